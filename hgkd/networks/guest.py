"""A frozen teacher beside a model that learns from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self

Guest = TypeVar("Guest")


def teachers_of(model: object) -> dict[str, Any]:
    """All teachers of a model by name: of one with ``teachers`` these, a single one as 'teacher', none of any other model."""
    several = getattr(model, "teachers", None)
    if isinstance(several, Mapping):
        return dict(several)
    one = getattr(model, "teacher", None)
    return {} if one is None else {"teacher": one}


class TeacherOwner(nn.Module, Generic[Guest]):
    """Base of models with a teacher that is no submodule, or several in a dict ``teachers``.

    The teacher is absent from ``parameters()``, ``state_dict()``, ``train()`` and DDP, but follows the model from device to
    device.

    Attributes:
        teacher: set by :meth:`keep_teacher`.
    """

    teacher: Guest

    def keep_teacher(self, teacher: Guest) -> None:
        """Take a teacher; None where there is none."""
        object.__setattr__(self, "teacher", teacher)  # nn.Module.__setattr__ would register it

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        for teacher in teachers_of(self).values():  # the device only: a teacher keeps the precision that it was built with
            teacher.to(next(self.parameters()).device)
        return self
