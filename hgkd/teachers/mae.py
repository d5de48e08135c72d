"""Masked autoencoder (MAE) as a frozen teacher (network and sources: :mod:`hgkd.networks.mae`)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.logging import print_log
from torch import Tensor, nn

from hgkd.errors import InvalidValueError
from hgkd.networks.mae import MAEArch, MaskedAutoencoder, positions_of, read_mae, set_positions
from hgkd.pixels import IMAGENET_MEAN, IMAGENET_STD, check_normalize, require_statistics
from hgkd.registry import MODELS
from hgkd.structures import TeacherInfo, TeacherNeeds, TeacherOutput
from hgkd.teachers.base import Teacher
from hgkd.weights.identify import chosen_entry
from hgkd.weights.loading import load_strict


def _kind(arch: MAEArch, weights: Mapping[str, Tensor], pixels: Mapping[str, Any]) -> str:
    """One line for the log about what a file is."""
    encoder = f"encoder {arch.depth} blocks x {arch.embed_dim}, {arch.num_heads} heads, patch {arch.patch_size}"
    if not arch.decoder_depth:
        tuned = any(key.startswith(("head.", "fc_norm.")) for key in weights)
        return f"{'fine-tuned, ' if tuned else ''}encoder-only file ({encoder})"
    told = {True: "standardised", False: "plain", None: "standardised, or plain as 'visualize' files are: it does not say"}
    trained = told[pixels.get("norm_pix")]
    return (
        f"file with decoder ({encoder}; decoder {arch.decoder_depth} blocks x {arch.decoder_embed_dim}, "
        f"{arch.decoder_num_heads} heads; trained on pixels {trained})"
    )


@MODELS.register_module()
class MAETeacher(Teacher):
    """A frozen MAE from a local file in the official naming.

    An encoder-only file gives tokens of whole or partly visible images (``kind`` 'mae-encoder'); a file with decoder
    (``kind`` 'mae') also infers hidden positions. MAE's 'visualize' files, trained on plain pixels, have the same entries as
    those trained on normalised ones: nothing in a file tells them apart, and for hidden states it makes no difference.

    Args:
        checkpoint: .safetensors or .pth.
        num_heads, decoder_num_heads: where the file does not say and 64 channels a head (decoder: 16 heads) is wrong.
        dtype: 'float32', 'float16' or 'bfloat16'; None: bfloat16 on GPUs that compute in it, else float32.
        normalize: (mean, std) of the pixels in [0, 1] that the network was trained with, three numbers each, RGB; None
            takes what the file tells, else ImageNet's, as in the official files.
        allow_random: distil from weights that look random (tests and baselines).
        entry, ema: which set of weights of a file that holds several; see :class:`TimmTeacher`.

    Attributes:
        kind: one line about the file.

    Raises:
        FileNotFoundError, WeightsError: the file is absent, damaged, or no MAE.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str],
        num_heads: int | None = None,
        decoder_num_heads: int | None = None,
        dtype: str | None = None,
        normalize: Sequence[Sequence[float]] | None = None,
        allow_random: bool = False,
        entry: str | None = None,
        ema: bool = False,
    ) -> None:
        if checkpoint is None:
            raise InvalidValueError(
                "teacher-without-weights",
                "MAETeacher has no weights: set checkpoint (teacher_checkpoint in our configs) to a local file",
            )
        checkpoint, entry = chosen_entry(checkpoint, entry, ema)
        arch, weights, pixels = read_mae(checkpoint, num_heads, decoder_num_heads, entry)
        require_statistics(arch.in_chans, normalize or pixels.get("mean"), "model.teacher.normalize")
        of_file = (pixels.get("mean", IMAGENET_MEAN), pixels.get("std", IMAGENET_STD))
        mean, std = of_file if normalize is None else check_normalize(normalize, "model.teacher.normalize", arch.in_chans)
        super().__init__(dtype, mean, std)
        self.kind = _kind(arch, weights, pixels)
        print_log(f"{checkpoint}: {self.kind}", "current")
        network = MaskedAutoencoder(arch)
        # fine-tuned files bring a classifier, and fc_norm instead of norm; no feature comes from there
        missing, left_over = ((), ()) if arch.decoder_depth else (("norm.",), ("head.", "fc_norm."))
        load_strict(network, weights, source=str(checkpoint), ignore_missing=missing, ignore_unexpected=left_over)
        self.source, self.allow_random = str(checkpoint), allow_random
        self.network = network
        self.info = TeacherInfo(
            kind="mae" if arch.decoder_depth else "mae-encoder",
            width=arch.embed_dim,
            depth=arch.depth,
            patch_size=arch.patch_size,
            decoder_width=arch.decoder_embed_dim if arch.decoder_depth else None,
            decoder_depth=arch.decoder_depth,
        )
        self._native_positions = positions_of(network)
        self.freeze()

    def _no_decoder(self) -> str:
        return (
            f"{self.source} is an encoder-only MAE file: it has no decoder, so it cannot infer hidden positions, and a decoder "
            "with random weights would be a useless target (G2SD's loss then stays near 0.2 instead of 0.02). The target "
            "'inferred' and G2SD need the full pretraining checkpoint (official name mae_pretrain_vit_<size>_full.pth); give "
            "that file, or use HGKD with target='full'"
        )

    def _set_grid(self, grid: tuple[int, int]) -> None:
        set_positions(self.network, self._native_positions, self.network.arch.grid, grid)

    def _before_block(self, images: Tensor, block: int) -> tuple[Tensor, nn.Module, int]:
        return self.network.blocks[:block](self.network.embed(images, None)), self.network.blocks[block], 1

    def _forward(self, images: Tensor, ids_keep: Tensor | None, needs: TeacherNeeds) -> TeacherOutput:
        network, grid = self.network, self.grid
        assert grid is not None
        decode = needs.decoder_block is not None
        deepest = self.info.depth if decode else max(needs.blocks, default=-1) + 1
        x = network.embed(images, ids_keep)
        tokens, cls, decoded = {}, x[:, 0], None
        for i, block in enumerate(network.blocks[:deepest]):
            x = block(x)
            if i in needs.blocks:
                tokens[i] = self.on_grid(x[:, 1:], ids_keep)
            if i <= max(needs.blocks, default=deepest):  # the deepest block asked for, although the decoder needs them all
                cls = x[:, 0]
        if needs.decoder_block is not None:
            hidden = network.decode(network.norm(x), ids_keep, needs.decoder_block + 1)
            decoded = self.on_grid(hidden[:, 1:], None)
        return TeacherOutput(tokens=tokens, grid=grid, cls=cls.float(), decoded=decoded)
