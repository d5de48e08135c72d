"""Objectives: what a student is trained for. One file an objective, pure functions plus thin modules."""

from hgkd.objectives.comparison import Comparison, MaskedObjective, Setup
from hgkd.objectives.finetuning.base import FinetuningObjective
from hgkd.objectives.finetuning.hard_label import HardLabel
from hgkd.objectives.finetuning.last_map import LastMapMGD
from hgkd.objectives.finetuning.nkd import NKD
from hgkd.objectives.finetuning.soft_label import SoftLabel
from hgkd.objectives.generation import MGDLoss
from hgkd.objectives.masked.dmae import DMAE
from hgkd.objectives.masked.g2sd import G2SD
from hgkd.objectives.masked.hgkd import HGKD
from hgkd.objectives.masked.mgd import MGD
from hgkd.objectives.masked.pixels import PixelReconstruction
from hgkd.objectives.masked.pooled import PooledFeature

__all__ = [
    "DMAE",
    "G2SD",
    "HGKD",
    "MGD",
    "NKD",
    "Comparison",
    "FinetuningObjective",
    "HardLabel",
    "LastMapMGD",
    "MGDLoss",
    "MaskedObjective",
    "PixelReconstruction",
    "PooledFeature",
    "Setup",
    "SoftLabel",
]
