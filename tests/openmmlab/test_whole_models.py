"""Whole detectors and segmentors as graphs: what they say is what mmdet and mmseg say, and what has no graph is named."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from downstream_runs import need, scope, train_tool
from PIL import Image
from refusals import refused
from tiny_runs import ROOT
from torch import nn
from torchvision.ops import box_iou

from hgkd.api.predict import predict
from hgkd.api.test import run_test
from hgkd.errors import WeightsError
from hgkd.export import ExportError, export
from hgkd.openmmlab.deployment import ExportedModel, parts, proof, writers
from hgkd.openmmlab.deployment.graphs import AnySizePool
from hgkd.openmmlab.deployment.pictures import TestPipeline, own_prediction
from hgkd.openmmlab.models import build_model

need("mmdet", "mmseg")
pytest.importorskip("onnxruntime", reason="pip install 'hgkd[export]'")
WIDTHS = [32, 48, 192, 96]  # of timm's test_resnet
TIMM = dict(type="hgkd.TimmBackbone", name="test_resnet")
NAMES = ("first", "second", "third")
SPREAD = ("conv_reg", "retina_cls", "rtm_cls", "rpn_cls", "fc_cls", "conv_cls", "conv_obj", "conv_seg", "centerness")


def recipe(path, **options):
    return train_tool.load_config(ROOT / "downstream" / path, options=options)


def retinanet():
    cfg = recipe("detection/retinanet_r18_12e_bccd.py")
    cfg.model.backbone = TIMM
    cfg.model.neck.update(in_channels=WIDTHS, out_channels=16, start_level=2, num_outs=3)
    cfg.model.bbox_head.update(in_channels=16, feat_channels=16, stacked_convs=1)
    cfg.model.bbox_head.anchor_generator.strides = [16, 32, 64]
    return cfg


def faster_rcnn():
    cfg = recipe("detection/faster-rcnn_r18_12e_bccd.py")
    cfg.model.backbone = TIMM
    cfg.model.neck.update(in_channels=WIDTHS, out_channels=16, start_level=2, num_outs=2)
    cfg.model.rpn_head.update(in_channels=16, feat_channels=16)
    cfg.model.rpn_head.anchor_generator.strides = [16, 32]
    cfg.model.roi_head.bbox_roi_extractor.update(out_channels=16, featmap_strides=[16, 32])
    cfg.model.roi_head.bbox_head.update(in_channels=16, fc_out_channels=32)
    cfg.model.test_cfg.rpn.update(nms_pre=100, max_per_img=40)
    return cfg


def rtmdet():
    cfg = recipe("detection/rtmdet_cspnext-tiny_24e_bccd.py")
    cfg.model.backbone.update(widen_factor=0.125)
    cfg.model.neck.update(in_channels=[32, 64, 128], out_channels=16)
    cfg.model.bbox_head.update(in_channels=16, feat_channels=16, stacked_convs=1)
    cfg.model.test_cfg.update(max_per_img=50)
    return cfg


def yolox():
    cfg = recipe("detection/yolox_cspdarknet-tiny_300e_coco.py")
    cfg.model.backbone.update(widen_factor=0.125)
    cfg.model.neck.update(in_channels=[32, 64, 128], out_channels=16)
    cfg.model.bbox_head.update(in_channels=16, feat_channels=16, stacked_convs=1, num_classes=3)
    return cfg


def upernet():
    cfg = recipe("segmentation/upernet_r18_1k_camvid.py")
    cfg.model.backbone = TIMM
    cfg.model.decode_head.update(in_channels=WIDTHS, channels=16)
    cfg.model.auxiliary_head.update(in_channels=192, channels=8)
    return cfg


MODELS = {build.__name__: build for build in (retinanet, faster_rcnn, rtmdet, yolox, upernet)}


def spread(layer: nn.Module, inputs: object, logits: torch.Tensor) -> torch.Tensor:
    """Once a picture has passed, logits have a spread of one."""
    scale = logits.std().clamp(min=1)  # of several levels that of the widest
    layer.weight.data /= scale
    return logits / scale


def written(folder: Path, cfg) -> Path:
    """A checkpoint of an untrained model whose scores are spread and differ from each other, and whose boxes are finite."""
    from mmengine.registry import MODELS

    torch.manual_seed(0)
    with scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and any(part in name for part in SPREAD):
            nn.init.normal_(layer.weight)
            nn.init.zeros_(layer.bias)
            layer.register_forward_hook(spread)
    smooth = nn.functional.interpolate(torch.rand(1, 3, 6, 8) * 255, (128, 160), mode="bilinear")
    with scope(cfg.default_scope):
        own_prediction(model.eval(), TestPipeline.of(cfg, cfg.default_scope), smooth.byte())
    for name, layer in model.named_modules():
        if "conv_reg" in name and isinstance(
            layer, nn.Conv2d
        ):  # YOLOX's sides are exponentials, and boxes of thousands of pixels hide what a pixel is
            layer.weight.data /= 4
    kept = {key: cfg[key].to_dict() for key in ("model", "test_dataloader")} | {"default_scope": cfg.default_scope}
    text = "".join(f"{key} = {value!r}\n" for key, value in kept.items())
    meta = {"cfg": text, "dataset_meta": {"classes": cfg.test_dataloader.dataset.get("metainfo", {}).get("classes", NAMES)}}
    torch.save({"meta": meta, "state_dict": model.state_dict()}, folder / "model.pth")
    return folder / "model.pth"


def draw(folder: Path, sizes) -> Path:
    folder.mkdir()
    for number, size in enumerate(sizes):
        smooth = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(smooth).resize(size[::-1]).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("whole") / "pictures", ((120, 160), (96, 128)))


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory, pictures: Path):
    """A model in a form: its checkpoint and the report. OpenVINO's is made from the very ONNX that is written once."""
    done = {}

    def find(name: str, target: str = "onnx", **options):
        key = (name, target, *options.items())
        if key in done:
            return done[key]
        if target == "onnx":
            folder = tmp_path_factory.mktemp(name)
            file = written(folder, MODELS[name]())
            done[key] = file, export(file, folder / "onnx", "onnx", part="model", images=pictures, **options)
            return done[key]
        file, first = find(name, **options)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(writers, "_write", lambda whole, file: shutil.copy(first.out / "model.onnx", file))
            report = export(file, file.parent / target, target, part="model", images=pictures, **options)
        done[key] = file, report
        return done[key]

    return find


