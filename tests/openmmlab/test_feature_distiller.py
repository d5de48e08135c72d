"""Distillation of detectors and segmentors: what is trained, saved and predicted, and the losses' values."""

from unittest.mock import Mock

import pytest
import torch
from downstream_runs import measure_tool, need, scope, shapes_ade20k, shapes_coco, tiny_detector, tiny_segmentor, train_tool
from refusals import refused
from tiny_runs import ROOT
from torch import nn

from hgkd.data.shapes import CLASSES
from hgkd.errors import WeightsError
from hgkd.openmmlab import FeatureDistiller
from hgkd.openmmlab.distiller import captured, hard_label_loss, inherit_head, position_distribution_loss

need("mmdet", "mmseg")
DETECTION, SEGMENTATION = ROOT / "downstream/detection", ROOT / "downstream/segmentation"
WIDTHS = [32, 48, 192, 96]  # of timm's test_resnet


def retinanet(convs=1, classes=8):
    cfg = train_tool.load_config(DETECTION / "retinanet_r18_12e_bccd.py").model
    cfg.backbone = dict(type="hgkd.TimmBackbone", name="test_resnet")
    cfg.neck.update(in_channels=WIDTHS, out_channels=16)
    cfg.bbox_head.update(in_channels=16, feat_channels=16, stacked_convs=convs, num_classes=classes)
    return cfg


def upernet(classes=3):
    cfg = train_tool.load_config(SEGMENTATION / "upernet_r18_1k_camvid.py").model
    cfg.backbone = dict(type="hgkd.TimmBackbone", name="test_resnet")
    cfg.data_preprocessor.seg_pad_val = 255
    cfg.decode_head.update(in_channels=WIDTHS, channels=16, num_classes=classes, ignore_index=255)
    cfg.auxiliary_head.update(in_channels=192, channels=8, num_classes=classes, ignore_index=255)
    return cfg


TAP = dict(student="neck", loss=dict(mask="position", ratio=0.65, alpha=2e-5))


def detector_distiller(**options):
    found = dict(student=retinanet(), teacher=retinanet(), taps=[TAP], allow_random_teacher=True)
    return FeatureDistiller(**{**found, **options})


def build(cfg):
    from mmengine.registry import MODELS

    return MODELS.build(cfg)


def detection_batch():
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    side = (64, 64)
    samples = []
    for _ in range(2):
        info = dict(img_shape=side, batch_input_shape=side, pad_shape=side, ori_shape=side, scale_factor=(1.0, 1.0))
        sample = DetDataSample(metainfo=info)
        sample.gt_instances = InstanceData(bboxes=torch.tensor([[8.0, 8, 40, 48]]), labels=torch.tensor([1]))
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
        samples.append(sample)
    return torch.randn(2, 3, *side), samples


def segmentation_batch():
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    side = (64, 64)
    samples = [SegDataSample(metainfo=dict(img_shape=side, ori_shape=side, pad_shape=side)) for _ in range(2)]
    for sample in samples:
        sample.gt_sem_seg = PixelData(data=torch.randint(0, 3, (1, *side)))
    return torch.randn(2, 3, *side), samples


def test_teacher_is_outside_of_everything():
    with scope("mmdet"):
        model = detector_distiller()
    assert {name.partition(".")[0] for name in model.state_dict()} == {"student", "generators"}
    parts = {name.partition(".")[0] for name, _ in model.named_modules()}
    assert parts == {"", "data_preprocessor", "student", "generators"}
    assert not {id(p) for p in model.teacher.parameters()} & {id(p) for p in model.parameters()}
    model.train()
    assert not any(m.training for m in model.teacher.modules())
    assert not any(p.requires_grad for p in model.teacher.parameters())
    model.to("meta")
    assert next(model.teacher.parameters()).is_meta


def test_student_predicts_as_if_alone():
    with scope("mmdet"):
        model = detector_distiller().eval()
        alone = build(retinanet())
        alone.load_state_dict(model.student.state_dict())
        images, samples = detection_batch()
        ours = model(images, [s.clone() for s in samples], mode="predict")
        theirs = alone.eval()(images, [s.clone() for s in samples], mode="predict")
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.pred_instances.bboxes, b.pred_instances.bboxes)
        assert torch.equal(a.pred_instances.scores, b.pred_instances.scores)


def test_mmdets_hooks_reach_the_student():
    from mmdet.engine.hooks import SetEpochInfoHook, YOLOXModeSwitchHook

    model = detector_distiller()
    runner = Mock(model=model, epoch=1, max_epochs=2)
    YOLOXModeSwitchHook(num_last_epochs=1).before_train_epoch(runner)
    assert model.student.bbox_head.use_l1
    model.student.set_epoch = Mock()
    SetEpochInfoHook().before_train_epoch(runner)
    model.student.set_epoch.assert_called_once_with(1)


