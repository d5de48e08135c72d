"""Versions of an ONNX file: of its operators (opset) and of its format (IR), and the least onnxruntime that reads both.

torch writes opset 18 and later. Lower ones are made from that by ONNX's own converter, a step at a time, and count only when
``onnx.checker`` passes the file and onnxruntime computes the same with it. How far down it goes depends on the operators of a
network: the converter has no way below 14 for subtraction, below 17 for LayerNormalization, below 18 for padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

from hgkd.errors import InvalidValueError
from hgkd.export.job import need

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET_OF_TORCH = 18  # the least that torch writes without loss
LEAST_OPSET = 7  # of onnxruntime
INT8_LEAST = 13  # scales per channel: DequantizeLinear has an axis from opset 13 on
_LEAST_IR = 4  # weights that are no inputs

# onnxruntime's own table: https://onnxruntime.ai/docs/reference/compatibility.html (ONNX opset support), read 2026-11
_RUNTIMES: tuple[tuple[str, int, int], ...] = (
    ("0.3", 9, 3),
    ("0.4", 10, 5),
    ("1.0", 11, 6),
    ("1.3", 12, 7),
    ("1.6", 13, 7),
    ("1.8", 14, 7),
    ("1.9", 15, 8),
    ("1.11", 16, 8),
    ("1.12", 17, 8),
    ("1.14", 18, 8),
    ("1.15", 19, 8),
    ("1.16", 19, 9),
    ("1.17", 20, 9),
    ("1.18", 21, 10),
)
"""First version with these: (onnxruntime, newest opset, newest IR version)."""
_LAST_IN_TABLE = "1.20"


def least_runtime(opset: int, ir_version: int) -> str:
    """The first onnxruntime that reads such a file, by its published table; in words where it is too new for that."""
    for version, newest, newest_ir in _RUNTIMES:
        if opset <= newest and ir_version <= newest_ir:
            return version
    return f"later than {_LAST_IN_TABLE}"


def opset_of(model: ModelProto) -> int:
    """Version of ONNX's own operators."""
    return next(int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def least_ir(model: ModelProto) -> int:
    """The least version of the format that a model's operators may be in."""
    (helper,) = need("onnx", "onnx.helper")
    own = [entry for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    return max(int(helper.find_min_ir_version_for(own)), _LEAST_IR)


def check_versions(opset: int | None, ir_version: int | None, int8: bool = False) -> None:
    """Refuse versions that ONNX does not know, before anything is written.

    Raises:
        ValueError: unknown, or below what int8 needs.
    """
    (onnx,) = need("onnx", "onnx")
    newest, least = onnx.defs.onnx_opset_version(), INT8_LEAST if int8 else LEAST_OPSET
    if opset is not None and not least <= opset <= newest:
        why = " (int8 needs 13 or later: scales per channel)" if int8 else ""
        raise InvalidValueError(
            "opset-unknown", f"opset {opset} is none that onnx {onnx.__version__} writes; give one of {least} .. {newest}{why}"
        )
    if ir_version is not None and not _LEAST_IR <= ir_version <= onnx.IR_VERSION:
        raise InvalidValueError(
            "ir-version-unknown",
            f"IR version {ir_version} is none of onnx {onnx.__version__}; give one of {_LEAST_IR} .. {onnx.IR_VERSION}",
        )


def in_version(
    model: ModelProto, opset: int | None, ir_version: int | None, same: Callable[[ModelProto], bool], floor: int = LEAST_OPSET
) -> ModelProto:
    """A model in the opset that is asked for, or in the lowest that its operators allow, and in an IR version.

    Args:
        model: as torch wrote it.
        opset, ir_version: None: the lowest.
        same: whether a runtime reads a model and computes the same with it.
        floor: lowest opset to try.

    Raises:
        ValueError: the model cannot be had in these.
    """
    asked = opset if opset is not None else floor
    found = [model, *_steps_down(model, asked)]
    if opset is not None and opset_of(found[-1]) != opset:
        raise InvalidValueError(
            "opset-not-reached",
            f"this network cannot be written in opset {opset}: its operators allow {opset_of(found[-1])} .. {opset_of(model)} "
            "here; give one of these, or leave opset out for the lowest",
        )
    for candidate in [found[-1]] if opset is not None else reversed(found):
        set_ir(candidate, ir_version)
        if same(candidate):
            return candidate
    raise InvalidValueError(
        "opset-computes-otherwise",
        f"the graph in opset {opset_of(found[-1])} is not read by onnxruntime, or computes something else; give a later opset",
    )


def set_ir(model: ModelProto, ir_version: int | None) -> None:
    """Set the IR version of a model, by default the least for its operators.

    Raises:
        ValueError: too low for them.
    """
    least = least_ir(model)
    if ir_version is not None and ir_version < least:
        raise InvalidValueError(
            "ir-version-too-low",
            f"opset {opset_of(model)} needs IR version {least} or later, got {ir_version}; give a lower opset",
        )
    model.ir_version = least if ir_version is None else ir_version


def _steps_down(model: ModelProto, lowest: int) -> Iterator[ModelProto]:
    """The model in each lower opset as far as the converter and the checker go."""
    (converter,) = need("onnx", "onnx.version_converter")
    model = _without_defaults(model)
    for version in range(opset_of(model) - 1, lowest - 1, -1):
        try:
            model = converter.convert_version(model, version)
            set_ir(model, None)
            _check(model)
        except Exception:
            # the converter's C++ raises RuntimeError for what it cannot do, the checker its own; either way it ends here
            return
        yield model


def _check(model: ModelProto) -> None:
    (onnx,) = need("onnx", "onnx")
    onnx.checker.check_model(model, full_check=True)


def _without_defaults(model: ModelProto) -> ModelProto:
    """A copy without an attribute of reductions that is new in opset 18, where it says what held before."""
    copy = cast(Any, type(model))()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        kept = [one for one in node.attribute if not (one.name == "noop_with_empty_axes" and one.i == 0)]
        del node.attribute[:]
        node.attribute.extend(kept)
    return cast("ModelProto", copy)
