"""Running a training: configs, runner, hooks, optimiser wrappers, safe weight loading."""

from hgkd.engine.config import SHORT_OPTIONS, apply_short_options, check_config, use_mixed_precision
from hgkd.engine.feature_cache import TeacherCacheHook
from hgkd.engine.hooks import (
    CollapseAlarmHook,
    DivergedError,
    EpochSeedHook,
    FiniteLossHook,
    MaskScheduleHook,
    MemoryHook,
    PictureHook,
    ThroughputHook,
)
from hgkd.engine.optim import BFloat16OptimWrapper, DecayGroupsConstructor
from hgkd.engine.runner import DistillRunner, find_last_checkpoint
from hgkd.engine.terms import TermShareHook
from hgkd.engine.validation_data import BankAndQuery

__all__ = [
    "SHORT_OPTIONS",
    "BFloat16OptimWrapper",
    "BankAndQuery",
    "CollapseAlarmHook",
    "DecayGroupsConstructor",
    "DistillRunner",
    "DivergedError",
    "EpochSeedHook",
    "FiniteLossHook",
    "MaskScheduleHook",
    "MemoryHook",
    "PictureHook",
    "TeacherCacheHook",
    "TermShareHook",
    "ThroughputHook",
    "apply_short_options",
    "check_config",
    "find_last_checkpoint",
    "use_mixed_precision",
]
