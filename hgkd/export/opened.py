"""Exported folders run as they are: the file, its runtime, and what its own record says of images and outputs.

Nothing of the training run is read. Weights for timm and torchvision, which have no graph, become the library's own network and
get the record that a graph of them would have.
"""

from __future__ import annotations

import json
import os
import runpy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import timm
from safetensors.torch import load_file
from torch import Tensor, nn

from hgkd.errors import InvalidValueError, WeightsError, check_counts, unknown_name_message
from hgkd.export.job import ExportError, input_of, load_all
from hgkd.export.targets import TARGETS
from hgkd.export.targets.graphs import with_threads
from hgkd.export.targets.torchvision import BUILD_FILE, recipe_of
from hgkd.networks.backbones import build_backbone, load_backbone
from hgkd.pixels import pixel_statistics
from hgkd.weights.export_folder import (
    CARD_FILE,
    READABLE,
    WEIGHTS_FILE,
    check_files,
    check_folder,
    read_card,
    read_config,
    read_graph,
)
from hgkd.weights.run_file import FORMAT, EncoderSpec
from hgkd.weights.signature import Output, Signature

Run = Callable[[Tensor], Any]
_ALSO_READ_BY = {"onnx": ("openvino",)}  # OpenVINO reads ONNX as it is


@dataclass(frozen=True)
class OpenedExport:
    """An exported folder, ready for images.

    Attributes:
        path: the folder.
        target: what it was exported to.
        runtime: the target whose runtime runs it.
        part: e.g. 'classifier'.
        precision: 'fp32', 'fp16' or 'int8'.
        signature: what it takes and gives.
        run: of the runtime, on what :meth:`hgkd.weights.signature.ImageInput.prepare` gives.
    """

    path: Path
    target: str
    runtime: str
    part: str
    precision: str
    signature: Signature
    run: Run

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Images in [0, 1], float (1, C, H, W), RGB -> what each output holds ('logits', 'boxes', ...) and its values.

        Raises:
            ValueError: a size that the file does not take.
            ExportError: other outputs than the record says, or none that are finite.
        """
        expected = self.signature.input
        expected.check_size(*images.shape[-2:])
        batch = expected.batch or 1
        found = _listed(self.run(expected.prepare(images).repeat(batch, 1, 1, 1)), self.signature.outputs)
        if len(found) != len(self.signature.outputs):
            names = ", ".join(output.name for output in self.signature.outputs)
            raise ExportError(
                "export-outputs-unexpected", f"{self.runtime} gives {len(found)} outputs of {self.path}, its record has {names}"
            )
        outputs = dict(zip((output.holds for output in self.signature.outputs), found, strict=True))
        for holds, value in outputs.items():
            if value.is_floating_point() and not value.isfinite().all():
                raise ExportError("graph-not-finite", f"{self.path} gives {holds} that are NaN or infinite; use its fp32 file")
        return {holds: value[:1] if batch > 1 else value for holds, value in outputs.items()}


def open_export(
    path: str | os.PathLike[str], *, runtime: str | None = None, threads: int = 1, precision: str = "fp32"
) -> OpenedExport:
    """Open a folder of ``hgkd export``; its files are compared with their SHA-256 first.

    Args:
        runtime: target whose runtime is used; None: the folder's own. An ONNX file is also read by 'openvino'.
        threads: CPU threads.
        precision: of the files of a graph.

    Raises:
        FileNotFoundError: no such folder, or a file of it is missing.
        WeightsError: a file was changed, or the folder is of a kind that is not run here.
        ValueError: a runtime that does not read it.
        MissingLibraryError: the runtime is not installed.
    """
    path = Path(path).expanduser()
    check_counts(threads=threads)
    check_folder(path)
    card = read_card(path)
    target, part = card.get("target", "timm"), card.get("part", "backbone")  # a folder of timm's own has no card
    read = TARGETS[target].runner if target in TARGETS else None
    by_weights = _WEIGHTS.get(target) if read is None else None
    known = (target, *_ALSO_READ_BY.get(target, ()))
    if read is None and by_weights is None:
        ways = ", ".join([name for name, other in TARGETS.items() if other.runner is not None] + list(_WEIGHTS))
        raise WeightsError(
            "export-not-run", f"{path} is an export to {target}, which is not run here; export the checkpoint to one of {ways}"
        )
    if runtime is not None and runtime not in known:
        raise InvalidValueError(
            "runtime-not-of-export", f"{unknown_name_message(f'runtime for an export to {target}', runtime, known)}"
        )
    if by_weights is not None:
        if precision != "fp32":
            raise InvalidValueError("precision-of-weights", f"{path} holds weights in fp32, not in {precision}; leave it out")
        check_files(path)
        signature, run = by_weights(path, part, threads)
        return OpenedExport(path, target, target, part, precision, signature, run)
    runtime = runtime or target
    graph = read_graph(path)
    runner = cast(Callable[..., Run], TARGETS[runtime].runner)
    return OpenedExport(path, target, runtime, part, precision, graph.signature, runner(graph.file(precision), threads=threads))


def _listed(found: Any, outputs: Sequence[Output]) -> list[Tensor]:
    """What a runner gives, in the order of the record."""
    if isinstance(found, Tensor):
        return [found]
    if isinstance(found, Mapping):
        return [found[output.name] for output in outputs]
    return list(found)


def _weights_of(path: Path, part: str, threads: int) -> tuple[Signature, Run]:
    """A folder that hgkd reads back, or one of timm's own layout: timm's network where timm builds it."""
    if part not in ("backbone", "classifier"):
        raise WeightsError("export-not-run", f"{path} holds a {part}, which gives no prediction; export the backbone")
    config = read_config(path)
    network: nn.Module
    if str(config.get("architecture")) in timm.list_models():
        network = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    else:
        network = load_backbone(path)
    classes = tuple(map(str, config.get("label_names") or ()))
    whole = part == "classifier" or bool(config.get("num_classes"))
    return _described(network, None if whole else "pooled", classes), with_threads(_Pooled(network, whole), threads)


def _torchvision(path: Path, part: str, threads: int) -> tuple[Signature, Run]:
    """torchvision's network, by the recipe in the folder, which must be the one that hgkd writes: no other code is run."""
    card = json.loads((path / CARD_FILE).read_text(encoding="utf-8"))
    spec = EncoderSpec.parse({"format": FORMAT, "encoder": card["network"]}, str(path / CARD_FILE))
    source = build_backbone(spec)
    if (path / BUILD_FILE).read_text(encoding="utf-8") != recipe_of(source, spec):
        raise WeightsError(
            "export-recipe-unknown", f"{path / BUILD_FILE} is not what hgkd writes for {spec.name}; export the checkpoint again"
        )
    network = load_all(runpy.run_path(str(path / BUILD_FILE))["model"], load_file(path / WEIGHTS_FILE), "torchvision")
    return _described(source, "pooled", ()), with_threads(network, threads)


_WEIGHTS: dict[str, Callable[[Path, str, int], tuple[Signature, Run]]] = {
    **dict.fromkeys(READABLE, _weights_of),
    "torchvision": _torchvision,
}


class _Pooled(nn.Module):
    """A network's own logits, or the mean of its features over places."""

    def __init__(self, network: nn.Module, whole: bool) -> None:
        super().__init__()
        self.network, self.whole = network, whole

    def forward(self, images: Tensor) -> Tensor:
        made: Tensor = self.network(images) if self.whole else cast(Any, self.network).forward_features(images)
        return made if self.whole else made.mean((2, 3))


def _described(network: nn.Module, features: str | None, classes: tuple[str, ...]) -> Signature:
    """The record of a network of timm's or hgkd's; ``features`` None: it gives logits."""
    mean, std = pixel_statistics(network)
    holds = features or "logits"
    return Signature(
        files={},
        input=replace(input_of(network), mean=mean, std=std),
        outputs=(Output(holds, holds),),
        task="features" if features else "classification",
        classes=classes,
    )
