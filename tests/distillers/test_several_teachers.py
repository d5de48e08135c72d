"""Several teachers in one model: who teaches what, the channels that each sees, and what is refused."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from hgkd.distillers import MAEPretraining, MaskedDistiller
from hgkd.errors import code_of
from hgkd.networks.guest import teachers_of
from hgkd.training.hooks.terms import gradient_shares

VIT = dict(type="TimmTeacher", name="vit_tiny_patch16_224", allow_random=True, depth=2, embed_dim=32, num_heads=2)
SMALLER = {**VIT, "embed_dim": 16}
DINO = dict(type="HGKD", block=1, supervise="all", teacher="dino")


@pytest.fixture(scope="module")
def mae(tmp_path_factory):
    """A MAE teacher's config."""
    file = tmp_path_factory.mktemp("mae") / "mae.safetensors"
    sizes = dict(depth=2, embed_dim=48, num_heads=2, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    MAEPretraining(sizes, 64).save_teacher(file)
    return dict(type="MAETeacher", checkpoint=str(file), allow_random=True)


def make(objectives, *, image_size=64, in_chans=3, **options):
    torch.manual_seed(0)
    pixels = {} if in_chans == 3 else dict(in_chans=in_chans, normalize=([0.5] * in_chans, [0.25] * in_chans))
    return MaskedDistiller(
        student=dict(type="SparseUNet", encoder="test_resnet", decoder_width=32, **pixels),
        objectives=objectives,
        mask=options.pop("mask", dict(type="RandomMask", mask_ratio=0.5)),
        image_size=image_size,
        **options,
    )


def images(count=4, channels=3):
    return torch.rand(count, channels, 64, 64, generator=torch.Generator().manual_seed(1))


# Who teaches what


def test_each_objective_learns_from_its_own_teacher(mae):
    objectives = dict(
        dino=DINO,
        pooled=dict(type="PooledFeature", block=1, teacher="dino"),
        inferred=dict(type="HGKD", target="inferred", block=1, decoder_block=0, supervise="all", teacher="mae", weight=0.5),
        pixels=dict(type="PixelReconstruction"),
    )
    model = make(objectives, teachers=dict(dino=VIT, mae=mae))
    assert list(teachers_of(model)) == ["dino", "mae"]
    assert model.teacher is None
    outs = model.teach(images(), torch.ones(4, 2, 2, dtype=torch.bool))
    assert {name: tuple(out.tokens[1].shape) for name, out in outs.items()} == {
        "dino": (4, 32, 4, 4),
        "pooled": (4, 32, 4, 4),
        "inferred": (4, 48, 4, 4),
    }
    assert outs["dino"] is outs["pooled"]  # one pass for both
    expected = model.teachers["dino"](images(), None, model._passes["dino"][0])
    assert torch.equal(outs["dino"].tokens[1], expected.tokens[1])
    losses = model(images(), mode="loss")
    assert set(losses) == {
        "dino_distill_loss",
        "pooled_pooled_loss",
        *(k for k in losses if k.startswith(("inferred", "pixels"))),
    }
    assert not [name for name in model.state_dict() if "teacher" in name]


def test_one_teacher_under_a_name_is_the_same_training():
    named = make(dict(hgkd=DINO), teachers=dict(dino=VIT))
    single = make(dict(hgkd={k: v for k, v in DINO.items() if k != "teacher"}), teacher=VIT)
    for model in (named, single):
        torch.manual_seed(3)
        model.loss = model(images(), mode="loss")
    assert torch.equal(named.loss["hgkd_distill_loss"], single.loss["hgkd_distill_loss"])
    assert (named.teacher, single.teachers) == (None, {"teacher": single.teacher})


def test_targets_are_standardised_so_that_no_teachers_scale_decides(mae):
    """A teacher whose tokens are a thousand times larger has the same share of the student's gradient."""
    model = make(dict(dino=DINO, mae=dict(DINO, teacher="mae")), teachers=dict(dino=VIT, mae=mae))
    model.eval()
    visible = torch.tensor([[True, False], [False, True]]).expand(4, 2, 2)
    found = []
    for scale in (1.0, 1000.0):
        out, said = model.student(images(), visible), model.teach(images(), visible)
        said["mae"].tokens[1] *= scale
        losses = {name: part(out, said[name], out.layout)["distill"] for name, part in model.objectives.items()}
        found.append(gradient_shares(losses, [p for p in model.student.parameters() if p.requires_grad]))
    assert found[0] == pytest.approx(found[1], abs=1e-3)
    assert 0.05 < found[0]["mae"] < 0.95


def test_a_named_teacher_guides_the_mask(mae):
    guided = dict(type="AttentionMask", mask_ratio=0.5)
    objectives = dict(dino=DINO, mae=dict(DINO, teacher="mae"))
    model = make(objectives, teachers=dict(dino=VIT, mae=mae), mask=guided, mask_teacher="mae")
    asked = []
    for name, teacher in model.teachers.items():
        teacher.attention = lambda x, name=name: asked.append(name) or torch.rand(len(x), 2, 2)
    model.draw_mask(images())
    assert asked == ["mae"]


def test_stored_features_are_those_of_each_teacher(mae, tmp_path):
    model = make(dict(dino=DINO, mae=dict(DINO, teacher="mae")), teachers=dict(dino=VIT, mae=mae))
    visible, index = torch.ones(4, 2, 2, dtype=torch.bool), torch.arange(4)
    plain = model.teach(images(), visible)
    planned = model.stored_bytes(4)
    model.store_features(tmp_path, 4, {"files": "x"})
    stores = [file for file in tmp_path.glob("tokens-*.npy") if ".sums" not in file.name]
    assert len(stores) == 2
    assert planned == 2 * 4 * (32 + 48) * 16 * 2 + 2 * 2 * 4 * 4
    flipped = torch.zeros(4, dtype=torch.bool)
    model.teach(images(), visible, index, flipped)
    for teacher in model.teachers.values():  # what is stored is not computed again
        teacher.forward = None
    kept = model.teach(images(), visible, index, flipped)
    for name in ("dino", "mae"):
        torch.testing.assert_close(kept[name].tokens[1], plain[name].tokens[1], rtol=2e-3, atol=2e-3)


CLIP = {**VIT, "name": "vit_base_patch32_clip_224"}


@pytest.mark.parametrize("change", [dict(normalize=([0.2] * 3, [0.7] * 3)), dict(name="vit_base_patch32_clip_quickgelu_224")])
def test_a_corrected_teacher_does_not_get_the_features_of_the_wrong_one(change, tmp_path):
    """Same weights: other pixels, and another activation."""
    for teacher in (CLIP, CLIP, {**CLIP, **change}):
        make(dict(hgkd={**DINO, "teacher": None}), teacher=teacher).store_features(tmp_path, 4, {"files": "x"})
    assert len(list(tmp_path.glob("tokens-*.json"))) == 2


def test_another_number_of_heads_is_another_store(mae, tmp_path):
    save_file(load_file(mae["checkpoint"]), tmp_path / "mae.safetensors")  # without what it says of its heads
    for heads in (2, 4):
        teacher = {**mae, "checkpoint": str(tmp_path / "mae.safetensors"), "num_heads": heads, "decoder_num_heads": 2}
        model = make(dict(hgkd={**DINO, "teacher": None}), teacher=teacher)
        model.store_features(tmp_path, 4, {"files": "x"})
    assert len(list(tmp_path.glob("tokens-*.json"))) == 2


def test_all_teachers_follow_the_model_and_a_copy_shares_them(mae):
    model = make(dict(dino=DINO, mae=dict(DINO, teacher="mae")), teachers=dict(dino=VIT, mae=mae))
    copied = copy.deepcopy(model)
    assert all(copied.teachers[name] is part for name, part in model.teachers.items())
    model.to("meta")
    assert {next(part.parameters()).device.type for part in model.teachers.values()} == {"meta"}


# Channels


def test_a_teacher_sees_the_chosen_channels_in_its_order():
    model = make(dict(hgkd={**DINO, "teacher": None}), teacher=VIT, in_chans=4, teacher_channels=[2, 1, 0])
    given, seen = images(channels=4), []
    model.teacher.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(given, mode="loss")
    assert torch.equal(seen[0], given[:, [2, 1, 0]])
    assert tuple(model.shown_channels) == (2, 1, 0)


@pytest.mark.parametrize(("in_chans", "chosen", "seen"), [(1, None, [0, 0, 0]), (8, [5], [5, 5, 5])])
def test_a_single_channel_is_repeated(in_chans, chosen, seen):
    model = make(dict(hgkd={**DINO, "teacher": None}), teacher=VIT, in_chans=in_chans, teacher_channels=chosen)
    given = images(channels=in_chans)
    assert torch.equal(model._seen_by("teacher", given), given[:, seen])


def test_each_teacher_sees_channels_of_its_own(mae):
    objectives = dict(dino=DINO, mae=dict(DINO, teacher="mae"))
    chosen = dict(dino=[2, 1, 0], mae=[3])
    model = make(objectives, teachers=dict(dino=VIT, mae=mae), in_chans=4, teacher_channels=chosen)
    assert model._channels == {"dino": (2, 1, 0), "mae": (3, 3, 3)}


def test_a_mae_of_as_many_channels_sees_all_of_them(tmp_path):
    sizes = dict(depth=2, embed_dim=48, num_heads=2, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    statistics = dict(mean=[0.1, 0.2, 0.3, 0.4], std=[0.2] * 4)
    MAEPretraining(sizes, 64, in_chans=4, **statistics).save_teacher(tmp_path / "mae.safetensors")
    teacher = dict(type="MAETeacher", checkpoint=str(tmp_path / "mae.safetensors"), allow_random=True)
    model = make(dict(hgkd={**DINO, "teacher": None}), teacher=teacher, in_chans=4)
    assert model._channels == {"teacher": None}
    assert model.teacher.mean.flatten().tolist() == pytest.approx(statistics["mean"])
    assert model(images(channels=4), mode="loss")["hgkd_distill_loss"] > 0


# What is refused


GUIDED = dict(type="AttentionMask", mask_ratio=0.5)
PIXELS = dict(type="PixelReconstruction", teacher="other")
CHOICES = "must be 3 numbers of channels, one for each that dino sees, or a single one"
UNFIT = {
    "a misspelt name": (
        dict(objectives=dict(a={**DINO, "teacher": "dion"})),
        r"a\.teacher: unknown teacher 'dion'; did you mean 'dino'",
        "teacher-unknown",
    ),
    "no name": (
        dict(objectives=dict(a={**DINO, "teacher": None})),
        r"several \(dino, other\); say which: model.objectives.a.teacher='dino'",
        "teacher-not-named",
    ),
    "idle": (
        dict(objectives=dict(a=DINO)),
        r"model.teachers.other is set, but no objective learns from it",
        "teacher-without-objective",
    ),
    "both options": (dict(teacher=VIT), r"a teacher and teachers \(dino, other\)", "teacher-and-teachers"),
    "not needed": (dict(objectives=dict(a=DINO, b=PIXELS)), r"learns from no teacher; leave it out", "teacher-not-needed"),
    "mask not guided": (dict(mask_teacher="dino"), r"a RandomMask is guided by no teacher", "teacher-not-needed"),
    "mask without a name": (dict(mask=GUIDED), r"say which: model.mask_teacher='dino'", "teacher-not-named"),
    "mask misspelt": (dict(mask=GUIDED, mask_teacher="x"), r"model.mask_teacher: unknown teacher 'x'", "teacher-unknown"),
    "channels misspelt": (dict(teacher_channels=dict(x=[0])), r"teacher_channels: unknown teacher 'x'", "teacher-unknown"),
    "no weights": (
        dict(teachers=dict(dino=VIT, other={**VIT, "allow_random": False})),
        r"model.teachers.other: .* has no weights",
        "teacher-without-weights",
    ),
    "beyond": (
        dict(teacher_channels=[0, 1, 3]),
        r"\[0, 1, 3\] names channel 3, but the images have 3, numbered 0 to 2",
        "teacher-channels-wrong",
    ),
    "too few": (dict(teacher_channels=[0, 1]), CHOICES, "teacher-channels-wrong"),
    "no numbers": (dict(teacher_channels=[0.5]), CHOICES, "teacher-channels-wrong"),
}


@pytest.mark.parametrize(("change", "told", "code"), UNFIT.values(), ids=UNFIT)
def test_teachers_that_do_not_fit(change, told, code):
    options = dict(teachers=dict(dino=VIT, other=SMALLER), objectives=dict(a=DINO, b={**DINO, "teacher": "other"}))
    with pytest.raises(ValueError, match=told) as error:
        make(**{**options, **change})
    assert code_of(error.value) == code


def test_channels_that_nobody_has_chosen():
    with pytest.raises(ValueError, match=r"have 4 channels, and teacher sees 3: .*teacher_channels=\[0, 1, 2\]") as error:
        make(dict(hgkd={**DINO, "teacher": None}), teacher=VIT, in_chans=4)
    assert code_of(error.value) == "teacher-channels-missing"
    with pytest.raises(ValueError, match="teacher_channels is set, but there is no teacher"):
        make(dict(a=dict(type="PixelReconstruction")), teacher_channels=[0])


def test_images_of_other_channels_than_the_students():
    model = make(dict(hgkd={**DINO, "teacher": None}), teacher=VIT, in_chans=4, teacher_channels=[0])
    for mode in ("loss", "tensor"):
        with pytest.raises(ValueError, match="the images have 3 channels, the model was built for 4; set in_chans") as error:
            model(images(), mode=mode)
        assert code_of(error.value) == "channels-differ"


def test_a_file_that_is_absent_is_named_with_its_teacher(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    for file, kind in (("gone.pth", FileNotFoundError), ("x.safetensors", ValueError)):
        teachers = dict(dino=VIT, other={**VIT, "checkpoint": str(tmp_path / file)})
        with pytest.raises(kind, match=r"model\.teachers\.other: "):
            make(dict(a=DINO), teachers=teachers)


def test_a_teacher_that_looks_random_is_named(mae):
    objectives = dict(a=DINO, b=dict(DINO, teacher="other"))
    told = r"^model\.teachers\.other: .* looks random.* set model\.teachers\.other\.allow_random=True"
    with pytest.raises(ValueError, match=told) as error:
        make(objectives, teachers=dict(dino=VIT, other={**mae, "allow_random": False}))
    assert code_of(error.value) == "teacher-looks-random"
