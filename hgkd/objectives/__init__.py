"""Objectives: what a student is trained for. One file an objective, pure functions plus thin modules."""

from hgkd.objectives.hgkd import HGKD
from hgkd.objectives.pixels import PixelReconstruction
from hgkd.objectives.pooled import PooledFeature

__all__ = ["HGKD", "PixelReconstruction", "PooledFeature"]
