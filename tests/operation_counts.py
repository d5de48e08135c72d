"""How often torch's operators were called: what a GPU would launch, and where the host would wait for it."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = ("nonzero", "_local_scalar_dense", "masked_select", "_unique2")


class CountingOperations(TorchDispatchMode):
    """Context that counts operators by name, e.g. ``seen['copy_']``; views count as well."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> object:
        self.seen[func.overloadpacket.__name__] += 1  # type: ignore[attr-defined]
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @property
    def waits(self) -> int:
        """Operators whose result the host reads, or whose shape it must know."""
        return sum(self.seen[name] for name in WAITS)
