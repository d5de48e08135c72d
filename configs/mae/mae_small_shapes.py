"""A MAE on generated shapes that is larger than the students of the recipes for them, and trained for longer: their teacher.

As mae_tiny_shapes, with twice the depth and width and a decoder of four blocks, the depth at which G2SD takes its target
(arXiv 2302.14771); 60 epochs take half an hour of one slow core.
"""

_base_ = ["./mae_tiny_shapes.py"]

epochs = 60
warmup_epochs = 3
batch_size = 32
lr = 4e-3

model = dict(
    arch=dict(embed_dim=256, depth=8, num_heads=4, decoder_embed_dim=128, decoder_depth=4, decoder_num_heads=4),
)
