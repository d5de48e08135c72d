"""What every downstream recipe adds to a config of mmdet or mmseg: the backbone's file, norms over all processes, checkpoints.

Recipes take the backbones below as ``_base_.resnet18`` and so on. Nothing is frozen and no norm keeps its statistics: a student
was trained on other images, unlike the ImageNet backbones whose first stage mmdet freezes.
"""

custom_imports = dict(imports=["hgkd.openmmlab"], allow_failed_imports=False)
runner_type = "hgkd.DownstreamRunner"
backbone = None  # FILE or exported folder; --cfg-options backbone=...
sync_bn = "torch"  # batch normalisation over the images of all processes (SparK's and MoCo's downstream settings)
randomness = dict(seed=0)

_trained = dict(frozen_stages=-1, norm_eval=False, init_cfg=None)
resnet18 = dict(depth=18, **_trained)
resnet50 = dict(depth=50, **_trained)
# how students of hgkd take images; RTMDet's own configs give BGR, YOLOX's BGR from 0 to 255
pixels = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True)
# ConvNeXt, arXiv 2201.03545, appendix A.3: drop path 0.4, a norm on each output
convnext_tiny = dict(_delete_=True, type="hgkd.TimmBackbone", name="convnext_tiny", drop_path_rate=0.4, out_norm=True)
widths = dict(resnet18=[64, 128, 256, 512], resnet50=[256, 512, 1024, 2048], convnext_tiny=[96, 192, 384, 768])
# The same appendix: AdamW, learning rates that fall from head to stem. Detection: 0.95, three blocks a layer, as released.
_adamw = dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05)
_layers = dict(_delete_=True, type="OptimWrapper", constructor="hgkd.LayerDecayConstructor", optimizer=_adamw)
layer_decay = dict(paramwise_cfg=dict(layer_decay=0.95, blocks_per_layer=(3, 3, 3, 3)), **_layers)
# Segmentation: 0.9, one layer a stage (of 9 blocks or fewer), rates that fall linearly to 0 after a warm-up. The release counts
# 8 layers for these 6, so its backbone learns at 0.81 of the rates here, and it counts all downsampling with the stem.
stage_decay = dict(paramwise_cfg=dict(layer_decay=0.9, blocks_per_layer=(9, 9, 9, 9)), **_layers)
_warm_up = dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500)
_linear = dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=1500)
linear_80k = [_warm_up, dict(end=80000, **_linear)]
linear_160k = [_warm_up, dict(end=160000, **_linear)]
