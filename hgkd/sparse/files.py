"""A sparse backbone as one file: its weights in safetensors, and its settings as JSON in the file's metadata.

The weights have the dense network's own names, so that any other program reads the file as an ordinary dense checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hgkd.differences import largest_difference
from hgkd.errors import (
    ExistingFileError,
    InvalidTypeError,
    InvalidValueError,
    MissingFileError,
    WeightsError,
    unknown_name_message,
)
from hgkd.sparse.convert import BACKENDS, SparseModule, sparsify
from hgkd.sparse.layout import CellLayout
from hgkd.sparse.parity import image_channels
from hgkd.writing import written_beside

_KEY = "hgkd_sparse"


def save_sparse(
    network: nn.Module,
    path: str | Path,
    *,
    timm_model: str | None = None,
    timm_kwargs: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a sparse network's weights, mask cell and backend to a ``.safetensors`` file.

    Args:
        network: made by :func:`hgkd.sparse.sparsify`.
        path: of the file; written under a temporary name and renamed, so that it is never there in part.
        timm_model: timm name of the network. The file then suffices to load it, which is proven: it is read back and must
            give equal features. Without it :func:`load_sparse` needs the network itself.
        timm_kwargs: further arguments of ``timm.create_model`` that the network was made with; values that JSON can hold.
        overwrite: replace a file that is there.

    Raises:
        TypeError: the network is no sparse one, or ``timm_kwargs`` do not fit in JSON.
        FileExistsError: the file is there, and ``overwrite`` is False.
        ValueError: ``timm_model`` with ``timm_kwargs`` is not this network.
        WriteError: see :func:`hgkd.writing.writing`.
    """
    if not isinstance(network, SparseModule):
        raise InvalidTypeError(
            "network-not-sparsified",
            f"save_sparse writes networks made by hgkd.sparse.sparsify, got {type(network).__name__}; sparsify it",
        )
    path = Path(path)
    if path.exists() and not overwrite:
        raise ExistingFileError("file-exists", f"{path} exists; choose another name or pass overwrite=True")
    facts = {"cell": network.sparse_cell, "backend": network.sparse_backend, "timm_model": timm_model}
    facts["renormalize"] = network.sparse_renormalize
    facts["timm_kwargs"] = dict(timm_kwargs or {})
    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in network.state_dict().items()}
    with written_beside(path) as beside:
        save_file(weights, beside, {"format": "pt", _KEY: json.dumps(facts)})
        if timm_model is not None:
            _check_equal(network, beside)


def load_sparse(path: str | Path, network: nn.Module | None = None, backend: str | None = None) -> nn.Module:
    """The network that :func:`save_sparse` wrote, on the CPU, in eval mode; ``visible`` is given when it is called.

    Args:
        path: the file.
        network: the dense network that the weights belong to, not changed; needed when the file names no timm model.
        backend: another backend than the saved one.

    Raises:
        FileNotFoundError: no such file.
        WeightsError: not a file of :func:`save_sparse`, or weights that do not fit the network.
        ValueError: the file names no network and none is given, or timm does not know the one it names.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(
            "sparse-file-missing", f"no sparse backbone at {path}; expected a file written by hgkd.sparse.save_sparse"
        )
    facts, weights = _read(path)
    if network is None:
        name = facts["timm_model"]
        if name is None:
            raise InvalidValueError(
                "network-not-in-file",
                f"{path} does not say which network it holds; pass network=, the dense network it was made from",
            )
        if not timm.is_model(name):
            raise InvalidValueError(
                "timm-name-unknown", f"{path}: " + unknown_name_message("timm model", name, timm.list_models())
            )
        network = timm.create_model(name, **facts["timm_kwargs"])
    # files of before it was an option did not renormalise
    sparse = sparsify(network, facts["cell"], backend or facts["backend"], facts.get("renormalize", False)).eval()
    try:
        sparse.load_state_dict(weights)
    except RuntimeError as error:
        raise WeightsError(
            "weights-do-not-fit", f"the weights of {path} do not fit {type(network).__name__}: {error}"
        ) from error
    return sparse


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise WeightsError(
            "file-not-safetensors", f"{path} is no safetensors file ({error}); expected one written by hgkd.sparse.save_sparse"
        ) from error
    if _KEY not in metadata:
        raise WeightsError(
            "sparse-facts-missing",
            f"{path} holds weights but neither mask cell nor backend; expected a file written by hgkd.sparse.save_sparse "
            "(for plain weights: load them into the dense network, then sparsify it)",
        )
    facts = json.loads(metadata[_KEY])
    if facts.get("backend") not in BACKENDS:
        raise WeightsError(
            "file-backend-unknown", f"{path}: " + unknown_name_message("sparse backend", str(facts.get("backend")), BACKENDS)
        )
    return facts, weights


def _check_equal(network: Any, path: Path) -> None:
    """Read the file back and compare features of one half-hidden image; the network is left as it was."""
    remedy = "pass the timm_kwargs that it was made with, or no timm_model (load_sparse then needs the network)"
    try:
        loaded = load_sparse(path)
    except WeightsError as error:
        raise InvalidValueError(
            "named-network-differs", f"the named timm model is not this network: {error}; {remedy}"
        ) from error
    parameter = next(network.parameters())
    found: Any = loaded.to(parameter.device, parameter.dtype)
    cell = network.sparse_cell
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, image_channels(network), 2 * cell, 2 * cell, generator=generator).to(
        parameter.device, parameter.dtype
    )
    layout = CellLayout(torch.eye(2, dtype=torch.bool, device=parameter.device)[None], cell, network.sparse_renormalize)
    modes = {module: module.training for module in network.modules()}
    try:
        with torch.no_grad():
            features = [net.eval().forward_features(net.pack(image, layout)).plain for net in (network, found)]
    finally:
        for module, training in modes.items():
            module.training = training
    if not largest_difference(features[1], features[0]) <= 1e-4:
        raise InvalidValueError(
            "named-network-differs", f"the named timm model has these weights but computes other features; {remedy}"
        )
