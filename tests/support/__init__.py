"""Helpers shared by the tests (pytest puts tests/ on the path)."""
