"""How good a backbone is on labelled images: k-NN, linear probe and few-shot of its frozen features, and fine-tuning.

    hgkd evaluate knn linear fewshot --backbone work_dirs/run/epoch_100.pth --train DIR/train --test DIR/test \\
        --image-size 96 --json result.json --csv results.csv
    hgkd evaluate finetune --backbone exported/resnet50 --train DIR/train --test DIR/test \\
        --finetune-options epochs=20
    hgkd evaluate compare result.json other.json

A backbone is a checkpoint of hgkd train, a folder of hgkd export, a MAE file, or a timm name (random weights unless
--checkpoint or --pretrained); a network of your own needs the --config that imports it. Labelled images are a folder with
one sub-folder a class, or a list with a path and a class a line (.txt, .csv, .tsv); they are centre-cropped. 'compare' tests
whether two results differ by more than the test images' chance; docs/howto/evaluation.md describes everything.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hgkd.api.evaluate import (
    METHODS,
    RECIPE,
    evaluate,
)
from hgkd.cli.common import command, command_parser, device_name
from hgkd.config.options import OptionsAction
from hgkd.config.reading import read_config
from hgkd.evaluation.fewshot import DEFAULT_SHOTS
from hgkd.evaluation.linear import DEFAULT_GRID
from hgkd.evaluation.records import append_csv, check_outputs, compare_results, read_json, write_json
from hgkd.training.loop import told_signals


def table_of(results: dict[str, dict[str, Any]]) -> Table:
    first = next(iter(results.values()))
    table = Table(title=f"{escape(first['backbone'])}: {first['train_images']} training, {first['test_images']} test images")
    for column in ("method", "setting", "top-1 %", "95 % interval", "worst class"):
        table.add_column(column)
    for method, result in results.items():
        worst = min(result["per_class"], key=result["per_class"].get)
        for i, (setting, score) in enumerate(result["scores"].items()):
            spread = f" +- {score['std']:.1f} over {result['settings']['draws']} draws" if "std" in score else ""
            table.add_row(
                method if i == 0 else "",
                setting,
                f"{score['top1']:.1f}{spread}",
                "{:.1f} .. {:.1f}".format(*score["ci95"]),
                f"{escape(worst)} {result['per_class'][worst]:.1f}" if i == 0 else "",
            )
    return table


def sweep_line(result: dict[str, Any]) -> str:
    """How the linear probe chose C."""
    tried = ", ".join(f"C={c} {value:.1f}" for c, value in result["sweep"].items())
    end = "" if result["converged"] else "; the final fit did NOT converge"
    return f"linear, top-1 % on held-out training images: {tried}; chosen C={result['chosen_c']:g}{end}"


def compare(first: str, second: str, seed: int = 0) -> Table:
    """Two files of ``--json`` against each other, as a table.

    Raises:
        FileNotFoundError, ValueError: see ``hgkd.evaluation.records``.
    """
    a, b = read_json(first), read_json(second)
    found, notes = compare_results(a, b, seed)
    table = Table(
        title=f"A = {escape(first)}, B = {escape(second)}",
        caption="p: exact McNemar test. It knows the chance of the test images, not that of another training seed.\n"
        + escape("\n".join(notes)),
    )
    for column in ("method", "setting", "A %", "B %", "A - B (95 %)", "only A : only B right", "p"):
        table.add_column(column, no_wrap=column in ("method", "setting"))
    for (method, setting), test in found.items():
        tops = (f"{run[method]['scores'][setting]['top1']:.1f}" for run in (a, b))
        low, high = test.ci95
        table.add_row(
            *(method, setting, *tops, f"{test.difference:+.1f} ({low:+.1f} .. {high:+.1f})"),
            *(f"{test.first_only} : {test.second_only}", f"{test.p_value:.2g}"),
        )
    return table


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("methods", nargs="+", choices=METHODS, help="features are extracted once")
    parser.add_argument("--backbone", required=True, help="checkpoint, export folder, MAE file or timm name")
    parser.add_argument(
        "--train",
        required=True,
        help="training images: a folder with one sub-folder a class, a list, or a .parquet file, folder or pattern of them",
    )
    parser.add_argument("--test", required=True, help="test images with the same classes")
    parser.add_argument("--checkpoint", help="weight file for a timm name, loaded strictly")
    parser.add_argument("--config", metavar="FILE", help="config whose custom_imports bring a network of your own")
    parser.add_argument("--block", type=int, help="ViT: block whose patch tokens are averaged, 0 = first; default last")
    parser.add_argument("--pretrained", action="store_true", help="let timm download its weights")
    parser.add_argument("--image-size", type=int, default=224, help="pixels of the centre crop")
    parser.add_argument("--limit-per-class", type=int, help="training images of a class, all by default")
    parser.add_argument("--test-limit-per-class", type=int, help="test images of a class, all by default")
    parser.add_argument("--k", type=int, nargs="+", default=[20], dest="ks", help="neighbours; top1 is the first's")
    parser.add_argument("--temperature", type=float, default=0.07, help="k-NN: the smaller, the more the nearest counts")
    parser.add_argument("--no-standardise", action="store_false", dest="standardise", help="k-NN on features as they are")
    parser.add_argument("--c-grid", type=float, nargs="+", default=list(DEFAULT_GRID), help="linear probe: values of C")
    parser.add_argument("--shots", type=int, nargs="+", default=list(DEFAULT_SHOTS), help="few-shot: labelled images a class")
    parser.add_argument("--draws", type=int, default=10, help="few-shot: how often they are drawn")
    parser.add_argument(
        "--finetune-options", nargs="+", action=OptionsAction, metavar="KEY=VALUE", help=f"of {RECIPE}: epochs, lr, ..."
    )
    parser.add_argument("--data-root", help="folder below which the paths of lists are; default: each list's own")
    parser.add_argument(
        "--value-range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="black and white in images of more than 8 bits"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images a forward")
    parser.add_argument("--workers", type=int, default=2, help="processes that read images")
    parser.add_argument("--device", type=device_name, default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--seed", type=int, default=0, help="random weights, held-out images, draws, bootstrap")
    parser.add_argument("--json", help="file to write the results to")
    parser.add_argument("--csv", help="file to append one line a method and setting to")
    args = parser.parse_args(argv)
    args.methods = list(dict.fromkeys(args.methods))
    return args


def parse_compare(argv: Sequence[str]) -> argparse.Namespace:
    parser = command_parser("Whether two results differ, image by image.")
    parser.add_argument("first", help="file of --json")
    parser.add_argument("second", help="file of --json, of the same test images")
    parser.add_argument("--seed", type=int, default=0, help="bootstrap")
    return parser.parse_args(argv)


@command
def main(argv: Sequence[str]) -> int:
    console = Console()
    if argv[:1] == ["compare"]:
        files = parse_compare(argv[1:])
        console.print(compare(files.first, files.second, files.seed))
        return 0
    args = vars(parse_args(argv))
    json_file, csv_file, own = args.pop("json"), args.pop("csv"), args.pop("config")
    check_outputs(json_file, csv_file)
    if own is not None:
        read_config(own)  # imports what it names
    with told_signals("no result is written"):
        results = evaluate(**args)
    if json_file:
        write_json(results, json_file)
    if csv_file:
        append_csv(results, csv_file)
    console.print(table_of(results))
    if results.get("linear", {}).get("sweep"):
        console.print(escape(sweep_line(results["linear"])))
    return 0
