"""ResNet-18 on CIFAR-10 at 128 pixels: small, an hour on two CPU cores. The baseline of the recipes that have a teacher.

AdamW 1e-3 for 64 images, one epoch of warm-up, cosine to 0, label smoothing 0.1, no mixing: this project's choice for short
trainings, the same whatever the network starts from.
"""

_base_ = ["./_base_/runtime.py", "../../configs/_base_/schedules/adamw_cosine.py", "./_base_/cifar128.py"]

backbone = None
model = dict(type="ClassifierTraining", classifier=dict(name="resnet18"), labels=dict(smoothing=0.1))
