"""Several masks of an image in a step, a whole view among them, and masks that change over the training."""

import pytest
import torch
from refusals import refused
from test_masked import PIXELS, batch, make

from hgkd.distillers import MaskedDistiller
from hgkd.errors import code_of
from hgkd.masking import RandomMask, Randomness
from hgkd.pixels import to_unit_range

HGKD = dict(hgkd=dict(type="HGKD", supervise="all"))
INFERRED = dict(hgkd=dict(type="HGKD", target="inferred", supervise="visible"))


def with_views(objectives=None, mask_ratio=0.75, teacher=True, mask=None, **options):
    return MaskedDistiller(
        student=dict(type="SparseUNet", encoder="test_resnet", decoder_width=32),
        objectives=objectives or HGKD,
        mask=mask or dict(type="RandomMask", mask_ratio=mask_ratio),
        image_size=64,
        teacher=dict(type="FakeTeacher") if teacher else None,
        **options,
    )


@pytest.mark.parametrize(("views", "ratio"), [(4, 0.75), (2, 0.5), (3, 0.75), (6, 0.75)])
def test_views_share_no_cell_as_long_as_there_are_others(views, ratio):
    drawn = RandomMask(ratio).draw_views(views, 5, (4, 4), Randomness("cpu"))
    shown = drawn.view(views, 5, 4, 4)
    times = shown.sum(0)  # how often each cell is shown
    assert int(times.max() - times.min()) <= 1
    assert shown.flatten(2).sum(2).unique().tolist() == [round(16 * (1 - ratio))]
    assert not shown[0].equal(shown[0].roll(1, 0))  # images differ


def test_views_of_different_ratios_go_on_where_the_last_ended():
    torch.manual_seed(0)
    times = RandomMask([0.5, 0.9]).draw_views(3, 50, (8, 8), Randomness("cpu")).view(3, 50, 8, 8).sum(0)
    spread = times.flatten(1).amax(1) - times.flatten(1).amin(1)
    assert int(spread.max()) <= 1


def test_one_view_is_the_ordinary_mask():
    ordinary, view = make(mask_ratio=0.75), with_views()
    view.load_state_dict(ordinary.state_dict())
    view.teacher.load_state_dict(ordinary.teacher.state_dict())
    pictures = batch()
    torch.manual_seed(3)
    expected = ordinary(pictures, mode="loss")
    torch.manual_seed(3)
    assert view(pictures, mode="loss") == expected


def test_the_loss_is_that_of_the_views_as_one_batch():
    model = with_views(masks_per_image=3, whole_view=True).eval()
    images = to_unit_range(batch())
    torch.manual_seed(1)
    student_out, teacher_outs = model._see(images, None)
    visible = student_out.layout.visible
    assert visible.shape == (16, 2, 2)
    assert visible[:4].all()
    assert visible[4:].flatten(1).sum(1).tolist() == [1] * 12
    assert torch.equal(student_out.images, images.repeat(4, 1, 1, 1))
    found = model.objectives["hgkd"](student_out, teacher_outs["hgkd"], student_out.layout)["distill"]
    one_by_one = []
    for view in range(4):
        part = slice(4 * view, 4 * view + 4)
        out = model.student(images, visible[part])
        target = model.teach(images, visible[part])["hgkd"]
        one_by_one.append(model.objectives["hgkd"](out, target, out.layout)["distill"])
    torch.testing.assert_close(found, torch.stack(one_by_one).mean())  # eval mode: no statistics of the batch


def test_the_teacher_sees_whole_images_once():
    seen = []
    for objectives, expected in ((HGKD, [4]), (INFERRED, [12])):
        model = with_views(objectives, masks_per_image=3)
        given = model.teacher.patches.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
        model(batch(), mode="loss")
        given.remove()
        assert seen == expected, objectives
        seen.clear()


@pytest.mark.parametrize("objective", [dict(type="HGKD", supervise="all", centre=True), dict(type="PooledFeature")])
@pytest.mark.parametrize("views", [dict(masks_per_image=2), dict(whole_view=True)])
def test_views_of_one_image_are_no_batch_to_compare_it_with(objective, views):
    """What differs from the batch's mean is exactly nothing, towards which the student would be trained."""
    model = with_views(dict(compared=objective), **views)
    with pytest.raises(ValueError, match="compares the images of a batch") as caught:
        model(batch()[:1], mode="loss")
    assert code_of(caught.value) == "batch-of-one"
    assert all(torch.isfinite(value) for value in model(batch()[:2], mode="loss").values())


def test_other_generators_draw_their_views_one_by_one():
    class Corner:
        guided, progress, current_ratio = False, 0.0, 0.75

        def check(self, grid):
            pass

        def __call__(self, images, grid, *, device, generator=None, scores=None):
            visible = torch.zeros(images, *grid, dtype=torch.bool)
            visible[:, 0, 0] = True
            return visible

    model = with_views(masks_per_image=2)
    model.mask = Corner()
    assert model.draw_views(torch.zeros(3, 3, 64, 64)).flatten(1).tolist() == [[True, False, False, False]] * 6


