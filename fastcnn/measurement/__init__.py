"""Timing against peers, with the conditions it was done under."""

from fastcnn.measurement.comparison import Comparison, compare
from fastcnn.measurement.conditions import Conditions, conditions
from fastcnn.measurement.flops import conv_flops, count_flops
from fastcnn.measurement.timing import Timing, interleave

__all__ = ["Comparison", "Conditions", "Timing", "compare", "conditions", "conv_flops", "count_flops", "interleave"]
