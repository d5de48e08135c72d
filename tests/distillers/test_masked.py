"""MaskedDistiller: wiring, what is trained, and what is refused."""

import copy

import pytest
import torch
from mmengine.model import ExponentialMovingAverage
from mmengine.optim import OptimWrapper
from refusals import refused
from torch import nn
from visible_rectangles import crops_of

from hgkd.distillers import MaskedDistiller
from hgkd.distillers.masked import merge_needs
from hgkd.pixels import to_unit_range
from hgkd.registry import MODELS
from hgkd.structures import FeatureSample, TeacherInfo, TeacherNeeds, TeacherOutput
from hgkd.teachers import Teacher


@MODELS.register_module()
class FakeTeacher(Teacher):
    """Three 'blocks' of fixed random projections of 16-pixel patches; counts its calls."""

    allow_random = True

    def __init__(self, decoder=False):
        super().__init__("float32", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        self.info = TeacherInfo("fake", 8, 3, 16, decoder_width=4 if decoder else None, decoder_depth=2 if decoder else 0)
        self.patches = nn.Conv2d(3, 8, 16, stride=16).requires_grad_(False)
        self.calls = []
        self.eval()

    def train(self, mode=True):
        return super().train(False)

    def check(self, needs):
        bad = [b for b in needs.blocks if not 0 <= b < 3]
        if bad:
            raise ValueError(f"no block {bad}")

    def prepare(self, mask_grid, cell):
        self.grid = (mask_grid[0] * 2, mask_grid[1] * 2)
        return self.grid

    @torch.no_grad()
    def forward(self, images, visible, needs, cells_an_image=None):
        self.calls.append(needs)
        tokens = self.patches(images)
        return TeacherOutput({b: tokens * (b + 1) for b in needs.blocks}, self.grid)


def make(objectives=None, teacher=True, mask_ratio=0.5, image_size=64, mask=None, model=None, **student):
    return MaskedDistiller(
        student=dict(type="SparseUNet", encoder="test_resnet", decoder_width=32, **student),
        objectives=objectives or dict(hgkd=dict(type="HGKD", supervise="all")),
        mask=mask or dict(type="RandomMask", mask_ratio=mask_ratio),
        image_size=image_size,
        teacher=dict(type="FakeTeacher") if teacher else None,
        **(model or {}),
    )


def batch(n=4, size=(64, 64)):
    return torch.randint(0, 256, (n, 3, *size), dtype=torch.uint8)


PIXELS = dict(pixels=dict(type="PixelReconstruction"))


@pytest.mark.parametrize("objectives", [dict(hgkd=dict(type="HGKD", supervise="all")), PIXELS], ids=["hgkd", "pixels"])
@pytest.mark.parametrize("out_stride", [16, 32])
def test_every_trained_parameter_gets_a_gradient(objectives, out_stride):
    model = make(objectives, teacher="hgkd" in objectives, out_stride=out_stride)
    with torch.no_grad():  # timm starts residual branches at zero, which stops the first gradient
        for name, p in model.student.encoder.named_parameters():
            if name.endswith("weight") and p.ndim == 1:
                p.fill_(1.0)
    sum(model(batch(), mode="loss").values()).backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not without


def test_steps_on_one_batch_lower_the_loss():
    model = make()
    wrapper = OptimWrapper(torch.optim.AdamW(model.parameters(), lr=3e-3))
    data = {"inputs": batch(), "index": torch.arange(4)}
    losses = [float(model.train_step(data, wrapper)["loss"].detach()) for _ in range(12)]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_teacher_is_outside_what_trains():
    model = make()
    model.train()
    assert not model.teacher.training
    assert not [key for key in model.state_dict() if "teacher" in key or "patches" in key]
    assert len(list(model.parameters())) == len(list(model.student.parameters())) + len(list(model.objectives.parameters()))
    assert not [name for name, _ in model.named_modules() if "teacher" in name]
    sum(model(batch(), mode="loss").values()).backward()
    assert model.teacher.patches.weight.grad is None


def test_teacher_follows_the_device_but_keeps_its_precision():
    model = make()
    model.to("meta")
    assert model.teacher.patches.weight.device.type == "meta"
    model = make().to(torch.float64)
    assert model.teacher.patches.weight.dtype == torch.float32


def test_losses_are_named_after_the_objective_and_weighted():
    configs = {"near": dict(type="HGKD", supervise="all"), "far": dict(type="HGKD", supervise="all", block=0, weight=0.0)}
    model = make(configs)
    losses = model(batch(), mode="loss")
    assert set(losses) == {"near_distill_loss", "far_distill_loss"}
    assert losses["far_distill_loss"] == 0
    assert losses["near_distill_loss"] > 0
    total, logged = model.parse_losses(losses)
    assert total == losses["near_distill_loss"]
    assert set(logged) == {"loss", "near_distill_loss", "far_distill_loss"}
    assert configs["far"]["weight"] == 0.0  # what was lent is unchanged


def test_objectives_with_equal_sight_share_one_teacher_pass():
    model = make({"a": dict(type="HGKD", supervise="all", block=2), "b": dict(type="HGKD", supervise="all", block=0)})
    model(batch(), mode="loss")
    assert model.teacher.calls == [TeacherNeeds(blocks=(0, 2))]


def test_pixels_never_call_the_teacher():
    model = make({**PIXELS, "hgkd": dict(type="HGKD", supervise="all")})
    losses = model(batch(), mode="loss")
    assert set(losses) == {"pixels_reconstruction_loss", "hgkd_distill_loss"}
    assert len(model.teacher.calls) == 1


def test_merging_needs():
    whole, half = TeacherNeeds((3,)), TeacherNeeds((3, 1), 2, visible_only=True)
    other_decoder = TeacherNeeds((), 5, visible_only=True)
    passes, owner = merge_needs([whole, half, TeacherNeeds((1,)), other_decoder, TeacherNeeds((7,), visible_only=True)])
    assert passes == [TeacherNeeds((1, 3)), TeacherNeeds((1, 3, 7), 2, True), other_decoder]
    assert owner == [0, 1, 0, 2, 1]


def test_masks_follow_the_seed():
    model = make().eval()
    data = batch()
    torch.manual_seed(1)
    first = model(data, mode="loss")["hgkd_distill_loss"]
    second = model(data, mode="loss")["hgkd_distill_loss"]
    torch.manual_seed(1)
    torch.testing.assert_close(model(data, mode="loss")["hgkd_distill_loss"], first, rtol=0, atol=0)
    assert first != second


def test_predict_pools_the_whole_image():
    model = make().eval()
    data = batch(3)
    samples = model(data, mode="predict", label=torch.tensor([4, 5, 6]), index=torch.arange(3), split=["bank", "bank", "query"])
    assert [type(s) for s in samples] == [FeatureSample] * 3
    assert [(s.label, s.index, s.split) for s in samples] == [(4, 0, "bank"), (5, 1, "bank"), (6, 2, "query")]
    levels = model(data)
    torch.testing.assert_close(samples[0].features, levels[0].mean(dim=(1, 2)))
    torch.testing.assert_close(model(data.float() / 255), levels)


def test_unlabelled_predict():
    sample = make().eval()(batch(1), mode="predict")[0]
    assert (sample.label, sample.index) == (-1, 0)


def test_images_that_are_not_square():
    model = make(image_size=(64, 96))
    assert model.mask_grid == (2, 3)
    assert model(batch(2, (64, 96)), mode="loss")["hgkd_distill_loss"].isfinite()


def test_nothing_hidden_is_a_control():
    assert make(mask_ratio=0.0)(batch(), mode="loss")["hgkd_distill_loss"].isfinite()


def test_meta_describes_the_encoder():
    meta = make(teacher=False, objectives=PIXELS).meta()
    assert meta == {"encoder": {"name": "test_resnet", "stem": "default", "kwargs": {}}, "format": 1}


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        (dict(teacher=False), ("objective-without-teacher", "hgkd", "HGKD")),
        (dict(objectives=PIXELS), ("teacher-without-objective", "model.teacher")),
        (dict(image_size=70), ("image-size-not-divided", "64 x 64", "96 x 96")),
        (dict(mask_ratio=0.9), ("mask-ratio-too-high", "2 x 2")),
        (dict(objectives=dict(hgkd=dict(type="HGKD", block=7))), ("teacher-block-out-of-range", "block")),
        (dict(encoder="resnet81"), ("timm-name-unknown", "resnet81")),
    ],
)
def test_what_does_not_fit_is_refused_at_construction(options, refusal):
    encoder = options.pop("encoder", None)
    if encoder:
        with refused(ValueError, *refusal):
            MaskedDistiller(dict(type="SparseUNet", encoder=encoder), PIXELS, dict(type="RandomMask"), 64)
        return
    with refused(ValueError, *refusal):
        make(**options)


