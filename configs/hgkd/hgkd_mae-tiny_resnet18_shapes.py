"""H-GKD: ResNet-18 from the tiny MAE of mae_tiny_shapes, on generated shapes: everything from nothing, no download.

Mask ratio and clipping: SparK (arXiv 2301.03580). Smooth L1 with beta 2 on normalised tokens: G2SD (arXiv 2302.14771). The
teacher's last block: best by k-NN in a teacher of four. The rest is this project's, not tuned yet. The
target is centred, because the tokens of a briefly trained MAE hold little but their place: without it the loss falls to a tenth
within two epochs by learning the places alone.

teacher_checkpoint: the last checkpoint of mae_tiny_shapes.
"""

_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/schedules/adamw_cosine.py",
    "../_base_/students/resnet18.py",
    "../_base_/data/shapes.py",
]

teacher_checkpoint = None
epochs = 10
batch_size = 32
lr = 2e-3

model = dict(
    teacher=dict(type="MAETeacher"),
    objectives=dict(hgkd=dict(type="HGKD", target="full", block=3, supervise="all", beta=2.0, centre=True)),
)
