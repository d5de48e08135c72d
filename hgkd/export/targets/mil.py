"""Core ML's programs (MIL), read from their file and computed with torch, operator by operator.

Core ML itself runs on Apple's systems alone. This is how a file is checked elsewhere: by what the reference says of its
operators (https://apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html), in fp32, whatever the
precision in which the file keeps its weights. It says nothing of Apple's kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hgkd.export.job import ExportError, need

_LOADER = "coremltools.converters.mil.frontend.milproto.load"


def mil_runner(package: Path) -> Callable[[Tensor], Tensor]:
    """A ``.mlpackage`` of one input and one output: images in [0, 1] (B, C, H, W), one after the other -> its output.

    Raises:
        ExportError: an operator has no meaning here; it is named.
    """
    coremltools, loader = need("coreml", "coremltools", _LOADER)
    spec = coremltools.utils.load_spec(str(package))
    weights = package / "Data" / "com.apple.CoreML" / "weights"
    program = loader.load(spec, spec.specificationVersion, str(weights))
    function = program.functions["main"]
    unknown = sorted({op.op_type for op in function.operations} - {"const", *_MEANING})
    if unknown:
        raise ExportError(
            "coreml-operator-unknown",
            f"{package.name} holds {', '.join(unknown)}, which cannot be checked away from Apple's systems; use --to onnx",
        )
    (given,) = function.inputs
    (wanted,) = function.outputs

    @torch.no_grad()
    def forward(image: Tensor) -> Tensor:
        values: dict[str, Any] = {given: image}
        for op in function.operations:
            if op.op_type == "const":
                continue
            made = _MEANING[op.op_type]({name: _value(var, values) for name, var in op.inputs.items()})
            values[op.outputs[0].name] = made
        return cast(Tensor, values[wanted.name])

    return lambda images: torch.cat([forward(image[None]) for image in images])


def _value(var: Any, values: Mapping[str, Any]) -> Any:
    """What an input of an operator is: computed before, a constant, or several of either."""
    if isinstance(var, list | tuple):
        return [_value(item, values) for item in var]
    if var is None or var.name in values:
        return None if var is None else values[var.name]
    constant = var.val
    if isinstance(constant, np.ndarray):
        return torch.from_numpy(constant).float() if constant.dtype.kind == "f" else torch.from_numpy(constant)
    return float(constant) if isinstance(constant, np.floating) else constant


def _pads(given: Mapping[str, Any], kernel: Sequence[int], dilations: Sequence[int], x: Tensor) -> list[int]:
    """Rows and columns to add, as torch's ``pad`` takes them: left, right, top, bottom."""
    kind = given["pad_type"]
    if kind == "valid":
        return [0, 0, 0, 0]
    if kind == "custom":
        top, bottom, left, right = (int(value) for value in given["pad"])
        return [left, right, top, bottom]
    found: list[int] = []
    for side, k, s, d in zip(x.shape[:1:-1], kernel[::-1], _ints(given["strides"])[::-1], dilations[::-1], strict=True):
        total = max(0, (-(-side // s) - 1) * s + (k - 1) * d + 1 - side)
        less, more = total // 2, total - total // 2
        found += [more, less] if kind == "same_lower" else [less, more]
    return found


def _ints(values: Any) -> list[int]:
    return [int(value) for value in values]


def _conv(given: Mapping[str, Any]) -> Tensor:
    x, weight, dilations = given["x"], given["weight"], _ints(given["dilations"])
    x = functional.pad(x, _pads(given, weight.shape[2:], dilations, x))
    return functional.conv2d(x, weight, given.get("bias"), _ints(given["strides"]), 0, dilations, int(given["groups"]))


def _max_pool(given: Mapping[str, Any]) -> Tensor:
    kernel = _ints(given["kernel_sizes"])
    x = functional.pad(given["x"], _pads(given, kernel, [1, 1], given["x"]), value=-torch.inf)
    return functional.max_pool2d(x, kernel, _ints(given["strides"]), ceil_mode=bool(given["ceil_mode"]))


def _avg_pool(given: Mapping[str, Any]) -> Tensor:
    kernel, strides, ceil = _ints(given["kernel_sizes"]), _ints(given["strides"]), bool(given["ceil_mode"])
    pads = _pads(given, kernel, [1, 1], given["x"])
    x = functional.avg_pool2d(functional.pad(given["x"], pads), kernel, strides, ceil_mode=ceil)
    if not given["exclude_padding_from_average"]:
        return x
    inside = functional.pad(torch.ones_like(given["x"][:, :1]), pads)
    return x / functional.avg_pool2d(inside, kernel, strides, ceil_mode=ceil)


def _gelu(given: Mapping[str, Any]) -> Tensor:
    if given["mode"] == "SIGMOID_APPROXIMATION":
        return cast(Tensor, given["x"] * torch.sigmoid(1.702 * given["x"]))
    return functional.gelu(given["x"], approximate="none" if given["mode"] == "EXACT" else "tanh")


def _layer_norm(given: Mapping[str, Any]) -> Tensor:
    x, axes = given["x"], _ints(given["axes"])
    centred = x - x.mean(axes, keepdim=True)
    normed = centred * (centred.square().mean(axes, keepdim=True) + given["epsilon"]).rsqrt()
    gamma, beta = given.get("gamma"), given.get("beta")
    normed = normed if gamma is None else normed * gamma
    return cast(Tensor, normed if beta is None else normed + beta)


def _batch_norm(given: Mapping[str, Any]) -> Tensor:
    return functional.batch_norm(
        given["x"], given["mean"], given["variance"], given.get("gamma"), given.get("beta"), eps=given["epsilon"]
    )


def _pad(given: Mapping[str, Any]) -> Tensor:
    pairs = _ints(given["pad"])
    backwards = [value for i in range(len(pairs) - 2, -1, -2) for value in pairs[i : i + 2]]
    mode = str(given["mode"])
    if mode == "constant":
        return functional.pad(given["x"], backwards, value=float(given["constant_val"]))
    return functional.pad(given["x"], backwards, mode=mode)


def _matmul(given: Mapping[str, Any]) -> Tensor:
    x, y = (given[name].mT if given[f"transpose_{name}"] else given[name] for name in ("x", "y"))
    return cast(Tensor, x @ y)


def _over(reduce: Callable[..., Tensor]) -> Callable[[Mapping[str, Any]], Tensor]:
    return lambda given: reduce(given["x"], _ints(given["axes"]), keepdim=bool(given["keep_dims"]))


def _each(function: Callable[[Any], Tensor]) -> Callable[[Mapping[str, Any]], Tensor]:
    return lambda given: function(given["x"])


def _two(function: Callable[[Any, Any], Tensor]) -> Callable[[Mapping[str, Any]], Tensor]:
    return lambda given: function(given["x"], given["y"])


def _squeeze(given: Mapping[str, Any]) -> Tensor:
    axes = given.get("axes")
    return cast(Tensor, given["x"].squeeze() if axes is None else given["x"].squeeze(_ints(axes)))


def _expand_dims(given: Mapping[str, Any]) -> Tensor:
    x: Tensor = given["x"]
    axes = _ints(given["axes"])
    for axis in sorted(axis % (x.dim() + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


_MEANING: dict[str, Callable[[Mapping[str, Any]], Tensor]] = {
    "conv": _conv,
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "linear": lambda given: functional.linear(given["x"], given["weight"], given.get("bias")),
    "matmul": _matmul,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "reduce_mean": _over(torch.mean),
    "reduce_sum": _over(torch.sum),
    "add": _two(torch.add),
    "sub": _two(torch.sub),
    "mul": _two(torch.mul),
    "real_div": _two(torch.div),
    "pow": _two(torch.pow),
    "relu": _each(torch.relu),
    "relu6": _each(functional.relu6),
    "sigmoid": _each(torch.sigmoid),
    "silu": _each(functional.silu),
    "tanh": _each(torch.tanh),
    "erf": _each(torch.erf),
    "sqrt": _each(torch.sqrt),
    "square": _each(torch.square),
    "identity": _each(lambda x: x),
    "cast": _each(lambda x: x),  # between floats: all is fp32 here
    "gelu": _gelu,
    "sigmoid_hard": lambda given: (given["alpha"] * given["x"] + given["beta"]).clamp(0.0, 1.0),
    "clip": lambda given: given["x"].clamp(given["alpha"], given["beta"]),
    "rsqrt": lambda given: (given["x"] + given["epsilon"]).rsqrt(),
    "softmax": lambda given: given["x"].softmax(int(given["axis"])),
    "reshape": lambda given: given["x"].reshape(_ints(given["shape"])),
    "transpose": lambda given: given["x"].permute(_ints(given["perm"])),
    "concat": lambda given: torch.cat(given["values"], int(given["axis"])),
    "squeeze": _squeeze,
    "expand_dims": _expand_dims,
    "pad": _pad,
}
