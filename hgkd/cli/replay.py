"""Do the steps again at which a training ended because its loss or gradient was not finite.

    hgkd replay work_dirs/mine/nonfinite_step_1234_rank_0.json

Tells for each step whether it happens again, and where the first value that is not finite appears. A run under --amp is done
again in full precision, which tells whether precision was the cause.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from hgkd.cli.common import command, command_parser
from hgkd.diagnosis.replay import ReplayedStep, replay
from hgkd.errors import abbreviate


def describe(step: ReplayedStep) -> str:
    """One paragraph about a step."""
    losses = ", ".join(
        f"{name}={value:g} (in the run {step.recorded.get(name, float('nan')):g})" for name, value in step.losses.items()
    )
    lines = [f"step {step.step + 1}: {'finite this time' if step.finite else 'NOT FINITE again'}; {losses}"]
    if step.first_module:
        lines.append(f"  the first output that is not finite is that of {step.first_module}")
    if step.parameters:
        lines.append(f"  gradients that are not finite: {abbreviate(step.parameters, 5)}")
    return "\n".join(lines)


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("dump", help="nonfinite_step_<n>_rank_<r>.json of the run's work folder")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--trust", action="store_true", help="the dump is mine: its config may import my own modules")
    return parser.parse_args(arguments)


@command
def main(argv: Sequence[str]) -> int:
    """0: every step went wrong again; 1: some did not."""
    args = parse_args(argv)
    steps = replay(args.dump, args.device, args.trust)
    for step in steps:
        print(describe(step))
    return int(any(step.finite for step in steps))
