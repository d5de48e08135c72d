"""Objectives: what a student is trained for. One file an objective, pure functions plus thin modules."""

from hgkd.objectives.comparison import ComparingObjective, Comparison
from hgkd.objectives.dmae import DMAE
from hgkd.objectives.g2sd import G2SD
from hgkd.objectives.hard_label import HardLabel
from hgkd.objectives.hgkd import HGKD
from hgkd.objectives.last_map import LastMapMGD
from hgkd.objectives.mgd import MGD, MGDLoss
from hgkd.objectives.nkd import NKD
from hgkd.objectives.pixels import PixelReconstruction
from hgkd.objectives.pooled import PooledFeature
from hgkd.objectives.soft_label import SoftLabel

__all__ = [
    "DMAE",
    "G2SD",
    "HGKD",
    "MGD",
    "NKD",
    "ComparingObjective",
    "Comparison",
    "HardLabel",
    "LastMapMGD",
    "MGDLoss",
    "PixelReconstruction",
    "PooledFeature",
    "SoftLabel",
]
