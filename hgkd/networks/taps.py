"""Features of any network by taps: what makes a network of another library, or a user's own module, an encoder.

A tap is the name of a submodule whose output is a level. They are declared (an argument, or an attribute ``taps`` of the
network) or found by one dry run; a network that returns several maps, as the backbones of mmdet and mmseg do, needs none. The
network keeps its class's behaviour and the names of its weights: the class of the object is swapped for one that adds
``forward_intermediates`` and ``forward_features``, timm's protocol (huggingface/pytorch-image-models), and nothing else.

Taps are read by forward hooks that live for one call, which ends at the last tap: classifiers behind it are not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from hgkd.errors import InvalidValueError, abbreviate, code_of, nearest_names
from hgkd.pixels import IMAGENET_MEAN, IMAGENET_STD

DRY_SHAPE = (128, 192)  # not square: a pooled map of one place then has two strides, and is no level
_INPUT_SIZE = (3, 224, 224)


class Tapped:
    """What :func:`tap` adds to the root of a network.

    Attributes:
        taps: names of the submodules that give the levels, finest first; empty: the maps that the network returns.
        pretrained_cfg: input size and pixel statistics (RGB) under timm's keys, 224 px and ImageNet's unless the network says
            others; and ``num_features``, the channels of the last level.
    """

    taps: tuple[str, ...]
    pretrained_cfg: dict[str, Any]

    def train(self, mode: bool = True) -> Any:
        """The network's own ``train``; returns the network, which mmdet's and mmseg's backbones do not."""
        super().train(mode)  # type: ignore[misc]
        return self

    def forward_intermediates(
        self, images: Tensor, indices: Sequence[int] | None = None, stop_early: bool = True, intermediates_only: bool = True
    ) -> list[Tensor]:
        """The levels (B, C, h, w), all or those of the given indices, finest first; arguments are timm's."""
        network = cast(nn.Module, self)
        maps = read_taps(network, images, self.taps) if self.taps else maps_of(network(images))
        return maps if indices is None else [maps[index] for index in indices]

    def forward_features(self, images: Tensor) -> Tensor:
        """The last level (B, C, h, w)."""
        return self.forward_intermediates(images)[-1]


def tap(network: nn.Module, name: str, taps: Sequence[str] | None = None, classifier: Sequence[str] = ()) -> nn.Module:
    """Give a network the methods and attributes of :class:`Tapped`, in place.

    Args:
        network: takes normalised images (B, 3, H, W).
        name: of the network, for messages and ``pretrained_cfg``.
        taps: names of submodules, finest level first; None: the network's attribute ``taps``, else the maps that it returns,
            else those that :func:`find_taps` finds.
        classifier: names of its modules that no level needs, for which a weight file may hold entries.

    Raises:
        ValueError: a tap that does not exist, is not reached or is passed twice, or a network that does not run.
    """
    declared = getattr(network, "taps", None) if taps is None else taps
    if isinstance(declared, str) or (declared is not None and not all(isinstance(entry, str) for entry in declared)):
        raise InvalidValueError("taps-no-names", f"taps of {name!r} must be a list of names of submodules, got {declared!r}")
    chosen = tuple(declared or ())
    check_taps(network, name, chosen)
    images = torch.zeros(1, 3, *DRY_SHAPE)
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad():
            given = _dry_run(network, name, images, chosen)
            if not chosen and len(given) < 2:
                chosen = find_taps(network, name, images)
                given = read_taps(network, images, chosen)
    finally:
        for module, training in modes.items():
            module.training = training
    own = getattr(network, "pretrained_cfg", None) or {}
    tapped: Any = network
    tapped.__class__ = _tapped_type(type(network))  # type: ignore[arg-type]
    tapped.taps = chosen
    tapped.pretrained_cfg = {
        "architecture": name,
        "input_size": _INPUT_SIZE,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "classifier": tuple(classifier),
        **own,
        "num_features": int(given[-1].shape[1]),
    }
    return cast(nn.Module, tapped)


def last_channels(network: nn.Module) -> int:
    """Channels of an encoder's last level, as timm or :func:`tap` notes them."""
    noted: Any = network.pretrained_cfg["num_features"] if isinstance(network, Tapped) else network.num_features
    return int(noted)


@cache
def _tapped_type(network_type: type[nn.Module]) -> type[nn.Module]:
    return type(
        "Tapped" + network_type.__name__, (Tapped, network_type), {"__doc__": network_type.__doc__, "__module__": __name__}
    )


def maps_of(output: object) -> list[Tensor]:
    """The maps (B, C, h, w) among what a network returned: a tensor, or tensors in a list, tuple or dictionary."""
    parts = list(output.values()) if isinstance(output, Mapping) else output
    parts = parts if isinstance(parts, (list, tuple)) else [parts]
    return [part for part in parts if isinstance(part, Tensor) and part.dim() == 4]


