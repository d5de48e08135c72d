"""G2SD's generic distillation on generated shapes: the ViT of dmae_mae-small_vit-mini_shapes from the MAE of mae_small_shapes.

Teacher's decoder block index 3, all positions: the released run (arXiv 2302.14771). The student's decoder: two blocks, as the
ratio of the released small student's to its teacher's.
"""

_base_ = ["../dmae/dmae_mae-small_vit-mini_shapes.py"]

model = dict(
    student=dict(arch=dict(decoder_depth=2)),
    objectives=dict(_delete_=True, g2sd=dict(type="G2SD", decoder_block=3, supervise="all")),
)
