"""Where the mask fixes how many cells an image shows, a step of a ViT student with a teacher of visible cells reads nothing."""

from typing import Any

import pytest
import torch
from operation_counts import CountingOperations
from refusals import refused
from torch import Tensor

from hgkd import masking
from hgkd.distillers import MAEPretraining, MaskedDistiller
from hgkd.masking import ids_keep_of
from hgkd.networks.mae import MaskedAutoencoder, make_arch, save_mae
from hgkd.sparse import CellLayout, layout
from hgkd.students import vit

SIZES: dict[str, Any] = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8}
SIZES |= {"decoder_embed_dim": 24, "decoder_depth": 2, "decoder_num_heads": 2}
OBJECTIVES = {
    "dmae": dict(dmae=dict(type="DMAE", taps=((0, 0), (1, 1)))),
    "g2sd": dict(g2sd=dict(type="G2SD", decoder_block=1)),
    "inferred": dict(hgkd=dict(type="HGKD", target="inferred")),
    "both": dict(g2sd=dict(type="G2SD", decoder_block=1), pixels=dict(type="PixelReconstruction")),
}


@pytest.fixture
def teacher(tmp_path) -> dict[str, Any]:
    torch.manual_seed(0)
    file = save_mae(MaskedAutoencoder(make_arch({**SIZES, "image_size": (32, 32)})), tmp_path / "mae.safetensors")
    return dict(type="MAETeacher", checkpoint=str(file), num_heads=2, decoder_num_heads=2, allow_random=True)


def model(teacher: dict[str, Any], objectives: dict[str, Any], ratio: Any = 0.5, **options: Any) -> MaskedDistiller:
    torch.manual_seed(0)
    student = options.pop("student", dict(type="MaskedViT", arch=SIZES))
    mask = dict(type="RandomMask", mask_ratio=ratio)
    return MaskedDistiller(
        student=student, objectives=objectives, mask=mask, image_size=32, teacher=teacher, cuda_graph=False, **options
    )


def pictures(n: int = 3) -> Tensor:
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def losses(net: MaskedDistiller) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {name: value.detach() for name, value in net._losses(pictures(), None).items()}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_reads_nothing_from_the_device(name, teacher, monkeypatch) -> None:
    """On the CPU the numbers are checked by reading flags, which on a GPU the device checks itself."""
    net = model(teacher, OBJECTIVES[name])
    losses(net)  # what a teacher gives on the first images of a run is looked at
    flags: list[Tensor] = []
    for module in (layout, vit, masking):
        monkeypatch.setattr(module, "require", lambda fits, error: flags.append(fits))
    with CountingOperations() as counted:
        sum(net._losses(pictures(), None).values()).backward()
    assert counted.waits == 0
    assert len(flags) == 3  # of the layout, the student and the teacher
    assert all(flags)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("views", [1, 2])
def test_values_are_those_of_counting(name, views, teacher, monkeypatch) -> None:
    net = model(teacher, OBJECTIVES[name], masks_per_image=views)
    known = losses(net)
    monkeypatch.setattr(MaskedDistiller, "_cells_masked", None)
    counted = losses(net)
    assert known == counted
    assert len(known) > 0


def test_a_whole_view_has_another_number_and_is_counted(teacher) -> None:
    student = dict(type="SparseUNet", encoder="test_resnet", decoder_width=32, cell=32)
    net = MaskedDistiller(
        student=student,
        objectives=dict(hgkd=dict(type="HGKD", target="inferred", supervise="all")),
        mask=dict(type="RandomMask", mask_ratio=0.5),
        image_size=64,
        teacher=teacher,
        whole_view=True,
        cuda_graph=False,
    )
    assert net._cells_shown(3, 6) == 3 * (2 + 4)
    assert net._cells_an_image is None
    found = net._losses(torch.rand(3, 3, 64, 64), None)
    assert all(torch.isfinite(value) for value in found.values())


@pytest.mark.parametrize(
    ("options", "mask", "expected"),
    [
        ({}, {}, (2, 2)),
        ({"masks_per_image": 2}, {}, (2, 2)),
        ({"whole_view": True}, {}, None),  # two sizes in one batch
        ({}, {"mask_ratio": [0.4, 0.8]}, None),  # a size for each image
        ({}, {"unmasked_share": 0.5}, (3, 3)),  # nothing is hidden in the end
    ],
)
def test_a_student_is_told_of_rectangles(options, mask, expected, teacher, monkeypatch) -> None:
    """A GPU's host cannot look for them without waiting; here the layout checks that it was told the truth."""
    net = MaskedDistiller(
        student=dict(type="SparseUNet", encoder="test_resnet", decoder_width=32, cell=32),
        objectives=dict(pixels=dict(type="PixelReconstruction", supervise="all")),
        mask={"type": "RectangleMask", "mask_ratio": 0.6, **mask},
        image_size=96,
        cuda_graph=False,
        **options,
    )
    net.mask.progress = 0.9
    told: list[Any] = []
    forward = net.student.forward

    def listen(images: Tensor, visible: Tensor, **known: Any) -> Any:
        told.append(known["rectangle"])
        return forward(images, visible, **known)

    monkeypatch.setattr(net.student, "forward", listen)
    losses = net._losses(torch.rand(3, 3, 96, 96), None)
    assert all(torch.isfinite(value) for value in losses.values())
    assert told == [expected]


def test_a_student_that_takes_numbers_alone_is_told_of_no_rectangle(teacher) -> None:
    net = model(teacher, OBJECTIVES["dmae"])
    assert net._known(3, 3) == {"num_cells": 3 * 8}
    assert all(torch.isfinite(value) for value in losses(net).values())


def test_numbers_that_are_not_the_masks_are_refused() -> None:
    visible = torch.tensor([[True, True, False], [False, True, True]])
    assert ids_keep_of(visible, 2).tolist() == ids_keep_of(visible).tolist() == [[0, 1], [1, 2]]
    for wrong in (1, 3):
        with refused(ValueError, "visible-cells-miscounted", str(wrong)):
            ids_keep_of(visible, wrong)
    uneven = torch.tensor([[[True, True]], [[True, False]]])
    for known in (None, 3):
        with refused(ValueError, "visible-counts-differ", "1 to 2"):
            vit.ids_keep_of_cells(CellLayout(uneven, 8, num_cells=known), 8, counted=known is None)


def test_pretraining_a_mae_counts_nothing(monkeypatch) -> None:
    net = MAEPretraining(SIZES, image_size=32, patch_size=8)
    monkeypatch.setattr(masking, "require", lambda fits, error: None)
    with CountingOperations() as counted:
        net.loss(pictures())
    assert (counted.seen["nonzero"], counted.waits) == (0, 1)  # on the CPU the loss asks whether anything is hidden
