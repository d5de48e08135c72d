"""Runner, logging, checkpoints and hooks that all recipes share."""

default_scope = "hgkd"
runner_type = "DistillRunner"
randomness = dict(seed=0)
env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),  # without CUDA the runner takes gloo
)

default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=20),
    param_scheduler=dict(type="ParamSchedulerHook"),
    # the last two and, when there is a validation, the best; never the teacher, which is no part of the model's state
    checkpoint=dict(
        type="RunCheckpointHook", interval=1, every_minutes=30, max_keep_ckpts=2, save_best="knn/top1", rule="greater"
    ),
    sampler_seed=dict(type="DistSamplerSeedHook"),
)
custom_hooks = [
    dict(type="MaskScheduleHook"),
    dict(type="FiniteLossHook"),
    dict(type="LossAlarmHook"),
    dict(type="UnreadableFilesHook"),
    dict(type="ThroughputHook"),
    dict(type="MemoryHook"),
    dict(type="CollapseAlarmHook"),
    dict(type="VisualizationHook", interval=5),
]

log_processor = dict(type="LogProcessor", window_size=20, by_epoch=True, mean_pattern=r".*(loss|time|grad_norm|images_per_s).*")
# JSON lines in <work dir>/<time>/vis_data/scalars.json, and TensorBoard
visualizer = dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")])