def test_gradient_reaches_the_student_alone():
    with scope("mmdet"):
        model = detector_distiller().train()
        before = {k: v.clone() for k, v in model.teacher.state_dict().items()}
        losses = model(*detection_batch(), mode="loss")
    assert {name for name in losses if name.startswith("mgd")} == {f"mgd_0_{level}_loss" for level in range(5)}
    sum(value for name, value in losses.items() if name.startswith("mgd")).backward()
    assert model.student.backbone.network.conv1[0].weight.grad.abs().sum() > 0
    assert model.student.bbox_head.retina_cls.weight.grad is None  # MGD alone: heads learn nothing from it
    assert all(p.grad.abs().sum() > 0 for p in model.generators["0_0"].parameters())
    assert all(p.grad is None for p in model.teacher.parameters())
    assert all(torch.equal(v, model.teacher.state_dict()[k]) for k, v in before.items())


def test_mgd_terms_are_the_published_sum():
    loss = dict(mask="position", ratio=0.0, alpha=2e-5)
    with scope("mmdet"), torch.no_grad():
        model = detector_distiller(taps=[dict(student="neck", levels=(-1,), loss=loss)]).eval()
        images, samples = detection_batch()
        losses = model(images, samples, mode="loss")
        ours, theirs = model.student.extract_feat(images)[-1], model.teacher.extract_feat(images)[-1]
        restored = model.generators["0_0"].generation(ours)
    expected = 2e-5 * (restored - theirs).square().sum() / 2
    assert losses["mgd_0_0_loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_mean_is_over_the_values_of_all_maps_of_a_tap():
    """A map of one position must not count as much as one of hundreds."""
    loss = dict(mask="position", ratio=0.0, alpha=1.0, reduction="mean")
    with scope("mmdet"), torch.no_grad():
        model = detector_distiller(taps=[dict(student="neck", loss=loss)]).eval()
        images, samples = detection_batch()
        losses = model(images, samples, mode="loss")
        pairs = zip(model.student.extract_feat(images), model.teacher.extract_feat(images), strict=True)
        squares = [
            (model.generators[f"0_{level}"].generation(ours) - theirs).square() for level, (ours, theirs) in enumerate(pairs)
        ]
    values = sum(square.numel() for square in squares)
    for level, square in enumerate(squares):
        assert losses[f"mgd_0_{level}_loss"].item() == pytest.approx(square.sum().item() / values, rel=1e-5)
    assert squares[0].numel() / values > 0.7


def test_channels_are_found_by_a_dry_run():
    student = retinanet()
    student.neck.out_channels = 8
    student.bbox_head.update(in_channels=8, feat_channels=8)
    with scope("mmdet"):
        model = detector_distiller(student=student)
    assert model.generators["0_0"].align.weight.shape == (16, 8, 1, 1)


def test_head_starts_as_the_teachers_where_shapes_agree():
    with scope("mmdet"):
        model = detector_distiller(student=retinanet(classes=3))
        model.init_weights()
    ours, theirs = model.student.state_dict(), model.teacher.state_dict()
    for name in ours:
        if name.startswith(("neck.", "bbox_head.retina_reg", "bbox_head.cls_convs")):
            assert torch.equal(ours[name], theirs[name]), name
    assert not torch.equal(ours["backbone.conv1.0.weight"], theirs["backbone.conv1.0.weight"])
    copied, left = inherit_head(model.student, model.teacher)
    assert set(left) == {"bbox_head.retina_cls.weight", "bbox_head.retina_cls.bias"}
    assert "neck.lateral_convs.0.conv.weight" in copied


def test_without_inheritance_the_head_is_the_students_own():
    with scope("mmdet"):
        model = detector_distiller(inherit=False)
        model.init_weights()
    name = "bbox_head.retina_reg.weight"
    assert not torch.equal(model.student.state_dict()[name], model.teacher.state_dict()[name])


def test_teacher_weights_load_strictly(tmp_path):
    file = str(tmp_path / "teacher.pth")
    with scope("mmdet"):
        teacher = build(retinanet())
        torch.save({"state_dict": teacher.state_dict()}, file)
        model = detector_distiller(allow_random_teacher=False, teacher_checkpoint=file)
        assert all(torch.equal(v, model.teacher.state_dict()[k]) for k, v in teacher.state_dict().items())
        with refused(ValueError, "weights-do-not-fit", "RetinaNet"):
            detector_distiller(teacher=retinanet(convs=2), allow_random_teacher=False, teacher_checkpoint=file)


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        (dict(allow_random_teacher=False), ("teacher-without-weights", "--cfg-options", "teacher_checkpoint=FILE")),
        (dict(taps=[]), ("taps-missing",)),
        (dict(taps=[dict(student="nekc")]), ("tap-module-missing", "RetinaNet", "nekc", "neck")),
        (dict(taps=[dict(student="neck", levels=(5,))]), ("tap-level-out-of-range", "5")),
        (dict(taps=[dict(student="backbone", teacher="neck", levels=(0,))]), ("tap-map-sizes-differ",)),
        (dict(taps=[dict(student="backbone", teacher="neck")]), ("tap-map-counts-differ", "4", "5")),
        (dict(hard_label=True), ("segmentor-head-needed", "conv_seg", "RetinaNet")),
    ],
)
def test_refusals(options, refusal):
    with scope("mmdet"), refused(ValueError, *refusal):
        detector_distiller(**options)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_teacher_whose_first_outputs_are_not_finite_is_named(mixed):
    with scope("mmdet"):
        model = detector_distiller()
    images, samples = detection_batch()
    norm = next(part for part in model.teacher.backbone.modules() if isinstance(part, nn.BatchNorm2d))
    norm.bias.data.fill_(3e38)  # finite, as weights must be; what it gives is not
    norm.weight.data.fill_(3e38)
    remedy = "in bfloat16 on the first images; train without --amp" if mixed else "in float32 on .*; take another checkpoint"
    message = f"the teacher without weights: the teacher's backbone.*gives (inf|NaN) {remedy}"
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        with pytest.raises(WeightsError, match=message):
            model(images, samples, mode="loss")
        model(images * float("nan"), samples, mode="loss")  # the images' fault, not the teacher's


