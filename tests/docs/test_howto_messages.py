"""The messages that the guides quote are those of the code, so that a reader who searches for one finds its page."""

import ast
from functools import cache

import pytest
from tiny_runs import ROOT

QUOTED = {
    "diverges": [
        "far above the first one",
        "the training diverges",
        "the loss jumped to",
        "loss or gradient is not finite at epoch",
        "The step is left out (",
        "training-not-finite",
        "training-diverged",
        "features are collapsing",
        "NOT FINITE again",
        "the first output that is not finite is that of",
        "gradients that are not finite",
        "the images hold values that are not finite",
        "this training diverged",
    ],
    "loss_is_flat": [
        "parameters got no gradient and are not trained",
        "it teaches nothing",
        "has done nothing so far, from step",
        "times the loss of predicting the mean target everywhere",
        "features are collapsing",
        "looks trained",
        "looks random",
        "pixels normalised by",
    ],
    "resume": [
        "was written with other settings; those of this start are in force now",
        "To go on as before, resume with the settings of the first start",
        "resume-past-the-end",
        "work-folder-in-use",
        "work-folder-locked",
        "memory-full",
        "reading-process-killed",
    ],
    "out_of_memory": ["memory-full", "reading-process-killed", "MB at most"],
    "several_gpus": ["stopped by a signal", "work-folder-locked", "--launcher slurm: "],
    "object_stores": ["address-unreachable", "look at the address and the network"],
    "windows_macos": [
        "this system has no file locks that hgkd knows",
        "this machine's Apple GPU is not used, as hgkd was not tried on one",
    ],
}


@cache
def texts_of_the_code() -> frozenset[str]:
    """Every text in hgkd's code, those of f-strings up to the next value."""
    return frozenset(
        node.value
        for file in (ROOT / "hgkd").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


@pytest.mark.parametrize(("page", "message"), [(page, message) for page, all_of in QUOTED.items() for message in all_of])
def test_a_message_that_a_guide_quotes_is_in_the_code(page, message):
    told = " ".join((ROOT / f"docs/howto/{page}.md").read_text(encoding="utf-8").split())
    assert " ".join(message.split()) in told
    assert any(message in text for text in texts_of_the_code()), message
