"""How families of timm's networks turn an image into tokens; a :class:`TimmTeacher` asks one of these.

A family is a small class: facts as attributes (which requests it can serve, and why not others), and the steps in which it
differs from the rest. :func:`family_for` picks the one for a network.

- :class:`AbsoluteViT`: patches with positions added once, then equal blocks (DINOv2, MAE, CLIP, SigLIP, AIMv2, DeiT ...).
- :class:`RotaryViT`: timm's ``Eva`` (DINOv3, EUPE, EVA-02, Perception Encoder, ROPE-ViT ...). Queries and keys are turned by
  angles that are a function of a patch's row and column (RoPE, arXiv 2104.09864), so the angles of dropped patches are dropped
  with them: gathered by the same indices as the tokens.
- :class:`BiasViT`: BEiT, whose attention has a bias for every pair of positions.
- :class:`Levels`: every other network that gives maps of features (timm's ``forward_intermediates``): CNNs, hierarchical
  transformers, ViTs with windows, relative positions or a CNN in front.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from timm.layers import PatchEmbed
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from hgkd.errors import InvalidValueError, first_line, nearest_names
from hgkd.networks.encoder import evaluating
from hgkd.networks.positions import positions_for
from hgkd.networks.vit import check_attention_is_read, patch_attention

EXAMPLES = (
    "vit_small_patch14_dinov2",
    "vit_small_patch16_dinov3",
    "vit_base_patch16_224.mae",
    "vit_base_patch16_siglip_224",
    "deit3_small_patch16_224",
    "beit_base_patch16_224",
    "swin_tiny_patch4_window7_224",
    "hiera_tiny_224",
    "convnext_tiny.dinov3_lvd1689m",
    "resnet50",
)
"""Names of teachers that serve, one of a kind, for messages."""

_FREE_SIZE = 128


class Family:
    """Base of the families.

    Args:
        network: timm's, with its weights.

    Attributes:
        what: the family's members, in words.
        no_dropping, no_attention: see :class:`hgkd.structures.Capabilities`.
        network: as given; what no token depends on is taken out of it.
        width, depth, patch_size: of the tokens that it gives, see :class:`hgkd.structures.TeacherInfo`.
        has_class_token, prefix: whether the first token is a class token, and how many tokens are no patches.
    """

    what: ClassVar[str]
    no_dropping: str = ""
    no_attention: str = ""
    width: int
    depth: int
    patch_size: int
    has_class_token: bool = False
    prefix: int = 0

    def __init__(self, network: nn.Module) -> None:
        self.network: Any = network

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Fit positions to a grid of tokens; always from those of the file.

        Raises:
            ValueError: the network cannot take images of that size.
        """
        raise NotImplementedError

    def tokens(self, images: Tensor, ids_keep: Tensor | None, blocks: Sequence[int]) -> tuple[dict[int, Tensor], Tensor | None]:
        """Tokens (B, n, D) of the patches after each of the blocks, and the class token after the deepest, (B, D).

        Args:
            images: normalised, of the size that :meth:`set_grid` was called for.
            ids_keep: int64 (B, n), the patches that are seen; None: all of them.
            blocks: ascending or not; none beyond the deepest is run.
        """
        raise NotImplementedError

    def attention(self, images: Tensor, block: int) -> Tensor:
        """How much the class token attends to each patch, (B, N); see :func:`hgkd.networks.vit.patch_attention`."""
        raise InvalidValueError("teacher-without-attention", self.no_attention)


