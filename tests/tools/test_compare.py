"""tools/compare.py: plans, the order of runs, the table, and one small comparison from training to table."""

import csv
import dataclasses
import json
import re
from pathlib import Path

import pytest
from mmengine.config import Config
from PIL import Image
from refusals import refused

from hgkd.api import compare as api
from hgkd.api import train as train_tool
from hgkd.cli import compare as tool
from hgkd.cli import evaluate as evaluate_command
from hgkd.cli import train as train_command
from hgkd.data.shapes import write_imagefolder
from hgkd.errors import StoppedError, code_of
from hgkd.training.loop import StopSignals

ROOT = Path(__file__).parents[2]
SPARK = "configs/spark/spark_resnet18_shapes.py"


EVALUATE = 'evaluate = dict(methods=["knn"], train="{data}/train", test="{data}/test", image_size=64, workers=0)\n'


def plan_file(tmp_path, rows, options="{}"):
    file = tmp_path / "plan.py"
    file.write_text(f"rows = {rows}\noptions = {options}\n{EVALUATE}")
    return file


def test_values_are_filled_in_everywhere(tmp_path):
    file = plan_file(tmp_path, [{"name": "a", "config": SPARK}], {"data_root": "{data}/train", "limit": 3})
    plan = api.read_plan(file, {"data": "/x"})
    assert plan["options"] == {"data_root": "/x/train", "limit": 3}
    assert plan["evaluate"]["test"] == "/x/test"


def test_a_plan_may_be_yaml(tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text(f'rows: [{{name: a, config: {SPARK}, seeds: [0, 1]}}]\nscores: {{"top-1 %": accuracy/top1}}\n')
    assert [job.seed for job in api.jobs_of(api.read_plan(file, {}), tmp_path)] == [0, 1]


@pytest.mark.parametrize(
    ("rows", "values", "refusal"),
    [
        ([{"name": "a", "config": SPARK}], {}, ("plan-value-missing", "data", "--set", "data=")),
        ([], {"data": "/x"}, ("plan-row-names",)),
        ([{"name": "a", "config": SPARK}] * 2, {"data": "/x"}, ("plan-row-names", "a")),
        ([{"name": "a", "config": SPARK, "seed": 1}], {"data": "/x"}, ("plan-row-key-unknown", "a", "seed")),
        ([{"name": "a"}], {"data": "/x"}, ("plan-row-kind-unclear", "a")),
        ([{"name": "a", "config": SPARK, "backbone": "resnet18"}], {"data": "/x"}, ("plan-row-kind-unclear", "a")),
    ],
)
def test_a_plan_that_is_wrong_is_refused(tmp_path, rows, values, refusal):
    with refused(ValueError, *refusal):
        api.read_plan(plan_file(tmp_path, rows), values)


def test_slips_are_told_before_the_first_run(tmp_path, monkeypatch, capsys):
    rows = [{"name": "a+b", "config": SPARK}, {"name": "a b", "config": SPARK}]
    file = plan_file(tmp_path, rows)
    with refused(ValueError, "plan-folder-shared", "a+b", "a_b_seed0"):
        api.jobs_of(api.read_plan(file, {"data": "/x"}), tmp_path)
    monkeypatch.chdir(tmp_path)  # a recipe of this project is found from everywhere
    assert api.read_plan(file, {"data": "/x"})["rows"][0]["config"] == str(ROOT / SPARK)
    file = plan_file(tmp_path, [{"name": "a", "config": "configs/gone.py"}])
    with refused(FileNotFoundError, "plan-row-file-missing", "a", "configs/gone.py"):
        api.read_plan(file, {"data": "/x"})
    assert tool.main([str(file), "--work-dir", "out", "--jobs", "0", "--set", "data=/x"]) == 2
    assert "jobs is the number of runs at a time, 1 or more, got 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "refusal"),
    [
        ({"image_sise": 64}, ("plan-evaluate-key-unknown", "'a'", "'image_sise'", "'image_size'")),
        ({"json": "x"}, ("plan-evaluate-key-unknown", "'json'")),
        ({"methods": None}, ("plan-evaluate-incomplete", "'a'", "methods")),
        ({"test": None}, ("plan-evaluate-incomplete", "test")),
        ({"methods": ["k-NN"]}, ("plan-evaluate-methods", "'a'", "'k-NN'", "'knn'")),
        ({"methods": "knn"}, ("plan-evaluate-methods", "['knn']")),
        ({"finetune_options": {"image_size": 96}}, ("plan-evaluate-finetune-options", "'a'", "image_size=96")),
        ({"finetune_options": "epochs=2"}, ("plan-evaluate-value", "'a'", "finetune_options='epochs=2'", "a dict or None")),
        ({"image_size": "big"}, ("plan-evaluate-value", "'a'", "image_size='big'", "a whole number")),
        ({"image_size": [64, 96]}, ("plan-evaluate-value", "image_size=[64, 96]", "a whole number")),
        ({"workers": 1.5}, ("plan-evaluate-value", "workers=1.5", "a whole number")),
        ({"batch_size": True}, ("plan-evaluate-value", "batch_size=True", "a whole number")),
        ({"k": [5, "ten"]}, ("plan-evaluate-value", "k=[5, 'ten']", "a list, each of it a whole number")),
        ({"pretrained": "yes"}, ("plan-evaluate-value", "pretrained='yes'", "True or False")),
        ({"test": ["y", "z"]}, ("plan-evaluate-value", "test=['y', 'z']", "a text")),
    ],
)
def test_what_hgkd_evaluate_would_refuse_is_told_before_the_first_run(tmp_path, arguments, refusal):
    evaluate = {"methods": ["knn"], "train": "x", "test": "y", **arguments}
    row = {"name": "a", "config": SPARK, "evaluate": {key: value for key, value in evaluate.items() if value}}
    with refused(ValueError, *refusal):
        api.read_plan(plan_file(tmp_path, [row]), {"data": "/x"})


