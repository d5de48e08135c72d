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
# ConvNeXt, arXiv 2201.03545, appendix A.3: drop path 0.4, a norm on each output
convnext_tiny = dict(_delete_=True, type="hgkd.TimmBackbone", name="convnext_tiny", drop_path_rate=0.4, out_norm=True)
widths = dict(resnet18=[64, 128, 256, 512], resnet50=[256, 512, 1024, 2048], convnext_tiny=[96, 192, 384, 768])
# the same appendix: AdamW, layer-wise decay of the learning rate
layer_decay = dict(
    _delete_=True,
    type="OptimWrapper",
    constructor="hgkd.LayerDecayConstructor",
    paramwise_cfg=dict(layer_decay=0.95),
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
)
