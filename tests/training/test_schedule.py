"""The two halves of a schedule, and what becomes of a warm-up in a very short training."""

import pytest
from tiny_runs import SPARK, tiny, write_images

from hgkd.cli import train as train_command
from hgkd.config.schedule import rate_entries, shorter_warmup, without_empty_warmup

LINEAR, COSINE = dict(type="LinearLR", begin=0), dict(type="CosineAnnealingLR")
DECAY = dict(type="CosineAnnealingParamScheduler", param_name="weight_decay")


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ([LINEAR, COSINE], (0, 1)),
        ([LINEAR, COSINE, DECAY], (0, 1)),
        ([DECAY, LINEAR, COSINE], (1, 2)),
        ([COSINE, DECAY], (None, 0)),
        ([DECAY], (None, None)),
        ([dict(type="LinearParamScheduler", param_name="lr"), COSINE], (0, 1)),
        ([], (None, None)),
        (None, (None, None)),
        (dict(type="PolyLR"), (None, None)),
    ],
)
def test_which_entry_is_the_warm_up(schedule, expected):
    assert rate_entries(schedule) == expected


def test_a_shorter_warm_up():
    assert [shorter_warmup(1, whole=False), shorter_warmup(25, whole=True), shorter_warmup(9, whole=True)] == [0.1, 2, 0]


@pytest.mark.parametrize(("end", "steps", "kept"), [(0.1, 9, False), (0.1, 10, True), (1, 1, True), (0.25, 3, False)])
def test_a_warm_up_below_one_step(end, steps, kept):
    schedule = [dict(LINEAR, end=end, by_epoch=True, convert_to_iter_based=True), COSINE]
    assert without_empty_warmup(schedule, steps) == (schedule if kept else [COSINE])
    plain = [dict(LINEAR, end=end), COSINE]  # counted in epochs, mmengine's own affair
    assert without_empty_warmup(plain, steps) is plain


@pytest.mark.parametrize("count", [2, 12])
def test_one_epoch_is_all_that_needs_to_be_said(count, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = write_images(tmp_path / "images", each=count)
    options = tiny(images, epochs=1, batch_size=2, val_train_root=None, val_test_root=None)
    options.pop("warmup_epochs")
    arguments = [f"{key}={value}" for key, value in options.items()]
    recipe = tmp_path / "recipe.py"
    recipe.write_text(f"_base_ = [{str(SPARK)!r}]\nepochs = 10\nwarmup_epochs = 1\n")
    assert train_command.main([str(recipe), "--work-dir", "run", "--cfg-options", *arguments]) == 0
    note = "note: the warm-up of 1 epochs is not shorter than epochs=1: it takes 0.1 now (warmup_epochs=... sets it)"
    assert note in capsys.readouterr().err
    (log,) = (tmp_path / "run").glob("*/*.log")
    steps = count  # two classes, two images a step
    warm_up = "LinearLR from 0.01 of it in steps 1 to 1; " if steps >= 10 else ""
    begin = 2 if steps >= 10 else 1
    assert f"; {warm_up}CosineAnnealingLR to 0 in steps {begin} to {steps}\n" in log.read_text()
    assert ("the warm-up is left out: it is shorter than one step" in log.read_text()) == (steps < 10)
