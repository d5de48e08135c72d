"""What a distillation of detectors or segmentors adds to the student's own config, which stays as published.

``teacher_checkpoint=FILE`` is required. ``backbone=FILE``, the student's start, is required of detectors, which freeze their
stem and their norms' statistics; published was torchvision's ResNet-50. Segmentors are ResNetV1c, with three convolutions in
the stem, and started from OpenMMLab's resnet18_v1c; an export of a ResNet fits with model.student.backbone.type=ResNet.
"""

custom_imports = dict(imports=["hgkd.openmmlab"], allow_failed_imports=False)
runner_type = "hgkd.DownstreamRunner"
backbone = None
randomness = dict(seed=0)
find_unused_parameters = True

_one_stage = dict(mask="position", ratio=0.65, alpha=2e-5)
_two_stage = dict(mask="position", ratio=0.45, alpha=5e-7)
mgd_fpn = [dict(student="neck", loss=_one_stage)]  # every level of the FPN
mgd_fpn_two_stage = [dict(student="neck", levels=(0, 1, 2, 3), loss=_two_stage)]  # without the pooled one
# the convolution alone, before a normalisation that the FPN may have
mgd_fpn_convolutions = [dict(student=f"neck.fpn_convs.{level}.conv", loss=_one_stage) for level in range(5)]
mgd_last_map = [dict(student="backbone", levels=(-1,), loss=dict(mask="position", ratio=0.75, alpha=2e-5))]
