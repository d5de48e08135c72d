"""hgkd: distil a large Vision Transformer into a small convolutional backbone with masked images.

    import hgkd

    hgkd.train("hgkd/hgkd_vit-s14_resnet18_10e_cifar128", "work_dirs/mine", options={"data_root": "photos"})
    hgkd.export("work_dirs/mine", "exported/mine", to="timm")
    hgkd.evaluate(["knn", "linear"], "exported/mine", "DIR/train", "DIR/test")
    hgkd.predict("exported/mine", "photos", "predicted")

Importing this package stays light: torch only when a submodule or one of these functions is asked for, and never mmdet,
mmsegmentation or spconv.
"""

from typing import TYPE_CHECKING

__version__ = "0.2.0"

if TYPE_CHECKING:
    from hgkd.api.evaluate import evaluate
    from hgkd.api.predict import predict
    from hgkd.api.train import train

__all__ = ["__version__", "evaluate", "predict", "train"]


def __getattr__(name: str) -> object:
    if name == "export":  # a package that can be called
        from importlib import import_module

        return import_module("hgkd.export")
    if name == "train":
        from hgkd.api.train import train

        return train
    if name == "predict":
        from hgkd.api.predict import predict

        return predict
    if name == "evaluate":
        from hgkd.api.evaluate import evaluate

        return evaluate
    raise AttributeError(f"module 'hgkd' has no attribute {name!r}")