def test_values_of_evaluate_that_come_from_the_command_line_are_texts(tmp_path):
    texts = {"image_size": "{size}", "k": "5", "temperature": "0.1", "limit_per_class": "1{seed}", "value_range": ["0", "4095"]}
    row = {"name": "a", "config": SPARK, "evaluate": {"methods": ["knn"], "train": "{here}/x", "test": "y", **texts}}
    (job,) = api.jobs_of(api.read_plan(plan_file(tmp_path, [row]), {"data": "/x", "size": "64"}), tmp_path)
    assert (job.evaluate["image_size"], job.evaluate["limit_per_class"]) == ("64", "10")


def test_arguments_of_evaluate_arrive_as_they_were_meant(tmp_path):
    numbers = {"ks": [5, 10], "shots": (1, 5), "c_grid": [0.1, 1.0], "value_range": [0, 4095], "image_size": 64}
    options = {"epochs": 2, "student": "007", "a.b": [1, None], "data_root": "/my pictures"}
    switches = {"standardise": False, "pretrained": True, "block": None}
    arguments = {"methods": ["knn", "fewshot"], "backbone": "resnet18", "train": "my data", "test": "b", **numbers, **switches}
    command = api._evaluate_command({**arguments, "finetune_options": options}, tmp_path / "out.json")
    read = vars(evaluate_command.parse_args(command[1:]))
    found = {key: tuple(value) if isinstance(value, list) else value for key, value in read.items()}
    expected = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
    assert {key: found[key] for key in expected} == expected
    assert read["finetune_options"] == options
    assert read["json"] == str(tmp_path / "out.json")
    plain = {"methods": ["knn"], "backbone": "a", "train": "b", "test": "c", "k": 3, "finetune_options": {}}
    read = evaluate_command.parse_args(api._evaluate_command({**plain, "standardise": True, "pretrained": False}, tmp_path)[1:])
    assert (read.ks, read.standardise, read.pretrained, read.finetune_options) == ([3], True, False, None)


def test_options_arrive_as_they_were_meant(tmp_path):
    options = {
        "data_root": "/my pictures/2024, new",
        "seed": 0,
        "a.b": [0.2, None, "x y"],
        "c": "007",
        "d": (1, [2]),
        "e": None,
    }
    job = api.Job("a", 0, tmp_path, SPARK, options, {}, {})
    read = train_command.parse_args(job.train_command[1:]).cfg_options
    assert read == {**options, "d": [1, [2]]}