VISIBLE = dict(hgkd=dict(type="HGKD", supervise="visible"), pooled=dict(type="PooledFeature"))
RECTANGLES = dict(type="RectangleMask", mask_ratio=0.5)


@pytest.mark.parametrize("views", [1, 2])
def test_what_is_visible_is_decoded_alone_and_learnt(views):
    """The loss is that of a student that is given the crops, and the teacher's tokens there."""
    model = make(VISIBLE, mask=RECTANGLES, image_size=96, model=dict(decode="visible", masks_per_image=views))
    images = to_unit_range(batch(size=(96, 96)))
    visible = model.draw_views(images)
    teacher_outs = model.teach(images, visible)
    out = model._student_sees(images, visible, model._known(len(images), len(visible)))
    whole = model.objectives["hgkd"].loss_terms(out, teacher_outs["hgkd"], out.layout)["distill"]
    crops = crops_of(images.repeat(views, 1, 1, 1), visible)
    predicted = model.objectives["hgkd"].projectors["distill"](model.student(crops).decoded)
    chosen = whole.positions[:, None].expand_as(whole.target)
    expected = whole.target[chosen].view(len(crops), -1)
    found = predicted.flatten(1)
    torch.testing.assert_close(whole.prediction[chosen].view(len(crops), -1), found, rtol=1e-4, atol=1e-4)
    loss = nn.functional.smooth_l1_loss(found, expected, beta=2.0)
    torch.testing.assert_close(whole.loss(), loss, rtol=1e-4, atol=1e-5)


