"""Writes the files beside it. It ran once, at commit 2edb054; run it anew and they are no longer files of that version.

The networks were trained for a step or two by the shipped recipes, so that every entry of a file is the runner's own.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from downstream_runs import shapes_coco, tiny_detector  # noqa: E402
from hgkd.engine.checkpoints import seal  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from test_golden import CLASSIFIER, ENCODER, HGKD_OPTIONS, LOADERS, detector, outputs_of  # noqa: E402
from tiny_runs import HGKD, ROOT, tiny, write_images  # noqa: E402

from hgkd.api import train as train_tool  # noqa: E402
from hgkd.export import export, load_backbone  # noqa: E402
from hgkd.sparse import save_sparse, sparsify  # noqa: E402
from hgkd.teachers.mae import save_mae  # noqa: E402

VIT = {"embed_dim": 16, "depth": 2, "num_heads": 2, "decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}


def copy(checkpoint: Path, name: str, optimizer: bool = False) -> None:
    content = torch.load(checkpoint, weights_only=False)
    if not optimizer:
        content.pop("optimizer")
    torch.save(content, HERE / name)
    seal(HERE / name)


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        images = write_images(work / "images")
        once = {"epochs": 1, "warmup_epochs": 0, "val_train_root": None, "val_test_root": None}

        options = {**tiny(images), **HGKD_OPTIONS, **once, "teacher_features": str(work / "features")}
        train_tool.train(HGKD, work / "unet", options={**options, "epochs": 2, "warmup_epochs": 1})
        copy(work / "unet/epoch_1.pth", "unet_student.pth", optimizer=True)

        small = tiny(images, **once)
        small.pop("student")
        cnn = small.pop("model.student.decoder_width")
        assert cnn
        vit = {"_delete_": True, "type": "MaskedViT", "arch": VIT, "patch_size": 8, "cell": 16}
        train_tool.train(ROOT / "configs/spark/spark_resnet18_shapes.py", work / "vit", options={**small, "model.student": vit})
        copy(work / "vit/epoch_1.pth", "vit_student.pth")

        runner = train_tool.train(ROOT / "configs/mae/mae_tiny_shapes.py", work / "mae", options={**small, "model.arch": VIT})
        copy(work / "mae/epoch_1.pth", "mae.pth")
        pixels = {"mean": runner.model.mean.flatten().tolist(), "deviation": runner.model.deviation.flatten().tolist()}
        save_mae(runner.model.network, HERE / "mae.safetensors", {**pixels, "norm_pix": False})

        options = {"data_root": str(images), "val_root": str(images), "num_classes": 2, "image_size": 64, "batch_size": 8}
        options |= {"student": CLASSIFIER["name"], "model.classifier.two_heads": True, "workers": 0}
        options |= {f"model.classifier.{key}": value for key, value in CLASSIFIER["kwargs"].items()}
        options |= {
            f"model.teacher.{key}": value
            for key, value in {"name": "test_resnet", "allow_random": True, "num_classes": 2}.items()
        }
        recipe = ROOT / "downstream/classification/resnet18_g2sd_10e_cifar128.py"
        train_tool.train(recipe, work / "classifier", options={**options, "epochs": 1, "warmup_epochs": 0})
        copy(work / "classifier/epoch_1.pth", "classifier.pth")

        save_sparse(
            sparsify(load_backbone(HERE / "unet_student.pth"), 32),
            HERE / "sparse.safetensors",
            timm_model=ENCODER["name"],
            timm_kwargs={**ENCODER["kwargs"], "num_classes": 0, "global_pool": ""},
        )
        for name, file, target, what in (
            ("export_timm", "unet_student.pth", "timm", "backbone"),
            ("export_sparse", "unet_student.pth", "sparse", "backbone"),
            ("export_student", "unet_student.pth", "sparse", "student"),
            ("export_classifier", "classifier.pth", "timm", "classifier"),
        ):
            export(HERE / file, HERE / name, target, what=what, force=True)
            for card in HERE.glob(f"{name}/*card.*"):
                card.write_text(card.read_text().replace(f"{HERE}/", ""))  # no paths of the machine that wrote them

        options = {**tiny_detector(shapes_coco(work / "coco")), "model.allow_random_teacher": True}
        cfg = train_tool.load_config(ROOT / "downstream/detection/mgd_retinanet_r50_r18_12e_bccd.py", options=options)
        cfg.model.student, cfg.model.teacher = detector(), detector()  # update() would merge
        train_tool.train(cfg, work / "distilled")
        shutil.copy(work / "distilled/student.pth", HERE / "distilled_student.pth")

    outputs = {name: outputs_of(name).half().contiguous() for name in LOADERS}
    save_file(outputs, HERE / "outputs.safetensors")


if __name__ == "__main__":
    main()
