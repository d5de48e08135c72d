"""Diagnose a file, a machine before a training, or a teacher: what it can teach and whether it looks trained.

    hgkd doctor file SOMETHING.pth
    hgkd doctor environment --work-dir work_dirs/mine --images ~/photos
    hgkd doctor teacher mae_pretrain_vit_base_full.pth
    hgkd doctor teacher dinov2.safetensors --name vit_small_patch14_dinov2 --images DIR
    hgkd doctor pixels FOLDER --in-chans 8 --value-range 0 4095
    hgkd doctor extract run.pth state_dict_ema averaged.safetensors
    hgkd doctor students --budget-ms 20 --threads 2 --runtime openvino --out students.json
    hgkd doctor errors mask-ratio-too-high

``file`` takes any weight file, work folder or export and says what it is and which commands take it.
What a teacher file can teach is found by building its network without weights and matching every entry: the network of
``--name``, else the one that the file's own shapes describe. The score of the weights needs the file alone. With a folder of
images its features are compared with those of a random network of the same shape; with one sub-folder a class, by k-NN too.
Files other than MAE's need timm's name for that. ``pixels`` reads all images of a folder and prints the mean and standard
std of every channel as options of a config. ``extract`` writes one of several sets of weights to a file of its own.
``students`` measures timm's CNNs in a runtime on this machine, and lists those within the budget that hgkd can train sparse.
``errors`` lists the codes in which messages end, with their texts, or those that have a word in them.
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
from torch import Tensor, nn

from hgkd.cli.common import command, command_parser
from hgkd.cli.doctor_students import add_students_options, run_students
from hgkd.data import LabelledImages, UnlabelledImages
from hgkd.data.statistics import PixelSums, measure_pixels
from hgkd.diagnosis.environment import check_environment, exit_code
from hgkd.diagnosis.error_codes import coded_errors, write_page
from hgkd.errors import DataError, ExistingFileError, InvalidValueError, WeightsError
from hgkd.networks.libraries import library_of
from hgkd.networks.mae import MaskedAutoencoder, arch_of, read_mae
from hgkd.teachers import MAETeacher, Teacher, TimmTeacher
from hgkd.teachers.described import vit_of
from hgkd.teachers.families import Family, Levels, family_for
from hgkd.teachers.health import FeatureHealth, WeightHealth, can_be_judged, feature_health, weight_health
from hgkd.teachers.vit import build_network, family_of, load_network, load_vit
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
        features: its features next to those of a random network; None without images.
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
        limit: maximum number of images.
        image_size: their side in pixels.

    Raises:
        FileNotFoundError, WeightsError, DataError, ValueError: something about the file or the images is wrong.
    """
    identified = identify(file, entry)
    if name is not None and _is_levels(name):
        return _examine_levels(identified, name, images, limit, image_size, entry)
    kind, weights = _read(identified, entry)
    patches = weights["patch_embed.proj.weight"]
    decoder = None
    if "decoder_embed.weight" in weights:
        decoder = (count_blocks(weights, "decoder_blocks."), weights["decoder_embed.weight"].shape[0])
    network, obstacle = _network(file, name, weights)
    prefix = sum(weights[key].shape[1] for key in ("cls_token", "reg_token") if key in weights)
    family = network if obstacle or isinstance(network, MaskedAutoencoder) else family_of(network, name or file)
    return Finding(
        kind=kind,
        width=patches.shape[0],
        depth=count_blocks(weights),
        patch_size=patches.shape[-1],
        grid=_grid(weights, prefix),
        decoder=decoder,
        prefix_tokens=prefix,
        health=None if obstacle else weight_health(weights),
        targets=_targets(family, obstacle, decoder is not None),
        features=None if images is None else _features(_build(identified, name, weights, entry), images, limit, image_size),
    )


def _is_levels(name: str) -> bool:
    """Whether timm's network of that name is one whose levels can teach, no ViT of equal blocks."""
    with torch.device("meta"):
        return family_for(build_network(name)) is Levels


