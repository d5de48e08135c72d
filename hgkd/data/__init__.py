"""Data: images in files, shards and tables (their data sets are in ``hgkd.registry.DATASETS``), and generated shapes."""

from hgkd.data.bank_and_query import BankAndQuery
from hgkd.data.images import LabelledImages, UnlabelledImages
from hgkd.data.sampler import EpochSampler, SeededIndex
from hgkd.data.shapes import CLASSES, Scene, render_scene, write_ade20k, write_coco, write_imagefolder
from hgkd.data.transforms import as_size, build_transform, eval_transform, train_transform

__all__ = [
    "CLASSES",
    "BankAndQuery",
    "EpochSampler",
    "LabelledImages",
    "Scene",
    "SeededIndex",
    "UnlabelledImages",
    "as_size",
    "build_transform",
    "eval_transform",
    "render_scene",
    "train_transform",
    "write_ade20k",
    "write_coco",
    "write_imagefolder",
]
