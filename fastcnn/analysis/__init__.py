"""What a network is made of: output volumes, parameters, multiply-accumulates, memory and receptive fields."""

from fastcnn.analysis.result import Layer, ReceptiveField, Summary
from fastcnn.analysis.summarising import summary

__all__ = ["Layer", "ReceptiveField", "Summary", "summary"]