def test_an_unmasked_end_decodes_everything():
    model = make(VISIBLE, mask=dict(RECTANGLES, unmasked_share=0.5), image_size=96, model=dict(decode="visible"))
    model.mask.progress = 1.0
    out, _ = model._see(batch(size=(96, 96)), None)
    assert out.layout.all_visible
    assert (out.decoded != 0.0).any(1).all()


def test_pictures_show_what_a_step_decodes():
    model = make(VISIBLE, mask=RECTANGLES, image_size=96, model=dict(decode="visible")).eval()
    images = to_unit_range(batch(size=(96, 96)))
    visible = model.draw_mask(images)
    decoded = model.student_output(images, visible).decoded
    shown = visible.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None].expand_as(decoded)
    assert not decoded[~shown].any()
    assert decoded[shown].any()


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        (dict(model=dict(decode="some")), ("decode-unknown", "some", "visible")),
        (dict(objectives=VISIBLE), ("decode-visible-impossible", "RandomMask", "RectangleMask")),
        (
            dict(objectives=VISIBLE, mask=dict(RECTANGLES, mask_ratio=[0.0, 0.5])),
            ("decode-visible-impossible", "one mask_ratio"),
        ),
        (
            dict(objectives=VISIBLE, mask=RECTANGLES, model=dict(decode="visible", whole_view=True)),
            ("decode-visible-impossible", "whole_view=True"),
        ),
        (dict(mask=RECTANGLES), ("decode-visible-impossible", "model.objectives.hgkd.supervise='visible'", "'all'")),
        (dict(objectives=VISIBLE, mask=RECTANGLES, out_stride=32), ("decode-visible-impossible", "stride 32", "2 tokens")),
    ],
)
def test_a_decoder_of_the_visible_part_is_refused_where_more_is_needed(options, refusal):
    with refused(ValueError, *refusal):
        make(**{"model": dict(decode="visible"), "image_size": 96, **options})


