"""Hook that saves pictures of what is learnt."""

from __future__ import annotations

from pathlib import Path

import torch
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.runner import Runner
from PIL import Image
from torch import Tensor

from hgkd.errors import InvalidValueError
from hgkd.pictures.columns import picture_grid
from hgkd.pictures.distillation import distillation_columns
from hgkd.registry import HOOKS
from hgkd.training.wrapping import plain_model
from hgkd.writing import written_whole


@HOOKS.register_module()
class VisualizationHook(Hook):
    """Saves ``work_dir/pictures/epoch_<n>.png``: a few training images and what student and teacher make of them.

    Columns: the image, what the student sees of it, and for every objective the teacher's tokens and the student's
    prediction as colours (same basis), or the reconstruction. Images, crops and masks are the same each time; with a mask
    ratio that changes, as many cells are hidden as at the beginning.

    Args:
        interval: epochs between two pictures; there is always one at the end.
        num_images: rows.
        seed: of the crops and masks.
    """

    priority = "LOW"

    def __init__(self, interval: int = 1, num_images: int = 4, seed: int = 0) -> None:
        if interval < 1 or num_images < 1:
            raise InvalidValueError(
                "count-not-positive", f"interval and num_images must be 1 or more, got {interval} and {num_images}"
            )
        self.interval = interval
        self.num_images = num_images
        self.seed = seed
        self._inputs: Tensor | None = None

    @master_only
    def before_train(self, runner: Runner) -> None:
        model = plain_model(runner)
        if not hasattr(model, "student"):
            raise InvalidValueError(
                "hook-without-student",
                f"VisualizationHook shows what a student learns, but a {type(model).__name__} has none; remove the hook",
            )
        dataset = runner.train_dataloader.dataset
        count = min(self.num_images, len(dataset))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self._inputs = torch.stack([dataset[i * len(dataset) // count]["inputs"] for i in range(count)])

    @master_only
    def after_train_epoch(self, runner: Runner) -> None:
        if self._inputs is None or not (self.every_n_epochs(runner, self.interval) or self.is_last_train_epoch(runner)):
            return
        picture = picture_grid(distillation_columns(plain_model(runner), self._inputs, self.seed))
        with written_whole(Path(runner.work_dir, "pictures", f"epoch_{runner.epoch + 1}.png")) as stream:
            Image.fromarray(picture).save(stream, format="PNG")
        runner.visualizer.add_image("pictures", picture, step=runner.epoch + 1)
