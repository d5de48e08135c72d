"""Sharded parameters by the config's key ``fsdp``: torch's ``fully_shard`` (FSDP 2; ZeRO, arXiv 1910.02054) over all processes.

Of what is trained, parameters, gradients and optimiser state are divided among the processes. A ViT is gathered block by block,
everything else (a whole CNN) at once, as it is walked through and not called. A frozen ViT teacher is divided, too.
mmengine 0.10.7's own strategy is FSDP 1, refuses a CPU and writes sharded files. Here a checkpoint is that of an ordinary run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.dist import get_world_size
from mmengine.hooks import EMAHook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from hgkd.errors import InvalidValueError
from hgkd.networks.guest import teachers_of
from hgkd.networks.mae import MaskedAutoencoder
from hgkd.networks.vit import is_plain_vit
from hgkd.training.hooks.feature_cache import TeacherCacheHook
from hgkd.training.hooks.pictures import VisualizationHook
from hgkd.training.hooks.terms import TermShareHook


def blocks_of(network: nn.Module) -> Iterator[nn.Module]:
    """The blocks of all plain ViTs within a network, encoder's and decoder's, which are called as modules."""
    for module in network.modules():
        if isinstance(module, MaskedAutoencoder) or is_plain_vit(module):
            for name in ("blocks", "decoder_blocks"):
                yield from getattr(module, name, None) or ()


def shard_model(model: BaseModel) -> str:
    """Divide the parameters of a model, and of its teachers, among all processes, in place; a sentence for the log.

    Every process must have built it with the same weights.

    Raises:
        ValueError: torch is too old, the mask is guided by a teacher, whose attention is read from within its blocks, or a
            teacher of visible cells gets different numbers of them.
    """
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError as error:
        raise InvalidValueError(
            "fsdp-torch-version", f"fsdp=True needs torch 2.6 or later, this is {torch.__version__}; leave fsdp out"
        ) from error
    guide = getattr(model, "_guide", None)
    if guide is not None:
        raise InvalidValueError(
            "fsdp-guided-mask",
            f"fsdp=True divides the blocks of teacher {guide!r}, whose attention guides the mask and is read within them; take "
            "a mask that is not guided, or leave fsdp out",
        )
    mask: Any = getattr(model, "mask", None)
    passes: Mapping[str, Any] = getattr(model, "_passes", {}) if getattr(mask, "counts_differ", False) else {}
    for name, needs in passes.items():
        if any(need.visible_only for need in needs):  # Teacher._see
            raise InvalidValueError(
                "fsdp-uneven-masks",
                f"fsdp=True divides the blocks of teacher {name!r}, which sees visible cells alone, in one pass for each "
                f"number of them in a batch; with mask_ratio={list(mask.mask_ratio)} processes would make different numbers of "
                "passes and wait for each other for ever. Give one mask_ratio, an objective on whole images, or leave fsdp out",
            )
    device = get_device()
    mesh = init_device_mesh(device, (get_world_size(),))
    model.to(memory_format=torch.contiguous_format)  # FSDP 2 takes no kernels in channels last, as sparsify lays them out
    blocks = list(blocks_of(model))
    for part in (*blocks, model):
        fully_shard(part, mesh=mesh)
    texts = [
        f"of the model {_share(model)} ({len(blocks)} blocks one at a time)" if blocks else f"of the model {_share(model)}"
    ]
    for name, teacher in teachers_of(model).items():
        within = list(blocks_of(teacher))
        for part in within:
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
        teacher.to(device)
        texts.append(f"of {name} {_share(teacher)}" if within else f"of {name}, which is no plain ViT, all")
    return f"parameters are divided among {get_world_size()} processes; each keeps {', '.join(texts)}"


def _share(module: nn.Module) -> str:
    """How much of a module's parameters lies in this process."""
    own, total = local_bytes(module.parameters()), sum(p.numel() * p.element_size() for p in module.parameters())
    return f"{own / 2**20:.1f} of {total / 2**20:.1f} MB"


def local_bytes(values: object) -> int:
    """Bytes of tensors, of sharded ones this process's part; also in mappings and iterables."""
    if isinstance(values, Tensor):
        local = _local(values)
        return local.numel() * local.element_size()
    if isinstance(values, Mapping):
        return sum(map(local_bytes, values.values()))
    return sum(map(local_bytes, values)) if hasattr(values, "__iter__") and not isinstance(values, str) else 0


def _local(value: Any) -> Tensor:
    part: Tensor = value.to_local() if hasattr(value, "to_local") else value
    return part


def whole(value: Any, keep: bool = True) -> Any:
    """The same with sharded tensors gathered, on the CPU, one after the other; all processes must ask for it.

    Args:
        keep: this process wants the result; otherwise its tensors are empty.
    """
    if isinstance(value, Tensor):
        gathered: Any = value.detach()
        gathered = gathered.full_tensor() if hasattr(gathered, "full_tensor") else gathered
        return gathered.cpu() if keep else torch.empty(0)
    if isinstance(value, Mapping):
        return {key: whole(item, keep) for key, item in value.items()}
    return type(value)(whole(item, keep) for item in value) if type(value) in (list, tuple) else value


def divided(value: Tensor, like: Any) -> Tensor:
    """A whole tensor as a sharded one, where ``like`` is one of the same shape; all processes must ask for it."""
    from torch.distributed.tensor import distribute_tensor

    if not hasattr(like, "device_mesh") or value.shape != like.shape:
        return value
    shared: Tensor = distribute_tensor(value.to(like.to_local().device), like.device_mesh, like.placements)
    return shared


def divided_state(state: Mapping[str, Any], wrapper: OptimWrapper) -> dict[str, Any]:
    """The state of an optimiser over whole parameters, for one over sharded ones; as it is where the two do not fit."""
    parameters = [p for group in wrapper.optimizer.param_groups for p in group["params"]]
    kept = {
        number: {
            name: divided(value, parameters[number]) if isinstance(value, Tensor) and number < len(parameters) else value
            for name, value in values.items()
        }
        for number, values in state.get("state", {}).items()
    }
    return {**state, "state": kept}


def check_hooks(runner: Runner) -> None:
    """Refuse hooks that use the model in one process alone, or copy it; leave out pictures, which are no part of a training.

    Raises:
        ValueError: names the hook.
    """
    pictures = [hook for hook in runner.hooks if isinstance(hook, VisualizationHook)]
    for hook in pictures:
        runner.hooks.remove(hook)
        runner.logger.warning("fsdp=True: no pictures, as one process alone cannot use a model that is divided")
    for hook in runner.hooks:
        if isinstance(hook, (EMAHook, TeacherCacheHook, TermShareHook)):
            remedy = "set teacher_features=None" if isinstance(hook, TeacherCacheHook) else "remove the hook"
            raise InvalidValueError(
                "fsdp-with-hook",
                f"fsdp=True does not go with {type(hook).__name__}, which copies parts of the model, or uses them in one "
                f"process and not in another; {remedy}, or leave fsdp out",
            )