def test_a_vit_decodes_whole_images():
    sizes = dict(embed_dim=16, depth=1, num_heads=2, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    student = dict(type="MaskedViT", arch=sizes, patch_size=16, cell=32)
    with refused(ValueError, "decode-visible-impossible", "MaskedViT", "SparseUNet"):
        MaskedDistiller(student, VISIBLE, RECTANGLES, 64, dict(type="FakeTeacher"), decode="visible")


def test_objectives_of_the_encoder_alone_learn_beside_it():
    objectives = dict(VISIBLE, dmae=dict(type="DMAE"), mgd=dict(type="MGD", feature=None))
    make(objectives, mask=RECTANGLES, image_size=96, model=dict(decode="visible"))(batch(size=(96, 96)), mode="loss")


def test_images_of_another_size_or_type_are_refused():
    model = make()
    with refused(ValueError, "images-of-another-size", "32 x 32", "64 x 64"):
        model(batch(2, (32, 32)), mode="loss")
    with refused(ValueError, "mode-unknown"):
        model(batch(2), mode="train")
    with refused(TypeError, "images-dtype", "uint8"):
        to_unit_range(torch.zeros(1, 3, 4, 4, dtype=torch.int64))
    with refused(ValueError, "objectives-empty"):
        MaskedDistiller(dict(type="SparseUNet", encoder="test_resnet"), {}, dict(type="RandomMask"), 64)


def test_objectives_of_all_kinds_mix():
    objectives = {
        "hgkd": dict(type="HGKD", supervise="all", block=(0, 2), stride=(32, 16), cosine=0.5, weight=2.0),
        "pixels": dict(type="PixelReconstruction"),
        "dmae": dict(type="DMAE", taps=((None, 1),)),
        "mgd": dict(type="MGD"),
    }
    model = make(objectives)
    losses = model(batch(), mode="loss")
    assert set(losses) == {
        "hgkd_distill_0_loss",
        "hgkd_distill_0_cosine_loss",
        "hgkd_distill_2_loss",
        "hgkd_distill_2_cosine_loss",
        "pixels_reconstruction_loss",
        "dmae_align_1_loss",
        "mgd_generation_loss",
    }
    assert model.teacher.calls == [TeacherNeeds(blocks=(0, 2)), TeacherNeeds(blocks=(1,), visible_only=True)]


def test_a_guided_mask_follows_the_teachers_attention():
    scores = torch.rand(4, 2, 2)
    with refused(ValueError, "mask-without-attention", "AttentionMask", "FakeTeacher"):
        make(mask=dict(type="AttentionMask"))
    FakeTeacher.attention = lambda self, images: scores
    try:
        model = make(mask=dict(type="AttentionMask", mask_ratio=0.5, temperature=0.0))
        visible = model.draw_mask(batch().float())
        assert visible.flatten(1).equal(scores.flatten(1) <= scores.flatten(1).sort(1).values[:, 1:2])
        assert model(batch(), mode="loss")["hgkd_distill_loss"].isfinite()
    finally:
        del FakeTeacher.attention


def test_the_teachers_time_is_counted(monkeypatch):
    model, clock, forward = make(), [0.0], FakeTeacher.forward

    def slow(self, *args):
        clock[0] += 0.5
        return forward(self, *args)

    monkeypatch.setattr(FakeTeacher, "forward", slow)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    for total in (0.5, 1.0):
        model(batch(), mode="loss")
        assert model.teacher_seconds == total


@pytest.mark.parametrize("ratio", [0.9, 0.95, 0.98])
def test_extreme_ratios_train(ratio):
    objectives = dict(dmae=dict(type="DMAE", taps=((None, 2),)), **PIXELS)
    model = make(objectives, mask_ratio=ratio, image_size=256)  # 64 cells: 6, 3 and 1 of them visible
    wrapper = OptimWrapper(torch.optim.AdamW(model.parameters(), lr=1e-3))
    losses = [model.train_step({"inputs": batch(2, (256, 256))}, wrapper)["loss"].detach() for _ in range(2)]
    assert all(loss.isfinite() for loss in losses)
    assert all(p.isfinite().all() for p in model.parameters())


def test_g2sd_from_a_file_without_decoder_is_refused_with_the_reason(tmp_path):
    from hgkd.networks.mae import MaskedAutoencoder, make_arch, save_mae

    arch = make_arch(dict(embed_dim=16, depth=2, num_heads=2, decoder_depth=0))
    file = save_mae(MaskedAutoencoder(arch), tmp_path / "encoder.safetensors")
    with refused(ValueError, "teacher-without-decoder", "encoder.safetensors", "encoder-only", "0.2", "0.02"):
        MaskedDistiller(
            dict(type="SparseUNet", encoder="test_resnet", decoder_width=32),
            dict(g2sd=dict(type="G2SD")),
            dict(type="RandomMask"),
            64,
            dict(type="MAETeacher", checkpoint=str(file), allow_random=True),
        )


def test_an_average_of_the_weights_has_no_teacher_of_its_own():
    model = make()
    average = ExponentialMovingAverage(model, momentum=0.5)
    copied = average.module
    assert copied.teacher is model.teacher
    assert copied.state_dict().keys() == model.state_dict().keys()
    storages = {p.data_ptr() for p in model.parameters()}
    assert not storages & {p.data_ptr() for p in copied.parameters()}
    inputs = batch()
    losses = []
    for part in (model, copied):
        torch.manual_seed(5)
        losses.append(sum(part(inputs, mode="loss").values()))
    assert torch.equal(*losses)
    before = model.student.encoder.bn1.weight.detach().clone()
    with torch.no_grad():
        model.student.encoder.bn1.weight += 1.0
    average.update_parameters(model)  # the first update takes the weights as they are
    with torch.no_grad():
        model.student.encoder.bn1.weight += 1.0
    average.update_parameters(model)
    torch.testing.assert_close(copied.student.encoder.bn1.weight, before + 1.5)


def test_a_copy_without_a_teacher_trains_by_itself():
    model = make(PIXELS, teacher=False)
    copied = copy.deepcopy(model)
    sum(copied(batch(), mode="loss").values()).backward()
    assert copied.teacher is None
    assert all(p.grad is None for p in model.parameters())


def test_what_the_student_sees_is_logged(monkeypatch):
    logged = []
    monkeypatch.setattr("hgkd.distillers.masked.print_log", lambda text, *_: logged.append(text))
    make(image_size=96, mask_ratio=0.6)
    assert logged == [
        "student: mask grid 3 x 3, 4 of 9 visible (mask_ratio 0.6); "
        "pixels normalised by mean (0.5, 0.5, 0.5), std (0.5, 0.5, 0.5)"
    ]
