"""The interpreter's tests are collected only where Triton interprets: see test_interpreter.py."""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore = ["interpreter"]
