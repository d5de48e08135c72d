"""Any plain ViT of timm, or BEiT, as a teacher, from a local file in any naming of :mod:`hgkd.teachers.naming`.

Tokens are the raw output of a block, before the final norm. For DINOv2 (arXiv 2304.07193) and other self-supervised ViTs an
intermediate block is often the better target.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from mmengine.logging import print_log
from timm.layers import PatchEmbed, resample_abs_pos_embed
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from hgkd.engine.weights import load_strict, read_weights
from hgkd.errors import WeightsError, unknown_name_message
from hgkd.registry import MODELS
from hgkd.structures import TeacherInfo, TeacherNeeds, TeacherOutput
from hgkd.teachers.base import Teacher
from hgkd.teachers.naming import to_timm_names


@MODELS.register_module()
class TimmTeacher(Teacher):
    """A frozen timm ViT.

    Args:
        name: timm's name, e.g. 'vit_small_patch14_dinov2'.
        checkpoint: local weight file (.safetensors or .pth) in timm's or another known naming.
        pretrained: take timm's own weights, which may download them; the only way to any download.
        dtype: 'float32', 'float16' or 'bfloat16'.
        normalize: (mean, deviation) of the pixels in [0, 1] that the network was trained with, three numbers each, RGB; None
            takes what timm notes for the name.
        allow_random: accept a network without weights, or with some that look random (tests and baselines).
        kwargs: further arguments of ``timm.create_model``.

    Raises:
        ValueError: unknown name (the nearest are named), no plain ViT, or no weights at all.
        FileNotFoundError, WeightsError: see :func:`hgkd.engine.weights.load_strict`.
    """

    def __init__(
        self,
        name: str,
        checkpoint: str | Path | None = None,
        pretrained: bool = False,
        dtype: str = "float32",
        normalize: Sequence[Sequence[float]] | None = None,
        allow_random: bool = False,
        **kwargs: Any,
    ) -> None:
        if not timm.is_model(name.partition(".")[0]):
            raise ValueError(unknown_name_message("teacher", name, timm.list_models("*vit*")))
        if checkpoint is None and not pretrained and not allow_random:
            raise ValueError(
                f"teacher {name!r} has no weights: set checkpoint (teacher_checkpoint in our configs) to a local file, or "
                "pretrained=True to let timm download them"
            )
        if checkpoint is not None and pretrained:
            raise ValueError("checkpoint and pretrained both name weights for the teacher; give one of them")
        built = timm.create_model(name, pretrained=pretrained, num_classes=0, **kwargs)
        if not isinstance(built, (VisionTransformer, Beit)) or type(built.patch_embed) is not PatchEmbed:
            raise ValueError(
                f"teacher {name!r} is not a plain ViT but a {type(built).__name__} of timm's {type(built).__module__}; "
                "choose one of timm's vit_*, deit_* or beit* models"
            )
        network: Any = built
        cfg: Any = network.pretrained_cfg
        mean, deviation = normalize or (cfg["mean"], cfg["std"])
        super().__init__(dtype, mean, deviation)
        if checkpoint is not None:
            _, weights = to_timm_names(read_weights(checkpoint), str(checkpoint))
            if "decoder_embed.weight" in weights:
                raise WeightsError(f"{checkpoint} is an MAE file with its decoder; load it with type='MAETeacher'")
            own = network.state_dict()
            parts = ("head", "head_dist", "fc_norm", "norm", "lm_head")
            unused = ("mask_token", *(f"{part}." for part in parts if f"{part}.weight" not in own))
            # no feature comes from the norm after the blocks, which some files call otherwise
            load_strict(
                network, weights, source=str(checkpoint), ignore_missing=("norm.", "fc_norm."), ignore_unexpected=unused
            )
        self.source, self.allow_random = str(checkpoint or name), allow_random
        self._is_beit = isinstance(network, Beit)
        if network.pos_embed is None and not self._is_beit:
            raise ValueError(f"teacher {name!r} has no absolute position embedding; choose another ViT")
        network.norm, network.head = nn.Identity(), nn.Identity()  # never run
        network.patch_embed.strict_img_size = False
        network.dynamic_img_size = False  # positions are fitted here
        self.network = network
        self.info = TeacherInfo(
            kind="timm",
            width=network.embed_dim,
            depth=len(network.blocks),
            patch_size=network.patch_embed.patch_size[0],
        )
        self.has_class_token = bool(getattr(network, "has_class_token", True))  # BEiT always has one
        self._prefix_tokens = int(network.num_prefix_tokens)
        self._prefix_positions = 0 if getattr(network, "no_embed_class", False) else self._prefix_tokens
        self._native_grid = tuple(network.patch_embed.grid_size)
        self._native_positions = None if network.pos_embed is None else network.pos_embed.detach().clone().float()
        self._native_biases = {
            name: parameter.detach().clone().float()
            for name, parameter in network.named_parameters()
            if name.endswith("relative_position_bias_table")
        }
        self.freeze()

    def check(self, needs: TeacherNeeds) -> None:
        super().check(needs)
        if self._is_beit and needs.visible_only:
            raise ValueError(
                "a BEiT teacher adds position biases for its whole grid to its attention and cannot drop hidden patches, as "
                "DMAE needs; use an objective on whole images (HGKD target='full', MGD), or another ViT"
            )

    def attention(self, images: Tensor, block: int = -1) -> Tensor:
        if self._is_beit:
            raise ValueError("the attention of a BEiT teacher cannot guide masks (its biases are inside timm's layer)")
        return super().attention(images, block)

    def _set_grid(self, grid: tuple[int, int]) -> None:
        current = next(self.network.blocks.parameters())
        if self._native_positions is not None:
            positions = self._native_positions
            if grid != self._native_grid:
                positions = resample_abs_pos_embed(
                    positions, list(grid), list(self._native_grid), num_prefix_tokens=self._prefix_positions
                )
                print_log(f"teacher's position embedding resampled from {self._native_grid} to {grid}", "current")
            self.network.pos_embed = nn.Parameter(positions.to(current.device, current.dtype), requires_grad=False)
        if self._native_biases:
            self._set_biases(grid, current)

    def _set_biases(self, grid: tuple[int, int], like: Tensor) -> None:
        """BEiT's relative position biases for another grid, by timm's own interpolation of the file's."""
        for name, table in self._native_biases.items():
            layer: Any = self.network.get_submodule(name.removesuffix(".relative_position_bias_table"))
            layer.set_window_size(self._native_grid)
            layer.relative_position_bias_table = nn.Parameter(table.to(like.device), requires_grad=False)
            layer.set_window_size(grid)
            layer.to(like.dtype)

    def _embed(self, images: Tensor) -> Tensor:
        """Class and register tokens and all patches, as they enter the first block, (B, prefix + N, D)."""
        network: Any = self.network
        x = network.patch_embed(images)
        if x.dim() == 4:
            x = x.flatten(1, 2)
        if self._is_beit:
            x = torch.cat([network.cls_token.expand(len(x), -1, -1), x], 1)
            return x if network.pos_embed is None else x + network.pos_embed
        embedded: Tensor = network.norm_pre(network._pos_embed(x))
        return embedded

    def _before_block(self, images: Tensor, block: int) -> tuple[Tensor, nn.Module, int]:
        network: Any = self.network
        return network.blocks[:block](self._embed(images)), network.blocks[block], self._prefix_tokens

    def _forward(self, images: Tensor, kept: Tensor | None, needs: TeacherNeeds) -> TeacherOutput:
        network: Any = self.network
        x = self._embed(images)
        prefix = self._prefix_tokens
        if kept is not None:
            patches = x[:, prefix:].gather(1, kept[:, :, None].expand(-1, -1, x.shape[2]))
            x = torch.cat([x[:, :prefix], patches], 1)
        tokens = {}
        shared = {"shared_rel_pos_bias": network.rel_pos_bias()} if self._is_beit and network.rel_pos_bias is not None else {}
        for i, block in enumerate(network.blocks[: max(needs.blocks, default=-1) + 1]):
            x = block(x, **shared)
            if i in needs.blocks:
                tokens[i] = self.on_grid(x[:, prefix:], kept)
        assert self.grid is not None
        return TeacherOutput(tokens=tokens, grid=self.grid, cls=x[:, 0].float() if self.has_class_token else None)