class _ViT(Family):
    """What ViTs of equal blocks share: patches, tokens before them, a row of blocks."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        net = self.network
        for unused in ("norm", "fc_norm", "head", "head_dist"):  # never run
            if isinstance(getattr(net, unused, None), nn.Module):
                setattr(net, unused, nn.Identity())
        if getattr(net, "attn_pool", None) is not None:
            net.attn_pool = None
        net.patch_embed.strict_img_size = False
        net.dynamic_img_size = False  # positions are fitted here
        self.width = net.embed_dim
        self.depth = len(net.blocks)
        self.patch_size = net.patch_embed.patch_size[0]
        self.has_class_token = net.cls_token is not None
        self.prefix = int(net.num_prefix_tokens)
        self._native_grid: tuple[int, int] = tuple(net.patch_embed.grid_size)
        self._prefix_positions = 0 if getattr(net, "no_embed_class", False) else self.prefix
        positions = net.pos_embed
        self.native_positions: Tensor | None = None if positions is None else positions.detach().clone().float()
        if not self.no_attention:
            try:
                check_attention_is_read(net.blocks[-1])
            except ValueError as error:
                self.no_attention = str(error)

    def set_grid(self, grid: tuple[int, int]) -> None:
        if self.native_positions is None:
            return
        like = next(self.network.blocks.parameters())
        positions = positions_for(
            grid, self.native_positions, self._native_grid, self._prefix_positions, "the teacher's pos_embed"
        )
        self.network.pos_embed = nn.Parameter(positions.to(like.device, like.dtype), requires_grad=False)

    def embed(self, images: Tensor) -> Tensor:
        """Class and register tokens and all patches, as they enter the first block, (B, prefix + N, D)."""
        raise NotImplementedError

    def arguments(self, block: int, ids_keep: Tensor | None) -> dict[str, Any]:
        """What a block takes beside the tokens."""
        return {}

    def tokens(self, images: Tensor, ids_keep: Tensor | None, blocks: Sequence[int]) -> tuple[dict[int, Tensor], Tensor | None]:
        x, prefix = self.embed(images), self.prefix
        if ids_keep is not None:
            patches = x[:, prefix:].gather(1, ids_keep[:, :, None].expand(-1, -1, x.shape[2]))
            x = torch.cat([x[:, :prefix], patches], 1)
        found = {}
        for i, block in enumerate(self.network.blocks[: max(blocks, default=-1) + 1]):
            x = block(x, **self.arguments(i, ids_keep))
            if i in blocks:
                found[i] = x[:, prefix:]
        return found, x[:, 0] if self.has_class_token else None

    def attention(self, images: Tensor, block: int) -> Tensor:
        if self.no_attention:
            raise InvalidValueError("teacher-without-attention", self.no_attention)
        x = self.embed(images)
        for i, layer in enumerate(self.network.blocks[:block]):
            x = layer(x, **self.arguments(i, None))
        rotary = self.arguments(block, None).get("rope")
        return patch_attention(self.network.blocks[block], x, self.prefix, self.has_class_token, rotary)

    def _patches(self, images: Tensor) -> Tensor:
        patches: Tensor = self.network.patch_embed(images)
        return patches.flatten(1, 2) if patches.dim() == 4 else patches


class AbsoluteViT(_ViT):
    """timm's ``VisionTransformer``, whose positions are added to its patches."""

    what = "ViTs with absolute positions"

    def embed(self, images: Tensor) -> Tensor:
        embedded: Tensor = self.network.norm_pre(self.network._pos_embed(self._patches(images)))
        return embedded


class RotaryViT(_ViT):
    """timm's ``Eva``, with rotary positions, absolute ones, or both."""

    what = "ViTs with rotary positions (timm's Eva)"

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        # in fp32 whatever precision the teacher gets, as timm's own buffers are; in training some move the grid at random
        self._rope: Any = None if self.network.rope is None else copy.deepcopy(self.network.rope).float().eval()
        self._mixed = bool(getattr(self.network, "rope_mixed", False))  # angles of their own in every block and head
        self._angles: Tensor | None = None

    def set_grid(self, grid: tuple[int, int]) -> None:
        super().set_grid(grid)
        if self._rope is None:
            return
        with torch.no_grad():
            if getattr(self._rope, "feat_shape", None) is None:
                self._angles = self._rope.get_embed(shape=list(grid))
            else:
                self._rope.update_feat_shape(list(grid))
                self._angles = self._rope.get_embed()

    def embed(self, images: Tensor) -> Tensor:
        network, x = self.network, self._patches(images)
        before = [token for token in (network.cls_token, network.reg_token) if token is not None]
        positions = network.pos_embed
        if positions is not None and self._prefix_positions == 0:
            x = x + positions
        x = torch.cat([*(token.expand(len(x), -1, -1) for token in before), x], 1)
        if positions is not None and self._prefix_positions > 0:
            x = x + positions
        embedded: Tensor = network.norm_pre(x)
        return embedded

    def arguments(self, block: int, ids_keep: Tensor | None) -> dict[str, Any]:
        if self._angles is None:
            return {}
        device = self.network.patch_embed.proj.weight.device
        if self._angles.device != device:
            self._angles = self._angles.to(device)
        angles = self._angles[block] if self._mixed else self._angles  # ([heads,] N, 2c)
        if ids_keep is None:
            return {"rope": angles}
        if self._mixed:
            return {"rope": angles[:, ids_keep].transpose(0, 1)}  # (B, heads, n, 2c)
        return {"rope": angles[ids_keep][:, None]}  # (B, 1, n, 2c)


