"""Running a training: runner, loop, hooks, optimiser wrappers."""

from hgkd.training.averaging import EMAHook, ExponentialMovingAverage
from hgkd.training.checkpoint_hook import CheckpointWriteError, RunCheckpointHook
from hgkd.training.hooks.alarms import CollapseAlarmHook, FiniteLossHook, LossAlarmHook
from hgkd.training.hooks.class_report import ClassReportHook
from hgkd.training.hooks.feature_cache import TeacherCacheHook
from hgkd.training.hooks.pictures import VisualizationHook
from hgkd.training.hooks.progress import MaskScheduleHook, MemoryHook, ThroughputHook, UnreadableFilesHook
from hgkd.training.hooks.terms import TermShareHook
from hgkd.training.loop import ExactEpochLoop
from hgkd.training.optim import BFloat16OptimWrapper, DecayGroupsConstructor, LayerDecayConstructor
from hgkd.training.runner import DistillRunner

__all__ = [
    "BFloat16OptimWrapper",
    "CheckpointWriteError",
    "ClassReportHook",
    "CollapseAlarmHook",
    "DecayGroupsConstructor",
    "DistillRunner",
    "EMAHook",
    "ExactEpochLoop",
    "ExponentialMovingAverage",
    "FiniteLossHook",
    "LayerDecayConstructor",
    "LossAlarmHook",
    "MaskScheduleHook",
    "MemoryHook",
    "RunCheckpointHook",
    "TeacherCacheHook",
    "TermShareHook",
    "ThroughputHook",
    "UnreadableFilesHook",
    "VisualizationHook",
]
