"""An exported detector or segmentor in the place of the model that it was made from, so that its own evaluator measures it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hgkd.errors import InvalidValueError
from hgkd.openmmlab.deployment.pictures import TestPipeline, fitted
from hgkd.openmmlab.deployment.writers import RUNNERS, model_runner
from hgkd.weights.export_folder import read_card, read_graph


def is_exported_model(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a folder with the graph of a whole model."""
    card = read_card(Path(path).expanduser())
    return card.get("part") == "model" and card.get("target") in RUNNERS


class ExportedModel(nn.Module):
    """A graph with the one method that mmengine's test loop calls.

    Args:
        folder: of an export; its files are checked by their hashes.
        cfg: of the test, whose pipeline and classes the graph must fit.

    Raises:
        FileNotFoundError, WeightsError: see :func:`hgkd.weights.export_folder.read_graph`.
        ValueError: it is another library's, or knows other classes.
    """

    def __init__(self, folder: str | os.PathLike[str], cfg: Mapping[str, Any], classes: Sequence[str]) -> None:
        super().__init__()
        graph = read_graph(folder)
        scope, library = cfg.get("default_scope"), graph.signature.options["library"]
        known = graph.signature.classes
        if library != scope or (known and tuple(known) != tuple(classes)):
            raise InvalidValueError(
                "exported-model-of-another-task",
                f"{graph.path} is of {library} and knows {', '.join(known) or 'unnamed classes'}; the config is of {scope} and "
                f"its data has {', '.join(classes)}; give the config that trained it",
            )
        self.image = graph.signature.input
        self.detects = graph.signature.task == "detection"
        self.pipeline = TestPipeline.of(cfg, str(scope))
        self.run = model_runner(graph.target, graph.file(), torch.get_num_threads())

    def test_step(self, data: Mapping[str, Any]) -> list[Any]:
        """Pictures and samples of a test pipeline -> the samples, with predictions in pixels of the original pictures."""
        pairs = zip(data["inputs"], data["data_samples"], strict=True)
        return [self._predict(self.pipeline.rgb(picture)[None], sample) for picture, sample in pairs]

    def _predict(self, picture: Tensor, sample: Any) -> Any:
        height, width = picture.shape[-2:]
        if self.image.height is not None and self.image.width is not None:
            size = (self.image.height, self.image.width)
            if height > size[0] or width > size[1]:
                self.image.check_size(height, width)
            picture = fitted(picture, size, 255 * self.image.pad)
        found = self.run(picture)
        if self.detects:
            from mmengine.structures import InstanceData

            boxes, scores, labels = (value[0] for value in found)
            boxes = boxes / boxes.new_tensor(sample.metainfo["scale_factor"]).repeat(2)
            sample.pred_instances = InstanceData(bboxes=boxes, scores=scores, labels=labels)
        else:
            from mmengine.structures import PixelData

            labels = found[0][:, :height, :width]
            labels = functional.interpolate(labels[None], tuple(sample.metainfo["ori_shape"]), mode="nearest-exact")[0]
            sample.set_data({"pred_sem_seg": PixelData(data=labels.long())})
        return sample