def test_a_plan_with_an_unknown_key_or_without_a_file_is_refused(tmp_path):
    file = plan_file(tmp_path, [{"name": "a", "config": SPARK}])
    file.write_text(file.read_text() + "seeds = [0]\n")
    with refused(ValueError, "plan-key-unknown", "seeds"):
        api.read_plan(file, {"data": "/x"})
    with refused(FileNotFoundError, "recipe-missing", "no.py"):
        api.read_plan(tmp_path / "no.py", {})


def test_runs_go_seed_by_seed_and_a_row_overrides_the_shared_options(tmp_path):
    rows = [
        {"name": "a", "config": SPARK, "seeds": [0, 1], "options": {"epochs": 2}},
        {"name": "b", "config": SPARK, "seeds": [0, 1]},
        {"name": "random", "backbone": "resnet18"},
    ]
    plan = api.read_plan(plan_file(tmp_path, rows, {"epochs": 5}), {"data": "/x"})
    jobs = api.jobs_of(plan, tmp_path)
    assert [(job.row, job.seed) for job in jobs] == [("a", 0), ("b", 0), ("random", 0), ("a", 1), ("b", 1)]
    assert [job.options.get("epochs") for job in jobs] == [2, 5, None, 2, 5]
    assert jobs[3].train_command[-2:] == ["epochs=2", "seed=1"]
    assert jobs[2].evaluate["backbone"] == "resnet18"
    assert [job.row for job in api.jobs_of(plan, tmp_path, ["b"])] == ["b", "b"]
    with refused(ValueError, "plan-row-unknown", "c"):
        api.jobs_of(plan, tmp_path, ["c"])


def test_some_seeds_of_a_plan_with_what_they_start_from(tmp_path):
    rows = [
        {"name": "teacher", "config": SPARK},
        {"name": "student", "config": SPARK, "seeds": [0, 1, 2], "after": "teacher"},
        {"name": "tuned", "config": SPARK, "seeds": [0, 1, 2], "after": "student"},
    ]
    plan = api.read_plan(plan_file(tmp_path, rows), {"data": "/x"})
    jobs = api.jobs_of(plan, tmp_path, seeds=[2, 1])
    assert [(job.row, job.seed) for job in jobs] == [
        ("teacher", 0),  # has neither, and is what the others start from
        ("student", 1),
        ("tuned", 1),
        ("student", 2),
        ("tuned", 2),
    ]
    whole = {job.folder: job for job in api.jobs_of(plan, tmp_path)}
    assert all(whole[job.folder] == job for job in jobs)  # so that another seed may be added later
    with refused(ValueError, "plan-seed-unknown", 3, "0, 1, 2"):
        api.jobs_of(plan, tmp_path, seeds=[1, 3])


def test_a_row_waits_for_those_that_it_starts_from(tmp_path):
    rows = [
        {"name": "teacher", "config": SPARK},
        {"name": "student", "config": SPARK, "seeds": [0, 1], "after": "teacher", "options": {"a": "{here}/teacher_seed0"}},
        {"name": "tuned", "config": SPARK, "seeds": [0, 1], "after": ["student"], "scores": {"top-1 %": "accuracy/top1"}},
        {"name": "alone", "backbone": "resnet18", "seeds": [0, 1]},
    ]
    todo = api.jobs_of(api.read_plan(plan_file(tmp_path, rows), {"data": "/x"}), tmp_path)
    by_name = {(job.row, job.seed): job for job in todo}
    assert by_name["student", 1].after == (tmp_path / "teacher_seed0",)  # the teacher has one seed
    assert by_name["tuned", 1].after == (tmp_path / "student_seed1",)
    assert by_name["student", 1].options["a"] == f"{tmp_path}/teacher_seed0"
    assert by_name["tuned", 0].scores
    assert not by_name["tuned", 0].evaluate
    assert by_name["student", 0].evaluate["methods"] == ["knn"]

    ended = []

    def attempt(job):
        assert all(folder in ended for folder in job.after)
        ended.append(job.folder)
        return {}

    assert {(job.row, job.seed) for job, _ in api._in_turn(todo, attempt, 2)} == set(by_name)

    def failing(job):
        return StoppedError("run-failed", "no") if (job.row, job.seed) == ("student", 1) else attempt(job)

    ended.clear()
    outcomes = {(job.row, job.seed): outcome for job, outcome in api._in_turn(todo, failing, 2)}
    lost = {key for key, outcome in outcomes.items() if isinstance(outcome, StoppedError)}
    assert lost == {("student", 1), ("tuned", 1)}
    assert code_of(outcomes["tuned", 1]) == "run-before-failed"
    assert "student_seed1" in str(outcomes["tuned", 1])
    only = api.jobs_of(api.read_plan(plan_file(tmp_path, rows), {"data": "/x"}), tmp_path, ["tuned"])
    assert len(list(api._in_turn(only, lambda job: {}, 1))) == 2  # what is not done here is taken as it is


