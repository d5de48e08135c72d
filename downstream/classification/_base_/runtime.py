"""Runner, log, checkpoints and hooks of all fine-tuning: the project's own, with the best checkpoint by top-1."""

_base_ = ["../../../configs/_base_/default_runtime.py"]

default_hooks = dict(checkpoint=dict(save_best="accuracy/top1"))
custom_hooks = [
    dict(type="ClassReportHook"),
    dict(type="FiniteLossHook"),
    dict(type="LossAlarmHook"),
    dict(type="UnreadableFilesHook"),
    dict(type="ThroughputHook"),
    dict(type="MemoryHook"),
]