class _AllRead(Exception):
    """Every tap has been read; the rest of the network need not run."""


def read_taps(network: nn.Module, images: Tensor, taps: Sequence[str], to_the_end: bool = False) -> list[Tensor]:
    """The outputs of the named submodules in one call of the network, in the order of the names.

    Args:
        to_the_end: run what comes behind the last tap, too, which finds a tap that is passed twice; it may fail, as a head for
            one size of image does.

    Raises:
        ValueError: a tap is passed twice, or not at all.
    """
    found: dict[str, Tensor] = {}
    whole = to_the_end or torch.compiler.is_compiling()  # torch.export follows every module to its end

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            if name in found:
                raise InvalidValueError("tap-passed-twice", f"tap {name!r} is called twice in a forward; tap another part")
            found[name] = output
            if len(found) == len(taps) and not whole:
                raise _AllRead

        return hook

    handles = [network.get_submodule(name).register_forward_hook(watch(name)) for name in taps]
    try:
        network(images)
    except _AllRead:
        pass
    except Exception as error:
        if not to_the_end or len(found) < len(taps) or code_of(error) is not None:
            raise
    finally:
        for handle in handles:
            handle.remove()
    unread = [name for name in taps if name not in found]
    if unread:
        raise InvalidValueError("tap-not-reached", f"tap {unread[0]!r} is not called in a forward; tap a part that is")
    return [found[name] for name in taps]


def check_taps(network: nn.Module, name: str, taps: Sequence[str]) -> None:
    """Raise ValueError unless every tap is the name of a submodule."""
    known = [path for path, _ in network.named_modules() if path]
    for entry in taps:
        if entry not in known:
            near = nearest_names(entry, known) or [path for path, _ in network.named_children()]
            raise InvalidValueError(
                "tap-absent", f"tap {entry!r}: {name!r} has no part of that name; parts that it has: {abbreviate(near)}"
            )


def _dry_run(network: nn.Module, name: str, images: Tensor, taps: Sequence[str]) -> list[Tensor]:
    try:
        return read_taps(network, images, taps, to_the_end=True) if taps else maps_of(network(images))
    except (AssertionError, AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        if code_of(error) is not None:
            raise
        raise InvalidValueError(
            "encoder-does-not-run",
            f"{name!r} does not run on a {images.shape[2]} x {images.shape[3]} image ({' '.join(str(error).split())}); an "
            "encoder takes images (B, 3, H, W) of any size that its total stride divides. Where a head wants one size, "
            "declare the levels before it: taps=[...] in encoder_kwargs, names of submodules, finest first",
        ) from error


def find_taps(network: nn.Module, name: str, images: Tensor) -> tuple[str, ...]:
    """One tap a level, finest first: the last part that gives a map of its stride in a run of ``images``.

    A part is looked into when it passes over more than one halving of the resolution, so a stage is taken as a whole.

    Raises:
        ValueError: fewer than two levels are found.
    """
    height, width = images.shape[2:]
    passed: dict[str, tuple[int, int, int]] = {}  # name -> stride before and after, place in the order of returns
    calls: dict[str, int] = {}

    def stride(value: Tensor) -> int:
        if not isinstance(value, Tensor) or value.dim() != 4 or not value.shape[2] or not value.shape[3]:
            return 0
        found = height // value.shape[2]
        return found if (value.shape[2] * found, value.shape[3] * found) == (height, width) else 0

    def watch(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> None:
            calls[path] = calls.get(path, 0) + 1
            if stride(output):
                passed[path] = (stride(inputs[0]) if inputs else 0, stride(output), len(passed))

        return hook

    handles = [module.register_forward_hook(watch(path)) for path, module in network.named_modules() if path]
    try:
        network(images)
    finally:
        for handle in handles:
            handle.remove()

    def parts(prefix: str, module: nn.Module) -> Iterator[str]:
        for child_name, child in module.named_children():
            path = prefix + child_name
            before, after, _ = passed.get(path, (0, 0, 0))
            inside = list(parts(f"{path}.", child)) if not after or not before or after > 2 * before else []
            yield from inside or ([path] if after and calls[path] == 1 else [])

    last: dict[int, str] = {}
    for path in sorted(parts("", network), key=lambda path: passed[path][2]):
        last[passed[path][1]] = path
    if len(last) < 2:
        seen = ", ".join(f"{path} (stride {step})" for step, path in last.items()) or "none"
        raise InvalidValueError(
            "no-levels-found",
            f"{name!r} shows fewer than two levels on a {height} x {width} image: {seen}; declare them: taps=[...] in "
            "encoder_kwargs, names of submodules, finest first, each giving (B, C, H/s, W/s)",
        )
    return tuple(last[step] for step in sorted(last))
