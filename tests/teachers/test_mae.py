"""The MAE network against a plain reference, its files, and MAE as a teacher."""

import argparse
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from refusals import refused
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hgkd.errors import WeightsError
from hgkd.networks.mae import (
    ARCHS,
    MaskedAutoencoder,
    mae_loss,
    make_arch,
    patchify,
    pixel_target,
    read_mae,
    save_mae,
)
from hgkd.networks.positions import sincos_positions
from hgkd.pixels import IMAGENET_MEAN, IMAGENET_STD
from hgkd.registry import MODELS
from hgkd.structures import TeacherNeeds
from hgkd.teachers.mae import MAETeacher

SIZES: dict[str, Any] = {
    "embed_dim": 64,
    "depth": 3,
    "num_heads": 1,
    "decoder_embed_dim": 32,
    "decoder_depth": 2,
    "decoder_num_heads": 4,
    "patch_size": 4,
    "image_size": (16, 16),
}
HEADS = {"num_heads": 1, "decoder_num_heads": 4}
VISIBLE = torch.tensor(
    [
        [[1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]],
        [[0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0]],
    ]
).bool()


def _network(**sizes: Any) -> MaskedAutoencoder:
    network = MaskedAutoencoder(make_arch({**SIZES, **sizes})).eval()
    for name, p in network.named_parameters():  # biases and norms that are 0 and 1 hide errors
        if p.requires_grad:
            p.data = p.data + 0.2 * torch.randn_like(p)
        else:
            assert "pos_embed" in name
    return network


def _save_official(network: MaskedAutoencoder, path: Path, half: bool = False, drop: tuple[str, ...] = ()) -> Path:
    """As facebookresearch/mae writes it: a pickle with the weights under 'model' and, in some, the arguments."""
    state = {k: v.half() if half else v for k, v in network.state_dict().items() if not k.startswith(drop or ("-",))}
    torch.save({"model": state, "args": argparse.Namespace(blr=1.5e-4), "epoch": 799}, path)
    return path


# --- an independent reference: one image, one token, one head at a time -----------------------------------------------


def _reference_block(state: dict[str, Tensor], name: str, tokens: list[Tensor], heads: int) -> list[Tensor]:
    def norm(x: Tensor, which: str) -> Tensor:
        mean, variance = x.mean(), ((x - x.mean()) ** 2).mean()
        return (x - mean) / torch.sqrt(variance + 1e-6) * state[f"{name}.{which}.weight"] + state[f"{name}.{which}.bias"]

    def linear(x: Tensor, which: str) -> Tensor:
        return state[f"{name}.{which}.weight"] @ x + state[f"{name}.{which}.bias"]

    width = len(tokens[0])
    d = width // heads
    qkv = [linear(norm(x, "norm1"), "attn.qkv") for x in tokens]
    out = []
    for i, x in enumerate(tokens):
        mixed = []
        for h in range(heads):
            q = qkv[i][h * d : (h + 1) * d]
            keys = [t[width + h * d : width + (h + 1) * d] for t in qkv]
            values = [t[2 * width + h * d : 2 * width + (h + 1) * d] for t in qkv]
            weights = torch.softmax(torch.stack([(q * k).sum() / math.sqrt(d) for k in keys]), 0)
            mixed.append(sum(w * v for w, v in zip(weights, values, strict=True)))
        y = x + linear(torch.cat(mixed), "attn.proj")
        out.append(y + linear(F.gelu(linear(norm(y, "norm2"), "mlp.fc1")), "mlp.fc2"))
    return out


