"""RTMDet-s on BCCD at 320 px: a teacher for mgd_rtmdet_cspnext-s_cspnext-tiny_24e_bccd.py."""

_base_ = "./rtmdet_cspnext-tiny_24e_bccd.py"
model = dict(
    backbone=dict(deepen_factor=0.33, widen_factor=0.5),
    neck=dict(in_channels=[128, 256, 512], out_channels=128),
    bbox_head=dict(in_channels=128, feat_channels=128),
)
