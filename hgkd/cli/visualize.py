"""Pictures of what a backbone has learnt, as PNG and on one HTML page.

    hgkd visualize pca            --backbone B --images PATH ... --out DIR [--level -2 -1]
    hgkd visualize attention      --backbone B --images PATH ... --out DIR [--level -1]
    hgkd visualize cam            --checkpoint FILE --images PATH ... --out DIR [--class NAME]
    hgkd visualize neighbours     --backbone B --images PATH ... --out DIR --bank FOLDER [--k 5]
    hgkd visualize reconstruction --checkpoint FILE --images PATH ... --out DIR [--mask-ratio 0.6]
    hgkd visualize predictions    --config FILE --checkpoint FILE --images PATH ... --out DIR

A backbone is what hgkd evaluate takes: a checkpoint, an export, a MAE file, a timm name; cam takes a fine-tuned classifier.
Images are files or folders. DIR/<name>.png is written, and DIR/pictures.html shows all pictures of DIR, so several calls fill
one page.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from mmengine.device import get_device
from torch import Tensor

from hgkd.cli.common import command, command_parser, device_name
from hgkd.config.options import OptionsAction
from hgkd.config.reading import read_config
from hgkd.data.folders import printable
from hgkd.data.images import read_crops
from hgkd.errors import InvalidValueError
from hgkd.evaluation import FeatureExtractor, extract, load_extractor
from hgkd.networks.classifier import load_classifier
from hgkd.pictures.features import attention_columns, class_columns, neighbour_columns, pca_columns
from hgkd.pictures.files import PAGE, ImageFiles, find_files, save_picture, write_page
from hgkd.pictures.reconstruction import load_reconstructor, reconstruction_columns
from hgkd.pixels import to_unit_range


def pca(args: argparse.Namespace) -> Path:
    extractor = _extractor(args)
    files = _files(args, extractor.reads_channels)
    columns = pca_columns(extractor, _images(files, args.image_size, args, extractor.reads_channels), args.level)
    caption = f"{_who(args)}: main directions of the features as colours; {_which(files)}"
    return save_picture(columns, args.out, args.name, caption)


def attention(args: argparse.Namespace) -> Path:
    extractor = _extractor(args)
    files = _files(args, extractor.reads_channels)
    columns = attention_columns(extractor, _images(files, args.image_size, args, extractor.reads_channels), args.level)
    return save_picture(columns, args.out, args.name, f"{_who(args)}: {extractor.attention_name}; {_which(files)}")


def cam(args: argparse.Namespace) -> Path:
    classifier = load_classifier(args.checkpoint).to(args.device)
    in_chans = None if classifier.in_chans == 3 else classifier.in_chans
    files, size = _files(args, in_chans), args.image_size or classifier.spec.image_size
    columns, names = class_columns(classifier, _images(files, size, args, in_chans), args.class_name)
    caption = f"{args.checkpoint}: Grad-CAM of {', '.join(dict.fromkeys(names))}; {_which(files)}"
    for file, name in zip(files, names, strict=True):
        print(printable(f"{file}: {name}"))
    return save_picture(columns, args.out, args.name, caption)


def neighbours(args: argparse.Namespace) -> Path:
    extractor = _extractor(args)
    in_chans = extractor.reads_channels
    files, bank = _files(args, in_chans), find_files([args.bank], arrays=in_chans is not None)
    known, asked = (
        extract(
            extractor, ImageFiles(part, args.image_size, args.value_range, in_chans), args.batch_size, args.workers, args.device
        )
        for part in (bank, files)
    )
    columns, found = neighbour_columns(
        asked, files, known, bank, args.image_size, args.k, value_range=args.value_range, in_chans=in_chans
    )
    for file, row in zip(files, found, strict=True):
        print(printable(f"{file}: " + ", ".join(f"{path} ({cosine:.2f})" for path, cosine in row)))
    caption = f"{_who(args)}: nearest of {len(bank)} images in {args.bank}, nearest first; {_which(files)}"
    return save_picture(columns, args.out, args.name, caption)


def reconstruction(args: argparse.Namespace) -> Path:
    model = load_reconstructor(args.checkpoint)
    in_chans = None if model.in_chans == 3 else model.in_chans
    files = _files(args, in_chans)
    inputs = read_crops(files, args.image_size or model.image_size, args.value_range, in_chans)
    columns, ratio = reconstruction_columns(model, inputs, args.mask_ratio, args.seed)
    caption = (
        f"{args.checkpoint}: {ratio:.0%} hidden; colours and contrast of hidden positions are given where the model was "
        f"trained on standardised pixels; {_which(files)}"
    )
    return save_picture(columns, args.out, args.name, caption)


def predictions(args: argparse.Namespace) -> Path:
    try:
        from hgkd.openmmlab.drawing import draw_predictions
    except ImportError as error:
        raise InvalidValueError(
            "downstream-packages-missing",
            f"predictions of detectors and segmentors need the extra 'downstream' ({error}): pip install 'hgkd[downstream]'",
        ) from error
    files = find_files(args.images, args.limit)
    draw_predictions(args.config, args.checkpoint, files, args.out, options=args.cfg_options, device=args.device)
    return write_page(args.out)


def _extractor(args: argparse.Namespace) -> FeatureExtractor:
    return load_extractor(args.backbone, args.checkpoint, pretrained=args.pretrained).to(args.device)


def _files(args: argparse.Namespace, in_chans: int | None) -> list[Path]:
    return find_files(args.images, args.limit, arrays=in_chans is not None)


def _images(files: Sequence[Path], image_size: int | Sequence[int], args: argparse.Namespace, in_chans: int | None) -> Tensor:
    return to_unit_range(read_crops(files, image_size, args.value_range, in_chans).to(args.device))


def _who(args: argparse.Namespace) -> str:
    return f"{args.backbone} ({args.checkpoint})" if args.checkpoint else str(args.backbone)


def _which(files: Sequence[Path]) -> str:
    return "rows: " + ", ".join(file.name for file in files)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(draw: Callable[[argparse.Namespace], Path], text: str, backbone: bool = True) -> argparse.ArgumentParser:
        name = draw.__name__
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(draw=draw)
        sub.add_argument("--images", nargs="+", required=True, metavar="PATH", help="files, or folders searched at any depth")
        sub.add_argument("--limit", type=int, default=8, help="maximum number of images")
        sub.add_argument("--out", required=True, metavar="DIR", help=f"folder of the picture and of {PAGE}")
        if name != "predictions":
            sub.add_argument("--config", metavar="FILE", help="config whose custom_imports bring a network of your own")
            sub.add_argument("--name", default=name, help=f"the picture's name ({name})")
            sub.add_argument(
                "--value-range",
                type=float,
                nargs=2,
                metavar=("LOW", "HIGH"),
                help="black and white in images of more than 8 bits",
            )
        if backbone:
            sub.add_argument("--backbone", required=True, help="checkpoint, export folder, MAE file or timm name")
            sub.add_argument("--checkpoint", help="weight file for a timm name, loaded strictly")
            sub.add_argument("--pretrained", action="store_true", help="let timm download its weights")
            sub.add_argument("--image-size", type=int, default=224, help="pixels of the centre crop")
        if draw is not reconstruction:
            sub.add_argument("--device", type=device_name, default=get_device(), help="cpu, cuda, cuda:1, ...")
        return sub

    for draw, text in ((pca, "features as colours"), (attention, "where the network looks")):
        sub = command(draw, text)
        sub.add_argument(
            "--level",
            type=int,
            nargs="+",
            default=[None],
            help="CNN: 0 = the finest level; ViT: the block, 0 = the first; negative ones count from the end (the last)",
        )
    sub = command(cam, "which image regions speak for a classifier's prediction (Grad-CAM)", backbone=False)
    sub.add_argument("--checkpoint", required=True, help="of a fine-tuned classifier, or its work folder")
    sub.add_argument("--class", dest="class_name", metavar="NAME", help="a class (default: each image's own prediction)")
    sub.add_argument("--image-size", type=int, help="pixels of the centre crop (that of the training)")
    sub = command(neighbours, "which images are alike")
    sub.add_argument("--bank", required=True, metavar="FOLDER", help="images among which neighbours are sought")
    sub.add_argument("--k", type=int, default=5, help="neighbours of each image")
    sub.add_argument("--batch-size", type=int, default=64, help="images a forward")
    sub.add_argument("--workers", type=int, default=2, help="processes that read images")
    sub = command(reconstruction, "reconstructions of hidden positions by a masked model", backbone=False)
    sub.add_argument("--checkpoint", required=True, help="of a run with PixelReconstruction or MAEPretraining, or a MAE file")
    sub.add_argument("--mask-ratio", type=float, help="share of hidden cells (that of the training)")
    sub.add_argument("--image-size", type=int, help="pixels of the centre crop (that of the training)")
    sub.add_argument("--seed", type=int, default=0, help="of the mask")
    sub = command(predictions, "what a detector or segmentor of downstream/ predicts", backbone=False)
    sub.add_argument("--config", required=True, help="the config that trained it")
    sub.add_argument("--checkpoint", required=True, help="its checkpoint")
    sub.add_argument(
        "--cfg-options", nargs="+", action=OptionsAction, default={}, metavar="KEY=VALUE", help="as in its training"
    )
    return parser.parse_args(argv)


@command
def main(argv: Sequence[str]) -> int:
    args = parse_args(argv)
    if args.limit < 1:
        raise InvalidValueError("count-not-positive", f"--limit must be 1 or more, got {args.limit}")
    if args.draw is not predictions and args.config is not None:
        read_config(args.config)  # imports what it names
    path = args.draw(args)
    print(f"{path}, page {Path(args.out) / PAGE}")
    return 0
