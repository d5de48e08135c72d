"""RTMDet-Ins-tiny, instance segmentation (arXiv 2212.07784), 300 epochs of COCO, 8 GPUs x 32 images, as mmdet has it.

Never run here. Images are RGB with ImageNet's numbers, as students of hgkd are trained; mmdet's own give BGR. backbone: an
export of a student named mmdet.CSPNeXt as in configs/_base_/students/cspnext_tiny.py.
"""

_base_ = ["mmdet::rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py", "../_base_/student.py"]
model = dict(data_preprocessor=_base_.pixels, backbone=dict(init_cfg=None))
