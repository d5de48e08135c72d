"""Does a teacher look trained? A score from its weights alone, and one from its features on images.

Weights. A large matrix of independent random entries with std d has a largest singular value near d (sqrt(m) + sqrt(n))
(Marchenko and Pastur 1967); training adds a few directions far above that edge. The score is the median over the blocks'
matrices of the largest singular value divided by the edge. Measured: 0.94 to 0.99 for untrained ViTs of timm and MAEs, widths
16 to 1024; 1.5 for the demo's MAE after 12 epochs on generated shapes; 1.4 for a DINOv2 ViT-S/14 fine-tuned for saliency.

Features. The same network with its blocks drawn at random again (std 0.02, norms 1 and 0, as ViTs are initialised) is
the measure for two numbers: in how many directions the images' mean tokens differ (effective rank), and, where labels are
known, k-NN. Measured on 100 CIFAR-10 images: 76 directions against 40 for the ViT-S/14, 28 against 14 for the demo's MAE. (The
share of variance between images was tried and tells nothing: random networks have the larger one.)
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hgkd.errors import InvalidValueError, WeightsError
from hgkd.features import effective_rank
from hgkd.networks.vit import is_finite, watch_nonfinite
from hgkd.structures import TeacherNeeds

RANDOM_BELOW = 1.02
_MATRICES = 12
_STEPS = 30
_MATRIX = re.compile(r"(^|\.)blocks\.\d+\.(.*\.)?(qkv|[qk]_proj|fc1(_[gx])?|fc2|attn\.proj)\.weight$")


@dataclass(frozen=True)
class WeightHealth:
    """Signs of training in the weights of a ViT.

    Attributes:
        spectrum: the score of the module's header; near 1 for random weights.
        matrices: how many it was taken from.
    """

    spectrum: float
    matrices: int

    @property
    def looks_random(self) -> bool:
        return self.spectrum < RANDOM_BELOW

    def __str__(self) -> str:
        verdict = "looks random" if self.looks_random else "looks trained"
        return f"{verdict}: spectral score {self.spectrum:.2f} (random networks: below 1.00, alarm below {RANDOM_BELOW})"


def _is_matrix(value: Tensor) -> bool:
    return value.ndim == 2 or (value.ndim == 4 and value.shape[2:] == (1, 1))


def can_be_judged(weights: Mapping[str, Tensor]) -> bool:
    """Whether :func:`weight_health` finds blocks among these weights."""
    return any(name.startswith("blocks.") or _MATRIX.search(name) for name in weights)


def weight_health(weights: Mapping[str, Tensor]) -> WeightHealth:
    """The spectral score of a ViT's weights under timm's names.

    Raises:
        ValueError: there are no blocks in it.
    """
    names = [name for name, value in weights.items() if _MATRIX.search(name) and _is_matrix(value)]
    if not names:  # blocks that fuse these products with others (timm's parallel ones)
        names = [name for name, value in weights.items() if name.startswith("blocks.") and value.ndim == 2]
    if not names:
        raise InvalidValueError(
            "no-blocks-to-judge", "there are no transformer blocks among these weights, so their health cannot be judged"
        )
    chosen = names[:: max(1, len(names) // _MATRICES)]
    scores = torch.tensor([_largest_over_edge(weights[name]) for name in chosen])
    return WeightHealth(float(scores.median()), len(chosen))


def _largest_over_edge(matrix: Tensor) -> float:
    """Largest singular value, by power iteration, divided by that of random entries of the same std."""
    values = matrix.detach().float().cpu().flatten(1)
    values = values - values.mean()
    std = float(values.std())
    if std == 0.0 or not math.isfinite(std):
        return 0.0
    vector = torch.randn(values.shape[1], generator=torch.Generator().manual_seed(0))
    for _ in range(_STEPS):
        vector = values.T @ (values @ vector)
        vector = vector / vector.norm()
    return float((values @ vector).norm()) / (std * (math.sqrt(values.shape[0]) + math.sqrt(values.shape[1])))


@dataclass(frozen=True)
class FeatureHealth:
    """Measures of a teacher's features, and of those of a random network of its shape.

    Attributes:
        rank, random_rank: effective rank of the images' mean tokens, at most images - 1 and channels.
        knn, random_knn: percent of images whose nearest neighbours have their class; None without labels.
    """

    rank: float
    random_rank: float
    knn: float | None = None
    random_knn: float | None = None

    def __str__(self) -> str:
        text = f"images differ in {self.rank:.1f} directions (random network {self.random_rank:.1f})"
        if self.knn is not None:
            text += f"; k-NN {self.knn:.1f} % (random network {self.random_knn:.1f} %)"
        return text


def feature_health(teacher: Any, images: Tensor, labels: Tensor | None = None, block: int | None = None) -> FeatureHealth:
    """Compare a teacher's tokens with those of the same network with random blocks.

    Args:
        teacher: prepared, see :meth:`hgkd.teachers.Teacher.prepare`.
        images: (B, 3, H, W) in [0, 1], B > 1.
        labels: int64 (B,); for the k-NN, each image against all others.
        block: whose tokens; None is the one at three quarters of the depth.
    """
    block = (3 * teacher.info.depth) // 4 if block is None else block
    found = []
    for network in (teacher, _random_twin(teacher)):
        tokens = network(images, None, TeacherNeeds(blocks=(block,))).tokens[block]
        pooled = torch.nn.functional.layer_norm(tokens.permute(0, 2, 3, 1), (tokens.shape[1],)).mean((1, 2)).cpu()
        found.append((effective_rank(pooled - pooled.mean(0)), None if labels is None else _knn(pooled, labels)))
    return FeatureHealth(found[0][0], found[1][0], found[0][1], found[1][1])


@torch.no_grad()
def _random_twin(teacher: Any) -> Any:
    """A copy whose blocks are initialised anew, always the same way."""
    twin = copy.deepcopy(teacher)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in getattr(twin.network, "blocks", twin.network).named_parameters():
        if parameter.ndim > 1:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        else:  # biases 0; norms and layer scales 1
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return twin


def _knn(features: Tensor, labels: Tensor, neighbours: int = 5) -> float:
    """Leave-one-out k-NN in percent: cosine of standardised features (B, D), majority of the nearest."""
    standardised = (features - features.mean(0)) / features.std(0).clamp_min(1e-6)
    directions = torch.nn.functional.normalize(standardised, dim=1)
    similar = directions @ directions.T
    similar.fill_diagonal_(-2.0)
    nearest = labels[similar.topk(min(neighbours, len(labels) - 1)).indices]
    return 100.0 * float((nearest.mode(1).values == labels).float().mean())


_REMEDIES = {
    torch.float16: "float16 ends at 65504; set model.teacher.dtype=bfloat16, or float32",
    torch.bfloat16: "set model.teacher.dtype=float32",
}


def check_outputs(
    network: nn.Module,
    given: Iterable[Tensor | None],
    again: Callable[[], object],
    source: str,
    dtype: torch.dtype,
    remedy: str | None = None,
) -> None:
    """Refuse a teacher whose outputs on real images are not finite, naming the place where that begins.

    Args:
        network: with its blocks named ``blocks.0`` and so on.
        given: its outputs.
        again: computes them once more.
        source, dtype: the file and the precision, for the message.
        remedy: what to do; by default what a precision of ``model.teacher.dtype`` asks for.

    Raises:
        WeightsError: NaN or inf among the outputs.
    """
    if all(value is None or is_finite(value) for value in given):
        return
    with watch_nonfinite(network) as seen:
        again()
    name, kind = seen[0] if seen else ("its output", "NaN or inf")
    block = re.search(r"(?:^|\.)(decoder_)?blocks\.(\d+)", name)
    place = name if block is None else f"{'decoder ' if block[1] else ''}block {block[2]} ({name})"
    precision = str(dtype).removeprefix("torch.")
    remedy = remedy or _REMEDIES.get(dtype, "the file is not what this network was trained with; take another one")
    raise WeightsError(
        "teacher-not-finite", f"{source}: the teacher's {place} gives {kind} in {precision} on the first images; {remedy}"
    )
