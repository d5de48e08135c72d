"""A trained detector or segmentor teaches a smaller one: MGD on declared feature maps, G2SD's hard labels for segmentors.

MGD (arXiv 2205.01529, released code yzd-v/MGD, read for facts only) masks the student's map at random and lets a small
generator restore the teacher's: on the levels of the FPN for detectors (positions hidden with 0.65, alpha 2e-5), on the
backbone's last map for segmentors (0.75, 2e-5); for two-stage detectors the release has 0.45 and 5e-7. A student may start with
the teacher's neck and heads, where shapes agree. The loss is :class:`hgkd.objectives.generation.MGDLoss`. For segmentors the
release adds, unmentioned in the abstract, channel-wise distillation of the logits (arXiv 2011.13256) with temperature 4 and
weight 3:

    L = weight * T^2 / (N * K) * sum over images and classes of KL( softmax(t / T) || softmax(s / T) ), softmax over positions

G2SD's specific stage (arXiv 2302.14771) for segmentors: a second classifier on the student's features learns the teacher's
hard label of every position, L = (supervised loss + cross entropy) / 2. It is dropped after training: a CNN has no distillation
token whose prediction could be averaged in. A detector's prediction has no such form, since which class an anchor or a proposal
gets depends on its matching with the annotated boxes and the two networks propose different boxes, so ``hard_label`` is refused
there; what constrains a detector are the features, by taps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from mmengine import registry as roots
from mmengine.logging import print_log
from mmengine.model import BaseModel
from torch import Tensor, nn

from hgkd.errors import InvalidValueError, nearest_names
from hgkd.networks.encoder import evaluating
from hgkd.networks.guest import TeacherOwner
from hgkd.networks.vit import is_finite
from hgkd.objectives.generation import MGDLoss
from hgkd.openmmlab.config import model_config
from hgkd.registry import MODELS
from hgkd.teachers.health import check_outputs
from hgkd.weights.files import read_weights
from hgkd.weights.loading import load_strict

_DRY_SIZE = 128


@dataclass(frozen=True)
class Tap:
    """A pair of modules whose outputs are compared.

    Attributes:
        student, teacher: paths of the modules, e.g. 'neck' or 'backbone'; the teacher's is the student's by default.
        levels: which of the maps that the module gives; None: all of them. Negative counts from the end.
        loss: arguments of :class:`hgkd.objectives.generation.MGDLoss` but for the channels, which are found by a dry run; the
            reduction 'mean' is over the values of all maps of the tap.
    """

    student: str
    teacher: str = ""
    levels: Sequence[int] | None = None
    loss: Mapping[str, Any] = field(default_factory=dict)


@MODELS.register_module()
class FeatureDistiller(TeacherOwner[Any], BaseModel):
    """A student of mmdet or mmseg with a frozen teacher; predicts, and is saved, as ``student.*`` and ``generators.*``.

    The teacher is no submodule; see :class:`hgkd.networks.guest.TeacherOwner`.

    Args:
        student, teacher: config file of a detector or segmentor ('mmdet::...' too), or the config of its model.
        taps: dicts of :class:`Tap`'s attributes.
        teacher_checkpoint: weights of the whole teacher, loaded strictly.
        hard_label: G2SD's second head, for segmentors.
        logits: weight of the channel-wise distillation of the logits, for segmentors; 0: none.
        inherit: neck and heads of the student start as the teacher's where name and shape agree.
        allow_random_teacher: accept a teacher without a checkpoint (tests).
        data_preprocessor: not taken; the student's is used.

    Raises:
        ValueError: no teacher weights, preprocessing of the two that differs, no such module or level, maps of another size, or
            nothing to learn from the teacher.
        FileNotFoundError: no such config or checkpoint.
    """

    def __init__(
        self,
        student: str | Mapping[str, Any],
        teacher: str | Mapping[str, Any],
        taps: Sequence[Mapping[str, Any]] = (),
        teacher_checkpoint: str | None = None,
        hard_label: bool = False,
        logits: float = 0.0,
        inherit: bool = True,
        allow_random_teacher: bool = False,
        data_preprocessor: None = None,
    ) -> None:
        if teacher_checkpoint is None and not allow_random_teacher:
            raise InvalidValueError(
                "teacher-without-weights",
                "the teacher has no weights; set --cfg-options teacher_checkpoint=FILE (a checkpoint of its config; to try "
                "commands, model.allow_random_teacher=True takes random ones)",
            )
        if not taps and not hard_label and not logits:
            raise InvalidValueError(
                "taps-missing", "nothing is learnt from the teacher; declare taps, or hard_label or logits for a segmentor"
            )
        student_cfg, teacher_cfg = model_config(student), model_config(teacher)
        _check_preprocessing(student_cfg, teacher_cfg)
        built = roots.MODELS.build(student_cfg)
        super().__init__(data_preprocessor=built.data_preprocessor)
        self.student = built
        self.inherit = inherit
        frozen = roots.MODELS.build(teacher_cfg)
        if teacher_checkpoint is not None:
            load_strict(frozen, read_weights(teacher_checkpoint), source=str(teacher_checkpoint))
        self.keep_teacher(frozen.eval().requires_grad_(False))
        self.taps = [Tap(**tap) for tap in taps]
        self.generators = nn.ModuleDict(self._build_generators())
        self.second_head = self._build_second_head() if hard_label else None
        self.logits = float(logits)
        self._reads_logits = hard_label or logits > 0
        self._teacher_source: str | None = str(teacher_checkpoint or "the teacher without weights")  # None: it was looked at
        if self._reads_logits:
            _check_classes(self.student, frozen)

    def init_weights(self) -> None:
        """The student's own initialisation, then the teacher's neck and heads where they fit."""
        self.student.init_weights()
        if self.inherit:
            inherit_head(self.student, self.teacher)

    def forward(  # type: ignore[override]
        self, inputs: Tensor, data_samples: object = None, mode: str = "tensor"
    ) -> dict[str, Tensor] | list[Any] | Tensor:
        """The student's forward, with the losses of the distillation added in mode 'loss'."""
        if mode != "loss":
            return self.student(inputs, data_samples, mode=mode)
        seen_by_teacher, teacher_logits = self._run_teacher(inputs)
        with captured(self.student, self._student_paths()) as seen:
            losses: dict[str, Any] = dict(self.student(inputs, data_samples, mode="loss"))
        if self.second_head is not None:
            losses = {name: _halved(value) if "loss" in name else value for name, value in losses.items()}
            features, _ = seen[_classifier_path(self.student)]
            losses["hard_label_loss"] = hard_label_loss(self.second_head(features), teacher_logits) / 2
        if self.logits:
            _, logits = seen[_classifier_path(self.student)]
            losses["logits_loss"] = self.logits * position_distribution_loss(logits, teacher_logits)
        for index, tap in enumerate(self.taps):
            targets = _chosen(seen_by_teacher[tap.teacher or tap.student], tap)
            for level, (ours, theirs) in enumerate(zip(_chosen(seen[tap.student], tap), targets, strict=True)):
                loss = cast(MGDLoss, self.generators[f"{index}_{level}"])
                losses[f"mgd_{index}_{level}_loss"] = _share(loss, theirs, targets) * loss(ours, theirs)
        return losses

    @property
    def detector(self) -> BaseModel:
        """The student, by the name at which mmdet's hooks look inside a model (``YOLOXModeSwitchHook``)."""
        return self.student

    def set_epoch(self, epoch: int) -> None:
        """Tell a student that counts epochs which one it is, for mmdet's ``SetEpochInfoHook``."""
        cast(Any, self.student).set_epoch(epoch)

    def _student_paths(self) -> list[str]:
        paths = [tap.student for tap in self.taps]
        return [*paths, _classifier_path(self.student)] if self._reads_logits else paths

    @torch.no_grad()
    def _run_teacher(self, inputs: Tensor) -> tuple[dict[str, list[Tensor]], Any]:
        paths = [tap.teacher or tap.student for tap in self.taps]
        whole = self._reads_logits or any(path.partition(".")[0] not in ("backbone", "neck") for path in paths)

        def run() -> object:
            return self.teacher(inputs, mode="tensor") if whole else self.teacher.extract_feat(inputs)

        with captured(self.teacher, paths) as seen:
            logits = run()
        if self._teacher_source is not None and is_finite(inputs):
            given = [value for maps in seen.values() for value in maps]
            _check_finite(self.teacher, [*given, *_maps(logits)], run, self._teacher_source, inputs.device.type)
            self._teacher_source = None
        return seen, logits if self._reads_logits else None

    def _build_generators(self) -> dict[str, nn.Module]:
        """One generator a tap and level, its channels found by running both networks on an empty image."""
        image = torch.zeros(1, 3, _DRY_SIZE, _DRY_SIZE)
        ours = _dry_run(self.student, [tap.student for tap in self.taps], image)
        theirs = _dry_run(self.teacher, [tap.teacher or tap.student for tap in self.taps], image)
        found: dict[str, nn.Module] = {}
        for index, tap in enumerate(self.taps):
            maps, targets = _chosen(ours[tap.student], tap), _chosen(theirs[tap.teacher or tap.student], tap)
            if len(maps) != len(targets):
                raise InvalidValueError(
                    "tap-map-counts-differ",
                    f"taps.{index} ({tap.student!r}): {len(maps)} maps of the student, {len(targets)} of the teacher",
                )
            for level, (a, b) in enumerate(zip(maps, targets, strict=True)):
                if a.shape[2:] != b.shape[2:]:
                    raise InvalidValueError(
                        "tap-map-sizes-differ",
                        f"taps.{index}, map {level}: {tuple(a.shape[2:])} positions of the student, {tuple(b.shape[2:])} of "
                        f"the teacher on a {_DRY_SIZE} px image; MGD compares position by position, so choose levels of equal "
                        "stride",
                    )
                found[f"{index}_{level}"] = MGDLoss(a.shape[1], b.shape[1], **tap.loss)
        return found

    def _build_second_head(self) -> nn.Module:
        classifier = self.student.get_submodule(_classifier_path(self.student))
        head = nn.Conv2d(classifier.in_channels, classifier.out_channels, 1)
        nn.init.normal_(head.weight, std=0.01)  # as mmseg's own classifiers
        nn.init.zeros_(head.bias)  # type: ignore[arg-type]
        return head