def test_a_row_after_one_below_it_and_one_measured_twice_are_refused(tmp_path):
    rows = [{"name": "a", "config": SPARK, "after": "b"}, {"name": "b", "config": SPARK}]
    with refused(ValueError, "plan-row-order", "'a'", "'b'"):
        api.read_plan(plan_file(tmp_path, rows), {"data": "/x"})
    rows = [{"name": "a", "config": SPARK, "scores": {"x": "y"}, "evaluate": {"methods": ["knn"]}}]
    with refused(ValueError, "plan-kind-unclear", "'a'"):
        api.read_plan(plan_file(tmp_path, rows), {"data": "/x"})


def test_table_of_rows_that_are_measured_in_different_ways():
    results = [
        {"row": "a", "seed": 0, "scores": {"knn": {"top1": 30.0, "ci95": [29.0, 31.0]}}, "command": "hgkd train a"},
        {"row": "b", "seed": 0, "scores": {"AP": {"value": 12.0}}, "curves": {"AP": [[1, 5.0], [2, 12.0]]}, "command": "b"},
    ]
    lines = api.table_of(results).splitlines()
    assert lines[0].startswith("| row | knn top-1 % | AP | seeds |")
    assert lines[2:4] == ["| a | 30.0 (29.0 .. 31.0) |  | 1 |  |  |  |  |", "| b |  | 12.0 | 1 |  |  |  |  |"]
    assert "- b: 5.0, 12.0" in lines
    assert not any(line.startswith("- a:") for line in lines)


def test_table_by_hand():
    def result(row, seed, top1, **extra):
        return {"row": row, "seed": seed, "scores": {"knn": {"top1": top1, "ci95": [top1 - 1, top1 + 1]}}, **extra}

    timed = {"train_seconds": 10.0, "train_cpu_seconds": 19.6, "images_per_s": 42.4, "teacher_share": 0.31}
    timed["command"] = "hgkd train x"
    resumed = {**timed, "train_seconds": 1.0, "resumed": True}
    table = api.table_of(
        [
            result("random", 0, 20.0, evaluate_command="hgkd evaluate"),
            result("a", 0, 30.0, **timed),
            result("a", 1, 34.0, **resumed),
        ]
    )
    assert table.splitlines()[2:4] == [
        "| random | 20.0 (19.0 .. 21.0) | 1 |  |  |  |  |",
        "| a | 32.0 +- 2.8 | 2 | 10 | 20 | 42 | 31 |",  # time: of the run that was not interrupted
    ]
    assert "    hgkd train x" in table


def test_plans_of_detectors_and_segmentors(tmp_path):
    values = dict.fromkeys(("data", "pixels", "hgkd", "dense", "teacher"), "/x")
    for name in ("bccd", "camvid", "bccd_mgd", "camvid_mgd"):
        jobs = api.jobs_of(api.read_plan(ROOT / f"configs/comparisons/{name}.py", values), tmp_path)
        assert {job.seed for job in jobs} == {0, 1, 2}
        assert all((ROOT / job.config).is_file() for job in jobs)
    job = api.jobs_of(api.read_plan(ROOT / "configs/comparisons/bccd.py", values), tmp_path, ["pixels"])[1]
    assert {"--cfg-options", "data_root=/x", "backbone=/x", "seed=1"} <= set(job.train_command)


