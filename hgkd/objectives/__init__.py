"""Objectives: what a student is trained for. One file an objective, pure functions plus thin modules."""

from hgkd.objectives.finetuning.base import FinetuningObjective
from hgkd.objectives.finetuning.feature_map_mgd import FeatureMapMGD
from hgkd.objectives.finetuning.hard_label_kd import HardLabelKD
from hgkd.objectives.finetuning.logit_kd import LogitKD
from hgkd.objectives.finetuning.nkd import NKD
from hgkd.objectives.generation import MGDLoss
from hgkd.objectives.loss_terms import LossTerm, MaskedObjective, Setup
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
    "LossTerm",
    "FinetuningObjective",
    "HardLabelKD",
    "FeatureMapMGD",
    "MGDLoss",
    "MaskedObjective",
    "PixelReconstruction",
    "PooledFeature",
    "Setup",
    "LogitKD",
]
