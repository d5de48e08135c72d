"""A sparse ResNet-50 with a UNet decoder down to 16 pixels a place; 60 % of the 32-pixel cells are hidden (SparK's share)."""

mask_ratio = 0.6

model = dict(
    type="MaskedDistiller",
    student=dict(type="SparseUNet", encoder="resnet50", out_stride=16),
    mask=dict(type="RandomMask"),  # mask_ratio: the short option
)
