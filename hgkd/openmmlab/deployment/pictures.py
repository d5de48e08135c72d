"""Pictures as a run's own test pipeline gives them, and what mmdet or mmseg itself says about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.dataset import Compose
from torch import Tensor, nn
from torch.nn import functional

from hgkd.data.images import find_images
from hgkd.errors import DataError, InvalidValueError, check_counts
from hgkd.openmmlab.config import load_with_care

_READS = ("LoadImageFromFile", "LoadReadableImage")
_ANNOTATIONS = "LoadAnnotations"


def kind_of(step: Mapping[str, Any]) -> str:
    """Name of a pipeline's step without its scope."""
    return str(step.get("type")).rpartition(".")[2]


def _sides(value: Any) -> tuple[int, int] | None:
    """(H, W) of a step's size, which is one number or OpenMMLab's (W, H); None: it has none."""
    if isinstance(value, int):
        return value, value
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return None
    width, height = value
    return int(height), int(width)


@dataclass(frozen=True)
class TestPipeline:
    """A run's test pipeline without annotations.

    Attributes:
        steps: as config.
        scope: 'mmdet' or 'mmseg'.
    """

    __test__ = False  # to pytest it looks like a test

    steps: Sequence[Mapping[str, Any]]
    scope: str

    @classmethod
    def of(cls, cfg: Mapping[str, Any], scope: str) -> TestPipeline:
        """That of a run's config.

        Raises:
            ValueError: the config has none that reads files.
        """
        loader = cfg.get("test_dataloader") or cfg.get("val_dataloader") or {}
        dataset = loader.get("dataset") or {}
        while isinstance(dataset, Mapping) and "dataset" in dataset:
            dataset = dataset["dataset"]
        steps = [step for step in dataset.get("pipeline") or () if kind_of(step) != _ANNOTATIONS]
        if not steps or kind_of(steps[0]) not in _READS:
            raise InvalidValueError(
                "model-without-test-pipeline",
                "the run's config has no test pipeline that begins with LoadImageFromFile, so nobody knows how pictures reach "
                "this model; train with a test_dataloader (or val_dataloader)",
            )
        return cls(steps, scope)

    @property
    def described(self) -> list[dict[str, Any]]:
        """What a user has to do with a picture before the graph takes it: the steps between reading and packing."""
        return [
            {"type": kind_of(step), **{k: v for k, v in step.items() if k != "type"}}
            for step in self.steps[1:]
            if not kind_of(step).startswith("Pack")
        ]

    @property
    def size(self) -> tuple[int, int] | None:
        """(H, W) that pictures are brought to, or into; None: they stay as they are."""
        for kind, key in (("Pad", "size"), ("Resize", "scale")):
            for step in self.steps:
                if kind_of(step) == kind and (sides := _sides(step.get(key))) is not None:
                    return sides
        return None

    @property
    def unrepeated(self) -> list[str]:
        """Steps, in words, that :func:`hgkd.export.placing.place` does not repeat by what :meth:`resize` says."""
        steps = [step for step in self.steps[1:] if not kind_of(step).startswith("Pack")]
        found = [kind_of(step) for step in steps if kind_of(step) not in ("Resize", "Pad")]
        resizes, pads = ([step for step in steps if kind_of(step) == kind] for kind in ("Resize", "Pad"))
        # by a factor there is no size; a second step, or one after the filling, starts from what the first has made
        found += ["Resize by scale_factor" for step in resizes if _sides(step.get("scale")) is None]
        found += ["more than one Resize"] * (len(resizes) > 1) + ["more than one Pad"] * (len(pads) > 1)
        found += ["Pad before Resize"] * (resizes != steps[: len(resizes)] and not found)
        found += [
            f"Pad by padding_mode={mode}" for step in pads if (mode := step.get("padding_mode", "constant")) != "constant"
        ]
        if pads and (sides := _sides(pads[0].get("size"))) is not None:
            scale = _sides(resizes[0].get("scale")) if resizes else None
            turned = bool(resizes) and resizes[0].get("keep_ratio", False)  # then it fits into the scale lying and standing
            if scale is None or not (sides == scale or (turned and sides == scale[::-1])):
                found.append("Pad to another size than that of Resize")
        return found

    def resize(self, fixed: bool) -> str:
        """One of :data:`hgkd.weights.signature.RESIZES`; ``fixed``: for a graph of one size."""
        if self.unrepeated:
            return "other"
        resizes = [step for step in self.steps if kind_of(step) == "Resize"]
        if not all(step.get("keep_ratio", False) for step in resizes):
            return "stretch"
        pads = [step for step in self.steps if kind_of(step) == "Pad"]
        if fixed or any(step.get("size") for step in pads):
            return "pad"
        if any(step.get("pad_to_square") for step in pads):
            return "square"
        return "fit" if resizes else "keep"

    @property
    def divisor(self) -> int:
        """Sides are filled up to multiples of it before the graph."""
        return max((int(step.get("size_divisor") or 1) for step in self.steps if kind_of(step) == "Pad"), default=1)

    @property
    def fill(self) -> float | None:
        """The value, of 0 to 255, that ``Pad`` fills in; None: there is none, or one of several."""
        step = next((step for step in self.steps if kind_of(step) == "Pad"), {})
        value = step.get("pad_val", 0 if step else None)
        value = value.get("img") if isinstance(value, Mapping) else value
        values = set(value) if isinstance(value, (list, tuple)) else {value}
        return float(found) if len(values) == 1 and (found := values.pop()) is not None else None

    def read(self, files: Sequence[Path]) -> list[Tensor]:
        """Pictures, uint8 RGB (1, 3, H, W).

        Raises:
            DataError: one cannot be read.
        """
        steps = [dict(step) for step in self.steps]
        load_with_care(steps, {"required": True})
        pipeline = Compose(steps)
        return [self.rgb(pipeline({"img_path": str(file), "img_id": 0})["inputs"])[None] for file in files]

    @property
    def order(self) -> str:
        """Of the channels that the pipeline gives."""
        return str(self.steps[0].get("channel_order", "bgr")).upper()

    def rgb(self, picture: Tensor) -> Tensor:
        """(3, H, W) in the pipeline's order -> RGB; its own inverse."""
        return picture.flip(0) if self.order == "BGR" else picture