def _share(loss: MGDLoss, target: Tensor, targets: Sequence[Tensor]) -> float:
    """Weight of one map of a tap: a mean is over the values of all its maps, of which each has its share, as in the sum.

    With means of their own, a map of one position would count as much as one of thousands. The coarsest maps of a detector
    that has seen no object of that size may be of any scale, and would rule the training.
    """
    return target.numel() / sum(other.numel() for other in targets) if loss.reduction == "mean" else 1.0


def position_distribution_loss(logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """Channel-wise distillation: where in the image a class is, as a distribution over positions; an fp32 scalar.

    Args:
        logits: (B, K, H, W), brought to the teacher's size where it differs.
        teacher_logits: (B, K, H', W').
        temperature: divides both.
    """
    ours = (_resized(logits, teacher_logits).float().flatten(2) / temperature).log_softmax(-1)
    theirs = (teacher_logits.detach().float().flatten(2) / temperature).log_softmax(-1)
    return temperature**2 * (theirs.exp() * (theirs - ours)).sum(-1).mean()


def hard_label_loss(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross entropy with the teacher's most probable class of every position, fp32 scalar.

    Args:
        logits: (B, K, H, W), brought to the teacher's size where it differs.
        teacher_logits: (B, K, H', W').
    """
    return F.cross_entropy(_resized(logits, teacher_logits).float(), teacher_logits.detach().argmax(1))


def _resized(logits: Tensor, like: Tensor) -> Tensor:
    same = logits.shape[2:] == like.shape[2:]
    return logits if same else F.interpolate(logits, size=like.shape[2:], mode="bilinear", align_corners=False)


def inherit_head(student: nn.Module, teacher: nn.Module) -> tuple[list[str], list[str]]:
    """Copy all but the backbone from the teacher where name and shape agree, as MGD does; log how much.

    Returns:
        Names that were copied, and names of the student's that were not.
    """
    theirs = teacher.state_dict()
    own = {name: value for name, value in student.state_dict().items() if not name.startswith("backbone.")}
    copied = [name for name, value in own.items() if name in theirs and theirs[name].shape == value.shape]
    student.load_state_dict({name: theirs[name] for name in copied}, strict=False)
    left = [name for name in own if name not in copied]
    more = f"; not of the teacher's shape: {', '.join(left[:5])}{' ...' if len(left) > 5 else ''}" if left else ""
    print_log(f"{len(copied)} of {len(own)} entries of neck and heads start as the teacher's{more}", "current")
    return copied, left


@contextmanager
def captured(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Context that collects the outputs of modules by path, and of a classifier ``conv_seg`` its input, too.

    A module that gives several maps, or is called several times, has them in order.

    Raises:
        ValueError: no such module.
    """
    seen: dict[str, list[Tensor]] = {path: [] for path in paths}
    known = dict(model.named_modules())
    handles = []
    try:
        for path in seen:
            if path not in known:
                near = ", ".join(map(repr, nearest_names(path, known))) or ", ".join(name for name, _ in model.named_children())
                raise InvalidValueError("tap-module-missing", f"{type(model).__name__} has no module {path!r}; near: {near}")

            def note(module: nn.Module, given: Sequence[Tensor], output: Any, path: str = path) -> None:
                seen[path] += [given[0], output] if path.endswith(_CLASSIFIER) else _maps(output)

            handles.append(known[path].register_forward_hook(note))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


_CLASSIFIER = "conv_seg"


def _maps(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [entry for part in output for entry in _maps(part)] if isinstance(output, (list, tuple)) else []


def _chosen(maps: Sequence[Tensor], tap: Tap) -> list[Tensor]:
    if not maps:
        raise InvalidValueError(
            "tap-without-feature-map", f"the module {tap.student!r} of a tap was not run, or gave no feature map"
        )
    levels = range(len(maps)) if tap.levels is None else tap.levels
    wrong = [level for level in levels if not -len(maps) <= level < len(maps)]
    if wrong:
        raise InvalidValueError(
            "tap-level-out-of-range", f"the tap {tap.student!r} has {len(maps)} maps, and level {wrong[0]} is not among them"
        )
    return [maps[level] for level in levels]


@torch.no_grad()
def _dry_run(model: BaseModel, paths: Sequence[str], image: Tensor) -> dict[str, list[Tensor]]:
    with evaluating(model), captured(model, paths) as seen:
        if all(path.partition(".")[0] in ("backbone", "neck") for path in paths):
            model.extract_feat(image)
        else:
            model(image, mode="tensor")
    return seen


def _check_finite(teacher: nn.Module, given: Sequence[Tensor], again: Callable[[], Any], source: str, device: str) -> None:
    """Refuse a teacher whose first outputs are not finite.

    Raises:
        WeightsError: names the module where that begins.
    """
    mixed = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if mixed else next(teacher.parameters()).dtype
    remedy = (
        "train without --amp"
        if mixed
        else "take another checkpoint: this one is damaged, diverged in its training, or is of another model"
    )
    check_outputs(teacher, given, again, source, dtype, remedy)


def _classifier_path(model: nn.Module) -> str:
    head = getattr(model, "decode_head", None)
    path = f"decode_head.{len(head) - 1}" if isinstance(head, nn.ModuleList) else "decode_head"
    if head is None or not hasattr(model.get_submodule(path), _CLASSIFIER):
        raise InvalidValueError(
            "segmentor-head-needed",
            f"hard_label and logits need a segmentor whose decode head ends in conv_seg, not a {type(model).__name__}; a "
            "detector's classes belong to its own proposals, so constrain its features with taps instead",
        )
    return f"{path}.{_CLASSIFIER}"


def _check_classes(student: nn.Module, teacher: nn.Module) -> None:
    ours, theirs = (model.get_submodule(_classifier_path(model)).out_channels for model in (student, teacher))
    if ours != theirs:
        raise InvalidValueError("classes-differ-from-teacher", f"the teacher tells {theirs} classes apart, the student {ours}")


def _halved(value: Any) -> Any:
    return [_halved(item) for item in value] if isinstance(value, (list, tuple)) else value / 2


def _floats(values: Sequence[float] | None) -> list[float] | None:
    return None if values is None else [float(value) for value in values]


def _check_preprocessing(student: Mapping[str, Any], teacher: Mapping[str, Any]) -> None:
    ours, theirs = (dict(cfg.get("data_preprocessor") or {}) for cfg in (student, teacher))
    for key, same_as in (("mean", _floats), ("std", _floats), ("bgr_to_rgb", bool), ("rgb_to_bgr", bool)):
        if same_as(ours.get(key)) != same_as(theirs.get(key)):
            raise InvalidValueError(
                "preprocessing-differs",
                f"data_preprocessor.{key} is {ours.get(key)} for the student and {theirs.get(key)} for the teacher, but both "
                "see the same normalised images; use models of one preprocessing (the 'pytorch' style, say)",
            )
