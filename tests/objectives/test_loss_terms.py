"""What every objective of masked distillation has, for the model and the hooks that ask it."""

from typing import Any

import pytest
import torch
from refusals import refused

from hgkd.distillers import MaskedDistiller
from hgkd.objectives import LossTerm, MaskedObjective
from hgkd.pictures.distillation import distillation_columns
from hgkd.registry import MASKED_OBJECTIVES


def comparison(student_out: Any) -> dict[str, LossTerm]:
    found = student_out.decoded
    positions = torch.ones(found.shape[0], *found.shape[2:], dtype=torch.bool)
    distance = lambda a, b: (a - b).square().mean(1)  # noqa: E731
    return {"small": LossTerm(found, torch.zeros_like(found), positions, int(positions.sum()), distance)}


@MASKED_OBJECTIVES.register_module(force=True)
class SmallestObjective(MaskedObjective):
    """No more than the documentation asks for."""

    def loss_terms(self, student_out: Any, teacher_out: Any, layout: Any) -> dict[str, LossTerm]:
        return comparison(student_out)


@MASKED_OBJECTIVES.register_module(force=True)
class WithATargetMap(SmallestObjective):
    def target_map(self, teacher_out: Any, term: str | None = None) -> torch.Tensor:
        raise AssertionError("nobody asks for it without terms")


@pytest.mark.parametrize("kind", ["SmallestObjective", "WithATargetMap"])
def test_an_objective_of_its_loss_terms_alone_trains_and_is_pictured(kind: str) -> None:
    model = MaskedDistiller(
        dict(type="SparseUNet", encoder="test_resnet", decoder_width=16, min_decoder_width=8),
        dict(own=dict(type=kind)),
        dict(type="RandomMask"),
        64,
    )
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert model(images, mode="loss")["own_small_loss"] > 0
    assert set(distillation_columns(model, images)) == {"image", "seen"}


def test_terms_without_what_pictures_are_made_of_are_refused_when_the_class_is_made() -> None:
    with refused(TypeError, "terms-without-methods", "Half", "predict"):

        class Half(WithATargetMap):
            terms = ("small",)
