"""Drop-in use: a user's model, traced with torch.fx and rewritten to run on fastcnn's fused operators."""

from fastcnn.graph.optimizing import NotFusedError, optimize, restore
from fastcnn.graph.reporting import report
from fastcnn.graph.result import FusedSite, Report
from fastcnn.graph.rewriting import Left

__all__ = ["FusedSite", "Left", "NotFusedError", "Report", "optimize", "report", "restore"]