class BiasViT(_ViT):
    """timm's ``Beit``."""

    what = "BEiT and BEiTv2 (a position bias for every pair of patches)"
    no_dropping = (
        "a BEiT teacher adds position biases for its whole grid to its attention and cannot drop hidden patches, as "
        "DMAE needs; use an objective on whole images (HGKD target='full', MGD), or another ViT"
    )
    no_attention = "the attention of a BEiT teacher cannot guide masks (its biases are inside timm's layer)"

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self._native_biases = {
            name: parameter.detach().clone().float()
            for name, parameter in self.network.named_parameters()
            if name.endswith("relative_position_bias_table")
        }

    def set_grid(self, grid: tuple[int, int]) -> None:
        super().set_grid(grid)
        like = next(self.network.blocks.parameters())
        for name, table in self._native_biases.items():  # by timm's own interpolation of the file's
            layer: Any = self.network.get_submodule(name.removesuffix(".relative_position_bias_table"))
            layer.set_window_size(self._native_grid)
            layer.relative_position_bias_table = nn.Parameter(table.to(like.device), requires_grad=False)
            layer.set_window_size(grid)
            layer.to(like.dtype)

    def embed(self, images: Tensor) -> Tensor:
        x = self._patches(images)
        x = torch.cat([self.network.cls_token.expand(len(x), -1, -1), x], 1)
        return x if self.network.pos_embed is None else x + self.network.pos_embed

    def arguments(self, block: int, ids_keep: Tensor | None) -> dict[str, Any]:
        shared = self.network.rel_pos_bias
        return {} if shared is None else {"shared_rel_pos_bias": shared()}


