"""Input and result of an export target: job, written files, report."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from hgkd.errors import Refusal, StoppedError
from hgkd.mmcv_ops import register_ops
from hgkd.networks.backbones import Source
from hgkd.pixels import PixelNormalisation, channels_of, pixel_statistics
from hgkd.weights.signature import ImageInput, Output, Signature

EXTRAS = {
    "openvino": "edge",
    "nncf": "edge",
    "ncnn": "edge",
    "pnnx": "edge",
    "executorch": "executorch",
    "torchao": "executorch",
    "litert_torch": "litert",
    "ai_edge_litert": "litert",
    "ai_edge_quantizer": "litert",
    "coremltools": "coreml",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "mmdet": "downstream",
    "mmseg": "downstream",
}
# what the makers of a runtime say that it takes, of the version that was tried: module -> (version, lowest and highest)
_PYTHONS = {
    "executorch": ("executorch 1.5.1", (3, 10), (3, 14)),
    "litert_torch": ("litert-torch 0.10.0", (3, 10), (3, 14)),
    "coremltools": ("coremltools 9.0", (3, 10), (3, 13)),
}
_TORCHES = {"litert_torch": ("litert-torch 0.10.0", (2, 4), (2, 14))}
_DISTRIBUTIONS = {"mmdet": "mmdet", "mmseg": "mmsegmentation"}  # of the libraries over mmcv


class ExportError(StoppedError):
    """The export, read back, differs from its source; nothing was left on disk."""


class MissingLibraryError(Refusal, ValueError):
    """A target needs a library that is not installed."""


@dataclass(frozen=True)
class Job:
    """One export, as a target sees it.

    Attributes:
        source: the student, with its network.
        folder: where to write; it becomes ``out`` when the proof has passed.
        out: the folder that the user asked for, for messages.
        part: which part of the student.
        images: real images as ``input`` has them, of the size of the network, or None when none were given.
        labels: classes of ``images`` (N,), or None when they lie in no class folders.
        given: what graphs take, where the user chose it; see :attr:`input`.
    """

    source: Source
    folder: Path
    out: Path
    part: str
    images: Tensor | None = None
    labels: Tensor | None = None
    given: ImageInput | None = None

    @property
    def input(self) -> ImageInput:
        """What graphs take, as the user chose, or else float32 (B, C, H, W) in [0, 1]."""
        return self.given or input_of(self.network)

    @property
    def fixed_input(self) -> ImageInput:
        """:attr:`input` for one image of the network's own size alone."""
        height, width = self.image_size
        return replace(self.input, batch=1, height=height, width=width)

    def random_images(self, batch: int, height: int, width: int) -> Tensor:
        """Random images as :attr:`input` has them."""
        return self.input.prepare(torch.rand(batch, self.input.channels, height, width))

    @property
    def network(self) -> nn.Module:
        """The dense encoder, in eval mode."""
        return self.source.network

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) that timm says the network is used at."""
        _, height, width = cast(Any, self.network).pretrained_cfg["input_size"]
        return int(height), int(width)

    def normalise(self, images: Tensor) -> Tensor:
        """Pixels in [0, 1] -> what the network expects."""
        pixels = PixelNormalisation()
        pixels.set_pixels(*pixel_statistics(self.network))
        return pixels.normalise(images)

    def features(self, images: Tensor) -> Tensor:
        """Reference output for the proof: last feature map (B, C, h, w) of images in [0, 1], or logits of a classifier."""
        return self.run(self.network, self.normalise(images))

    def run(self, network: nn.Module, inputs: Tensor) -> Tensor:
        """Last feature map, or logits, of any network of timm's, from normalised images."""
        run = network if self.part == "classifier" else network.forward_features
        return cast(Callable[[Tensor], Tensor], run)(inputs)


@dataclass(frozen=True)
class Written:
    """Files of a target, and how they are read back.

    Attributes:
        load_with: the lines by which a user reads the result.
        proven_with: what read it back for the proof: a library and its version.
        reloaded: images in [0, 1] (B, 3, H, W) -> outputs of what was read back.
        expected: the same of the source; None: :meth:`Job.features`.
        tensors, parameters: how many were written; parameters are trainable values.
        notes: what a user should know.
        table: rows about the files, e.g. sizes and agreement of quantised graphs.
        tolerance: largest relative difference that the proof may find; None: the exporter's own.
        requires: the least versions of what reads the files, for the cards.
        input: what the graphs take, where it is less than :attr:`Job.input` (a fixed size, one image at a time).
        outputs: of the graphs, where they are called otherwise than what was asked for ('pooled', ...).
    """

    load_with: str
    proven_with: str
    reloaded: Callable[[Tensor], Tensor]
    tensors: int
    parameters: int
    expected: Callable[[Tensor], Tensor] | None = None
    notes: list[str] = field(default_factory=list)
    table: list[dict[str, Any]] = field(default_factory=list)
    tolerance: float | None = None
    requires: dict[str, str | int] = field(default_factory=dict)
    input: ImageInput | None = None
    outputs: tuple[Output, ...] = ()


