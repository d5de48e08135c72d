"""The table of docs/edge.md: size, difference, agreement and time of exported folders, each by its own runtime.

    python tools/edge_table.py --weights weights resnet18 mobilenetv4_conv_small repvit_m0_9
    hgkd export weights/resnet18.safetensors --encoder resnet18 --to litert --precision int8 --images DIR --out exported/litert
    python tools/edge_table.py exported/*

The first writes random weights with norms that do something, for who has no trained ones. The last prints a row a file: what
the export measured, and the processor time of one image on one thread, the median of ``--repeats``, all files in turn in this
process. A runtime that is not here, or cannot be timed, leaves a dash.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hgkd.export import TARGETS, MissingLibraryError
from hgkd.weights.export_folder import CARD_FILE


def random_weights(name: str) -> dict[str, Tensor]:
    """Weights of timm's network of that name: random scales and shifts, and statistics of its own activations.

    timm starts some norms at 0: whole branches would do nothing, and converters would leave them out.
    """
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0).train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0.0, 0.1)
        norm.momentum = None  # the mean of all batches below
    with torch.no_grad():
        for _ in range(3):
            model(0.7 * torch.randn(8, 3, 128, 128) + torch.randn(8, 3, 1, 1))
    return {key: value.contiguous() for key, value in model.state_dict().items()}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """What the run card of an export says of its files."""
    card = json.loads((folder / CARD_FILE).read_text(encoding="utf-8"))
    proof = card["export"]
    return [
        {
            **row,
            "folder": folder,
            "network": card["network"]["name"],
            "target": proof["target"],
            "proof": proof["max_difference"],
        }
        for row in proof["table"]
    ]


def runner_of(row: dict[str, Any]) -> Callable[[Tensor], Tensor] | None:
    """What runs a file on one thread; None: nothing here does."""
    runner = TARGETS[row["target"]].runner
    try:
        return None if runner is None else runner(row["folder"] / row["file"], threads=1)
    except MissingLibraryError as error:
        print(f"{row['folder']}: {error}")
        return None


def with_times(rows: Sequence[dict[str, Any]], side: int, repeats: int) -> list[dict[str, Any]]:
    """The rows with ``ms``, the median processor time of one image; None where nothing runs the file."""
    image = torch.rand(1, 3, side, side)
    runners = [runner_of(row) for row in rows]
    times: list[list[float]] = [[] for _ in rows]
    for repeat in range(repeats + 2):
        for run, taken in zip(runners, times, strict=True):
            if run is None:
                continue
            run(image)  # fills the caches again
            start = time.process_time()
            run(image)
            if repeat >= 2:
                taken.append(1000 * (time.process_time() - start))
    return [{**row, "ms": statistics.median(taken) if taken else None} for row, taken in zip(rows, times, strict=True)]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| network | runtime | precision | MB | difference | cosine | same nearest | top1 | ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        full = row["precision"] == "fp32"
        difference = row["proof"] if full else row.get("difference")
        parts = [row["network"], f"`{row['target']}`", row["precision"], f"{row['bytes'] / 1e6:.1f}"]
        parts += ["-" if difference is None else f"{difference:.1e}" if full else f"{difference:.2g}"]
        for key, form in (("cosine", ".4f"), ("same_nearest", ".2f"), ("top1", ".2f"), ("ms", ".1f")):
            parts.append("-" if row.get(key) is None else format(row[key], form))
        lines.append(f"| {' | '.join(parts)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", help="exported folders; with --weights, timm's names of networks")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="write random weights of these networks into DIR instead")
    parser.add_argument("--side", type=int, default=224, help="of the image, in pixels (default 224)")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args(argv)
    if args.weights is not None:
        args.weights.mkdir(parents=True, exist_ok=True)
        for name in args.names:
            save_file(random_weights(name), args.weights / f"{name}.safetensors")
        return
    rows = [row for name in args.names for row in rows_of(Path(name))]
    print(markdown(with_times(rows, args.side, args.repeats)))


if __name__ == "__main__":
    main()