def find_pictures(folder: Path, limit: int) -> list[Path]:
    """Files below a folder, at most ``limit``, spread over the sorted list.

    Raises:
        DataError: there are none.
        ValueError: ``limit`` is below 1.
    """
    check_counts(max_images=limit)
    names = find_images(str(folder)) if folder.is_dir() else []
    if not names:
        raise DataError(
            "no-images-to-compare",
            f"{folder} holds no images to compare outputs on; give a folder of .jpg, .png or others, at any depth",
        )
    count = min(limit, len(names))
    return [folder / names[i * len(names) // count] for i in range(count)]


@torch.no_grad()
def own_prediction(model: nn.Module, pipeline: TestPipeline, picture: Tensor) -> tuple[Tensor, ...]:
    """What the library's own inference says about a picture, uint8 RGB (1, 3, H, W), in its pixels.

    Returns:
        boxes (N, 4), scores (N,), labels (N,) of a detector; the label map (1, H, W) and its logits (K, H, W) of a segmentor.
    """
    size = tuple(picture.shape[-2:])
    meta = {"img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0)}
    if pipeline.scope == "mmdet":
        from mmdet.structures import DetDataSample as Sample
    else:
        from mmseg.structures import SegDataSample as Sample
    data = {"inputs": [pipeline.rgb(picture[0])], "data_samples": [Sample(metainfo=meta)]}
    found = model.test_step(data)[0]  # type: ignore[operator]
    if pipeline.scope == "mmdet":
        boxes = found.pred_instances
        return boxes.bboxes, boxes.scores, boxes.labels
    return found.pred_sem_seg.data.to(torch.uint8), found.seg_logits.data


def fitted(picture: Tensor, size: tuple[int, int], fill: float) -> Tensor:
    """A picture (1, 3, H, W) cut to at most ``size``, then filled at the right and below."""
    picture = picture[..., : size[0], : size[1]]
    height, width = picture.shape[-2:]
    return functional.pad(picture, (0, size[1] - width, 0, size[0] - height), value=int(fill))


def at_other_sizes(pictures: Sequence[Tensor], step: int) -> list[Tensor]:
    """The first two pictures at another size each: three quarters high and turned; sides in multiples of ``step``."""
    cut = [
        picture[..., : _floor(picture.shape[-2] * 3 // 4, step), : _floor(picture.shape[-1], step)] for picture in pictures[:2]
    ]
    return [cut[0], *(picture.transpose(-1, -2) for picture in cut[1:])]


def _floor(side: int, step: int) -> int:
    return max(step, side // step * step)
