"""Doing training steps again that went wrong, from what :class:`hgkd.training.hooks.alarms.FiniteLossHook` left behind.

A step is a function of weights, images, (seed, epoch, image, copy) and (seed, process, step), all of which the dump holds. Its
config is held to plain data and its weights are read safely, so a dump from elsewhere runs no code of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.utils import import_modules_from_strings
from torch.utils.data import default_collate

from hgkd.config.reading import check_plain_data
from hgkd.data.sampler import SeededIndex, epoch_seed
from hgkd.errors import InvalidValueError
from hgkd.networks.vit import is_finite, watch_nonfinite
from hgkd.registry import DATASETS, MODELS
from hgkd.training.loop import seed_step
from hgkd.weights.files import trained_weights
from hgkd.weights.loading import load_strict
from hgkd.weights.run_folder import read_run_checkpoint


@dataclass(frozen=True)
class ReplayedStep:
    """Result of a step that was done again.

    Attributes:
        step: its number, from 0.
        losses: name -> value now.
        recorded: name -> value in the run.
        first_module: name of the first module whose output was not finite, None when all were.
        parameters: names of the parameters whose gradient is not finite.
    """

    step: int
    losses: dict[str, float]
    recorded: dict[str, float]
    first_module: str | None
    parameters: tuple[str, ...]

    @property
    def finite(self) -> bool:
        """Nothing went wrong this time."""
        return not self.parameters and all(map(math.isfinite, self.losses.values()))

    @property
    def same(self) -> bool:
        """Every loss is what it was in the run, to the last bit on the same machine."""
        return all(
            value == self.recorded.get(name) or (math.isnan(value) and math.isnan(self.recorded.get(name, 0.0)))
            for name, value in self.losses.items()
        )


def replay(dump: str | Path, device: str | torch.device = "cpu", trusted: bool = False) -> list[ReplayedStep]:
    """Do the steps of a dump again, each from the dump's weights, since none of them changed these.

    Args:
        dump: ``nonfinite_step_<n>_rank_<r>.json``; the checkpoint that it names lies next to it.
        trusted: the dump's config may import code of yours (``custom_imports``, types that are import paths).

    Raises:
        FileNotFoundError: the dump, its checkpoint, the images or the teacher's weights are not there.
        ValueError: it is no such dump, or asks for code without being trusted.
    """
    dump = Path(dump)
    try:
        content = json.loads(dump.read_text(encoding="utf-8"))
        cfg, steps, seed, rank = Config(content["config"]), content["steps"], int(content["seed"]), int(content["rank"])
        weights = dump.parent / Path(content["checkpoint"]).name
        last_step = max(int(content["max_iters"]) - 1, 1)
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InvalidValueError(
            "dump-not-readable",
            f"{dump} is no dump of a run ({type(error).__name__}: {error}); give a nonfinite_step_<n>_rank_<r>.json",
        ) from error
    if not trusted:
        check_plain_data(content["config"], str(dump))
    elif cfg.get("custom_imports"):
        import_modules_from_strings(**cfg.custom_imports)
    checkpoint = read_run_checkpoint(weights)
    state = trained_weights(checkpoint) or checkpoint["state_dict"]  # a step is one of the weights, not of their average
    dataset = DATASETS.build({"_scope_": "hgkd", **cfg.train_dataloader.dataset})
    model = MODELS.build({"_scope_": "hgkd", **cfg.model}).to(device)
    found = []
    for entry in steps:
        load_strict(model, state, source=str(weights), finite=False)  # it may be what is looked for
        mask = getattr(model, "mask", None)
        if mask is not None:
            mask.progress = entry["step"] / last_step
        copies = entry.get("copies") or [0] * len(entry["images"])
        shown = zip(entry["images"], copies, strict=True)
        batch = default_collate([dataset[SeededIndex(i, epoch_seed(seed, entry["epoch"], copy))] for i, copy in shown])
        seed_step(seed, rank, entry["step"])
        found.append(_replay_step(model, batch, entry))
    return found


def _replay_step(model: BaseModel, batch: Mapping[str, Any], entry: Mapping[str, Any]) -> ReplayedStep:
    model.train()
    model.zero_grad(set_to_none=True)
    with watch_nonfinite(model) as seen:
        data = model.data_preprocessor(batch, True)
        losses = model(**data, mode="loss")
    total, values = model.parse_losses(losses)
    total.backward()
    broken = tuple(n for n, p in model.named_parameters() if p.grad is not None and not is_finite(p.grad))
    return ReplayedStep(
        step=entry["step"],
        losses={name: float(value.detach()) for name, value in values.items()},
        recorded=dict(entry["losses"]),
        first_module=seen[0][0] if seen else None,
        parameters=broken,
    )
