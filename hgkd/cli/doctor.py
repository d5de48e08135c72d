"""What a file is; whether this machine is fit for a training; what a teacher file can teach and whether it looks trained.

    hgkd doctor file SOMETHING.pth
    hgkd doctor environment --work-dir work_dirs/mine --images ~/photos
    hgkd doctor teacher mae_pretrain_vit_base_full.pth
    hgkd doctor teacher dinov2.safetensors --name vit_small_patch14_dinov2 --images DIR
    hgkd doctor extract run.pth state_dict_ema averaged.safetensors

``file`` takes any weight file, work folder or export and says what it is and which commands take it.
What a teacher file can teach is found by building its network without weights and matching every entry: the network of
``--name``, else the one that the file's own shapes describe. The score of the weights needs the file alone. With a folder of
images its features are compared with those of a random network of the same shape; with one sub-folder a class, by k-NN too.
Files other than MAE's need timm's name for that. ``extract`` writes one of several sets of weights to a file of its own.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from safetensors.torch import save_file
from timm.models.beit import Beit
from torch import Tensor

from hgkd.cli.common import command, command_parser
from hgkd.data import LabelledImages, UnlabelledImages
from hgkd.diagnosis.environment import check_environment, exit_code
from hgkd.errors import DataError, WeightsError
from hgkd.networks.libraries import library_of
from hgkd.networks.mae import MaskedAutoencoder, arch_of, read_mae
from hgkd.networks.vit import check_attention_is_read
from hgkd.pixels import check_channels
from hgkd.teachers import MAETeacher, Teacher, TimmTeacher
from hgkd.teachers.health import FeatureHealth, WeightHealth, feature_health, weight_health
from hgkd.teachers.vit import build_vit, load_vit, vit_of
from hgkd.weights.export_folder import READABLE
from hgkd.weights.files import read_weights
from hgkd.weights.identify import Kind, WeightFile, identify
from hgkd.weights.loading import match
from hgkd.weights.vit_names import count_blocks, to_timm_names

TARGETS = ("HGKD target='full'", "MGD", "HGKD target='inferred'", "G2SD", "DMAE", "AttentionMask")


@dataclass(frozen=True)
class Finding:
    """What the doctor says of a file.

    Attributes:
        kind: its naming.
        width, depth, patch_size: of the encoder.
        grid: tokens that its positions are for; None when they are relative.
        decoder: (blocks, width), or None.
        prefix_tokens: class and register tokens.
        targets: what it can teach, and what not, with the reason.
        health: the score of its weights; None when it cannot be a teacher.
        features: its features beside those of a random network; None without images.
    """

    kind: str
    width: int
    depth: int
    patch_size: int
    grid: tuple[int, int] | None
    decoder: tuple[int, int] | None
    prefix_tokens: int
    health: WeightHealth | None
    targets: dict[str, str] = field(default_factory=dict)
    features: FeatureHealth | None = None


def examine_teacher(
    file: str,
    name: str | None = None,
    images: str | None = None,
    limit: int = 200,
    image_size: int = 224,
    entry: str | None = None,
) -> Finding:
    """Examine a teacher file.

    Args:
        file: .safetensors, .pth, .pt or .bin in any known naming.
        name: timm's name of the network that the file is meant for, which every entry must then fit; None: the network that the
            file's shapes describe. Not for MAE files with a decoder.
        images: folder of images, or of one folder a class.
        limit: at most so many images.
        image_size: their side in pixels.

    Raises:
        FileNotFoundError, WeightsError, DataError, ValueError: something about the file or the images is wrong.
    """
    identified = identify(file, entry)
    kind, weights = _read(identified, entry)
    patches = weights["patch_embed.proj.weight"]
    decoder = None
    if "decoder_embed.weight" in weights:
        decoder = (count_blocks(weights, "decoder_blocks."), weights["decoder_embed.weight"].shape[0])
    network, obstacle = _network(file, name, weights)
    prefix = sum(weights[key].shape[1] for key in ("cls_token", "reg_token") if key in weights)
    return Finding(
        kind=kind,
        width=patches.shape[0],
        depth=count_blocks(weights),
        patch_size=patches.shape[-1],
        grid=_grid(weights, prefix),
        decoder=decoder,
        prefix_tokens=prefix,
        health=None if obstacle else weight_health(weights),
        targets=_targets(network, obstacle, decoder is not None),
        features=None if images is None else _features(_build(identified, name, weights, entry), images, limit, image_size),
    )


def _read(file: WeightFile, entry: str | None) -> tuple[str, dict[str, Tensor]]:
    if file.kind is Kind.VIT_STUDENT:
        return "distilled ViT of hgkd", read_mae(file, entry=entry)[1]
    kind, weights = to_timm_names(file.tensors(entry), str(file))
    if "decoder_embed.weight" in weights:
        kind += ", a MAE with its decoder"
    return kind, weights


def _network(file: str, name: str | None, weights: Mapping[str, Tensor]) -> tuple[Any, str | None]:
    """The network that a teacher would be built with, on the meta device, and why the file does not fit it (None: it does)."""
    with torch.device("meta"):
        try:
            if "decoder_embed.weight" in weights:
                if name is not None:
                    raise ValueError(f"{file} is a MAE with its decoder, whose network it describes itself; leave --name out")
                arch = arch_of(weights, file, 1, 1)  # heads change no shape
                check_channels(arch.in_chans, f"the number of channels of {file}")
                network: Any = MaskedAutoencoder(arch)
                match(network, weights, source=file)
            else:
                network = build_vit(name) if name is not None else vit_of(weights, file)
                load_vit(network, weights, file, dry=True)
        except WeightsError as error:
            unnamed = "" if name is not None else "; if timm has this network, give its name with --name"
            return None, f"{error}{unnamed}"
    return network, None


def _grid(weights: Mapping[str, Tensor], prefix: int) -> tuple[int, int] | None:
    if "pos_embed" not in weights:
        return None
    positions = weights["pos_embed"].shape[1]
    for count in (positions, positions - 1, positions - prefix):
        side = math.isqrt(max(count, 0))
        if side * side == count:
            return side, side
    return None


def _targets(network: Any, obstacle: str | None, decoder: bool) -> dict[str, str]:
    if obstacle is not None:
        return dict.fromkeys(TARGETS, f"no: {obstacle}")
    beit = isinstance(network, Beit)
    inferred = "yes" if decoder else "no: the file has no decoder; it needs the full MAE checkpoint"
    attention = "yes"
    try:
        check_attention_is_read(network.blocks[-1])
    except ValueError as error:
        attention = f"no: {error}"
    whole = "no: BEiT's position biases are for its whole grid" if beit else "yes"
    return dict(zip(TARGETS, ("yes", "yes", inferred, inferred, whole, attention), strict=True))


def _build(file: WeightFile, name: str | None, weights: Mapping[str, Tensor], entry: str | None) -> Teacher:
    if name is not None:
        return TimmTeacher(name, checkpoint=file, allow_random=True, entry=entry)
    if "decoder_embed.weight" not in weights:
        raise ValueError(f"--images needs the network: give --name, timm's name of {file}, e.g. vit_base_patch16_224.mae")
    return MAETeacher(file, allow_random=True, entry=entry)


def _features(teacher: Teacher, folder: str, limit: int, image_size: int) -> FeatureHealth:
    labelled = any(entry.is_dir() for entry in Path(folder).iterdir()) if Path(folder).is_dir() else False
    data: LabelledImages | UnlabelledImages
    if labelled:
        data = LabelledImages(folder, image_size=image_size)
    else:
        data = UnlabelledImages(folder, image_size=image_size, transform=dict(kind="eval"))
    count = min(limit, len(data))
    if count < 2:
        raise DataError(f"{folder} holds {len(data)} images; at least 2 are needed to compare")
    samples = [data[i * len(data) // count] for i in range(count)]
    images = torch.stack([sample["inputs"] for sample in samples]).float() / 255
    labels = torch.tensor([int(sample["label"]) for sample in samples]) if labelled else None
    side = max(1, round(image_size / teacher.info.patch_size))
    teacher.prepare((side, side), teacher.info.patch_size)
    return feature_health(teacher, images, labels)


_START = "backbone={file} of a fine-tuning (hgkd train)"
_EVALUATE = "hgkd evaluate ... --backbone {file}"
_OTHERS = "hgkd evaluate ... --backbone NAME --checkpoint {file} (NAME: timm's name of the network)"
_TEACHER = "hgkd doctor teacher {file} (what it can teach)"
_MAE_TEACHER = "model.teacher.type=MAETeacher model.teacher.checkpoint={file} of a distillation"
_CNN = (
    _OTHERS,
    "hgkd export {file} --encoder NAME --to TARGET --out FOLDER",
    "model.student.encoder_checkpoint={file} of a pretraining (hgkd train)",
)
USES: dict[Kind, tuple[str, ...]] = {
    Kind.STUDENT: (_EVALUATE, "hgkd export {file} --to TARGET --out FOLDER", _START),
    Kind.VIT_STUDENT: (_EVALUATE, _START, _MAE_TEACHER),
    Kind.MAE_RUN: (_EVALUATE, "hgkd visualize reconstruction --checkpoint {file} ...", _START, _MAE_TEACHER),
    Kind.CLASSIFIER: (_EVALUATE, "hgkd visualize cam --checkpoint {file} ...", "hgkd test CONFIG {file}", _START),
    Kind.DISTILLED_MODEL: ("hgkd test CONFIG {file}", "hgkd export {file} --what model --to mmdet (or mmseg) --out FOLDER"),
    Kind.MODEL: ("hgkd test CONFIG {file}", "load_from={file} of a downstream training"),
    Kind.SPARSE: ("hgkd.sparse.load_sparse({file!r}, NETWORK) in Python",),
    Kind.MAE: (_EVALUATE, _START, _TEACHER, _MAE_TEACHER),
    Kind.MAE_ENCODER: (_EVALUATE, _START, _TEACHER),
    Kind.SPARK: _CNN,
    Kind.CNN: _CNN,
    Kind.VIT: (_OTHERS, _TEACHER, _START),
    Kind.UNKNOWN: (),
}


def _uses_of_export(file: WeightFile) -> tuple[str, ...]:
    target, what = file.card.get("target", "timm"), file.card.get("what", "backbone")
    uses: tuple[str, ...] = (_EVALUATE, _START) if target in READABLE and what != "decoder" else ()
    if target in ("timm", "mmdet", "mmseg", "torchvision") and what == "backbone":
        uses += ("backbone={file} of a downstream training",)
    return (*uses, f"what loads files of {target}; see README.md in it")


def described(file: WeightFile) -> list[str]:
    """What ``hgkd doctor file`` prints: kind, names, what is known besides, and what takes the file; paths are never cut."""
    uses = _uses_of_export(file) if file.kind is Kind.EXPORT else USES[file.kind]
    if file.kind is Kind.STUDENT and file.spec is not None and library_of(file.spec.name) is not None:
        uses = tuple(use for use in uses if use != _START)  # timm's networks alone are fine-tuned
    lines = [f"{file}: {file.kind}"]
    if file.naming:
        lines.append(f"names of {file.naming}" + (f", behind {file.prefix!r}" if file.prefix else ""))
    if file.detail:
        lines.append(file.detail)
    return [*lines, "taken by:", *(f"  {use.format(file=str(file))}" for use in uses or ("nothing here",))]


def extract_entry(file: str, entry: str, out: str) -> int:
    """Write one set of weights of a file to a safetensors file; returns the number of tensors.

    Raises:
        FileNotFoundError, WeightsError: the file is absent or damaged, or has no such entry.
        ValueError, FileExistsError: ``out`` has another ending, or is there already.
    """
    path = Path(out)
    if path.suffix != ".safetensors":
        raise ValueError(f"{out} must end in .safetensors, which holds tensors and nothing else")
    if path.exists():
        raise FileExistsError(f"{out} exists already; give another name")
    weights = read_weights(file, entry)
    # contiguous copies: entries that share their memory, as tied weights do, cannot be written otherwise
    save_file({key: value.clone().contiguous() for key, value in weights.items()}, path, metadata={"format": "pt"})
    return len(weights)


def table_of(file: str, found: Finding) -> Table:
    table = Table(title=escape(file), show_header=False)
    grid = "relative positions" if found.grid is None else f"{found.grid[0]} x {found.grid[1]}"
    decoder = "no" if found.decoder is None else f"{found.decoder[0]} blocks x {found.decoder[1]}"
    rows = {
        "kind": found.kind,
        "encoder": f"{found.depth} blocks x {found.width}",
        "patch": f"{found.patch_size} pixels",
        "grid": f"{grid}, {found.prefix_tokens} class and register tokens",
        "decoder": decoder,
        **found.targets,
        "health": "not judged" if found.health is None else str(found.health),
    }
    if found.features is not None:
        rows["features"] = str(found.features)
    for key, value in rows.items():
        table.add_row(escape(key), escape(value))
    return table


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    file = commands.add_parser("file", help="say what a weight file, a work folder or an export is")
    file.add_argument("file", help="weight file or folder")
    file.add_argument("--entry", help="which set of weights, in a file that holds several (default: the usual one)")
    environment = commands.add_parser("environment", help="examine this machine: versions, devices, disk, images")
    environment.add_argument("--work-dir", default="work_dirs", help="where checkpoints will lie (default: %(default)s)")
    environment.add_argument("--images", help="folder of the training images, of which some are read")
    environment.add_argument("--planned-mb", type=float, default=1000.0, help="space needed, told by `hgkd train --dry-run`")
    teacher = commands.add_parser("teacher", help="examine a teacher file")
    teacher.add_argument("file", help="weight file in any known naming")
    teacher.add_argument("--name", help="timm's name of the network that the file is meant for")
    teacher.add_argument("--entry", help="which set of weights, in a file that holds several (default: the usual one)")
    teacher.add_argument("--images", help="folder of images, or of one folder a class")
    teacher.add_argument("--limit", type=int, default=200, help="at most so many images")
    teacher.add_argument("--image-size", type=int, default=224, help="side of the images in pixels")
    extract = commands.add_parser("extract", help="write one of several sets of weights to a file of its own")
    extract.add_argument("file", help="weight file")
    extract.add_argument("entry", help="name of the set, e.g. state_dict_ema; inner ones behind a dot")
    extract.add_argument("out", help="file to write, .safetensors; it must not exist")
    return parser.parse_args(arguments)


@command
def main(argv: Sequence[str]) -> int:
    """0: known, fit, or looks trained; 1: unknown, a check failed, looks random, or can teach nothing."""
    args = parse_args(argv)
    if args.command == "file":
        file = identify(args.file, args.entry)
        print(*described(file), sep="\n")
        return int(file.kind is Kind.UNKNOWN)
    if args.command == "environment":
        checks = check_environment(args.work_dir, args.images, args.planned_mb)
        print(*checks, sep="\n")
        return exit_code(checks)
    if args.command == "extract":
        print(f"{extract_entry(args.file, args.entry, args.out)} tensors of {args.entry!r} written to {args.out}")
        return 0
    found = examine_teacher(args.file, args.name, args.images, args.limit, args.image_size, args.entry)
    Console().print(table_of(args.file, found))
    return int(found.health is None or found.health.looks_random)
