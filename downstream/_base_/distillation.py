"""What a distillation of detectors or segmentors adds to the student's own config, which stays as published.

``teacher_checkpoint=FILE`` is required; ``backbone=FILE`` is the student's start, in the published runs torchvision's weights.
"""

custom_imports = dict(imports=["hgkd.openmmlab"], allow_failed_imports=False)
runner_type = "hgkd.DownstreamRunner"
backbone = None
randomness = dict(seed=0)
find_unused_parameters = True

_one_stage = dict(mask="place", ratio=0.65, alpha=2e-5)
_two_stage = dict(mask="place", ratio=0.45, alpha=5e-7)
mgd_fpn = [dict(student="neck", loss=_one_stage)]  # every level of the FPN
mgd_fpn_two_stage = [dict(student="neck", levels=(0, 1, 2, 3), loss=_two_stage)]  # without the pooled one
mgd_last_map = [dict(student="backbone", levels=(-1,), loss=dict(mask="place", ratio=0.75, alpha=2e-5))]
