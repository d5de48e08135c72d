"""tools/benchmark.py: what it reports and refuses. How fast anything is, no test says."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tiny_runs import write_images

from hgkd.api import benchmark as benchmark_api
from hgkd.cli import benchmark
from hgkd.sparse import CellLayout

ROOT = Path(__file__).parents[2]

SPARSE = ["sparse", "--student", "test_resnet", "--image-size", "64", "--mask-ratio", "0.75", "--batch-size", "2"]
TINY = {
    "teacher": "vit_tiny_patch16_224",
    "student": "test_resnet",
    "image_size": 64,
    "model.teacher.allow_random": True,
    "model.teacher.depth": 2,
    "model.teacher.embed_dim": 32,
    "model.teacher.num_heads": 2,
    "model.objectives.hgkd.block": 1,
    "model.objectives.pooled.block": 1,
    "model.student.decoder_width": 32,
}


def test_sparse_writes_the_promised_json(tmp_path, capsys) -> None:
    backends = ["--backends", "gather", "masked", "dense", "--repeats", "1", "--clock", "cpu"]
    assert benchmark.main([*SPARSE, *backends, "--json", str(tmp_path / "out.json")]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["limit"] == 4.0
    assert result["settings"]["visible_cells"] == [1, 4]
    assert [row["backend"] for row in result["results"]] == ["gather", "masked", "dense"]
    steps = {row["backend"]: row["step_ms"] for row in result["results"]}
    for row in result["results"]:
        assert row["images_per_s"] == pytest.approx(2e3 / row["step_ms"])
        assert row["speedup_over"] == pytest.approx({b: t / row["step_ms"] for b, t in steps.items() if b != row["backend"]})
        assert row["peak_mb"] > 0
        assert (row["index_share"] > 0) == (row["backend"] != "dense")
    assert "FLOP limit 4.00x" in capsys.readouterr().out


def test_sparse_measures_rectangles(tmp_path, capsys, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(benchmark_api, "encoder_step", lambda network, images, visible, *_: lambda: seen.append(visible()))
    command = ["sparse", "--student", "test_resnet", "--image-size", "96", "--batch-size", "2", "--mask", "rectangle"]
    rest = ["--backends", "gather", "--repeats", "1", "--json", str(tmp_path / "out.json")]
    assert benchmark.main([*command, "--mask-ratio", "0.55", *rest]) == 0
    # said of the layout, not found out from the mask, which a GPU would not do
    assert {vars(layout)["rectangle"] for layout in seen} == {(2, 2)}
    assert "4/9 visible in one rectangle (FLOP limit 2.25x)" in " ".join(capsys.readouterr().out.split())
    assert benchmark.main([*command, "--mask-ratio", "0.45", *rest]) == 2
    assert "no rectangle on a 3 x 3 grid shows 5 cells" in capsys.readouterr().err


def test_peak_memory_counts_live_tensors_only() -> None:
    def step() -> None:
        for _ in range(3):
            torch.zeros(2**18)  # 1 MB, gone at once
        kept = [torch.zeros(2**18) for _ in range(2)]
        there_before.view(2, -1).t().add_(1)  # no new memory
        del kept

    there_before = torch.zeros(2**20)
    assert benchmark_api._peak_mb(step, cuda=False) == 2.0


def test_index_clock_counts_nested_building_once() -> None:
    now = iter(range(100))
    layout = CellLayout(torch.ones(1, 2, 2, dtype=torch.bool), 4)
    clock = benchmark_api._IndexClock(lambda: next(now))
    with clock.running():
        layout.keep("outer", lambda: layout.keep("inner", lambda: 1))
    assert clock.seconds == 2  # readings 0 and 2; the start of the inner one, 1, lies within
    layout.keep("later", lambda: 1)
    assert clock.seconds == 2


def test_distill_measures_a_recipe(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    recipe = ROOT / "configs/hgkd/hgkd_vit-s14_resnet18_10e_cifar128.py"
    folders = {key: str(tmp_path / "images") for key in ("data_root", "val_train_root", "val_test_root")}
    result = benchmark_api.benchmark_distill(recipe, {**TINY, **folders}, batch_size=2, backends=["gather", "dense"], repeats=1)
    assert [row["backend"] for row in result["results"]] == ["gather", "dense"]
    assert result["settings"]["visible_cells"] == [2, 4]
    assert result["limit"] == 2.0
    assert result["results"][0]["index_share"] > 0
    assert not list(tmp_path.glob("work_dirs/**/*.*")), "nothing is trained, logged or cached"


def test_variants_of_a_recipe_are_rows_of_the_table(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    recipe = str(ROOT / "configs/hgkd/hgkd_vit-s14_resnet18_10e_cifar128.py")
    folders = {key: str(tmp_path / "images") for key in ("data_root", "val_train_root", "val_test_root")}
    options = [f"{key}={value}" for key, value in {**TINY, **folders}.items()]
    command = ["distill", recipe, "--batch-size", "2", "--repeats", "1", "--backends", "gather", "--cfg-options", *options]
    command += [
        "--variant",
        "two",
        "masks_per_image=2",
        "--variant",
        "pair",
        "mask_ratio=[0,0.5]",
        "model.student.renormalize=True",
    ]
    assert benchmark.main([*command, "--json", "out.json"]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [row["backend"] for row in rows] == ["gather", "two", "pair"]
    assert rows[1]["speedup_over"].keys() == {"gather", "pair"}
    assert all(row["images_per_s"] > 0 for row in rows)
    printed = capsys.readouterr().out
    assert "…" not in printed, "nothing is cut off, however many rows there are"
    assert printed.count("over gather") == 1
    assert "over two" not in printed
    for given, code in ((["two"], "takes a name and KEY=VALUE"), (["gather", "seed=1"], "has the name of a backend")):
        assert benchmark.main([*command[:8], "--cfg-options", *options, "--variant", *given]) == 2
        assert code in capsys.readouterr().err


def test_a_variant_has_the_channels_of_its_recipe(tmp_path) -> None:
    recipe = ROOT / "configs/hgkd/hgkd_vit-s14_resnet18_10e_cifar128.py"
    folders = dict.fromkeys(("data_root", "val_train_root", "val_test_root"), str(tmp_path))
    infrared = {"in_chans": 4, "teacher_channels": [2, 1, 0], "value_range": [0, 255]}
    infrared["model.student.normalize"] = [[0.5] * 4, [0.25] * 4]
    result = benchmark_api.benchmark_distill(
        recipe, {**TINY, **folders, **infrared}, 2, ["gather"], repeats=1, variants={"dense": {"mask_ratio": 0.0}}
    )
    assert [row["backend"] for row in result["results"]] == ["gather", "dense"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sparse", "--student", "resnet81"], "unknown student 'resnet81'; did you mean"),
        (["sparse", "--student", "resnet18", "--image-size", "100"], "100"),
        (["distill", "configs/mae/mae_tiny_shapes.py"], "measures recipes of a MaskedDistiller"),
        (["distill", "configs/none.py"], "none.py"),
    ],
)
def test_refusals(arguments, message: str, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    assert benchmark.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_data_rates_are_told_against_decoding(tmp_path, capsys) -> None:
    images = write_images(tmp_path / "images", each=4, size=32)
    command = ["data", "--data-root", str(images), "--image-size", "16", "--workers", "1", "--repeats", "1", "--images", "6"]
    assert benchmark.main([*command, "--json", str(tmp_path / "out.json")]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    written = {"shards of 256 px": "webdataset", "Parquet": "pyarrow"}
    forms = [f"data set, {what}" for what, library in written.items() if importlib.util.find_spec(library)]
    measured = ["decoding", "decoding, scaled", "data set", "data set, scaled decoding", *forms, "loader, 1 processes"]
    assert [row["what"] for row in result["results"]] == measured
    rates = [row["images_per_s"] for row in result["results"]]
    assert [row["of_decoding"] for row in result["results"]] == pytest.approx([rate / rates[0] for rate in rates])
    assert result["settings"]["images"] == 6
    assert "of decoding" in capsys.readouterr().out
    assert benchmark.main(["data", "--data-root", str(tmp_path / "gone")]) == 2
    assert "gone does not exist" in capsys.readouterr().err
    assert benchmark.main([*command, "--workers", "0"]) == 2
    assert "must be 1 or more, got 0" in capsys.readouterr().err
