"""A run with two teachers: its dry run, its log, its pictures, and going on with it."""

import torch
from tiny_runs import ROOT, load_tool, tiny, write_images

from hgkd.distillers import MAEPretraining

RECIPE = ROOT / "configs/hgkd/hgkd-two_vit-s14-mae-ti16_resnet18_10e_cifar128.py"
MAE = dict(depth=2, embed_dim=32, num_heads=2, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)


def test_a_run_of_two_teachers_is_told_shown_and_resumed(tmp_path, capsys):
    MAEPretraining(MAE, 64).save_teacher(tmp_path / "mae.safetensors")
    vit = dict(name="vit_tiny_patch16_224", depth=2, embed_dim=32, num_heads=2, allow_random=True)
    options = tiny(write_images(tmp_path / "images"), epochs=1, warmup_epochs=0, val_train_root=None, val_test_root=None)
    options |= {f"model.teachers.dino.{key}": value for key, value in vit.items()}
    options |= {"model.teachers.mae.checkpoint": str(tmp_path / "mae.safetensors"), "model.teachers.mae.allow_random": True}
    options |= {f"model.objectives.{name}.block": 1 for name in ("dino", "pooled", "mae")}
    options |= {"teacher_features": str(tmp_path / "features")}
    work = tmp_path / "run"
    arguments = [str(RECIPE), "--work-dir", str(work), "--cfg-options", *(f"{key}={value}" for key, value in options.items())]
    train = load_tool("train")

    assert train.main([*arguments, "--dry-run"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "teacher dino 0." in told
    assert "teacher mae 0." in told
    assert "teachers dino (timm, 2 blocks, width 32) for dino, pooled; mae (mae, 2 blocks, width 32) for mae" in told

    assert train.main(arguments) == 0
    log = next(work.rglob("*.log")).read_text()
    assert all(f"{term}_share: " in log for term in ("dino_distill", "pooled_pooled", "mae_distill"))
    assert len([file for file in (tmp_path / "features").glob("tokens-*.npy") if ".sums" not in file.name]) == 2
    assert list(work.glob("pictures/*.png"))

    longer = ["epochs=2" if argument == "epochs=1" else argument for argument in arguments]
    assert train.main([*longer, "--resume"]) == 0
    state = torch.load(work / "epoch_2.pth", weights_only=False)
    assert state["meta"]["iter"] == 4
    assert not [key for key in state["state_dict"] if "teacher" in key]
