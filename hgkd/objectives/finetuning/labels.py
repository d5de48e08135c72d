"""Label losses of classifiers: cross entropy, or binary cross entropy by class, on labels that may be smoothed and mixed.

Cross entropy -sum_k y_k log p_k and binary cross entropy ("ResNet strikes back", arXiv 2110.00476) come from ``timm.loss``,
mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) from ``timm.data``.
"""

from __future__ import annotations

from timm.data.mixup import Mixup, mixup_target
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from hgkd.errors import InvalidValueError

LABEL_LOSSES = ("cross_entropy", "bce")


class LabelLoss(nn.Module):
    """Mixes images, makes the targets of the mix, and compares logits with them.

    Args:
        num_classes: K.
        loss: 'cross_entropy' or 'bce'.
        smoothing: share of the target that is spread evenly over all classes, in [0, 1).
        threshold: with 'bce', targets above it count as 1 and others as 0 (0.2 in timm's recipes A1 to A3), so that both
            classes of a mixed image are right; None leaves them soft.
        mixup, cutmix: alpha of the two, 0 is off; with both on, one of them is drawn for each batch.
        mix_probability: share of the batches that are mixed.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self,
        num_classes: int,
        loss: str = "cross_entropy",
        smoothing: float = 0.0,
        threshold: float | None = None,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mix_probability: float = 1.0,
    ) -> None:
        super().__init__()
        if loss not in LABEL_LOSSES:
            raise InvalidValueError("loss-unknown", f"loss must be one of {', '.join(map(repr, LABEL_LOSSES))}, got {loss!r}")
        if not 0.0 <= smoothing < 1.0:
            raise InvalidValueError("smoothing-out-of-range", f"smoothing must be in [0, 1), got {smoothing}")
        if threshold is not None and (loss != "bce" or not 0.0 < threshold < 1.0):
            raise InvalidValueError(
                "threshold-out-of-range",
                f"threshold={threshold} makes targets of loss='bce' 0 or 1; it must be in (0, 1), the loss is {loss!r}",
            )
        if min(mixup, cutmix) < 0.0 or not 0.0 <= mix_probability <= 1.0:
            raise InvalidValueError(
                "mixing-out-of-range",
                f"mixup and cutmix must be 0 or more and mix_probability in [0, 1], got {mixup}, {cutmix}, {mix_probability}",
            )
        self.mixes = max(mixup, cutmix) > 0.0 and mix_probability > 0.0
        self.mixer = Mixup(
            mixup_alpha=mixup, cutmix_alpha=cutmix, prob=mix_probability, label_smoothing=smoothing, num_classes=num_classes
        )
        self.mixer.mixup_enabled = self.mixes
        self.loss: nn.Module = (
            SoftTargetCrossEntropy()
            if loss == "cross_entropy"
            else BinaryCrossEntropy(smoothing=0.0, target_threshold=threshold)
        )

    def mix(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W), changed in place, and labels (B,) -> mixed images and targets (B, K), fp32, rows summing to 1.

        Raises:
            ValueError: an odd batch, of which one image has no partner.
        """
        if len(inputs) % 2 and self.mixes:
            told = f"mixup and cutmix pair the images of a batch, which has {len(inputs)}; set an even batch_size"
            raise InvalidValueError("odd-batch", told)
        if not self.mixes:  # timm asks for pairs even then
            targets: Tensor = mixup_target(labels, self.mixer.num_classes, smoothing=self.mixer.label_smoothing)
            return inputs, targets
        mixed: tuple[Tensor, Tensor] = self.mixer(inputs, labels)
        return mixed

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss, an fp32 scalar, of logits and targets (B, K)."""
        value: Tensor = self.loss(logits.float(), targets)
        return value
