"""LightlyTrain on the images, the teacher and the budget of a comparison of hgkd: a rival by its own hand.

    python3 -m venv ENV && ENV/bin/pip install lightly-train safetensors
    ENV/bin/python tools/rival_lightly_train.py --data IMAGES --limit 3000 --teacher FILE --epochs 4 --out OUT
    hgkd evaluate knn linear --backbone resnet18 --checkpoint OUT/exported_models/exported_last.pt --train BANK --test TEST

It runs in an environment of its own, never in hgkd's, and imports nothing of hgkd. Method 'distillation' (version 3 of
LightlyTrain 0.18) with its defaults; --lr, --drop-blocks and --batch-size change what a careful user would search. --teacher is
a weight file of vit_small_patch14_dinov2 in timm's naming, as hgkd's recipes take it. At the end the processor seconds of this
process are printed, which is what budgets are compared by. Nothing is reported to anybody, and nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("LIGHTLY_TRAIN_EVENTS_DISABLED", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def images_below(folder: Path, limit: int | None) -> list[str]:
    """The images by name; with a limit as many of each folder, the first of every one."""
    found: dict[Path, list[str]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in (".jpg", ".jpeg", ".png"):
            found.setdefault(path.parent, []).append(str(path.resolve()))
    if limit is None:
        return [name for names in found.values() for name in names]
    each, more = divmod(limit, len(found))
    return [name for i, names in enumerate(found.values()) for name in names[: each + (i < more)]]


def official_weights(file: Path, out: Path, drop_blocks: int) -> Path:
    """The teacher under the names of DINOv2's repository, without its last blocks if wanted."""
    import torch
    from safetensors.torch import load_file

    state = load_file(str(file)) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    for block in range(depth - drop_blocks, depth):
        for name in [name for name in state if name.startswith(f"blocks.{block}.")]:
            # a block whose two branches are scaled to nothing hands its input on
            if name.endswith(("ls1.gamma", "ls2.gamma")):
                state[name] = torch.zeros_like(state[name])
    state.setdefault("mask_token", torch.zeros(1, state["cls_token"].shape[-1]))
    torch.save(state, out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="this many images, evenly of the folders")
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--drop-blocks", type=int, default=0, help="take the teacher's output so many blocks earlier")
    parser.add_argument("--model", default="timm/resnet18")
    parser.add_argument("--image-size", type=int, default=126, help="a multiple of the teacher's 14 pixels")
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, help="of the batch as it is; default: LightlyTrain's, scaled by it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    import lightly_train  # after the environment is set

    images = images_below(args.data, args.limit)
    method: dict[str, Any] = {"teacher": "dinov2/vits14-notpretrained", "teacher_args": {"num_register_tokens": 0}}
    optimiser: dict[str, Any] = {}
    if args.lr is not None:
        # its rate is for 1,536 images and scaled with the square root of the batch
        optimiser["lr"] = args.lr * (1536 / args.batch_size) ** 0.5
    with tempfile.TemporaryDirectory() as folder:
        method["teacher_weights"] = str(official_weights(args.teacher, Path(folder) / "teacher.pt", args.drop_blocks))
        lightly_train.pretrain(
            out=str(args.out),
            data=images,
            model=args.model,
            method="distillation",
            method_args=method,
            epochs=args.epochs,
            batch_size=args.batch_size,
            num_workers=0,
            devices=1,
            accelerator="cpu",
            precision="32-true",
            seed=args.seed,
            transform_args={"image_size": (args.image_size, args.image_size)},
            optim="adamw",
            optim_args=optimiser or None,
            trainer_args={"enable_progress_bar": True},
        )
    used = resource.getrusage(resource.RUSAGE_SELF)
    facts = {"images": len(images), "epochs": args.epochs, "cpu_seconds": round(used.ru_utime + used.ru_stime)}
    facts |= {"lightly_train": lightly_train.__version__, "lr": args.lr, "drop_blocks": args.drop_blocks}
    (args.out / "facts.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
