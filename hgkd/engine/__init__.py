"""Running a training: configs, runner, hooks, optimiser wrappers, safe weight loading."""

from hgkd.engine.checkpoints import CheckpointWriteError, RunCheckpointHook, find_last_checkpoint
from hgkd.engine.class_report import ClassReportHook
from hgkd.engine.config import SHORT_OPTIONS, apply_short_options, check_config, read_config, use_mixed_precision
from hgkd.engine.feature_cache import TeacherCacheHook
from hgkd.engine.hooks import (
    CollapseAlarmHook,
    DivergedError,
    FiniteLossHook,
    LossAlarmHook,
    MaskScheduleHook,
    MemoryHook,
    PictureHook,
    ThroughputHook,
    UnreadableFilesHook,
)
from hgkd.engine.loop import ExactEpochLoop
from hgkd.engine.optim import BFloat16OptimWrapper, DecayGroupsConstructor, LayerDecayConstructor
from hgkd.engine.runner import DistillRunner
from hgkd.engine.terms import TermShareHook
from hgkd.engine.validation_data import BankAndQuery

__all__ = [
    "SHORT_OPTIONS",
    "BFloat16OptimWrapper",
    "BankAndQuery",
    "CheckpointWriteError",
    "ClassReportHook",
    "CollapseAlarmHook",
    "DecayGroupsConstructor",
    "DistillRunner",
    "DivergedError",
    "ExactEpochLoop",
    "FiniteLossHook",
    "LayerDecayConstructor",
    "LossAlarmHook",
    "MaskScheduleHook",
    "MemoryHook",
    "PictureHook",
    "RunCheckpointHook",
    "TeacherCacheHook",
    "TermShareHook",
    "ThroughputHook",
    "UnreadableFilesHook",
    "apply_short_options",
    "check_config",
    "find_last_checkpoint",
    "read_config",
    "use_mixed_precision",
]
