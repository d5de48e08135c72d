"""RTMDet's smallest backbone as a sparse student, decoder and mask as in resnet18.py. Needs hgkd[downstream].

The settings are those of mmdet's rtmdet_tiny, so that an export is the stock detector's backbone: depth, width, and norms with
torch's eps and momentum, not those of CSPNeXt's own default.
"""

mask_ratio = 0.6

model = dict(
    type="MaskedDistiller",
    student=dict(
        type="SparseUNet",
        encoder="mmdet.CSPNeXt",
        encoder_kwargs=dict(
            deepen_factor=0.167, widen_factor=0.375, norm_cfg=dict(type="BN"), act_cfg=dict(type="SiLU", inplace=True)
        ),
        out_stride=16,
    ),
    mask=dict(type="RandomMask"),  # mask_ratio: the short option
)
