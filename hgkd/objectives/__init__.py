"""Objectives: what a student is trained for. One file an objective, pure functions plus thin modules."""

from hgkd.objectives.comparison import ComparingObjective, Comparison
from hgkd.objectives.dmae import DMAE
from hgkd.objectives.g2sd import G2SD
from hgkd.objectives.hgkd import HGKD
from hgkd.objectives.mgd import MGD, MGDLoss
from hgkd.objectives.pixels import PixelReconstruction
from hgkd.objectives.pooled import PooledFeature

__all__ = ["DMAE", "G2SD", "HGKD", "MGD", "ComparingObjective", "Comparison", "MGDLoss", "PixelReconstruction", "PooledFeature"]