@pytest.mark.parametrize("target", ["onnx", "openvino"])
@pytest.mark.parametrize("name", MODELS)
def test_a_graph_says_what_the_library_says_at_any_size(exports, name: str, target: str) -> None:
    _, report = exports(name, target)
    (row,) = report.table
    assert (report.images, row["pictures"]) == (2, 5)  # two of other sizes, and a black one
    assert row["mismatched"] == 0
    assert row.get("detections", row.get("pixels")) > 50
    assert report.max_difference <= 1e-3
    taken = report.signature.input
    assert (taken.dtype, taken.order, taken.range, taken.batch) == ("uint8", "RGB", (0.0, 255.0), 1)
    assert (taken.height, taken.width) == (None, None)
    card = json.loads((report.out / "run_card.json").read_text())
    files = {"onnx": {"model.onnx"}, "openvino": {"model.xml", "model.bin"}}[target]
    assert set(report.files) == set(card["files"]) == files
    assert card["signature"]["task"] == ("segmentation" if name == "upernet" else "detection")
    assert card["signature"]["classes"]


def test_the_stages_of_a_long_export_are_told(tmp_path: Path, exports, pictures: Path, monkeypatch) -> None:
    file, report = exports("retinanet")
    monkeypatch.setattr(writers.torch.export, "export", lambda *given, **options: 1 / 0)
    told: list[str] = []
    monkeypatch.setattr(writers, "print_log", lambda text, logger: told.append(text))
    with refused(ExportError, "model-not-followed"):
        export(file, tmp_path / "failed", "onnx", part="model", images=pictures)
    assert told[0] == f"1 of 3: building the model of {file} and reading 2 pictures"
    assert [text[:6] for text in told] == ["1 of 3", "2 of 3"]
    monkeypatch.setattr(writers, "_write", lambda whole, file: shutil.copy(report.out / "model.onnx", file))
    export(file, tmp_path / "written", "onnx", part="model", images=pictures)
    assert told[-1].startswith("3 of 3: comparing onnxruntime ")
    assert told[-1].endswith("with mmdet's own inference on 5 pictures")


