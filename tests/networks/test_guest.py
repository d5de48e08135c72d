"""A teacher stands beside the model that learns from it."""

import copy
import io
from typing import Any

import torch
from mmengine.model import BaseModel
from torch import nn

from hgkd.distillers import ClassifierTraining, MaskedDistiller
from hgkd.networks.guest import TeacherOwner
from hgkd.openmmlab.distiller import FeatureDistiller


class Pupil(TeacherOwner[nn.Module | None], BaseModel):
    def __init__(self, teacher: nn.Module | None) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.keep_teacher(teacher)

    def forward(self, inputs: Any, mode: str = "tensor") -> Any:
        return self.layer(inputs)


def test_a_teacher_is_no_part_of_the_model_but_follows_its_device() -> None:
    teacher = nn.Linear(2, 2, dtype=torch.float16).eval()
    pupil = Pupil(teacher).train()
    assert pupil.teacher is teacher
    assert not teacher.training
    assert [name for name, _ in pupil.named_modules() if name] == ["data_preprocessor", "layer"]
    assert set(pupil.state_dict()) == {"layer.weight", "layer.bias"}
    pupil.double()
    assert (pupil.layer.weight.dtype, teacher.weight.dtype) == (torch.float64, torch.float16)
    pupil.to("meta")
    assert teacher.weight.device.type == "meta"


def test_a_model_without_a_teacher() -> None:
    pupil = Pupil(None).to("meta")
    assert pupil.teacher is None
    assert copy.deepcopy(pupil).teacher is None
    again: Any = pickled(Pupil(None))
    assert again.teacher is None


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    found: nn.Module = torch.load(file, weights_only=False)
    return found


def test_every_distiller_keeps_its_teacher_this_way() -> None:
    for kind in (MaskedDistiller, ClassifierTraining, FeatureDistiller):
        assert issubclass(kind, TeacherOwner)
        assert kind._apply is TeacherOwner._apply
