"""NMS and soft-NMS against plain loops over Python numbers (float64)."""

import math

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from hgkd.mmcv_ops.nms import nms, softnms

THRESHOLD = 0.4837  # no ratio of small integers: nothing lies on the edge


def iou(a: list[float], b: list[float], offset: int) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0]) + offset
    height = min(a[3], b[3]) - max(a[1], b[1]) + offset
    shared = max(width, 0) * max(height, 0)
    areas = sum((c[2] - c[0] + offset) * (c[3] - c[1] + offset) for c in (a, b))
    return shared / (areas - shared)


def greedy(boxes: torch.Tensor, scores: torch.Tensor, offset: int = 0) -> list[int]:
    boxes, kept = boxes.double().tolist(), []
    for i in scores.argsort(descending=True).tolist():
        if all(iou(boxes[i], boxes[j], offset) <= THRESHOLD for j in kept):
            kept.append(i)
    return kept


def soft(boxes, scores, method, offset, sigma, min_score):
    """Indices and scores in the order of taking."""
    boxes, left, taken = boxes.double().tolist(), dict(enumerate(scores.double().tolist())), []
    while left:
        best = max(left, key=left.get)
        taken.append((best, left.pop(best)))
        for i in list(left):
            overlap = iou(boxes[i], boxes[best], offset)
            if method == "gaussian":
                left[i] *= math.exp(-(overlap**2) / sigma)
            elif overlap >= THRESHOLD:
                left[i] *= 1 - overlap if method == "linear" else 0
            if left[i] < min_score:
                del left[i]
    return taken


def random_boxes(count: int, seed: int, size: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes on eighths of a pixel, so that float32 adds and subtracts them exactly, and scores that all differ."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, size * 8, (count, 2), generator=generator)
    sides = torch.randint(8, size * 4, (count, 2), generator=generator)
    scores = (torch.randperm(count, generator=generator) + 1) / (count + 1)
    return torch.cat([corners, corners + sides], 1) / 8, scores


@settings(max_examples=60, deadline=None)
@given(count=st.integers(0, 30), seed=st.integers(0, 10_000), offset=st.sampled_from([0, 1]))
def test_nms(count, seed, offset):
    boxes, scores = random_boxes(count, seed)
    assert nms(boxes, scores, iou_threshold=THRESHOLD, offset=offset).tolist() == greedy(boxes, scores, offset)


def test_offset_by_hand():
    # 10 x 10 and its half: IoU 1/2 as points, (11 * 6) / 121 = 0.545 with the last pixel counted
    boxes, scores = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 5.0]]), torch.tensor([0.9, 0.8])
    assert nms(boxes, scores, iou_threshold=0.52, offset=0).tolist() == [0, 1]
    assert nms(boxes, scores, iou_threshold=0.52, offset=1).tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_nms_of_other_number_formats(ops, dtype):
    boxes = torch.tensor([[0, 0, 8, 8], [0, 0, 8, 7], [16, 16, 24, 24]], dtype=dtype)
    dets, kept = ops.nms(boxes, torch.tensor([0.5, 0.75, 0.25], dtype=dtype), 0.5)
    assert kept.tolist() == [1, 2]
    assert dets.dtype == dtype


def test_nms_limits(ops):
    boxes, scores = random_boxes(50, seed=1)
    wanted = [i for i in greedy(boxes, scores) if scores[i] > 0.3]
    _, kept = ops.nms(boxes, scores, THRESHOLD, score_threshold=0.3)
    assert kept.tolist() == wanted
    dets, kept = ops.nms(boxes.numpy(), scores.numpy(), THRESHOLD, max_num=3)
    assert kept.tolist() == greedy(boxes, scores)[:3]
    torch.testing.assert_close(torch.from_numpy(dets), torch.cat([boxes, scores[:, None]], 1)[torch.from_numpy(kept)])


@pytest.mark.parametrize("split", [10_000, 100])
def test_batched_nms_of_many_classes(ops, split):
    boxes, scores = random_boxes(1500, seed=2)
    classes = torch.randint(0, 300, (1500,), generator=torch.Generator().manual_seed(3))
    dets, kept = ops.batched_nms(boxes, scores, classes, {"type": "nms", "iou_threshold": THRESHOLD, "split_thr": split})
    by_class = [torch.where(classes == c)[0] for c in range(300)]
    wanted = torch.cat([members[greedy(boxes[members], scores[members])] for members in by_class])
    wanted = wanted[scores[wanted].argsort(descending=True)]
    assert 300 < len(wanted) < 1490
    assert kept.tolist() == wanted.tolist()
    assert kept.tolist() == torchvision.ops.batched_nms(boxes, scores, classes, THRESHOLD).tolist()
    torch.testing.assert_close(dets, torch.cat([boxes[wanted], scores[wanted, None]], 1))


