"""docs/tutorials/first_student.md, run whole at tiny size: what is printed and left is what it shows."""

import sys

import pytest
from tiny_commands import readers_folder, run_command
from tiny_runs import ROOT
from tutorial_pages import run_page

from hgkd.api import demo
from hgkd.data.shapes import CLASSES

PAGE = ROOT / "docs/tutorials/first_student.md"
TOY = demo.Plan(train=168, test=32, teacher_epochs=2, student_epochs=1, probe=8)  # a warm-up of a step; 8 fill no batch
MORE = {
    # the toy's teacher is one of two epochs, which may look untrained
    "train": ["default_hooks.logger.interval=1", "model.student.decoder_width=32", "model.teacher.allow_random=True"],
    "evaluate": ["--limit-per-class", "8"],
}


@pytest.mark.slow
def test_first_student(tmp_path, monkeypatch):
    readers_folder(tmp_path, monkeypatch)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(demo, "FULL", TOY)
    names = run_page(PAGE, lambda words: run_command(words, MORE.get(words[0], [])), values=CLASSES)
    assert names["student"].num_features == names["student"].forward_features(names["images"]).shape[1]