def _examine_levels(file: WeightFile, name: str, images: str | None, limit: int, image_size: int, entry: str | None) -> Finding:
    network = build_network(name)
    obstacle, health = None, None
    try:
        load_network(network, file, entry)
    except WeightsError as error:
        obstacle = str(error)
    else:
        weights = network.state_dict()
        health = weight_health(weights) if can_be_judged(weights) else None
    family = Levels(network)
    teacher = None if images is None else TimmTeacher(name, checkpoint=file, allow_random=True, entry=entry)
    return Finding(
        kind=f"{file.naming or 'timm'}, {name} with the levels {'; '.join(family.levels)}",
        width=family.width,
        depth=family.depth,
        patch_size=family.patch_size,
        grid=None,
        decoder=None,
        prefix_tokens=0,
        health=health,
        targets=_targets(family, obstacle, False),
        features=None if teacher is None else _features(teacher, images or "", limit, image_size),
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
                    raise InvalidValueError(
                        "name-not-needed",
                        f"{file} is a MAE with its decoder, whose network it describes itself; leave --name out",
                    )
                arch = arch_of(weights, file, 1, 1)  # heads change no shape
                network = MaskedAutoencoder(arch)
                match(network, weights, source=file)
            else:
                network = build_network(name) if name is not None else vit_of(weights, file)
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


def _targets(network: nn.Module | Family, obstacle: str | None, decoder: bool) -> dict[str, str]:
    if obstacle is not None:
        return dict.fromkeys(TARGETS, f"no: {obstacle}")
    inferred = "yes" if decoder else "no: the file has no decoder; it needs the full MAE checkpoint"
    dropping, attention = "yes", "yes"
    if isinstance(network, Family):
        dropping = f"no: {network.no_dropping}" if network.no_dropping else "yes"
        attention = f"no: {network.no_attention}" if network.no_attention else "yes"
    return dict(zip(TARGETS, ("yes", "yes", inferred, inferred, dropping, attention), strict=True))


def _build(file: WeightFile, name: str | None, weights: Mapping[str, Tensor], entry: str | None) -> Teacher:
    if name is not None:
        return TimmTeacher(name, checkpoint=file, allow_random=True, entry=entry)
    if "decoder_embed.weight" not in weights:
        raise InvalidValueError(
            "network-name-missing",
            f"--images needs the network: give --name, timm's name of {file}, e.g. vit_base_patch16_224.mae",
        )
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
        raise DataError("too-few-images", f"{folder} holds {len(data)} images; at least 2 are needed to compare")
    samples = [data[i * len(data) // count] for i in range(count)]
    images = torch.stack([sample["inputs"] for sample in samples]).float() / 255
    labels = torch.tensor([int(sample["label"]) for sample in samples]) if labelled else None
    side = max(1, round(image_size / teacher.info.patch_size))
    teacher.prepare((side, side), teacher.info.patch_size)
    return feature_health(teacher, images, labels)


def pixel_lines(
    folder: str,
    in_chans: int | None = None,
    value_range: Sequence[float] | None = None,
    list_file: str | None = None,
    limit: int | None = None,
) -> list[str]:
    """What ``hgkd doctor pixels`` prints: statistics of every channel over all pixels, and the options that they are for.

    Args:
        in_chans: channels of the images; None: 8-bit RGB.
        value_range, list_file, limit: see :class:`hgkd.data.UnlabelledImages`.

    Raises:
        FileNotFoundError, DataError: see there; or a channel is the same everywhere, so nothing can be divided by its
            std.
    """
    dataset = UnlabelledImages(
        folder, list_file, transform={"kind": "eval"}, limit=limit, value_range=value_range, in_chans=in_chans
    )
    sums, unreadable = measure_pixels(dataset)
    constant = [str(channel) for channel, std in enumerate(sums.std) if std == 0]
    if constant:
        raise DataError(
            "channel-is-constant",
            f"channel {', '.join(constant)} of the {sums.images} images in {folder} is {sums.mean[int(constant[0])]:.4g} at "
            "every pixel and has no standard deviation; leave it out of the files, or look at value_range",
        )
    rows = [f"{c:>7}  {m:.4f}  {s:.4f}  {low:.4f}  {high:.4f}" for c, (m, s, low, high) in enumerate(_columns(sums))]
    mean, std = ("[" + ",".join(f"{value:.6g}" for value in values) + "]" for values in (sums.mean, sums.std))
    lines = [f"# {sums.images} images, {sums.pixels} pixels in [0, 1]; {len(unreadable)} files cannot be read"]
    lines += [f"# {row}" for row in ("channel  mean    std     lowest  highest", *rows)]
    lines += [] if in_chans is None else [f"in_chans={in_chans}"]
    lines += [] if dataset.value_range is None else ["value_range=[{:g},{:g}]".format(*dataset.value_range)]
    return [
        *lines,
        f"model.student.normalize=[{mean},{std}]",
        f"# a classifier: model.classifier.normalize=[{mean},{std}]",
        f"# a ViT student: model.student.mean={mean} model.student.std={std}",
        f"# MAE pretraining: model.mean={mean} model.std={std}",
    ]


def _columns(sums: PixelSums) -> list[tuple[float, ...]]:
    return list(zip(*(map(float, part) for part in (sums.mean, sums.std, sums.low, sums.high)), strict=True))


_START = "backbone={file} of a fine-tuning (hgkd train)"
_EVALUATE = "hgkd evaluate ... --backbone {file}"
_OTHERS = "hgkd evaluate ... --backbone NAME --checkpoint {file} (NAME: timm's name of the network)"
_TEACHER = "hgkd doctor teacher {file} (what it can teach)"
_MAE_TEACHER = "model.teacher.type=MAETeacher model.teacher.checkpoint={file} of a distillation"
_DISTIL = "teacher_checkpoint={file} of a distillation (hgkd train); model.teacher.name=NAME unless it is the recipe's own"
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
    Kind.DISTILLED_MODEL: ("hgkd test CONFIG {file}", "hgkd export {file} --part model --to mmdet (or mmseg) --out FOLDER"),
    Kind.MODEL: ("hgkd test CONFIG {file}", "load_from={file} of a downstream training"),
    Kind.SPARSE: ("hgkd.sparse.load_sparse({file!r}, NETWORK) in Python",),
    Kind.MAE: (_EVALUATE, _START, _TEACHER, _MAE_TEACHER),
    Kind.MAE_ENCODER: (_EVALUATE, _START, _TEACHER),
    Kind.SPARK: _CNN,
    Kind.CNN: (*_CNN, _DISTIL),
    Kind.VIT: (_OTHERS, _TEACHER, _DISTIL, _START),
    Kind.NETWORK: (
        _OTHERS,
        "hgkd doctor teacher {file} --name NAME (what it can teach)",
        _DISTIL,
    ),
    Kind.UNKNOWN: (),
}


def _uses_of_export(file: WeightFile) -> tuple[str, ...]:
    target, part = file.card.get("target", "timm"), file.card.get("part", "backbone")
    uses: tuple[str, ...] = (_EVALUATE, _START) if target in READABLE and part != "decoder" else ()
    if target in ("timm", "mmdet", "mmseg", "torchvision") and part == "backbone":
        uses += ("backbone={file} of a downstream training",)
    return (*uses, f"what loads files of {target}; see README.md in it")


def described(file: WeightFile) -> list[str]:
    """Text of ``hgkd doctor file``: kind, names, further facts, and the commands that take the file; paths are never cut."""
    uses = _uses_of_export(file) if file.kind is Kind.EXPORT else USES[file.kind]
    if file.kind is Kind.STUDENT and file.spec is not None and library_of(file.spec.name) is not None:
        uses = tuple(use for use in uses if use != _START)  # timm's networks alone are fine-tuned
    teaches = "; serves as a teacher" if _DISTIL in uses or _MAE_TEACHER in uses else ""
    lines = [f"{file}: {file.kind}{teaches}"]
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
        raise InvalidValueError(
            "suffix-not-safetensors", f"{out} must end in .safetensors, which holds tensors and nothing else"
        )
    if path.exists():
        raise ExistingFileError("file-exists", f"{out} exists already; give another name")
    weights = read_weights(file, entry)
    # contiguous copies: entries that share their memory, as tied weights do, cannot be written otherwise
    save_file({key: value.clone().contiguous() for key, value in weights.items()}, path, metadata={"format": "pt"})
    return len(weights)


def table_of(file: str, found: Finding) -> Table:
    table = Table(title=escape(file), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    grid = "no absolute positions" if found.grid is None else f"{found.grid[0]} x {found.grid[1]}"
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
    teacher.add_argument("--limit", type=int, default=200, help="maximum number of images")
    teacher.add_argument("--image-size", type=int, default=224, help="side of the images in pixels")
    pixels = commands.add_parser("pixels", help="measure mean and standard deviation of every channel of a folder's images")
    pixels.add_argument("folder", help="folder of images, searched at any depth, or of .tar shards")
    pixels.add_argument("--in-chans", type=int, help="channels of the images (default: read as 8-bit RGB)")
    pixels.add_argument(
        "--value-range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="black and white in images of more than 8 bits"
    )
    pixels.add_argument("--list-file", help="text file naming the images, one a line")
    pixels.add_argument("--limit", type=int, help="only so many images, drawn at random (default: all)")
    extract = commands.add_parser("extract", help="write one of several sets of weights to a file of its own")
    extract.add_argument("file", help="weight file")
    extract.add_argument("entry", help="name of the set, e.g. state_dict_ema; inner ones behind a dot")
    extract.add_argument("out", help="file to write, .safetensors; it must not exist")
    add_students_options(commands.add_parser("students", help="measure small CNNs in a runtime here, and list those that fit"))
    errors = commands.add_parser("errors", help="list the codes of errors")
    errors.add_argument("word", nargs="?", default="", help="part of a code or of a message (default: all)")
    errors.add_argument("--out", metavar="FILE.md", help="write the list as a page instead")
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
    if args.command == "pixels":
        print(*pixel_lines(args.folder, args.in_chans, args.value_range, args.list_file, args.limit), sep="\n")
        return 0
    if args.command == "extract":
        print(f"{extract_entry(args.file, args.entry, args.out)} tensors of {args.entry!r} written to {args.out}")
        return 0
    if args.command == "students":
        return run_students(args)
    if args.command == "errors":
        if args.out is not None:
            print(f"{write_page(args.out)} codes written to {args.out}")
            return 0
        known = [error for error in coded_errors() if args.word in error.code or args.word in error.message]
        if not known:
            raise InvalidValueError("no-code-matches", f"no code or message has {args.word!r} in it; leave it out for all")
        print(*(f"{error.code} ({error.kind}, {error.module})\n    {error.message}" for error in known), sep="\n")
        return 0
    found = examine_teacher(args.file, args.name, args.images, args.limit, args.image_size, args.entry)
    Console().print(table_of(args.file, found))
    return int(found.health is None or found.health.looks_random)
