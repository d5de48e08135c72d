"""The command ``hgkd``: the first argument names the command, the rest is its own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from hgkd import __version__
from hgkd.errors import unknown_name_message

COMMANDS = {
    "train": "train what a config describes: distillation, fine-tuning, detectors, segmentors",
    "test": "measure a trained classifier, detector or segmentor",
    "evaluate": "measure a backbone: k-NN, linear probe, few-shot, fine-tuning",
    "export": "write a student for the library that will load it, and prove it",
    "predict": "run an exported folder on images, a video or a camera",
    "visualize": "pictures of features, attention, reconstructions, predictions",
    "compare": "train and evaluate a plan of several rows and seeds, and write one table",
    "recipes": "list the recipes that are shipped",
    "doctor": "check this machine, or a teacher file",
    "replay": "repeat the steps at which a training diverged",
    "benchmark": "speed and memory of the sparse engine and of reading images",
    "demo": "the main job on generated images, from nothing to a report",
    "make-shapes": "write a data set of generated shapes",
    "make-shards": "pack images into tar shards",
}


def usage() -> str:
    """The page of ``hgkd --help``."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(["usage: hgkd COMMAND [options]", "", *lines, "", "'hgkd COMMAND --help' describes one of them."])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code, 2 for a user's mistake."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(f"hgkd {__version__}")
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        print(f"error: {unknown_name_message('command', name, COMMANDS)}\n\n{usage()}", file=sys.stderr)
        return 2
    sys.argv[0] = f"hgkd {name}"  # what argparse calls the program
    # only the command's own module: others import what this one has no use for
    module = importlib.import_module(f"hgkd.cli.{name.replace('-', '_')}")
    code: int = module.main(rest)
    return code


if __name__ == "__main__":
    sys.exit(main())
