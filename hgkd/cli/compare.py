"""Train and evaluate what a plan lists, and write one table of it.

    hgkd compare PLAN --work-dir DIR [--only NAME ...] [--seeds 0 ...] [--jobs 2] [--set KEY=VALUE ...] \\
        [--cfg-options KEY=VALUE ...]

A plan is a Python, YAML or JSON file with

    rows      list of dict(name=..., config=..., options={...}, seeds=[0, 1, 2]) for what is trained, or of
              dict(name=..., backbone=..., checkpoint=..., block=...) for what is evaluated as it is
    options   config options that all trained rows share
    evaluate  arguments of ``hgkd evaluate``'s ``evaluate``; methods, train, test, image_size, ...
    scores    instead of ``evaluate``, where a run measures itself (fine-tuning, detectors, segmentors): dict(name=key) with the
              key that its validation logs, e.g. {"top-1 %": "accuracy/top1"}, or [key, factor]; the last validation counts

``{name}`` in a string of the plan is replaced by the value of ``--set name=...``: data and teacher files stay out of the plan.
``{seed}`` is the run's own, so that a run can start from the pretraining of its seed; ``{here}`` is DIR. A row may have
``evaluate`` or ``scores`` of its own, and ``after=[NAME, ...]``: rows above it that it starts from, as in
``teacher_checkpoint="{here}/teacher_seed0"``. Their runs of the same seed (or, without one, their first) are waited for.
``--cfg-options`` replaces shared options, e.g. ``limit=300 epochs=1`` for a trial; a row's own stay.
Every run is a process of its own (``hgkd train``), with ``--jobs`` of them at a time and the cores shared between them.
A run that is complete is not repeated, a broken one is resumed, so the same command continues a comparison. Where one fails,
the others are finished. Results, of all runs of the plan that are complete, those of earlier calls included:
``DIR/results.json`` and ``DIR/table.csv`` (every run), ``DIR/table.md`` (mean and std over the seeds, commands below) and
``DIR/picture.png`` (final results, learning curves).
"""

from __future__ import annotations

from collections.abc import Sequence

from hgkd.api.compare import (
    compare,
    table_of,
)
from hgkd.cli.common import command, command_parser
from hgkd.config.options import OptionsAction
from hgkd.errors import InvalidValueError


@command
def main(argv: Sequence[str]) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("plan", help="name of a shipped plan ('hgkd recipes --plans'), or a file")
    parser.add_argument("--work-dir", required=True, help="folder of all runs and of the table")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these rows of the plan")
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=[],
        metavar="SEED",
        help="runs of these seeds; a row that has none of them, such as a teacher of one seed, keeps its own",
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time; each gets its share of the cores, at most OMP_NUM_THREADS"
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", dest="values", help="values for {NAME} in the plan"
    )
    parser.add_argument(
        "--cfg-options",
        dest="options",
        nargs="+",
        action=OptionsAction,
        metavar="KEY=VALUE",
        help="over the plan's shared options",
    )
    args = parser.parse_args(argv)
    pairs = [value.split("=", 1) for value in args.values]
    if any(len(pair) < 2 for pair in pairs):
        raise InvalidValueError("set-not-a-pair", f"--set takes NAME=VALUE, got {args.values}")
    print(table_of(compare(args.plan, args.work_dir, args.only, args.jobs, dict(pairs), args.options, args.seeds)))
    return 0