def test_a_run_gets_no_more_threads_than_its_caller_allows_and_the_result_says_how_many(tmp_path, monkeypatch):
    seen = {}

    def start(command, env, **_):
        seen.update(env)
        raise KeyboardInterrupt

    monkeypatch.setattr(api.os, "cpu_count", lambda: 8)
    for allowed, given in ((None, 4), ("1", 1), ("9", 4), ("4,2", 4), ("", 4)):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if allowed is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", allowed)
        assert api.threads_of(jobs=2) == given
    assert api.threads_of(jobs=9) == 1
    monkeypatch.setattr(api.subprocess, "Popen", start)
    with pytest.raises(KeyboardInterrupt):
        api._process(["tools/train.py"], tmp_path / "log", threads=3)
    assert seen["OMP_NUM_THREADS"] == "3"


def test_a_score_may_have_a_factor(tmp_path):
    log = tmp_path / "x/vis_data/scalars.json"
    log.parent.mkdir(parents=True)
    log.write_text('{"coco/bbox_mAP": 0.125, "step": 3}\n{"coco/bbox_mAP": 0.25, "step": 6}\n')
    found = api._log(api.Job("a", 0, tmp_path, "x.py", {}, {}, {"box AP": ["coco/bbox_mAP", 100]}))
    assert found["curves"] == {"box AP": [[3, 12.5], [6, 25.0]]}


def test_a_validation_that_finds_nothing_counts_as_nothing(tmp_path):
    """Of a detector without a single detection mmdet logs no score; an earlier epoch's is not its."""
    job = api.Job("a", 0, tmp_path, "x.py", {}, {}, {"box AP": ["coco/bbox_mAP", 100]})
    log = tmp_path / "x/vis_data/scalars.json"
    log.parent.mkdir(parents=True)
    first, nothing = '{"coco/bbox_mAP": 0.125, "step": 3}\n', '{"data_time": 0.1, "time": 0.2, "step": 6}\n'
    log.write_text(first + '{"lr": 0.1, "loss": 1.0, "step": 5}\n' + nothing)
    found = api._log(job)
    assert found["curves"] == {"box AP": [[3, 12.5], [6, 0.0]]}
    assert found["found_nothing"] == [6]
    result = {"row": "a", "seed": 0, "command": "c", "scores": {"box AP": {"value": 0.0}}, **found}
    assert "- a, seed 0: nothing was found in the validation at 6, which counts as 0" in api.table_of([result])
    log.write_text(first + nothing + nothing.replace("}", ', "coco/bbox_mAP": 0.5}'))  # resumed, and then it found something
    assert api._log(job)["curves"] == {"box AP": [[3, 12.5], [6, 50.0]]}
    log.write_text(nothing)
    with refused(StoppedError, "score-not-logged"):
        api._log(job)
    log.write_text(first + '{"mIoU": 0.5, "step": 6}\n')
    with refused(StoppedError, "score-not-in-last-validation", "6", "coco/bbox_mAP", "mIoU"):
        api._log(job)


def test_from_training_to_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_imagefolder("shapes", train=24, test=8, image_size=64)
    options = {
        "student": "test_resnet",
        "data_root": "{data}/train",
        "val_train_root": None,
        "val_test_root": None,
        "image_size": 64,
        "batch_size": 8,
        "workers": 0,
        "epochs": 1,
        "warmup_epochs": 0,
        "model.student.decoder_width": 32,
    }
    rows = [{"name": "pixels", "config": str(ROOT / SPARK)}, {"name": "random", "backbone": "test_resnet"}]
    file = plan_file(tmp_path, rows, options)
    file.write_text(file.read_text().replace("workers=0", "workers=0, k=3"))
    command = [str(file), "--work-dir", "out", "--set", "data=shapes", "--cfg-options", "limit=16"]
    assert tool.main(command) == 0
    results = json.loads(Path("out/results.json").read_text())
    assert "limit=16 seed=0" in results[0]["command"]
    assert [r["row"] for r in results] == ["pixels", "random"]
    assert results[0]["train_seconds"] > 0
    assert results[0]["images_per_s"] > 0
    table = Path("out/table.md").read_text()
    assert table in capsys.readouterr().out
    assert results[0]["images"] == 16  # one epoch of as many as --cfg-options allows
    lines = list(csv.DictReader(Path("out/table.csv").read_text().splitlines()))
    assert [line["row"] for line in lines] == ["pixels", "random"]
    assert float(lines[0]["knn"]) == results[0]["scores"]["knn"]["top1"]
    with Image.open("out/picture.png") as picture:
        assert picture.format == "PNG"
    # a second call repeats nothing; another setting in the same folder is refused
    checkpoint = Path(Path("out/pixels_seed0/last_checkpoint").read_text())
    before = checkpoint.stat().st_mtime_ns
    assert tool.main(command) == 0
    assert checkpoint.stat().st_mtime_ns == before
    # of some rows alone: the table has the others, too, as far as they are complete and of the same setting
    assert tool.main([*command, "--only", "random"]) == 0
    assert Path("out/table.md").read_text() == table
    file.write_text(file.read_text().replace("'epochs': 1", "'epochs': 2"))
    assert tool.main([*command, "--only", "random"]) == 0
    assert "pixels seed 0: not in the table, out/pixels_seed0 holds a run with another setting" in capsys.readouterr().out
    assert [r["row"] for r in json.loads(Path("out/results.json").read_text())] == ["random"]
    assert tool.main(command) == 2
    assert "holds a run with another setting" in capsys.readouterr().err


