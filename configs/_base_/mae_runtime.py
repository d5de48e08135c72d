"""As default_runtime, without the hooks that look at a student: MAE trains a teacher."""

_base_ = ["./default_runtime.py"]

custom_hooks = [
    dict(type="FiniteLossHook"),
    dict(type="LossAlarmHook"),
    dict(type="UnreadableFilesHook"),
    dict(type="ThroughputHook"),
    dict(type="MemoryHook"),
    dict(type="CollapseAlarmHook"),
]
