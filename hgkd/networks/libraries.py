"""Encoders of other libraries, and a user's own: ``mmdet.CSPNeXt``, ``torchvision.resnet18``, ``MyNetwork``.

Names: ``mmdet.``, ``mmseg.`` or ``mmpretrain.`` before a backbone's class; ``torchvision.`` before a model's name; or the name
under which a class or function of the user is registered in ``hgkd.registry.MODELS``, by a module of ``custom_imports``. All
become :class:`hgkd.networks.taps.Tapped`. The libraries are imported when one of their networks is asked for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast

import timm
from torch import nn

from hgkd.errors import coded, few, nearest_names, unknown_name_message
from hgkd.mmcv_ops import register_ops
from hgkd.networks.taps import tap
from hgkd.registry import MODELS

OPENMMLAB = ("mmdet", "mmseg", "mmpretrain")
LIBRARIES = (*OPENMMLAB, "torchvision")
_PACKAGES = {"mmseg": "mmsegmentation"}
_HEADS = ("fc", "classifier", "head", "heads")  # torchvision's names of what follows the last map
OWN = "a user's own"
HOW_TO_NAME = (
    "(other libraries' networks have theirs before the name: mmdet.CSPNeXt, torchvision.resnet18; your own is registered by "
    "a module in the config's custom_imports, and hgkd export takes that config with --config)"
)


def library_of(name: str) -> str | None:
    """Library that an encoder's name is of: one of ``LIBRARIES``, or ``OWN``; None: timm's, or unknown."""
    library, dot, _ = name.partition(".")
    if dot and library in LIBRARIES:
        return library
    return OWN if name in MODELS.module_dict and not timm.is_model(name) else None


def home_of(name: str) -> str:
    """Where a student of another library, or of the user, goes."""
    library = library_of(name)
    home = f"{library} or torch" if library in LIBRARIES else "torch"
    return f"export it to {home}, onnx, program or sparse"


def build_library_network(name: str, *, taps: Sequence[str] | None = None, **kwargs: Any) -> nn.Module:
    """A network of another library, or of the user, with random weights, that gives its levels by taps.

    Args:
        name: see the module's header.
        taps: see :func:`hgkd.networks.taps.tap`.
        kwargs: arguments of the class or function, e.g. ``deepen_factor`` of ``mmdet.CSPNeXt``.

    Raises:
        ValueError: an unknown name or argument, a library that is not installed, or no network that serves.
    """
    library, kind = library_of(name), name.partition(".")[2]
    if library in OPENMMLAB:
        return tap(_openmmlab(str(library), kind, kwargs), name, taps)
    if library == "torchvision":
        network, heads = _torchvision(kind, kwargs)
        return tap(network, name, taps, heads)
    make: Callable[..., Any] = MODELS.module_dict[name]
    _check_arguments(name, make, kwargs)
    own = make(**kwargs)
    if not isinstance(own, nn.Module):
        raise coded("encoder-no-module", ValueError(f"{name!r} gives a {type(own).__name__}, an encoder is a torch.nn.Module"))
    return tap(own, name, taps)


def _import(library: str, module: str) -> Any:
    package = _PACKAGES.get(library, library)
    if find_spec(library) is None:
        raise coded(
            "library-absent",
            ValueError(f"an encoder named {library}.* needs {package}, which is not installed; pip install 'hgkd[downstream]'")
            if library != "mmpretrain"
            else ValueError(f"an encoder named {library}.* needs {package}, which is not installed; pip install {package}"),
        )
    try:
        if library in OPENMMLAB:
            register_ops()  # they import mmcv's operators, compiled or not
        return import_module(module)
    except Exception as error:  # they raise what their compiled parts raise, not only ImportError
        raise coded("library-broken", ValueError(f"{package} does not import: {error}; install it again")) from error


def _openmmlab(library: str, kind: str, kwargs: Mapping[str, Any]) -> nn.Module:
    backbones = _import(library, f"{library}.models.backbones")
    found = getattr(backbones, kind, None)
    if not isinstance(found, type):
        raise coded(
            "library-network-unknown",
            ValueError(unknown_name_message(f"backbone of {library}", kind, backbones.__all__)),
        )
    name = f"{library}.{kind}"
    taken = [key for key in ("init_cfg", "pretrained") if kwargs.get(key) is not None]
    if taken:
        raise coded(
            "encoder-argument-ours",
            ValueError(f"{taken[0]} of {name} is not taken: weights come from encoder_checkpoint=FILE, and nothing is fetched"),
        )
    norm = kwargs.get("norm_cfg")
    if isinstance(norm, Mapping) and str(norm.get("type")).endswith("SyncBN"):
        raise coded(
            "encoder-sync-norm",
            ValueError(
                f"norm_cfg of {name} asks for SyncBN, which no single process can train; give type='BN' (the weights are "
                "the same): a run of several processes makes its norms synchronised itself"
            ),
        )
    _check_arguments(name, found, kwargs)
    # mmdet's ResNets hold their norms' statistics by default, which nothing has set yet
    still = {"norm_eval": False} if "norm_eval" in defaults_of(found) else {}
    network: Any = found(**{**still, **kwargs})
    network._dump_init_info = lambda: None  # mmengine's, which logs three lines a parameter
    network.init_weights()
    del network._dump_init_info
    return cast(nn.Module, network)


def _torchvision(kind: str, kwargs: Mapping[str, Any]) -> tuple[nn.Module, list[str]]:
    models = _import("torchvision", "torchvision.models")
    known = models.list_models(module=models)
    if kind not in known:
        raise coded("library-network-unknown", ValueError(unknown_name_message("model of torchvision", kind, known)))
    taken = [key for key in ("weights", "weights_backbone") if kwargs.get(key) is not None]
    if taken:
        raise coded(
            "encoder-argument-ours",
            ValueError(f"{taken[0]} of torchvision.{kind} is not taken: weights come from encoder_checkpoint=FILE"),
        )
    try:
        network: nn.Module = models.get_model(kind, weights=None, **kwargs)
    except TypeError as error:
        raise coded("encoder-argument-unknown", ValueError(f"torchvision.{kind}: {error}")) from error
    heads = [head for head in _HEADS if isinstance(getattr(network, head, None), nn.Module)]
    for head in heads:
        setattr(network, head, nn.Identity())
    return network, heads


def defaults_of(network_type: type) -> dict[str, Any]:
    """Defaults of a class's arguments, those that its bases take as ``**kwargs`` included."""
    found: dict[str, Any] = {}
    for base in network_type.__mro__:
        if "__init__" in vars(base):
            for name, parameter in inspect.signature(vars(base)["__init__"]).parameters.items():
                if parameter.default is not parameter.empty:
                    found.setdefault(name, parameter.default)
    return found


def _parameters(make: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(make).parameters
    except (TypeError, ValueError):  # some callables written in C have none
        return {}


def _check_arguments(name: str, make: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError for an argument that a class or function does not take."""
    parameters = _parameters(make)
    if not parameters or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for key in kwargs:
        if key not in parameters:
            near = nearest_names(key, parameters) or [known for known in parameters if known != "self"]
            raise coded(
                "encoder-argument-unknown",
                ValueError(f"{name} takes no {key!r} (encoder_kwargs); arguments that it takes: {few(near)}, taps"),
            )