def test_a_run_that_fails_names_its_log(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_imagefolder("shapes", train=24, test=8, image_size=64)
    file = plan_file(tmp_path, [{"name": "no", "backbone": "resnet_eighteen"}])
    assert tool.main([str(file), "--work-dir", "out", "--set", "data=shapes"]) == 2
    assert "evaluate ended with 2; see out/no_seed0/evaluate.log: error: unknown" in capsys.readouterr().err
    assert "resnet_eighteen" in Path("out/no_seed0/evaluate.log").read_text()
    # the other runs are finished and in the table all the same
    monkeypatch.setenv("HOME", str(tmp_path))
    file = plan_file(tmp_path, [{"name": "no", "backbone": "resnet_eighteen"}, {"name": "yes", "backbone": "test_resnet"}])
    assert tool.main([str(file), "--work-dir", "~/out", "--set", "data=shapes"]) == 2
    assert "1 of 2 runs failed: evaluate ended with 2" in capsys.readouterr().err
    assert [run["row"] for run in json.loads(Path("out/results.json").read_text())] == ["yes"]
    assert tool.main([str(file), "--work-dir", "out", "--set", "data"]) == 2
    assert "--set takes NAME=VALUE, got ['data']" in capsys.readouterr().err


SCORES = 'scores = {"top-1 %": "accuracy/top1"}\n'


def test_runs_that_measure_themselves_from_training_to_the_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_imagefolder("shapes", train=16, test=8, image_size=64)
    options = {"student": "test_resnet", "data_root": "{data}/train", "val_root": "{data}/test", "num_classes": 8}
    options |= {"image_size": 64, "batch_size": 8, "workers": 0, "epochs": 2, "warmup_epochs": 0, "train_cfg.val_interval": 1}
    config = str(ROOT / "downstream/classification/resnet18_10e_cifar128.py")
    plan = tmp_path / "plan.py"
    plan.write_text(f"rows = [dict(name='fine-tuned', config={config!r}, seeds=[1])]\noptions = {options}\n{SCORES}")
    assert tool.main([str(plan), "--work-dir", "out", "--set", "data=shapes"]) == 0
    (result,) = json.loads(Path("out/results.json").read_text())
    curve = result["curves"]["top-1 %"]
    assert [step for step, _ in curve] == [1, 2]
    assert result["scores"] == {"top-1 %": {"value": curve[-1][1]}}
    table = Path("out/table.md").read_text()
    assert f"| fine-tuned | {curve[-1][1]:.1f} | 1 |" in table
    assert f"- fine-tuned: {curve[0][1]:.1f}, {curve[1][1]:.1f}" in table
    misspelt = api.Job("fine-tuned", 1, Path("out/fine-tuned_seed1"), config, {}, {}, {"top-1 %": "accuracy/top_1"})
    with refused(StoppedError, "score-not-logged", "accuracy/top_1", "accuracy/top1", "accuracy/top5"):
        api._log(misspelt)


def test_a_run_knows_its_seed_and_a_plan_measures_in_one_way(tmp_path):
    file = tmp_path / "plan.py"
    rows = [{"name": "a", "config": SPARK, "seeds": [0, 2], "options": {"backbone": "{runs}/H-GKD_seed{seed}"}}]
    file.write_text(f"rows = {rows}\n{SCORES}")
    jobs = api.jobs_of(api.read_plan(file, {"runs": "/r"}), tmp_path)
    assert [job.options["backbone"] for job in jobs] == ["/r/H-GKD_seed0", "/r/H-GKD_seed2"]
    assert [job.scores for job in jobs] == [{"top-1 %": "accuracy/top1"}] * 2
    file.write_text(f"rows = {rows}\n{SCORES}{EVALUATE}")
    with refused(ValueError, "plan-kind-unclear"):
        api.read_plan(file, {"runs": "/r", "data": "/x"})
    file.write_text(f"rows = [dict(name='a', backbone='resnet18')]\n{SCORES}")
    with refused(ValueError, "plan-row-without-config", "a"):
        api.read_plan(file, {})


def test_table_of_runs_that_measured_themselves_by_hand():
    def result(seed, *values):
        curve = [[epoch, value] for epoch, value in enumerate(values, 1)]
        return {
            "row": "a",
            "seed": seed,
            "command": "c",
            "scores": {"box AP": {"value": values[-1]}},
            "curves": {"box AP": curve},
        }

    lines = api.table_of([result(0, 10.0, 20.0), result(1, 20.0, 24.0)]).splitlines()
    assert lines[0].startswith("| row | box AP | seeds |")
    assert lines[2].startswith("| a | 22.0 +- 2.8 | 2 |")
    assert "- a: 15.0, 22.0" in lines


@pytest.mark.parametrize("plan", sorted((ROOT / "configs/comparisons").glob("*.py")), ids=lambda path: path.stem)
def test_every_run_of_a_shipped_plan_has_a_config_that_takes_its_options(plan, tmp_path):
    names = set(re.findall(r"\{(\w+)\}", Config.fromfile(plan).text))  # of the files that it starts from as well
    for job in api.jobs_of(api.read_plan(plan, {name: f"/{name}" for name in names}), tmp_path):
        if job.config is not None:
            cfg = train_tool.load_config(ROOT / job.config, options=job.options)
            assert "epochs" not in job.options or cfg.train_cfg.max_epochs == job.options["epochs"]
            assert not [value for value in job.options.values() if re.search(r"\{\w+\}", str(value))]


def test_half_a_training_is_not_gone_on_with_by_other_options(tmp_path, monkeypatch):
    """A row of the table would be of two settings, and its result would name the second one alone."""
    job = api.Job("a", 0, tmp_path / "a_seed0", "x.py", {"lr": 1e-3, "epochs": 2}, {}, {"top-1": "knn/top1"})
    commands = []

    def stopped(command, log, threads):
        commands.append(command)
        (job.folder / "epoch_1.pth").touch()
        raise StoppedError("run-stopped", "stopped")

    monkeypatch.setattr(api, "_process", stopped)
    with refused(StoppedError, "run-stopped"):
        api.run(job, 1)
    other = dataclasses.replace(job, options={"lr": 1e-2, "epochs": 2})
    with refused(StoppedError, "run-setting-changed", "a_seed0", "lr 0.001 -> 0.01"):
        api.run(other, 1)
    with refused(StoppedError, "run-stopped"):
        api.run(job, 1)
    assert [("--resume" in command) for command in commands] == [False, True]
    (job.folder / "epoch_1.pth").unlink()  # nothing was trained that could be gone on with
    with refused(StoppedError, "run-stopped"):
        api.run(other, 1)


def test_a_training_that_a_signal_stopped_is_no_row(tmp_path):
    log = tmp_path / "train.log"
    said = f"WARNING - {api.STOPPED} (SIGTERM) after epoch 2, step 258; saved epoch_2_step_72.pth, continue with --resume\n"
    log.write_text(said)
    with refused(StoppedError, "run-stopped", str(log), "goes on"):
        api._refuse_stopped("train", log, 0)
    log.write_text(said + "a later start that came to its end\n")
    api._refuse_stopped("train", log, len(said))
    assert StopSignals().said.startswith(api.STOPPED)
    for loops in ("training/loop.py", "openmmlab/loops.py"):  # which write that line
        assert 'f"{self._signals.said} after' in (ROOT / "hgkd" / loops).read_text(encoding="utf-8")