@dataclass(frozen=True)
class ExportReport:
    """Result of an export, and its proof.

    Attributes:
        out: the folder.
        target: e.g. 'timm'.
        part: which part was written.
        network: what it is: the encoder's description (name, stem, kwargs), or the model's name.
        tensors: number of tensors written.
        parameters: number of trainable values among them.
        loaded_with: the lines that read the folder.
        proven_with: the library, with its version, that read it back for the proof.
        max_difference: largest difference of outputs between source and re-read network, relative to the largest source value.
        images: number of real images in the proof, besides random ones.
        source_sha256: digest of the checkpoint.
        files: name -> size in bytes.
        notes: what a user should know.
        table: rows about the files, e.g. agreement of quantised graphs.
        channels: of the images that the network takes.
        signature: what the graphs take and give; None: the target has no graphs.
    """

    out: Path
    target: str
    part: str
    network: dict[str, Any]
    tensors: int
    parameters: int
    loaded_with: str
    proven_with: str
    max_difference: float
    images: int
    source_sha256: str
    files: dict[str, int]
    notes: list[str] = field(default_factory=list)
    table: list[dict[str, Any]] = field(default_factory=list)
    channels: int = 3
    signature: Signature | None = None


@dataclass(frozen=True)
class Target:
    """A form in which students leave.

    Attributes:
        name: as users give it.
        summary: one line.
        write: ``write(job, **options) -> Written``; fills ``job.folder``. Its keyword-only arguments are the target's options.
        part: parts of a student that it can hold.
        hub_library: ``library_name`` of the Hugging Face hub for folders of this target; None: no such layout, no model card.
        runner: ``runner(file, threads=N)`` -> images as the file takes them -> outputs of a file of the table, on the CPU, by
            which it is timed; None: it cannot be.
        runtime: module that runs the files; '' where there is no runner.
        preprocessing: whether it holds what ``--with-preprocessing`` puts into a graph: integers in, any layout and order.
    """

    name: str
    summary: str
    write: Callable[..., Written]
    part: tuple[str, ...] = ("backbone",)
    hub_library: str | None = None
    runner: Callable[..., Callable[[Tensor], Tensor]] | None = None
    runtime: str = ""
    preprocessing: bool = False

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options that :attr:`write` takes."""
        return options_of(self.write)


def options_of(write: Callable[..., object]) -> tuple[str, ...]:
    """Names of the options of a writer: its keyword-only arguments."""
    return tuple(p.name for p in inspect.signature(write).parameters.values() if p.kind is p.KEYWORD_ONLY)


def input_of(network: nn.Module) -> ImageInput:
    """What graphs of a network take by default: float32 (B, C, H, W) in [0, 1], RGB or the training's channels."""
    channels, height, width = cast(Any, network).pretrained_cfg["input_size"]
    return ImageInput(channels=int(channels), order="RGB" if channels == 3 else "", size=(int(height), int(width)))


def use_at(network: nn.Module, size: tuple[int, int]) -> None:
    """Note (H, W) as the size that a network is used at; see :attr:`Job.image_size`."""
    cfg = cast(Any, network).pretrained_cfg
    cast(Any, network).pretrained_cfg = {**cfg, "input_size": (channels_of(network), *size)}


def need(target: str, *modules: str) -> list[ModuleType]:
    """Import what a target cannot do without.

    Raises:
        MissingLibraryError: one is not installed; the message names the extra of hgkd that installs it, and where this Python
            or torch is too old or too new for it, the versions that are not.
    """
    found = []
    for module in modules:
        try:
            found.append(importlib.import_module(module))
        except ImportError as error:
            top = module.partition(".")[0]
            name = f"'hgkd[{EXTRAS[top]}]'" if top in EXTRAS else top
            raise MissingLibraryError(
                "target-library-missing",
                f"--to {target} needs {top}, which does not import ({error}); pip install {name}{_where_it_runs(top)}",
            ) from error
    return found


def _where_it_runs(module: str) -> str:
    """Where this Python or torch cannot have a library, the versions that can; else nothing."""
    here = {"Python": sys.version_info[:2], "torch": tuple(int(part) for part in torch.__version__.split(".")[:2])}
    said = []
    for what, table in (("Python", _PYTHONS), ("torch", _TORCHES)):
        if module in table:
            library, low, high = table[module]
            if not low <= here[what] <= high:
                low_text, high_text, own = (".".join(map(str, version)) for version in (low, high, here[what]))
                said.append(f"{library} takes {what} {low_text} to {high_text}, and this is {own}")
    return f" in an environment of its own: {'; '.join(said)}" if said else ""


def optional(module: str) -> tuple[ModuleType | None, str]:
    """A library that is used for a proof where it is there: (module or None, 'name version' or why it is absent)."""
    top = module.partition(".")[0]
    try:
        if top in _DISTRIBUTIONS and find_spec(top):
            register_ops()  # they import mmcv's operators, compiled or not
        found = importlib.import_module(module)
    except Exception as error:
        # mmdet and mmseg raise what their compiled parts raise, not only ImportError
        reason = (
            "is not installed" if isinstance(error, ModuleNotFoundError) and error.name == top else f"does not import: {error}"
        )
        return None, f"{_DISTRIBUTIONS.get(top, top)} {reason}"
    return found, f"{_DISTRIBUTIONS.get(top, top)} {importlib.import_module(top).__version__}"


def load_all(module: nn.Module, state: Mapping[str, Tensor], library: str) -> nn.Module:
    """Load weights into a library's network, every key used and every entry filled; the network in eval mode.

    Raises:
        ExportError: a key is missing or left over, or a shape differs.
    """
    try:
        module.load_state_dict(dict(state), strict=True)
    except RuntimeError as error:
        raise ExportError("library-refuses-weights", f"{library} does not take the weights: {error}") from error
    return module.eval()


def count_parameters(network: nn.Module) -> int:
    """Trainable values of a network."""
    return sum(parameter.numel() for parameter in network.parameters())
