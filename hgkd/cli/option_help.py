"""Help texts of ``hgkd train`` and ``hgkd test`` about options, generated from the tables of options."""

from __future__ import annotations

from collections.abc import Mapping

from hgkd.config.short_options import SHORT_OPTIONS
from hgkd.openmmlab.config import SHORT_OPTIONS as DOWNSTREAM_OPTIONS
from hgkd.training.trackers import TRACKERS


def help_text(examples: str, codes: Mapping[int, str]) -> str:
    """End of the --help page: short options, precedence of options, examples and exit codes."""
    lines = ["short options of pretraining and fine-tuning (for --cfg-options):"]
    lines += [f"  {name:<18} {option.help}" for name, option in SHORT_OPTIONS.items()]
    lines += ["", "short options of detectors and segmentors:"]
    lines += [f"  {name:<18} {text}" for name, text in DOWNSTREAM_OPTIONS.items()]
    lines += [
        "",
        "keys without a place of their own:",
        f"  {'tracker':<18} {' or '.join(TRACKERS)}: where the run is recorded, too",
        f"  {'fsdp':<18} True: divide the parameters among the processes (not of detectors and segmentors)",
    ]
    lines += [
        "",
        "The command line wins over the config, and a config over those in its _base_. A short option and the dotted path that",
        "it stands for are one setting: two different values on the command line are refused. None: not given.",
        "",
        "examples:",
        examples,
        "",
        "exit codes:",
    ]
    return "\n".join([*lines, *(f"  {code}  {text}" for code, text in codes.items())])