def test_other_preprocessing_is_refused():
    teacher = retinanet()
    teacher.data_preprocessor.update(bgr_to_rgb=False)
    with scope("mmdet"), refused(ValueError, "preprocessing-differs", "data_preprocessor.bgr_to_rgb", "True", "False"):
        detector_distiller(teacher=teacher)
    teacher = retinanet()
    teacher.data_preprocessor.update(mean=tuple(teacher.data_preprocessor.mean), rgb_to_bgr=False)  # as where it is left out
    teacher.data_preprocessor.std = [int(value) if value == int(value) else value for value in teacher.data_preprocessor.std]
    with scope("mmdet"):
        detector_distiller(teacher=teacher)


def test_hooks_are_removed_even_after_an_error():
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    with refused(ValueError, "tap-module-missing", "1"), captured(model, ["0", "1"]):
        pass
    assert not model[0]._forward_hooks
    with captured(model, ["0"]) as seen:
        model(torch.zeros(1, 3, 2, 2))
        model(torch.zeros(1, 3, 4, 4))
    assert [m.shape[-1] for m in seen["0"]] == [2, 4]
    assert not model[0]._forward_hooks


# segmentors


def test_second_head_takes_half_of_the_loss():
    with scope("mmseg"):
        model = FeatureDistiller(upernet(), upernet(), hard_label=True, allow_random_teacher=True).eval()
        batch = segmentation_batch()
        losses = model(*batch, mode="loss")
        plain = model.student(*batch, mode="loss")
        with torch.no_grad(), captured(model.student, ["decode_head.conv_seg"]) as seen:
            model.student(batch[0], mode="tensor")
            logits = model.second_head(seen["decode_head.conv_seg"][0])
            labels = model.teacher(batch[0], mode="tensor").argmax(1)
    assert {name.partition(".")[0] for name in model.state_dict()} == {"student", "second_head"}
    for name, value in plain.items():
        if "loss" in name:
            assert losses[name].item() == pytest.approx(value.item() / 2, rel=1e-5)
    expected = nn.functional.cross_entropy(logits, labels) / 2
    assert losses["hard_label_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    losses["hard_label_loss"].backward()
    assert model.second_head.weight.grad.abs().sum() > 0
    assert model.student.backbone.network.conv1[0].weight.grad.abs().sum() > 0


def test_other_numbers_of_classes_are_refused():
    with scope("mmseg"), refused(ValueError, "classes-differ-from-teacher", "4", "3"):
        FeatureDistiller(upernet(3), upernet(4), logits=3.0, allow_random_teacher=True)


def test_logits_and_last_map():
    tap = dict(student="backbone", levels=(-1,), loss=dict(mask="position", ratio=0.75, alpha=2e-5))
    with scope("mmseg"), torch.no_grad():
        model = FeatureDistiller(upernet(), upernet(), taps=[tap], logits=3.0, allow_random_teacher=True).eval()
        images, samples = segmentation_batch()
        losses = model(images, samples, mode="loss")
        ours, theirs = model.student(images, mode="tensor"), model.teacher(images, mode="tensor")
    assert losses["logits_loss"].item() == pytest.approx(3 * position_distribution_loss(ours, theirs).item(), rel=1e-4)
    assert "mgd_0_0_loss" in losses


def test_place_distribution_loss_by_hand():
    # one image, one class, two positions, T = 1: KL((p, 1 - p) || (1/2, 1/2))
    teacher = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    p = torch.softmax(torch.tensor([1.0, 0.0]), 0)
    expected = (p * (p / 0.5).log()).sum().item()
    assert position_distribution_loss(torch.zeros(1, 1, 1, 2), teacher, temperature=1.0).item() == pytest.approx(expected)
    assert position_distribution_loss(teacher + 5, teacher).item() == pytest.approx(0.0, abs=1e-6)
    # summed over positions, averaged over images and classes, times the squared temperature
    a, b = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    log_a, log_b = (torch.log_softmax(x.view(-1, 20) / 4, 1) for x in (a, b))
    reference = (log_b.exp() * (log_b - log_a)).sum() * 16 / 6
    assert position_distribution_loss(a, b).item() == pytest.approx(reference.item(), rel=1e-5)


def test_hard_label_loss_by_hand():
    teacher = torch.tensor([[2.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2)  # classes 0 and 1
    logits = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).view(1, 2, 1, 2)
    expected = ((1 + torch.tensor(1.0).exp()).log() - 1 + torch.tensor(2.0).log()) / 2
    assert hard_label_loss(logits, teacher).item() == pytest.approx(expected.item())
    assert hard_label_loss(torch.zeros(1, 2, 2, 4), teacher).item() == pytest.approx(torch.tensor(2.0).log().item())


# whole runs


def cfg_of(model, options):
    cfg = train_tool.load_config(DETECTION / "mgd_retinanet_r50_r18_12e_bccd.py", options=options)
    cfg.model = model
    if "teacher_checkpoint" in model:
        cfg.model.teacher_checkpoint = None
    return cfg


def test_run_of_a_detector(tmp_path):
    root = shapes_coco(tmp_path / "data")
    options = tiny_detector(root, teacher_checkpoint=str(tmp_path / "teacher.pth"))
    cfg = train_tool.load_config(DETECTION / "mgd_retinanet_r50_r18_12e_bccd.py", options=options)
    cfg.model.student, cfg.model.teacher = retinanet(), retinanet()  # update() would merge
    cfg.custom_hooks = [*cfg.get("custom_hooks", []), dict(type="EMAHook", momentum=0.1)]  # checkpoints hold the average
    with scope("mmdet"):
        torch.save({"state_dict": build(retinanet()).state_dict()}, tmp_path / "teacher.pth")
    runner = train_tool.train(cfg, tmp_path / "run")
    saved = torch.load(tmp_path / "run/epoch_1.pth", weights_only=False)["state_dict"]
    assert {name.partition(".")[0] for name in saved} == {"student", "generators"}
    alone = torch.load(tmp_path / "run/student.pth", weights_only=True)["state_dict"]
    assert alone.keys() == runner.model.student.state_dict().keys()
    assert all(torch.equal(value, saved[f"student.{name}"]) for name, value in alone.items())
    assert not all(torch.equal(alone[name], value) for name, value in runner.model.student.state_dict().items())

    # the student is measured alone: by the distillation's config without its teacher, or by its own config
    options.pop("teacher_checkpoint")
    measured = [
        measure_tool.run_test(described, tmp_path / "run/epoch_1.pth")
        for described in (cfg_of(cfg.model, options), cfg_of(cfg.model.student, options))
    ]
    assert measured[0] == measured[1]


def test_run_of_a_segmentor(tmp_path):
    root = shapes_ade20k(tmp_path / "data")
    options = tiny_segmentor(root, model="model.student")
    cfg = train_tool.load_config(SEGMENTATION / "g2sd_upernet_r50_r18_1k_camvid.py", options=options)
    cfg.model.student, cfg.model.teacher = upernet(len(CLASSES)), upernet(len(CLASSES))  # update() would merge
    cfg.model.allow_random_teacher = True
    runner = train_tool.train(cfg, tmp_path / "run")
    alone = torch.load(tmp_path / "run/student.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(alone[name], value) for name, value in runner.model.student.state_dict().items())