def _reference(network: MaskedAutoencoder, image: Tensor, visible: Tensor) -> tuple[list[Tensor], list[list[Tensor]], Tensor]:
    """Encoder tokens (class first), hidden states of each decoder block, loss with standardised pixels."""
    state = {k: v.double() for k, v in network.state_dict().items()}
    arch, p = network.arch, network.arch.patch_size
    image = image.double()
    rows, columns = arch.grid

    def position(width: int, row: int, column: int) -> Tensor:
        value = []
        for coordinate in (column, row):
            for wave in (math.sin, math.cos):
                value += [wave(coordinate / 10000 ** (i / (width / 4))) for i in range(width // 4)]
        return torch.tensor(value, dtype=torch.float64)

    places = [(r, c) for r in range(rows) for c in range(columns)]
    cut = {(r, c): image[:, r * p : (r + 1) * p, c * p : (c + 1) * p] for r, c in places}
    seen = [place for place in places if visible[place]]
    tokens = [state["cls_token"][0, 0]]
    for place in seen:
        projected = (state["patch_embed.proj.weight"] * cut[place]).sum((1, 2, 3)) + state["patch_embed.proj.bias"]
        tokens.append(projected + position(arch.embed_dim, *place))
    for i in range(arch.depth):
        tokens = _reference_block(state, f"blocks.{i}", tokens, arch.num_heads)
    tokens = [F.layer_norm(x, x.shape, state["norm.weight"], state["norm.bias"], 1e-6) for x in tokens]

    inner = [state["decoder_embed.weight"] @ x + state["decoder_embed.bias"] for x in tokens]
    hidden = [inner[0]]
    for place in places:
        x = inner[1 + seen.index(place)] if place in seen else state["mask_token"][0, 0]
        hidden.append(x + position(arch.decoder_embed_dim, *place))
    states = []
    for i in range(arch.decoder_depth):
        hidden = _reference_block(state, f"decoder_blocks.{i}", hidden, arch.decoder_num_heads)
        states.append(hidden)
    errors = []
    for place, x in zip(places, hidden[1:], strict=True):
        if place in seen:
            continue
        x = F.layer_norm(x, x.shape, state["decoder_norm.weight"], state["decoder_norm.bias"], 1e-6)
        predicted = state["decoder_pred.weight"] @ x + state["decoder_pred.bias"]
        target = torch.stack([cut[place][ch, y, x_] for y in range(p) for x_ in range(p) for ch in range(3)])
        variance = ((target - target.mean()) ** 2).sum() / (len(target) - 1)
        target = (target - target.mean()) / torch.sqrt(variance + 1e-6)
        errors.append(((predicted - target) ** 2).mean())
    return tokens, states, torch.stack(errors).mean()


@torch.no_grad()
def test_network_and_teacher_equal_the_reference(tmp_path: Path) -> None:
    network = _network()
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    pictures = torch.rand(2, 3, 16, 16)
    images = (pictures - mean) / std
    ids_keep = VISIBLE.flatten(1).nonzero()[:, 1].view(2, -1)
    encoded = network.encode(images, ids_keep)
    target = pixel_target(images, 4, norm_pix=True)
    losses = [
        mae_loss(network.predict_pixels(encoded, ids_keep)[i : i + 1], target[i : i + 1], VISIBLE[i : i + 1].flatten(1))
        for i in range(2)
    ]
    teacher = MAETeacher(save_mae(network, tmp_path / "mae.safetensors"))
    teacher.prepare((4, 4), 4)
    outs = [teacher(pictures, VISIBLE, TeacherNeeds(decoder_block=k, visible_only=True)) for k in range(2)]
    for i in range(2):
        tokens, states, loss = _reference(network, images[i], VISIBLE[i])
        torch.testing.assert_close(encoded[i], torch.stack(tokens).float(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(losses[i], loss.float(), rtol=1e-4, atol=1e-4)
        for k, hidden in enumerate(states):
            decoded = outs[k].decoded
            assert decoded is not None
            assert decoded.shape == (2, 32, 4, 4)
            expected = torch.stack(hidden[1:]).T.reshape(32, 4, 4).float()
            torch.testing.assert_close(decoded[i], expected, rtol=1e-4, atol=1e-4)


def test_positions_by_hand() -> None:
    table = sincos_positions(8, (2, 3))
    assert table.shape == (1, 7, 8)
    assert bool((table[0, 0] == 0).all())
    row, column = 1, 2  # 8 channels: rates 1 and 1/100
    expected = [
        *(math.sin(column), math.sin(column / 100), math.cos(column), math.cos(column / 100)),
        *(math.sin(row), math.sin(row / 100), math.cos(row), math.cos(row / 100)),
    ]
    torch.testing.assert_close(table[0, 1 + row * 3 + column], torch.tensor(expected))


def test_patches_and_their_standardised_pixels_by_hand() -> None:
    images = torch.arange(2 * 4 * 6.0).view(1, 2, 4, 6)
    patches = patchify(images, 2)
    assert patches.shape == (1, 6, 8)
    # patch in row 1, column 2: pixels row by row, channels innermost
    assert patches[0, 5].tolist() == [16, 40, 17, 41, 22, 46, 23, 47]
    values = torch.tensor([1.0, 3.0, 5.0, 7.0, 1.0, 3.0, 5.0, 7.0, 1.0, 3.0, 5.0, 7.0])  # mean 4, squares 60 / 11
    target = pixel_target(values.view(1, 2, 2, 3).permute(0, 3, 1, 2), 2, norm_pix=True)[0, 0]
    torch.testing.assert_close(target, (values - 4) / math.sqrt(60 / 11 + 1e-6))
    assert torch.equal(pixel_target(images, 2, norm_pix=False), patches)


def test_loss_counts_hidden_patches_only() -> None:
    predicted, target = torch.zeros(1, 3, 2), torch.tensor([[[9.0, 9.0], [1.0, 3.0], [2.0, 2.0]]])
    visible = torch.tensor([[True, False, False]])
    assert mae_loss(predicted, target, visible).item() == pytest.approx((5.0 + 4.0) / 2)
    with refused(ValueError, "mask-ratio-hides-nothing"):
        mae_loss(predicted, target, torch.ones(1, 3).bool())


def test_names_are_the_official_ones() -> None:
    block = ["norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias"]
    block += ["norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"]
    names = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"}
    names |= {"decoder_embed.weight", "decoder_embed.bias", "mask_token", "decoder_pos_embed", "decoder_norm.weight"}
    names |= {"decoder_norm.bias", "decoder_pred.weight", "decoder_pred.bias"}
    names |= {f"blocks.{i}.{name}" for i in range(3) for name in block}
    names |= {f"decoder_blocks.{i}.{name}" for i in range(2) for name in block}
    assert set(MaskedAutoencoder(make_arch(SIZES)).state_dict()) == names


def test_kinds_of_files_are_recognised_and_said(tmp_path: Path) -> None:
    network = _network()
    full = MAETeacher(_save_official(network, tmp_path / "full.pth"), decoder_num_heads=4)
    assert (full.info.kind, full.info.decoder_width, full.info.decoder_depth) == ("mae", 32, 2)
    assert "file with decoder" in full.kind
    assert "it does not say" in full.kind  # norm-pix or 'visualize': no one can tell
    encoder = MAETeacher(_save_official(network, tmp_path / "encoder.pth", drop=("decoder", "mask_token")))
    assert (encoder.info.kind, encoder.info.decoder_width, encoder.info.decoder_depth) == ("mae-encoder", None, 0)
    assert encoder.kind.startswith("encoder-only file")
    tuned = {k: v for k, v in encoder.network.state_dict().items() if not k.startswith("norm.")}
    tuned |= {"fc_norm.weight": torch.ones(64), "fc_norm.bias": torch.zeros(64), "head.weight": torch.ones(5, 64)}
    save_file(tuned, tmp_path / "tuned.safetensors")
    assert MAETeacher(tmp_path / "tuned.safetensors").kind.startswith("fine-tuned, encoder-only file")


def test_both_files_give_the_same_tokens_and_only_one_a_decoder(tmp_path: Path) -> None:
    network = _network()
    full = MAETeacher(_save_official(network, tmp_path / "full.pth"), decoder_num_heads=4)
    encoder = MAETeacher(_save_official(network, tmp_path / "encoder.pth", drop=("decoder", "mask_token")))
    for teacher in (full, encoder):
        teacher.prepare((4, 4), 4)
    images, needs = torch.rand(2, 3, 16, 16), TeacherNeeds(blocks=(1,), visible_only=True)
    assert torch.equal(full(images, VISIBLE, needs).tokens[1], encoder(images, VISIBLE, needs).tokens[1])
    with refused(
        ValueError, "teacher-without-decoder", "encoder.pth", "encoder-only", "mae_pretrain_vit_", "_full.pth", "target='full'"
    ):
        encoder.check(TeacherNeeds(decoder_block=0, visible_only=True))
    with refused(ValueError, "decoder-block-out-of-range", "2", "0", "1"):
        full.check(TeacherNeeds(decoder_block=2))


def test_a_full_file_with_a_damaged_decoder_is_refused(tmp_path: Path) -> None:
    path = _save_official(_network(), tmp_path / "odd.pth", drop=("decoder_blocks.1.mlp", "mask_token"))
    with refused(WeightsError, "weights-do-not-fit", "5", "mask_token"):
        MAETeacher(path, **HEADS)


def test_heads_come_from_the_file_or_the_paper_or_must_be_told(tmp_path: Path) -> None:
    with refused(ValueError, "attention-heads-unknown", "decoder_num_heads"):
        MAETeacher(_save_official(_network(), tmp_path / "full.pth"))
    own = MAETeacher(save_mae(_network(num_heads=2), tmp_path / "own.safetensors"))
    assert (own.network.arch.num_heads, own.network.arch.decoder_num_heads) == (2, 4)
    # ViT-H: 1280 channels have 16 heads of 80, not 20 of 64; weights of a sixteenth of a byte would do, so meta ones
    from hgkd.networks.mae import arch_of

    with torch.device("meta"):
        huge = MaskedAutoencoder(make_arch("huge")).state_dict()
    arch = arch_of(huge, "huge", None, None)
    assert (arch.num_heads, arch.depth, arch.patch_size, arch.decoder_num_heads) == (16, 32, 14, 16)


def test_a_file_of_ours_tells_its_pixels_and_grid(tmp_path: Path) -> None:
    pixels = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 1.0], "norm_pix": False}
    path = save_mae(_network(image_size=(8, 16)), tmp_path / "mae.safetensors", pixels)
    teacher = MAETeacher(path)
    assert "trained on pixels plain" in teacher.kind
    torch.testing.assert_close(teacher.mean.flatten(), torch.tensor(pixels["mean"]))
    torch.testing.assert_close(teacher.std.flatten(), torch.tensor(pixels["std"]))
    assert teacher.network.arch.grid == (2, 4)
    with refused(FileExistsError, "file-exists", "overwrite=True"):
        save_mae(teacher.network, path)
    with refused(ValueError, "suffix-not-safetensors"):
        save_mae(teacher.network, tmp_path / "mae.pth")


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    network = _network()
    older, newer = tmp_path / "older.safetensors", tmp_path / "newer.safetensors"
    save_mae(network, newer)
    with safe_open(newer, "pt") as file:
        metadata = file.metadata()
    without = {key: value for key, value in metadata.items() if key != "hgkd_mae_format"}
    save_file(network.state_dict(), older, metadata=without)  # as the first version wrote it
    read_mae(older)
    save_file(network.state_dict(), newer, metadata={**without, "hgkd_mae_format": "2"})
    checkpoint = tmp_path / "newer.pth"
    own = {"mae": dict(SIZES), "format": 2}
    torch.save({"meta": {"hgkd": own}, "state_dict": network.state_dict()}, checkpoint)
    for path in (newer, checkpoint):
        with refused(WeightsError, "checkpoint-format", path.name, "2", "1"):
            read_mae(path)


def test_fixed_positions_are_computed_for_any_grid_and_others_resampled(tmp_path: Path) -> None:
    network = _network()
    teacher = MAETeacher(_save_official(network, tmp_path / "half.pth", half=True), **HEADS)
    teacher.prepare((2, 7), 4)
    assert teacher.input_size == (8, 28)
    torch.testing.assert_close(teacher.network.pos_embed, sincos_positions(64, (2, 7)))
    torch.testing.assert_close(teacher.network.decoder_pos_embed, sincos_positions(32, (2, 7)))
    out = teacher(torch.rand(1, 3, 9, 30), torch.ones(1, 2, 7).bool(), TeacherNeeds((2,), decoder_block=1, visible_only=True))
    assert out.tokens[2].shape == (1, 64, 2, 7)
    assert out.decoded is not None
    assert out.decoded.shape == (1, 32, 2, 7)
    learned = torch.randn(1, 17, 64)
    network.pos_embed.data.copy_(learned)
    teacher = MAETeacher(_save_official(network, tmp_path / "learned.pth"), **HEADS)
    teacher.prepare((4, 4), 4)
    assert torch.equal(teacher.network.pos_embed, learned)
    teacher.prepare((8, 8), 4)
    assert not torch.allclose(teacher.network.pos_embed, sincos_positions(64, (8, 8)), atol=0.1)
    torch.testing.assert_close(teacher.network.decoder_pos_embed, sincos_positions(32, (8, 8)))


def test_visible_only_is_blind_to_hidden_pixels_also_in_the_decoder(tmp_path: Path) -> None:
    teacher = MAETeacher(save_mae(_network(), tmp_path / "mae.safetensors"))
    teacher.prepare((2, 2), 8)  # two patches a cell side
    visible = torch.tensor([[[True, False], [False, True]], [[False, False], [True, False]]])  # unequal counts
    images = torch.rand(2, 3, 16, 16)
    pixels = visible[:, None].repeat_interleave(8, 2).repeat_interleave(8, 3)
    changed = torch.where(pixels, images, torch.rand_like(images))
    needs = TeacherNeeds(blocks=(0, 2), decoder_block=1, visible_only=True)
    first, second = teacher(images, visible, needs), teacher(changed, visible, needs)
    torch.testing.assert_close(first.decoded, second.decoded)
    torch.testing.assert_close(first.tokens[2], second.tokens[2])
    hidden = ~visible.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]
    assert bool((first.tokens[2] * hidden == 0).all())
    assert first.decoded is not None
    assert bool(((first.decoded * hidden).abs().sum(1) > 0).eq(hidden[:, 0]).all())


def test_blocks_run_only_as_far_as_asked_and_cls_is_of_the_deepest(tmp_path: Path) -> None:
    teacher = MAETeacher(save_mae(_network(), tmp_path / "mae.safetensors"))
    teacher.prepare((4, 4), 4)
    runs: list[str] = []
    for name in ("blocks", "decoder_blocks"):
        for i, block in enumerate(getattr(teacher.network, name)):
            block.register_forward_hook(lambda *_, text=f"{name}.{i}": runs.append(text))
    images = torch.rand(1, 3, 16, 16)
    shallow = teacher(images, None, TeacherNeeds(blocks=(1,)))
    assert runs == ["blocks.0", "blocks.1"]
    runs.clear()
    deep = teacher(images, None, TeacherNeeds(blocks=(1,), decoder_block=0))
    assert runs == ["blocks.0", "blocks.1", "blocks.2", "decoder_blocks.0"]
    assert torch.equal(shallow.cls, deep.cls)


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.ones(1)}, tmp_path / "resnet.pth")
    with refused(WeightsError, "vit-naming-unknown", "conv1.weight"):
        MAETeacher(tmp_path / "resnet.pth")
    state = _network().state_dict() | {"blocks.0.ls1.gamma": torch.ones(64)}  # DINOv2 has layer scale
    torch.save(state, tmp_path / "dino.pth")
    with refused(WeightsError, "weights-do-not-fit", "1", "blocks.0.ls1.gamma"):
        MAETeacher(tmp_path / "dino.pth", **HEADS)
    with pytest.raises(FileNotFoundError):
        MAETeacher(tmp_path / "absent.pth")
    with refused(ValueError, "teacher-without-weights"):
        MODELS.build({"type": "MAETeacher", "checkpoint": None})
    from hgkd.teachers.vit import TimmTeacher

    with refused(WeightsError, "mae-with-decoder", "MAETeacher"):
        TimmTeacher("vit_tiny_patch16_224", checkpoint=_save_official(_network(), tmp_path / "full.pth"))


