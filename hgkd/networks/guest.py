"""A frozen teacher beside a model that learns from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar

from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self

Guest = TypeVar("Guest")


class TeacherOwner(nn.Module, Generic[Guest]):
    """Base of models with a teacher that is no submodule.

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
        teacher = getattr(self, "teacher", None)
        if teacher is not None:  # the device only: a teacher keeps the precision that it was built with
            teacher.to(next(self.parameters()).device)
        return self
