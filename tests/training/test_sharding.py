"""Parameters divided among two processes (gloo, CPU) by the key ``fsdp``, against ordinary data-parallel training."""

import json
from pathlib import Path

import pytest
import torch
from refusals import refused
from tiny_runs import SPARK, tiny, torchrun, write_images

from hgkd.api.train import load_config
from hgkd.distillers import MaskedDistiller
from hgkd.registry import RUNNERS
from hgkd.training.sharding import shard_model

SCRIPT = Path(__file__).with_name("process_of_fsdp.py")
pytestmark = pytest.mark.skipif(torch.__version__ < "2.6", reason="fully_shard has its public name since then")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_a_divided_training_is_the_ordinary_one_and_its_checkpoints_are_whole(kind, images, tmp_path):
    done = torchrun([SCRIPT, kind, images, tmp_path], tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    losses = {name: torch.tensor(one["losses"], dtype=torch.float64) for name, one in found.items()}
    assert losses["ddp"].shape == (4, 2)  # loss and norm of the gradient
    assert losses["ddp"][:, 0].unique().numel() == 4
    torch.testing.assert_close(losses["fsdp"], losses["ddp"], rtol=1e-5, atol=0)
    for name in ("resumed", "unsharded"):  # from the divided training's first epoch
        torch.testing.assert_close(losses[name], losses["ddp"][2:], rtol=1e-5, atol=0)
    ddp, fsdp = (found[name]["held"] for name in ("ddp", "fsdp"))
    for part in ("parameters", "gradients", "optimiser"):
        assert 0.5 <= fsdp[part] / ddp[part] < 0.52, part
    if kind == "vit":
        assert fsdp["teacher"] < ddp["teacher"]
        codes = json.loads((tmp_path / "codes.json").read_text())
        assert codes == ["fsdp-with-hook", "fsdp-with-hook", "fsdp-guided-mask", "fsdp-not-bool"]
    read = [torch.load(tmp_path / name / "epoch_2.pth", weights_only=False) for name in ("ddp", "fsdp", "unsharded")]
    for checkpoint in read[1:]:
        assert checkpoint["state_dict"].keys() == read[0]["state_dict"].keys()
        for key, value in read[0]["state_dict"].items():
            assert type(checkpoint["state_dict"][key]) is torch.Tensor
            # Adam makes whole steps of gradients that are nothing but rounding
            torch.testing.assert_close(checkpoint["state_dict"][key], value, rtol=1e-3, atol=5e-4)
        for number, state in read[0]["optimizer"]["state"].items():
            other = checkpoint["optimizer"]["state"][number]
            torch.testing.assert_close(other["exp_avg"], state["exp_avg"], rtol=1e-3, atol=1e-6)
            assert other["step"] == state["step"] == 4


def test_one_process_has_nobody_to_divide_with(images, tmp_path):
    with refused(ValueError, "fsdp-needs-processes", "--launcher pytorch"):
        RUNNERS.build(load_config(SPARK, tmp_path, options=tiny(images, fsdp=True)))


def test_a_divided_teacher_must_run_as_often_in_every_process():
    """One that sees visible cells runs once for each number of them, which each process draws for itself."""
    vit = dict(type="TimmTeacher", name="vit_tiny_patch16_224", allow_random=True, depth=2, embed_dim=32, num_heads=2)
    model = MaskedDistiller(
        student=dict(type="SparseUNet", encoder="test_resnet", decoder_width=16, min_decoder_width=8),
        teachers=dict(whole=vit, partial=vit),
        objectives=dict(hgkd=dict(type="HGKD", teacher="whole"), dmae=dict(type="DMAE", teacher="partial")),
        mask=dict(type="RandomMask", mask_ratio=[0.25, 0.75]),
        image_size=128,
    )
    with refused(ValueError, "fsdp-uneven-masks", "'partial'", "[0.25, 0.75]", "leave fsdp out"):
        shard_model(model)