class Levels(Family):
    """Any network of timm that gives maps of features, from one of its levels.

    A level is a stride. Of a hierarchical network it has one map, the deepest of that stride; of a network whose blocks all
    have one stride (a ViT with windows, say) there is one level, and its maps are the blocks.

    Args:
        level: index among the strides, finest first; negative from the end.
        image_size: (H, W) that the network was made for; None: what timm notes.

    Raises:
        ValueError: its features are no tokens on a grid, or there is no such level; the message names those that there are.
    """

    what = "CNNs, hierarchical transformers, ViTs with windows or relative positions"
    no_dropping = (
        "this teacher sees whole images alone: windows, convolutions or positions of its whole grid tie neighbouring places "
        "together, so hidden ones cannot be left out as DMAE and the target 'inferred' ask; use an objective on whole images "
        "(HGKD target='full', MGD, PooledFeature), or a ViT of equal blocks such as vit_small_patch16_dinov3"
    )
    no_attention = (
        "a teacher of maps (a CNN, a hierarchical transformer, a ViT with windows or relative positions) gives no attention "
        "to guide masks; use RandomMask or BlockMask, or a ViT such as vit_small_patch16_dinov3"
    )

    def __init__(self, network: nn.Module, level: int = -1, image_size: tuple[int, int] | None = None) -> None:
        super().__init__(network)
        self.name = type(network).__name__
        self._native_size = image_size or _size_of(network)
        maps = self._shapes(self._native_size)
        levels: dict[int, list[int]] = {}  # stride -> indices among the network's features
        for index, shape in enumerate(maps):
            levels.setdefault(self._native_size[0] // shape[2], []).append(index)
        known = [f"{i} (stride {stride}, {maps[found[-1]][1]} channels)" for i, (stride, found) in enumerate(levels.items())]
        if not -len(levels) <= level < len(levels):
            raise InvalidValueError(
                "no-such-level", f"level {level} does not exist: this {self.name} has the levels {', '.join(known)}"
            )
        stride = list(levels)[level]
        deepest = maps[levels[stride][-1]][1]
        self._features = [index for index in levels[stride] if maps[index][1] == deepest]
        self.level, self.levels = level, tuple(known)
        self.width, self.depth, self.patch_size = deepest, len(self._features), stride
        self._native = {
            key: value.detach().clone().float()
            for key, value in network.state_dict().items()
            if value.is_floating_point() and any(part in key for part in ("pos", "relative", "rel_"))
        }
        self._size = self._native_size

    def set_grid(self, grid: tuple[int, int]) -> None:
        size = (grid[0] * self.patch_size, grid[1] * self.patch_size)
        if size != self._size and hasattr(self.network, "set_input_size"):
            self._resize(size)
        (shape,) = self._shapes(size, [self._features[-1]])
        if tuple(shape[2:]) != grid:
            raise self._refusal(size, f"its feature has {shape[2]} x {shape[3]} places then")
        self._size = size

    def tokens(self, images: Tensor, ids_keep: Tensor | None, blocks: Sequence[int]) -> tuple[dict[int, Tensor], Tensor | None]:
        assert ids_keep is None  # refused by no_dropping
        wanted = sorted(set(blocks))
        found = self._run(images, [self._features[block] for block in wanted]) if wanted else []
        return {block: value.flatten(2).transpose(1, 2) for block, value in zip(wanted, found, strict=True)}, None

    def _run(self, images: Tensor, indices: list[int] | None) -> list[Tensor]:
        return list(
            self.network.forward_intermediates(images, indices=indices, stop_early=indices is not None, intermediates_only=True)
        )

    def _shapes(self, size: tuple[int, int], indices: list[int] | None = None) -> list[tuple[int, ...]]:
        """Shapes of the network's features for images of a size, by a dry run; of all of them (1, C, H/s, W/s)."""
        like = next(self.network.parameters())
        zeros = torch.zeros(1, 3, *size, device=like.device, dtype=like.dtype)
        try:
            with evaluating(self.network), torch.no_grad():
                found = self._run(zeros, indices)
        except (AssertionError, AttributeError, RuntimeError, ValueError, TypeError, IndexError) as error:
            raise self._refusal(size, first_line(error)) from error
        shapes = [tuple(value.shape) if isinstance(value, Tensor) else () for value in found]
        for shape in shapes if indices is None else ():
            side = size[0] // shape[2] if len(shape) == 4 and shape[2] else 0
            if not side or (shape[2] * side, shape[3] * side) != size:
                raise InvalidValueError(
                    "teacher-without-grid",
                    f"timm's {self.name} gives no tokens on a grid, as a teacher must: a feature of shape {shape} for "
                    f"an image of {size[0]} x {size[1]} px is no (1, C, H/s, W/s); {advice(self._registered())}",
                )
        return shapes

    def _resize(self, size: tuple[int, int]) -> None:
        """Fit a network to images of another size by timm's own interpolation, from the file's positions."""
        network = self.network
        like = next(network.parameters())
        network.float()
        try:
            if self._size != self._native_size:
                network.set_input_size(img_size=self._native_size)
                network.load_state_dict(self._native, strict=False)
            if size != self._native_size:
                network.set_input_size(img_size=size)
        except (AssertionError, RuntimeError, ValueError, TypeError) as error:
            raise self._refusal(size, first_line(error)) from error
        network.to(like.device, like.dtype).requires_grad_(False)

    def _refusal(self, size: tuple[int, int], why: str) -> ValueError:
        height, width = self._native_size
        own = ""
        if hasattr(self, "patch_size"):
            own = f", {height // self.patch_size} x {width // self.patch_size} tokens at this level"
        return InvalidValueError(
            "teacher-image-size",
            f"timm's {self.name} takes no images of {size[0]} x {size[1]} px ({why}). Its own are {height} x {width}{own}: "
            "choose image_size and the mask's cell so that the mask grid divides these tokens, another level, or a teacher "
            "for any size such as vit_small_patch16_dinov3 or convnext_tiny",
        )

    def _registered(self) -> str:
        return str((getattr(self.network, "pretrained_cfg", None) or {}).get("architecture", self.name))


def _size_of(network: Any) -> tuple[int, int]:
    """The image size (H, W) to try a network with: its own where it is made for one."""
    cfg = getattr(network, "pretrained_cfg", None) or {}
    own = getattr(getattr(network, "patch_embed", None), "img_size", None)
    if isinstance(own, (tuple, list)) and len(own) == 2:
        return int(own[0]), int(own[1])
    if cfg.get("fixed_input_size") or hasattr(network, "set_input_size"):
        return tuple(cfg["input_size"][1:])
    return _FREE_SIZE, _FREE_SIZE


def advice(name: str) -> str:
    """Which names can be teachers, the nearest to a given one first."""
    near = nearest_names(name, EXAMPLES, 1)
    others = [example for example in EXAMPLES if example not in near][:4]
    return f"teachers that serve are e.g. {', '.join([*near, *others])} (docs/reference/teachers.md)"


def family_for(network: nn.Module) -> type[Family]:
    """The family that serves a network."""
    plain = type(getattr(network, "patch_embed", None)) is PatchEmbed
    if plain and isinstance(network, Eva):
        return RotaryViT
    if plain and isinstance(network, Beit):
        return BiasViT
    if plain and isinstance(network, VisionTransformer) and network.pos_embed is not None:
        return AbsoluteViT
    return Levels
