"""ResNet-50 as SparK fine-tunes it (arg.py of its released code): LAMB and BCE, 300 epochs, 8 GPUs x 512 images.

Never run here. Learning rate 2e-3 for 256 images, weight decay 0.02, 5 epochs of warm-up, mixup 0.1, stochastic depth 0.05;
LAMB without clipping, bias correction or exception for what does not decay, as there. The rest: _base_/spark.py. Published:
80.6 from SparK's own pretraining. ``backbone=``: a student's checkpoint or export, or SparK's file.
"""

_base_ = ["./_base_/spark.py"]

epochs = 300
warmup_epochs = 5
lr = 2e-3

model = dict(classifier=dict(name="resnet50", drop_path=0.05), labels=dict(loss="bce", mixup=0.1))
optim_wrapper = dict(
    optimizer=dict(
        _delete_=True,
        type="timm.optim.Lamb",
        weight_decay=0.02,
        max_grad_norm=1e7,
        always_adapt=True,
        bias_correction=False,
    ),
    paramwise_cfg=dict(layer_decay=0.7, blocks_per_layer=(3, 2, 3, 3)),
)
