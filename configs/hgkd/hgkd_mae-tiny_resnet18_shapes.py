"""H-GKD: ResNet-18 from the tiny MAE of mae_tiny_shapes, on generated shapes: everything from nothing, no download.

Clipping at 5: SparK (arXiv 2301.03580); half of the cells are hidden, for there are only four. Smooth L1 with beta 2 on
normalised tokens: G2SD (arXiv 2302.14771). The teacher's last block (-1): best by k-NN in a teacher of four. The rest is this
project's. The target is centred, because the tokens of a briefly trained MAE hold much of their place. One epoch of 16
images a step with a short warm-up: as many steps as two epochs of 32, at half the cost.

teacher_checkpoint: the last checkpoint of mae_tiny_shapes.
"""

_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/schedules/adamw_cosine.py",
    "../_base_/students/resnet18.py",
    "../_base_/data/shapes.py",
]

teacher_checkpoint = None
epochs = 1
warmup_epochs = 0.1
lr = 4e-3
mask_ratio = 0.5

model = dict(
    student=dict(out_stride=8, decoder_width=128),
    teacher=dict(type="MAETeacher"),
    objectives=dict(
        hgkd=dict(type="HGKD", target="full", block=-1, supervise="all", beta=2.0, centre=True),
        pooled=dict(type="PooledFeature", block=-1),
    ),
)
