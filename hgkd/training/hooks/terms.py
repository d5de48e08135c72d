"""Hook that says what each loss term does: its share of the student's gradient, and whether it beats a constant."""

from __future__ import annotations

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn

from hgkd.errors import InvalidValueError
from hgkd.networks.untouched import unchanged
from hgkd.registry import HOOKS
from hgkd.training.wrapping import plain_model

# a term whose ``vs_mean`` loses this part of itself within the patience is still learnt
_FALLS = 0.05


def gradient_shares(losses: dict[str, Tensor], parameters: list[nn.Parameter]) -> dict[str, float]:
    """Norm of each loss's gradient divided by the sum of all their norms; 0 where no loss has a gradient.

    Args:
        losses: scalars of one graph, which is used up.
        parameters: what the gradients are taken for.
    """
    norms = {}
    for i, (name, loss) in enumerate(losses.items()):
        if not loss.requires_grad:
            norms[name] = 0.0
            continue
        last = i == len(losses) - 1
        found = torch.autograd.grad(loss, parameters, retain_graph=not last, allow_unused=True)
        squares = [gradient.float().square().sum() for gradient in found if gradient is not None]
        norms[name] = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
    total = sum(norms.values())
    return {name: norm / total if total else 0.0 for name, norm in norms.items()}


@HOOKS.register_module()
class TermShareHook(Hook):
    """Logs for every loss term ``<term>_share`` of the student's gradient and ``<term>_vs_mean``, and warns.

    ``vs_mean`` is the term divided by what it would be, were the prediction the mean target of the batch everywhere. A step is
    measured on its own batch before it is made, with one pass more; it changes nothing of the training.

    Args:
        interval: steps between two measurements.
        min_share: warn when a term stays below this share...
        patience: ...for this number of steps; or when it stays no better than the mean for as many, and ``vs_mean`` has not
            fallen by 5 % of itself meanwhile: a term that still falls gets as many steps again.
    """

    priority = "ABOVE_NORMAL"  # before the logger

    def __init__(self, interval: int = 50, min_share: float = 0.01, patience: int = 200) -> None:
        if interval < 1 or patience < 1:
            raise InvalidValueError(
                "count-not-positive", f"interval and patience must be 1 or more, got {interval} and {patience}"
            )
        if not 0.0 <= min_share < 1.0:
            raise InvalidValueError("min-share-out-of-range", f"min_share must be in [0, 1), got {min_share}")
        self.interval = interval
        self.min_share = min_share
        self.patience = patience
        self._since: dict[tuple[str, str], tuple[int, float]] = {}  # step at which it began, and the value then
        self._warned: set[tuple[str, str]] = set()

    def before_train(self, runner: Runner) -> None:
        model = plain_model(runner)
        if not hasattr(model, "term_report"):
            raise InvalidValueError(
                "hook-without-distillation",
                f"TermShareHook measures a distillation, but a {type(model).__name__} is none; remove the hook",
            )

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        if runner.iter % self.interval:
            return
        model = plain_model(runner)
        with unchanged(model), runner.optim_wrapper.optim_context(model):
            data = model.data_preprocessor(data_batch, True)
            losses, vs_mean = model.term_report(data["inputs"], data.get("index"))
            parameters = [p for p in model.student.parameters() if p.requires_grad]
            shares = gradient_shares(losses, parameters)
        for term, share in shares.items():
            name = term.removesuffix("_loss")
            runner.message_hub.update_scalar(f"train/{name}_share", share)
            self._watch(runner, "share", term, share < self.min_share, share, f"its share of the gradient is {share:.2%}")
            if term in vs_mean:
                ratio = float(losses[term].detach()) / max(float(vs_mean[term]), 1e-12)
                runner.message_hub.update_scalar(f"train/{name}_vs_mean", ratio)
                self._watch(
                    runner,
                    "mean",
                    term,
                    ratio >= 1.0,
                    ratio,
                    f"it is {ratio:.2f} times the loss of predicting the mean target everywhere, so nothing is learnt from it",
                )

    def _watch(self, runner: Runner, what: str, term: str, bad: bool, value: float, message: str) -> None:
        key = (what, term)
        if not bad:
            self._since.pop(key, None)
            return
        since, begun = self._since.setdefault(key, (runner.iter, value))
        if runner.iter - since < self.patience or key in self._warned:
            return
        if what == "mean" and value < (1 - _FALLS) * begun:
            self._since[key] = (runner.iter, value)
            return
        self._warned.add(key)
        runner.logger.warning(
            f"{term} has done nothing so far, from step {since} to {runner.iter}: {message}. If it stays so, raise its weight, "
            "check its target, or remove it"
        )
