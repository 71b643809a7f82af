"""The models: `VGGT` and `VGGT_MV`, the aggregator they share, and named configurations."""

from vggt_mv.models.aggregator import Aggregator
from vggt_mv.models.vggt import VGGT, VGGT_MV

__all__ = ["VGGT", "VGGT_MV", "Aggregator"]