@pytest.mark.slow
def test_of_a_fixed_size_smaller_pictures_are_filled(exports) -> None:
    reports = [exports("retinanet", target, fixed_size=(128, 192))[1] for target in ("onnx", "openvino")]
    for report in reports:
        assert (report.signature.input.height, report.signature.input.width) == (128, 192)
        assert report.table[0]["mismatched"] == 0
    run = writers.model_runner("onnx", reports[0].out / "model.onnx")
    boxes, scores, labels = run(torch.zeros(1, 3, 128, 192, dtype=torch.uint8))
    assert boxes.shape == (*scores.shape, 4)
    assert scores.shape == labels.shape
    with pytest.raises(Exception, match="INVALID_ARGUMENT"):
        run(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


@pytest.mark.slow
def test_where_nothing_is_found_there_is_no_box_and_no_proof(tmp_path: Path, pictures: Path, monkeypatch) -> None:
    cfg = faster_rcnn()
    cfg.model.test_cfg.rcnn.score_thr = 0.9999
    file = written(tmp_path, cfg)
    compare, found = writers.compare_detections, []
    monkeypatch.setattr(writers, "compare_detections", lambda *given: found.append(given[1]) or compare(*given))
    with refused(ExportError, "proof-without-detections", "3"):
        export(file, tmp_path / "onnx", "onnx", part="model", images=pictures, fixed_size=(64, 64))
    assert [tuple(part.shape) for part in found[0][0]] == [(0, 4), (0,), (0,)]
    assert not (tmp_path / "onnx").exists()


def test_the_record_says_what_comes_before_and_what_is_inside(exports) -> None:
    signature = exports("yolox")[1].signature
    taken, options = signature.input, signature.options
    assert (taken.size, taken.resize, taken.pad, taken.multiple) == ((416, 416), "square", 114 / 255, 1)
    assert [step["type"] for step in options["test_pipeline"]] == ["Resize", "Pad"]
    assert options["inside"]["thresholds"]["iou"] == 0.65
    assert options["inside"]["padding_divisor"] == 32


RESIZE, PADS = dict(type="Resize", scale=(160, 120), keep_ratio=True), dict(type="Pad", size_divisor=32)


@pytest.mark.parametrize(
    ("steps", "resize", "size"),
    [
        ([], "keep", None),
        ([RESIZE], "fit", (120, 160)),
        ([dict(RESIZE, scale=160), PADS], "fit", (160, 160)),
        ([dict(RESIZE, scale=(120, 160)), dict(type="Pad", size=(160, 120))], "pad", (120, 160)),
        ([dict(type="Resize", scale=160)], "stretch", (160, 160)),
        ([dict(type="Resize", scale_factor=0.5)], "other", None),
        ([dict(type="mmdet.FixScaleResize", scale=(160, 120), keep_ratio=True)], "other", None),
        ([RESIZE, dict(type="ResizeToMultiple", size_divisor=32)], "other", (120, 160)),
        ([dict(type="ResizeShortestEdge", scale=120, max_size=160)], "other", None),
        ([RESIZE, dict(type="Pad", size=(320, 320))], "other", (320, 320)),
        ([dict(type="Pad", size=(320, 320))], "other", (320, 320)),
        ([PADS, RESIZE], "other", (120, 160)),
        ([RESIZE, dict(PADS, padding_mode="reflect")], "other", (120, 160)),
    ],
)
def test_steps_that_prediction_would_not_repeat_are_not_recorded_as_if_it_did(steps: list, resize: str, size) -> None:
    pipeline = TestPipeline([{"type": "LoadImageFromFile"}, *steps, {"type": "PackDetInputs"}], "mmdet")
    assert (pipeline.resize(fixed=False), pipeline.size) == (resize, size)
    assert (resize == "other") == bool(pipeline.unrepeated)


def test_in_the_place_of_the_model_a_graph_gives_boxes_of_the_original_picture(exports, pictures: Path) -> None:
    from mmengine.dataset import Compose

    file, report = exports("retinanet")
    cfg = retinanet()
    classes = cfg.test_dataloader.dataset.metainfo.classes
    graph = ExportedModel(report.out, cfg, classes)
    with scope("mmdet"):
        model = build_model(cfg.model, "mmdet", torch.load(file)["state_dict"], str(file))
        steps = [step for step in cfg.test_dataloader.dataset.pipeline if step.type != "LoadAnnotations"]
        steps[1].scale = (100, 80)  # so that the picture's own pixels are others
        data = Compose(steps)({"img_path": str(pictures / "0.png"), "img_id": 0})
        batch = {"inputs": [data["inputs"]], "data_samples": [data["data_samples"]]}
        own, found = (each.test_step(copy.deepcopy(batch))[0].pred_instances for each in (model, graph))
    assert found.bboxes.max() > 100
    sides = [[tuple(part[key] for key in ("bboxes", "scores", "labels"))] for part in (own, found)]
    assert proof.compare_detections(*sides, "onnxruntime").mismatched == 0
    with refused(ValueError, "exported-model-of-another-task", "RBC", "cell"):
        ExportedModel(report.out, cfg, ("cell",))


@pytest.mark.parametrize(("name", "resize"), [("retinanet", "fit"), ("upernet", "fit")])
def test_hgkd_predict_finds_what_the_pipeline_of_the_test_finds(tmp_path: Path, exports, name: str, resize: str) -> None:
    """On the same picture, lying and standing; OpenCV's rounding of resized pixels differs by a level or two."""
    from mmengine.dataset import Compose

    report, cfg = exports(name)[1], MODELS[name]()
    assert report.signature.input.resize == resize
    pictures = draw(tmp_path / "pictures", ((240, 320), (300, 200)))
    predict(report.out, pictures, tmp_path / "out", score_threshold=0, pictures=False)
    lines = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    with scope(cfg.default_scope):
        graph = ExportedModel(report.out, cfg, report.signature.classes)
        pipeline = Compose([step for step in cfg.test_dataloader.dataset.pipeline if step.type != "LoadAnnotations"])
        for line in lines:
            data = pipeline({"img_path": line["image"], "img_id": 0})
            found = graph.test_step({"inputs": [data["inputs"]], "data_samples": [data["data_samples"]]})[0]
            if name == "upernet":
                labels = np.asarray(Image.open(tmp_path / "out" / line["label_map"]))
                assert (labels == found.pred_sem_seg.data[0].numpy()).mean() > 0.97
                continue
            own = found.pred_instances
            boxes, labels = (torch.tensor([one[key] for one in line["objects"]]) for key in ("box", "class"))
            assert len(own) > 5
            overlap = box_iou(own.bboxes, boxes) * (own.labels[:, None] == labels)
            assert (overlap.amax(1) > 0.9).float().mean() > 0.9


def test_hgkd_test_measures_a_graph_by_the_evaluator_of_its_config(tmp_path: Path, exports, pictures: Path) -> None:
    (file, report), (_, ir) = exports("upernet"), exports("upernet", "openvino")
    (tmp_path / "data/annotations").mkdir(parents=True)
    shutil.copytree(pictures, tmp_path / "data/images/test")
    (tmp_path / "data/annotations/test").mkdir()
    for picture in (tmp_path / "data/images/test").iterdir():
        side = Image.open(picture).size[::-1]
        Image.fromarray(np.random.default_rng(1).integers(0, 11, side, dtype=np.uint8)).save(
            tmp_path / "data/annotations/test" / picture.name
        )
    cfg = upernet()
    cfg.test_dataloader.dataset.pipeline.pop(1)  # at their own size, where logits are enlarged once
    cfg.test_dataloader.dataset.img_suffix = ".png"
    cfg.dump(tmp_path / "upernet.py")
    options = {"data_root": str(tmp_path / "data")}
    own, *found = (run_test(tmp_path / "upernet.py", tested, options=options) for tested in (file, report.out, ir.out))
    assert own["mIoU"] > 0
    assert found == [own, own]
    (report.out / "model.onnx").write_bytes((report.out / "model.onnx").read_bytes() + b" ")
    with refused(WeightsError, "export-file-changed", "model.onnx"):
        run_test(tmp_path / "upernet.py", report.out, options=options)


REFUSED = [
    ("detection/mask-rcnn_r18_1x_coco.py", {}, "FCNMaskHead"),
    ("detection/rtmdet-ins_cspnext-tiny_300e_coco.py", {}, "RTMDetInsSepBNHead"),
    ("detection/retinanet_r18_12e_bccd.py", {"model.test_cfg.nms.type": "soft_nms"}, "RetinaHead"),
    ("segmentation/upernet_r18_1k_camvid.py", {"model.test_cfg.mode": "slide"}, "EncoderDecoder"),
]
# heads that fit in by their methods: one multiplies its scores by an IoU, the other fails in mmdet's own inference
HEADS = {
    "DDODHead": dict(
        in_channels=16,
        feat_channels=32,
        stacked_convs=1,
        use_dcn=False,
        anchor_generator=dict(
            type="AnchorGenerator", ratios=[1.0], octave_base_scale=8, scales_per_octave=1, strides=[16, 32, 64]
        ),
    ),
    "SSDHead": dict(
        in_channels=(16, 16, 16),
        anchor_generator=dict(
            type="SSDAnchorGenerator",
            scale_major=False,
            min_sizes=[16, 32, 64],
            max_sizes=[32, 64, 128],
            ratios=[[2], [2, 3], [2]],
            strides=[16, 32, 64],
        ),
    ),
}


@pytest.mark.parametrize(("path", "options", "name"), REFUSED)
def test_a_part_without_graph_is_refused_by_name(path: str, options: dict, name: str) -> None:
    from mmengine.registry import MODELS

    cfg = recipe(path, **options)
    with scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
        check = parts.detector_parts if cfg.default_scope == "mmdet" else parts.segmentor_parts
        with refused(ValueError, "model-part-without-graph", name):
            check(model, cfg.test_dataloader.dataset.pipeline)


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_whose_maps_are_no_scores_and_boxes_is_refused_by_name(kind: str) -> None:
    from mmengine.registry import MODELS

    cfg = retinanet()
    cfg.model.update(type="SingleStageDetector", train_cfg=None)
    cfg.model.bbox_head = dict(type=kind, num_classes=3, **HEADS[kind])
    with scope("mmdet"):
        model = MODELS.build(cfg.model).eval()
        with refused(ValueError, "model-part-without-graph", kind):
            parts.detector_parts(model, cfg.test_dataloader.dataset.pipeline)


def test_what_is_missing_for_a_graph_is_said_before(tmp_path: Path, pictures: Path) -> None:
    file = written(tmp_path, retinanet())
    go = {"to": "onnx", "part": "model"}
    with refused(ValueError, "model-graph-without-images", "mmdet"):
        export(file, tmp_path / "out", **go)
    with refused(ValueError, "fixed-size", "[0, 64]"):
        export(file, tmp_path / "out", **go, images=pictures, fixed_size=(0, 64))
    with refused(ValueError, "target-option-unknown", "precision", "fixed_size"):
        export(file, tmp_path / "out", **go, images=pictures, precision=["fp16"])
    with refused(ValueError, "preprocessing-of-model"):
        export(file, tmp_path / "out", **go, images=pictures, preprocessing="nhwc")
    content = torch.load(file)
    torch.save({**content, "meta": {"cfg": "default_scope = 'mmdet'\n"}}, file)
    with refused(ValueError, "model-not-of-a-library", file):
        export(file, tmp_path / "out", **go, images=pictures)
    assert not (tmp_path / "out").exists()


def box(*sides: float, score: float = 0.9, label: int = 1):
    return torch.tensor([sides]), torch.tensor([score]), torch.tensor([label])


@pytest.mark.parametrize(
    ("found", "count"),
    [
        (box(0, 0, 10, 10.01), 0),
        (box(0, 0, 10, 10.2), 2),
        (box(0, 0, 10, 10, score=0.88), 2),
        (box(0, 0, 10, 10, label=2), 2),
        (tuple(torch.cat([part, part]) for part in box(0, 0, 10, 10)), 1),
    ],
)
def test_detections_without_a_partner_are_counted(found, count: int) -> None:
    many = [box(0, 0, 10, 10)] * 300
    agreement = proof.compare_detections(many, [found, *many[1:]], "onnxruntime")
    assert (agreement.things, agreement.mismatched) == (300, count)
    if count:
        with refused(ExportError, "detections-differ", count):
            proof.compare_detections(many[:1], [found], "onnxruntime")


def test_not_a_number_is_no_agreement() -> None:
    with refused(ExportError, "export-outputs-not-finite", "onnxruntime"):
        proof.compare_detections([box(0, 0, 1, 1)], [box(0, 0, 1, float("nan"))], "onnxruntime")
    logits = torch.tensor([[[float("nan"), 1.0]], [[0.0, 0.0]]])
    with refused(ExportError, "export-outputs-not-finite"):
        proof.compare_label_maps([(logits.argmax(0)[None], logits)], [logits.argmax(0)[None]], "onnxruntime")


def test_a_pixel_may_differ_where_the_logits_tie() -> None:
    logits = torch.tensor([[[1.0, 1.0]], [[1.0005, 0.5]]])
    own = logits.argmax(0)[None]
    agreement = proof.compare_label_maps([(own, logits)], [torch.tensor([[[0, 0]]])], "onnxruntime")
    assert (agreement.things, agreement.mismatched) == (2, 1)
    with refused(ExportError, "label-maps-differ", 1, 2):
        proof.compare_label_maps([(own, logits)], [torch.tensor([[[1, 1]]])], "onnxruntime")


def test_bins_of_a_pool_are_those_of_torch() -> None:
    for sides, bins in (((7, 5), (3, 2)), ((4, 9), (6, 6)), ((1, 1), (2, 3))):
        x = torch.randn(2, 3, *sides, dtype=torch.float64)
        torch.testing.assert_close(AnySizePool(bins)(x), nn.AdaptiveAvgPool2d(bins)(x))
