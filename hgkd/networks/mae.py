"""Masked autoencoder (MAE): the network and its files.

He et al., arXiv 2111.06377; parameter names are those of the released files (facebookresearch/mae), so that official files
load here and ours load elsewhere. Facts kept from there: LayerNorm eps 1e-6; fixed sin-cos positions whose first half of
channels encodes the column; the class token has position 0; the pixel target's variance is the unbiased one. Blocks are timm's.

What differs: masks are ``visible`` (True = visible) instead of 1 = removed; patches keep their order instead of being
shuffled, which changes nothing because attention does not see order; the decoder hands out the hidden state of each block.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from hgkd.errors import ExistingFileError, InvalidValueError, WeightsError, unknown_name_message
from hgkd.networks.positions import positions_for, sincos_positions
from hgkd.pixels import pixels_noted
from hgkd.weights.identify import MAE_PIXELS, MAE_SIZES, identify
from hgkd.weights.run_file import FORMAT, check_format
from hgkd.weights.vit_names import count_blocks, looks_like, to_timm_names
from hgkd.writing import written_beside

_FORMAT_KEY = "hgkd_mae_format"
_STUDENT_PREFIX = "student.network."  # in a checkpoint of a distilled ViT


@dataclass(frozen=True)
class MAEArch:
    """Sizes of a MAE. ``decoder_depth`` 0 is an encoder alone.

    Attributes:
        image_size: (H, W) in pixels that the stored positions are for.
        in_chans: channels of the images.
    """

    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    patch_size: int = 16
    decoder_embed_dim: int = 512
    decoder_depth: int = 8
    decoder_num_heads: int = 16
    mlp_ratio: float = 4.0
    image_size: tuple[int, int] = (224, 224)
    in_chans: int = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", tuple(self.image_size))
        for side in self.image_size:
            if side % self.patch_size:
                raise InvalidValueError(
                    "image-size-no-multiple-of-patch",
                    f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}",
                )
        for what, width, heads in (
            ("embed_dim", self.embed_dim, self.num_heads),
            ("decoder_embed_dim", self.decoder_embed_dim, self.decoder_num_heads),
        ):
            if width % heads or width % 4:
                raise InvalidValueError(
                    "width-no-multiple-of-heads",
                    f"{what} {width} must be a multiple of its {heads} heads and of 4 (sin-cos positions)",
                )

    @property
    def grid(self) -> tuple[int, int]:
        """Patches (rows, columns)."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size


# base, large, huge: MAE's released models; small and tiny: DeiT's widths (arXiv 2012.12877) with a lighter decoder
ARCHS: dict[str, dict[str, Any]] = {
    "tiny": {
        "embed_dim": 192,
        "depth": 12,
        "num_heads": 3,
        "decoder_embed_dim": 192,
        "decoder_depth": 4,
        "decoder_num_heads": 3,
    },
    "small": {
        "embed_dim": 384,
        "depth": 12,
        "num_heads": 6,
        "decoder_embed_dim": 256,
        "decoder_depth": 8,
        "decoder_num_heads": 8,
    },
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16, "patch_size": 14},
}


def make_arch(arch: str | Mapping[str, Any], **overrides: Any) -> MAEArch:
    """Sizes by name ('tiny' ... 'huge') or as a dict, with overrides.

    Args:
        arch: a name, or fields of :class:`MAEArch`; a key ``base`` names the sizes to start from, ViT-B's without.

    Raises:
        ValueError: unknown name or field, with the nearest.
    """
    given: dict[str, Any] = {"base": arch} if isinstance(arch, str) else dict(arch)
    base = given.pop("base", "base")
    if base not in ARCHS:
        raise InvalidValueError("mae-arch-unknown", unknown_name_message("MAE arch", str(base), ARCHS))
    sizes = {**ARCHS[base], **given, **overrides}
    for key in sizes:
        if key not in MAEArch.__dataclass_fields__:
            raise InvalidValueError(
                "mae-size-unknown", unknown_name_message("MAE size", str(key), MAEArch.__dataclass_fields__)
            )
    return MAEArch(**sizes)