def test_batched_nms_over_classes_together(ops):
    boxes, scores = random_boxes(100, seed=4)
    config = {"type": "nms", "iou_threshold": THRESHOLD}
    _, kept = ops.batched_nms(boxes, scores, torch.arange(100), config, class_agnostic=True)
    assert kept.tolist() == greedy(boxes, scores)


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(0, 20),
    seed=st.integers(0, 10_000),
    method=st.sampled_from(["naive", "linear", "gaussian"]),
    offset=st.sampled_from([0, 1]),
    min_score=st.sampled_from([0.001, 0.2]),
)
def test_soft_nms(count, seed, method, offset, min_score):
    boxes, scores = random_boxes(count, seed, size=20)
    boxes, scores = boxes.double(), scores.double()
    dets, number = boxes.new_full((count, 5), -1.0), ["naive", "linear", "gaussian"].index(method)
    given_scores = scores.clone()
    kept = softnms(boxes, scores, dets, THRESHOLD, 0.5, min_score, number, offset)
    wanted = soft(boxes, scores, method, offset, 0.5, min_score)
    assert kept.tolist() == [i for i, _ in wanted]
    torch.testing.assert_close(dets[: len(kept), 4], torch.tensor([s for _, s in wanted], dtype=torch.float64))
    torch.testing.assert_close(dets[: len(kept), :4], boxes[kept])
    assert (dets[len(kept) :] == -1).all()
    assert torch.equal(scores, given_scores)


def test_soft_nms_by_hand(ops):
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 2.0], [9.0, 9.0, 10.0, 10.0]])
    scores = torch.tensor([0.9, 0.8, 0.6])  # IoU of the first two: 1/2
    dets, kept = ops.soft_nms(boxes, scores, 0.3, method="linear")
    assert kept.tolist() == [0, 2, 1]
    torch.testing.assert_close(dets[:, 4], torch.tensor([0.9, 0.6, 0.4]))
    dets, kept = ops.soft_nms(boxes, scores, 0.3, sigma=0.5, method="gaussian")
    assert kept.tolist() == [0, 2, 1]
    torch.testing.assert_close(dets[:, 4], torch.tensor([0.9, 0.6, 0.8 * math.exp(-0.5)]))
    assert ops.soft_nms(boxes, scores, 0.3, method="naive")[1].tolist() == [0, 2]


def test_soft_nms_of_boxes_without_area(ops):
    boxes, scores = torch.tensor([[3.0, 1.0, 3.0, 1.0]] * 2), torch.tensor([0.5, 0.4])
    dets, kept = ops.soft_nms(boxes, scores, method="gaussian")
    assert kept.tolist() == [0, 1]
    torch.testing.assert_close(dets[:, 4], scores)


def test_batched_soft_nms(ops):
    boxes, scores = random_boxes(60, seed=5)
    classes = torch.arange(60) % 7
    dets, kept = ops.batched_nms(boxes, scores, classes, {"type": "soft_nms", "iou_threshold": THRESHOLD, "min_score": 0.05})
    wanted = {}
    for c in range(7):
        members = torch.where(classes == c)[0]
        wanted |= {int(members[i]): s for i, s in soft(boxes[members], scores[members], "linear", 0, 0.5, 0.05)}
    assert dict(zip(kept.tolist(), dets[:, 4].tolist(), strict=True)) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("method", ["nms", "soft_nms"])
def test_no_boxes(ops, method):
    dets, kept = getattr(ops, method)(torch.zeros(0, 4), torch.zeros(0), 0.5)
    assert dets.shape == (0, 5)
    assert kept.shape == (0,)
    assert kept.dtype == torch.long


def test_no_boxes_in_batches(ops):
    nothing = torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long), {"type": "nms", "iou_threshold": 0.5}
    dets, kept = ops.batched_nms(*nothing, class_agnostic=True)
    assert dets.shape == (0, 5)
    assert kept.shape == (0,)
    # mmcv's own Python takes the maximum of all boxes before any operator is asked, compiled or not; mmdet asks first
    with pytest.raises(RuntimeError, match=r"max\(\)"):
        ops.batched_nms(*nothing)


@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
def test_soft_nms_in_half_precision_is_rounded_once(ops, method):
    boxes, scores = (t.bfloat16() for t in random_boxes(30, seed=6))
    dets, kept = ops.soft_nms(boxes, scores, 0.3, min_score=0.01, method=method)
    wanted, expected = ops.soft_nms(boxes.float(), scores.float(), 0.3, min_score=0.01, method=method)
    assert kept.tolist() == expected.tolist()
    assert torch.equal(dets, wanted.bfloat16())