def test_the_unmasked_end_is_one_whole_view():
    model = with_views(mask=dict(type="RandomMask", mask_ratio=0.75, unmasked_share=0.5), masks_per_image=2, whole_view=True)
    images = torch.zeros(3, 3, 64, 64)
    assert len(model.draw_views(images)) == 9
    model.mask.progress = 1.0
    visible = model.draw_views(images)
    assert visible.shape == (3, 2, 2)
    assert visible.all()


def test_a_ratio_for_each_image_trains_and_is_said():
    model = with_views(mask_ratio=[0.0, 0.75])
    losses = model(batch(), mode="loss")
    assert torch.isfinite(losses["hgkd_distill_loss"])
    assert "1 to 4 of 4 visible, drawn for each image (mask_ratio 0 to 0.75)" in model._seen()
    views = with_views(masks_per_image=2, whole_view=True)
    assert "1 of 4 visible (mask_ratio 0.75); 2 masks an image; and the whole image" in views._seen()


SHARP = dict(type="AttentionMask", mask_ratio=0.5, temperature=0.0)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (dict(mask_ratio=0.0, masks_per_image=2), ("masks_per_image=2", "nothing is hidden")),
        (dict(mask_ratio=0.1, masks_per_image=2), ("masks_per_image=2", "nothing is hidden")),  # 3.6 of 4 cells are 4
        (dict(mask=SHARP, masks_per_image=3), ("masks_per_image=3", "temperature=0")),
        (dict(mask_ratio=0.0, whole_view=True), ("whole_view=True", "nothing is hidden")),
    ],
)
def test_views_that_would_be_alike_are_refused(options, told):
    with refused(ValueError, "views-equal", *told):
        with_views(**options)


@pytest.mark.parametrize(
    "options",
    [
        dict(whole_view=True),
        dict(mask_ratio=[0.0, 0.75], masks_per_image=2),
        dict(mask=dict(type="RandomMask", mask_ratio=0.75, final_mask_ratio=0.0), masks_per_image=2),
    ],
)
def test_views_that_differ_are_not_refused(options):
    losses = with_views(**options)(batch(), mode="loss")
    assert torch.isfinite(losses["hgkd_distill_loss"])


@pytest.mark.parametrize("given", [0, -1, 1.5, True, "two"])
def test_a_number_of_masks_that_is_none_is_refused(given):
    with pytest.raises(ValueError, match=r"masks_per_image is the number of masks of an image, 1 or more") as caught:
        with_views(masks_per_image=given)
    assert code_of(caught.value) == "masks-per-image"


@pytest.mark.parametrize(
    "mask",
    [
        dict(type="RandomMask", mask_ratio=0.0),
        dict(type="RandomMask", mask_ratio=0.6, unmasked_share=0.2),
        dict(type="RandomMask", mask_ratio=0.6, final_mask_ratio=0.0),
        dict(type="RandomMask", mask_ratio=0.1, final_mask_ratio=0.6),  # 3.6 of 4 cells are 4
        dict(type="RandomMask", mask_ratio=[0.0, 0.6]),
        dict(type="RectangleMask", mask_ratio=0.25, min_aspect=1.0),  # of 3 and of 5 cells the nearest square has 4
    ],
)
def test_objectives_of_hidden_cells_refuse_steps_that_hide_nothing(mask):
    with pytest.raises(ValueError, match=r"objective 'pixels' .* set model\.objectives\.pixels\.supervise='all'") as caught:
        with_views(PIXELS, teacher=False, mask=mask)
    assert code_of(caught.value) == "nothing-supervised"
    with_views(dict(pixels=dict(type="PixelReconstruction", supervise="all")), teacher=False, mask=mask)  # the remedy


@pytest.mark.parametrize(
    "mask",
    [
        dict(type="RandomMask", mask_ratio=0.6, final_mask_ratio=0.2),
        dict(type="RandomMask", mask_ratio=0.1, rounding="floor"),  # 3.6 of 4 cells are 3
        dict(type="RandomMask", mask_ratio=[0.2, 0.6]),
        dict(type="RectangleMask", mask_ratio=0.5),
    ],
)
def test_objectives_of_hidden_cells_take_masks_that_always_hide_some(mask):
    model = with_views(PIXELS, teacher=False, mask=mask)
    for model.mask.progress in (0.0, 1.0):
        assert not model.draw_views(torch.zeros(8, 3, 64, 64)).all()


@pytest.mark.parametrize("options", [dict(whole_view=True), dict(mask=dict(type="RandomMask", mask_ratio=[0.25, 0.75]))])
def test_a_vit_student_refuses_different_numbers_of_cells(options):
    arch = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    arch |= {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    with pytest.raises(ValueError, match=r"but a MaskedViT takes as many of each") as caught:
        MaskedDistiller(
            student=dict(type="MaskedViT", arch=arch, cell=32),
            objectives=PIXELS,
            image_size=64,
            **{"mask": dict(type="RandomMask", mask_ratio=0.75), **options},
        )
    assert code_of(caught.value) == "equal-counts-needed"