def positions_of(network: MaskedAutoencoder) -> dict[str, Tensor]:
    """A copy, in fp32, of the positions that a network holds: name of the parameter -> (1, 1 + gh*gw, width)."""
    names = ["pos_embed", "decoder_pos_embed"] if network.arch.decoder_depth else ["pos_embed"]
    return {name: getattr(network, name).detach().clone().float() for name in names}


def set_positions(
    network: MaskedAutoencoder, native: Mapping[str, Tensor], native_grid: tuple[int, int], grid: tuple[int, int]
) -> None:
    """Give a network positions for another grid, in place; see :mod:`hgkd.networks.positions`.

    Args:
        native: see :func:`positions_of`; for ``native_grid``.
    """
    for name, positions in native.items():
        fitted = positions_for(grid, positions, native_grid, prefix=1, name=name)
        like = getattr(network, name)
        setattr(network, name, nn.Parameter(fitted.to(like.device, like.dtype), requires_grad=False))


class PatchProjection(nn.Module):
    """Patches to tokens by a convolution; MAE's name for it is ``patch_embed.proj``."""

    def __init__(self, in_chans: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, width, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, gh*gw, width)."""
        tokens: Tensor = self.proj(images)
        return tokens.flatten(2).transpose(1, 2)


class MaskedAutoencoder(nn.Module):
    """The MAE network.

    Args:
        arch: its sizes.
    """

    def __init__(self, arch: MAEArch) -> None:
        super().__init__()
        self.arch = arch
        self.patch_embed = PatchProjection(arch.in_chans, arch.embed_dim, arch.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, arch.embed_dim))
        self.pos_embed = nn.Parameter(sincos_positions(arch.embed_dim, arch.grid), requires_grad=False)
        self.blocks = _blocks(arch.depth, arch.embed_dim, arch.num_heads, arch.mlp_ratio)
        self.norm = nn.LayerNorm(arch.embed_dim, eps=1e-6)
        if arch.decoder_depth:
            width = arch.decoder_embed_dim
            self.decoder_embed = nn.Linear(arch.embed_dim, width)
            self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
            self.decoder_pos_embed = nn.Parameter(sincos_positions(width, arch.grid), requires_grad=False)
            self.decoder_blocks = _blocks(arch.decoder_depth, width, arch.decoder_num_heads, arch.mlp_ratio)
            self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
            self.decoder_pred = nn.Linear(width, arch.patch_size**2 * arch.in_chans)
            nn.init.normal_(self.mask_token, std=0.02)
        nn.init.normal_(self.cls_token, std=0.02)
        self.apply(_init_linear)
        projection = self.patch_embed.proj.weight
        nn.init.xavier_uniform_(projection.view(projection.shape[0], -1))

    def embed(self, images: Tensor, ids_keep: Tensor | None) -> Tensor:
        """Normalised images (B, 3, H, W) -> class token and the kept patches, with positions, (B, 1 + n, D)."""
        x = self.patch_embed(images) + self.pos_embed[:, 1:]
        if ids_keep is not None:
            x = x.gather(1, ids_keep[:, :, None].expand(-1, -1, x.shape[2]))
        cls = self.cls_token + self.pos_embed[:, :1]
        return torch.cat([cls.expand(len(x), -1, -1), x], 1)

    def encode(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Normalised images -> encoder output after the final norm, (B, 1 + n, D).

        Args:
            ids_keep: int64 (B, n), visible patches in ascending order; None: all.
        """
        x = self.embed(images, ids_keep)
        for block in self.blocks:
            x = block(x)
        encoded: Tensor = self.norm(x)
        return encoded

    def decoder_input(self, encoded: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Encoder output -> what the first decoder block gets: tokens at kept patches, mask tokens elsewhere, positions."""
        x = self.decoder_embed(encoded)
        if ids_keep is not None:
            count = self.decoder_pos_embed.shape[1] - 1
            full = self.mask_token.to(x.dtype).expand(len(x), count, -1)
            patches = full.scatter(1, ids_keep[:, :, None].expand(-1, -1, x.shape[2]), x[:, 1:])
            x = torch.cat([x[:, :1], patches], 1)
        decoder_input: Tensor = x + self.decoder_pos_embed
        return decoder_input

    def decode(self, encoded: Tensor, ids_keep: Tensor | None = None, blocks: int | None = None) -> Tensor:
        """Encoder output -> hidden state after so many decoder blocks (None: all), no norm, (B, 1 + gh*gw, D')."""
        x = self.decoder_input(encoded, ids_keep)
        for block in self.decoder_blocks[:blocks]:
            x = block(x)
        return x

    def pixels_of(self, hidden: Tensor) -> Tensor:
        """Hidden state of the last decoder block -> predicted pixels of every patch, (B, gh*gw, p*p*3)."""
        pixels: Tensor = self.decoder_pred(self.decoder_norm(hidden))
        return pixels[:, 1:]

    def predict_pixels(self, encoded: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Encoder output -> predicted pixels of every patch, (B, gh*gw, p*p*3)."""
        return self.pixels_of(self.decode(encoded, ids_keep))


def _blocks(depth: int, width: int, heads: int, mlp_ratio: float) -> nn.Sequential:
    norm: Any = partial(nn.LayerNorm, eps=1e-6)
    return nn.Sequential(*(Block(width, heads, mlp_ratio, qkv_bias=True, norm_layer=norm) for _ in range(depth)))


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) -> (B, gh*gw, p*p*C); within a patch row by row, channels last, as in MAE's released code."""
    batch, channels, height, width = images.shape
    p = patch_size
    x = images.reshape(batch, channels, height // p, p, width // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, (height // p) * (width // p), p * p * channels)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """Inverse of :func:`patchify`: (B, gh*gw, p*p*C) -> (B, C, H, W)."""
    batch, _, values = patches.shape
    p = patch_size
    x = patches.reshape(batch, *grid, p, p, values // p**2)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, values // p**2, grid[0] * p, grid[1] * p)


def pixel_target(images: Tensor, patch_size: int, norm_pix: bool) -> Tensor:
    """The patches to predict; with ``norm_pix`` each standardised by its own mean and unbiased variance (eps 1e-6)."""
    target = patchify(images, patch_size)
    if norm_pix:
        mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
    return target


def mae_loss(predicted: Tensor, target: Tensor, visible: Tensor) -> Tensor:
    """Mean squared error over hidden patches (arXiv 2111.06377, section 3).

    Args:
        predicted, target: (B, N, p*p*3).
        visible: bool (B, N), True = visible.

    Raises:
        ValueError: no patch is hidden, so there is nothing to predict.
    """
    error = (predicted.float() - target.float()).square().mean(-1)
    hidden = (~visible).to(error.dtype)
    count = hidden.sum()
    if visible.device.type == "cpu" and count == 0:
        raise InvalidValueError(
            "mask-ratio-hides-nothing", "MAE's loss has no hidden patch to predict; use a mask_ratio above 0"
        )
    return (error * hidden).sum() / count


def arch_of(weights: Mapping[str, Tensor], source: str, num_heads: int | None, decoder_num_heads: int | None) -> MAEArch:
    """Sizes of a MAE from its tensors.

    Heads leave no trace in them: the released ones for a known width and depth, else 64 channels a head; in the decoder 16
    heads as released, else 64 channels a head.

    Raises:
        WeightsError: the names are not a MAE's.
        ValueError: the number of heads must be told.
    """
    for key in ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"):
        if key not in weights:
            some = ", ".join(list(weights)[:4])
            raise WeightsError("mae-entry-missing", f"{source} is no MAE file: it lacks {key!r} (its first entries: {some})")
    if weights["patch_embed.proj.weight"].ndim != 4:
        raise WeightsError("mae-of-other-data", f"{source} is of {looks_like(weights)}, no MAE of images")
    width, channels, patch, _ = weights["patch_embed.proj.weight"].shape
    patches = weights["pos_embed"].shape[1] - 1
    side = round(patches**0.5)
    if side * side != patches:
        raise WeightsError(
            "mae-positions-not-square",
            f"{source}: {patches} positions are no square grid, and the file does not say which grid they are",
        )
    sizes: dict[str, Any] = {"decoder_depth": 0}
    if "decoder_embed.weight" in weights:
        decoder_width = weights["decoder_embed.weight"].shape[0]
        heads = decoder_num_heads or (16 if decoder_width == 512 else _heads("decoder_num_heads", decoder_width, source))
        sizes = {
            "decoder_depth": count_blocks(weights, "decoder_blocks."),
            "decoder_embed_dim": decoder_width,
            "decoder_num_heads": heads,
        }
    depth = count_blocks(weights)
    known = next((a["num_heads"] for a in ARCHS.values() if (a["embed_dim"], a["depth"]) == (width, depth)), None)
    return MAEArch(
        embed_dim=width,
        depth=depth,
        num_heads=num_heads or known or _heads("num_heads", width, source),
        patch_size=patch,
        mlp_ratio=weights["blocks.0.mlp.fc1.weight"].shape[0] / width,
        image_size=(side * patch, side * patch),
        in_chans=channels,
        **sizes,
    )


def _heads(option: str, width: int, source: str) -> int:
    if width % 64:
        raise InvalidValueError(
            "attention-heads-unknown", f"{source} does not say how many attention heads its {width} channels have; set {option}"
        )
    return width // 64


def save_mae(
    network: MaskedAutoencoder, path: str | Path, pixels: Mapping[str, Any] | None = None, overwrite: bool = False
) -> Path:
    """Write a network in the official naming, with its sizes in the metadata; written beside, then renamed.

    Args:
        path: ends in .safetensors.
        pixels: what it was trained on: ``mean``, ``std`` and ``norm_pix``; :class:`MAETeacher` normalises accordingly.
        overwrite: replace an existing file.

    Raises:
        ValueError: another ending.
        FileExistsError: the file is there already.
        WriteError: see :func:`hgkd.writing.writing`.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InvalidValueError(
            "suffix-not-safetensors", f"an MAE is written as .safetensors, which holds its sizes too; got {path}"
        )
    if path.exists() and not overwrite:
        raise ExistingFileError("file-exists", f"{path} exists already; give another name, or overwrite=True")
    tensors = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    notes = {MAE_SIZES: asdict(network.arch), MAE_PIXELS: dict(pixels or {}), _FORMAT_KEY: FORMAT}
    with written_beside(path) as beside:
        save_file(tensors, beside, metadata={"format": "pt", **{key: json.dumps(note) for key, note in notes.items()}})
    return path


def read_mae(
    path: str | os.PathLike[str],
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    entry: str | None = None,
) -> tuple[MAEArch, dict[str, Tensor], Mapping[str, Any]]:
    """Sizes, weights and training pixels (see :func:`save_mae`; may be empty) of a MAE file.

    Files of :func:`save_mae`, checkpoints of ``MAEPretraining`` and of distillation with a ViT student, official ones.

    Args:
        num_heads, decoder_num_heads: where the file does not say and :func:`arch_of` would guess wrongly.
        entry: see :func:`hgkd.weights.files.tensors_of`.

    Raises:
        FileNotFoundError, WeightsError: the file is absent, damaged, or no MAE.
    """
    file = identify(path, entry)
    weights = file.tensors(entry)
    if any(key.startswith(_STUDENT_PREFIX) for key in weights):
        weights = {k.removeprefix(_STUDENT_PREFIX): v for k, v in weights.items() if k.startswith(_STUDENT_PREFIX)}
    if MAE_SIZES in file.metadata:
        check_format(json.loads(file.metadata.get(_FORMAT_KEY, str(FORMAT))), str(path))  # not noted by the first version
        return (
            make_arch(json.loads(file.metadata[MAE_SIZES])),
            weights,
            pixels_noted(json.loads(file.metadata.get(MAE_PIXELS, "{}"))),
        )
    if "mae" in file.hgkd:
        check_format(file.hgkd.get("format"), str(path))
        return make_arch(file.hgkd["mae"]), weights, pixels_noted(file.hgkd.get("pixels", {}))
    if "patch_embed.proj.weight" not in weights:
        _, weights = to_timm_names(weights, str(path))
    return arch_of(weights, str(path), num_heads, decoder_num_heads), weights, {}
