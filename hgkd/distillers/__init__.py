"""Distillers: mmengine models that wire student, teacher, mask and objectives."""

from hgkd.distillers.classifier import ClassifierTraining
from hgkd.distillers.mae import MAEPretraining
from hgkd.distillers.masked import MaskedDistiller

__all__ = ["ClassifierTraining", "MAEPretraining", "MaskedDistiller"]
