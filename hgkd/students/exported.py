"""Students out of exported folders: the sparse encoder, or encoder and decoder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from hgkd.errors import InvalidValueError, WeightsError
from hgkd.networks.backbones import build_backbone, load_backbone
from hgkd.pixels import pixel_statistics
from hgkd.sparse import load_sparse as load_sparse_file
from hgkd.students.unet import SparseUNet
from hgkd.weights.export_folder import WEIGHTS_FILE, read_config, read_spec
from hgkd.weights.files import read_checkpoint
from hgkd.weights.loading import load_strict

ENCODER = "encoder."


def load_sparse(path: str | os.PathLike[str], backend: str = "gather") -> nn.Module:
    """The encoder of a folder of ``--to sparse``, in eval mode: ``net(images, visible=...)``.

    The folder says which network it is; its weight file is one of ``hgkd.sparse.save_sparse``.

    Args:
        backend: of ``sparsify``.

    Raises:
        FileNotFoundError: no such folder, or a file of it is missing.
        WeightsError: no such export, damaged, or not fitting.
    """
    _section(path, "cell")
    return load_sparse_file(Path(path).expanduser() / WEIGHTS_FILE, build_backbone(read_spec(path)), backend)


def load_student(
    path: str | os.PathLike[str], backend: str = "gather", *, encoder: nn.Module | str | os.PathLike[str] | None = None
) -> nn.Module:
    """The ``SparseUNet`` of a folder of ``--to sparse --part student`` or ``decoder``, in eval mode.

    Args:
        backend: of ``sparsify``.
        encoder: for a decoder: the network to put it on, the dense encoder (images are normalised as the decoder's student
            did) or what :func:`hgkd.export.load_backbone` reads (as that says).

    Raises:
        FileNotFoundError: no such folder, or a file of it is missing.
        WeightsError: no such export, damaged, or not fitting.
        ValueError: a decoder without encoder, or a whole student with another one.
    """
    part = "student" if encoder is None else "decoder"
    section = _section(path, "student", "decoder")
    if part not in section:
        raise InvalidValueError(
            "export-part-and-encoder",
            f"{path} holds a decoder alone; give the network to put it on with encoder="
            if encoder is None
            else f"{path} holds a whole student; leave encoder out",
        )
    file = Path(path).expanduser() / WEIGHTS_FILE
    weights, arguments = read_checkpoint(file), section[part]
    if encoder is not None:
        network = encoder if isinstance(encoder, nn.Module) else load_backbone(encoder)
        weights.update({f"{ENCODER}{key}": value for key, value in network.state_dict().items()})
        if network is not encoder:  # a fine-tuned backbone may have pixel statistics of its own
            arguments = {**arguments, "normalize": pixel_statistics(network)}
    student = build_student(arguments, backend)
    load_strict(student, weights, source=str(file))
    return student.eval()


def build_student(arguments: dict[str, Any], backend: str) -> nn.Module:
    """The ``SparseUNet`` of an export's description, with random weights."""
    return SparseUNet(**arguments, backend=backend)


def _section(path: str | os.PathLike[str], *keys: str) -> dict[str, Any]:
    section = read_config(Path(path).expanduser()).get("hgkd") or {}
    if not any(key in section for key in keys):
        shown = "".join(f" --part {key}" for key in keys[:1] if key != "cell")
        raise WeightsError("export-not-sparse", f"{path} is no export that hgkd export wrote with --to sparse{shown}")
    return dict(section)
