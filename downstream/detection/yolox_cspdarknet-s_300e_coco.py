"""YOLOX-s (arXiv 2107.08430), 300 epochs of COCO, 8 GPUs x 8 images, as mmdet has it.

Never run here. Images are RGB with ImageNet's numbers, as students of hgkd are trained; mmdet's own give BGR from 0 to 255.
backbone: an export of a student named mmdet.CSPDarknet, deepen_factor 0.33, widen_factor 0.5.
"""

_base_ = ["mmdet::yolox/yolox_s_8xb8-300e_coco.py", "../_base_/student.py"]
model = dict(data_preprocessor=_base_.pixels, backbone=dict(init_cfg=None))