def test_sizes_by_name_by_field_and_misspelt() -> None:
    assert make_arch("large").depth == 24
    assert make_arch({"base": "tiny", "depth": 5}, patch_size=8) == make_arch({**ARCHS["tiny"], "depth": 5, "patch_size": 8})
    with refused(ValueError, "mae-arch-unknown", "large"):
        make_arch("larg")
    with refused(ValueError, "mae-size-unknown", "depth"):
        make_arch({"dept": 3})
    with refused(ValueError, "width-no-multiple-of-heads", "5"):
        make_arch({"embed_dim": 64, "num_heads": 5})


def test_attention_of_the_class_token(tmp_path: Path) -> None:
    network = _network()
    teacher = MAETeacher(save_mae(network, tmp_path / "mae.safetensors"))
    teacher.prepare((4, 4), 4)
    images = torch.rand(2, 3, 16, 16)
    tokens = network.embed((images - teacher.mean) / teacher.std, None)
    for block in network.blocks[:2]:
        tokens = block(tokens)
    attn = network.blocks[2].attn
    query, key, _ = attn.qkv(network.blocks[2].norm1(tokens)).chunk(3, -1)  # one head
    weights = (query[:, :1] @ key.transpose(1, 2) / 8).softmax(-1)[:, 0, 1:]  # 64 channels
    torch.testing.assert_close(teacher.attention(images), weights.view(2, 4, 4))
