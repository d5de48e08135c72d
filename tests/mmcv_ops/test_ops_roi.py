"""RoIAlign and RoIPool against their definitions in loops (float64), torchvision's Python-level functions, and gradcheck."""

import math

import pytest
import torch
import torchvision

SIZE = (2, 3)
SCALE = 0.5
# regions inside, over the border, of fractional size, and large enough for several samples a bin
ROIS = [[0, 2.3, 1.1, 13.7, 9.2], [1, -3.0, -2.0, 7.5, 5.5], [1, 10.2, 8.4, 30.0, 26.0], [0, 5.0, 5.0, 5.6, 5.2]]


def features(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def bilinear(plane: torch.Tensor, y: float, x: float) -> torch.Tensor:
    """Value between pixel centres; within one pixel of the border the border's, 0 beyond."""
    height, width = plane.shape[-2:]
    if not (-1 <= y <= height and -1 <= x <= width):
        return plane.new_zeros(plane.shape[0])
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    upper = plane[:, top, left] * (left + 1 - x) + plane[:, top, right] * (x - left)
    lower = plane[:, bottom, left] * (left + 1 - x) + plane[:, bottom, right] * (x - left)
    return upper * (top + 1 - y) + lower * (y - top)


def roi_align_by_definition(maps, rois, ratio, mode, aligned):
    output = maps.new_zeros(len(rois), maps.shape[1], *SIZE)
    for k, (image, *box) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (v * SCALE - (0.5 if aligned else 0) for v in box)
        sides = (y2 - y1, x2 - x1) if aligned else (max(y2 - y1, 1), max(x2 - x1, 1))
        counts = [ratio or math.ceil(side / bins) for side, bins in zip(sides, SIZE, strict=True)]
        steps = [side / bins for side, bins in zip(sides, SIZE, strict=True)]
        for i in range(SIZE[0]):
            for j in range(SIZE[1]):
                points = [
                    (y1 + steps[0] * (i + (a + 0.5) / counts[0]), x1 + steps[1] * (j + (b + 0.5) / counts[1]))
                    for a in range(counts[0])
                    for b in range(counts[1])
                ]
                samples = torch.stack([bilinear(maps[int(image)], *point) for point in points])
                output[k, :, i, j] = samples.mean(0) if mode == "avg" else samples.amax(0)
    return output


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 1, 2, 3])
def test_roi_align(ops, ratio, aligned, mode):
    maps, rois = features(2, 3, 8, 9), torch.tensor(ROIS, dtype=torch.float64)
    pooled = ops.roi_align(maps, rois, SIZE, SCALE, ratio, mode, aligned)
    torch.testing.assert_close(pooled, roi_align_by_definition(maps, rois, ratio, mode, aligned))
    if mode == "avg":
        wanted = torchvision.ops.roi_align(maps, rois, SIZE, SCALE, ratio or -1, aligned)
        torch.testing.assert_close(pooled, wanted)


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 2])
def test_roi_align_gradients(ops, ratio, aligned, mode):
    maps, rois = features(2, 2, 5, 6).requires_grad_(), torch.tensor(ROIS, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda m: ops.roi_align(m, rois, SIZE, SCALE, ratio, mode, aligned), maps)


def test_roi_align_gradients_are_those_of_torchvision(ops):
    rois, grads = torch.tensor(ROIS), []
    for pool in (ops.RoIAlign(SIZE, SCALE, 0), lambda m, r: torchvision.ops.roi_align(m, r, SIZE, SCALE, -1, True)):
        maps = features(2, 3, 8, 9).float().requires_grad_()
        # a head that hands back gradients that are not contiguous
        pool(maps, rois).permute(0, 2, 3, 1).pow(2).sum().backward()
        grads.append(maps.grad)
    torch.testing.assert_close(*grads)


def roi_pool_by_definition(maps, rois):
    output = maps.new_zeros(len(rois), maps.shape[1], *SIZE)
    for k, (image, *box) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = box[0] * SCALE, box[1] * SCALE, (box[2] + 1) * SCALE, (box[3] + 1) * SCALE
        if x2 <= x1 or y2 <= y1:
            continue
        steps = ((y2 - y1) / SIZE[0], (x2 - x1) / SIZE[1])
        for i in range(SIZE[0]):
            for j in range(SIZE[1]):
                rows = [max(math.floor(i * steps[0] + y1), 0), max(math.ceil((i + 1) * steps[0] + y1), 0)]
                columns = [max(math.floor(j * steps[1] + x1), 0), max(math.ceil((j + 1) * steps[1] + x1), 0)]
                window = maps[int(image), :, slice(*rows), slice(*columns)].flatten(1)
                if window.shape[1]:
                    output[k, :, i, j] = window.amax(1)
    return output


# the last two: without length, and beyond the image
POOL_ROIS = [*ROIS, [0, 9.0, 2.0, 4.0, 6.0], [1, 40.0, 40.0, 60.0, 60.0]]


def test_roi_pool(ops):
    maps, rois = features(2, 3, 8, 9), torch.tensor(POOL_ROIS, dtype=torch.float64)
    pooled = ops.RoIPool(SIZE, SCALE)(maps, rois)
    torch.testing.assert_close(pooled, roi_pool_by_definition(maps, rois))
    assert (pooled[-2:] == 0).all()
    assert (pooled[:-2] != 0).any(dim=(1, 2, 3)).all()


def test_roi_pool_of_whole_pixels_is_torchvisions(ops):
    maps, rois = features(2, 3, 8, 9), torch.tensor([[0, 1, 2, 7, 6], [1, 0, 0, 8, 7], [1, 3, 3, 3, 3]], dtype=torch.float64)
    torch.testing.assert_close(ops.roi_pool(maps, rois, SIZE, 1.0), torchvision.ops.roi_pool(maps, rois, SIZE, 1.0))


def test_roi_pool_gradients(ops):
    maps, rois = features(2, 2, 5, 6).requires_grad_(), torch.tensor(POOL_ROIS, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda m: ops.roi_pool(m, rois, SIZE, SCALE), maps)


@pytest.mark.parametrize("mode", ["avg", "max", "pool"])
def test_no_regions(ops, mode):
    maps, rois = features(2, 3, 8, 9).requires_grad_(), torch.zeros(0, 5, dtype=torch.float64)
    pooled = ops.roi_pool(maps, rois, SIZE, SCALE) if mode == "pool" else ops.roi_align(maps, rois, SIZE, SCALE, 0, mode)
    assert pooled.shape == (0, 3, *SIZE)
    pooled.sum().backward()
    assert torch.equal(maps.grad, torch.zeros_like(maps))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["avg", "max", "pool"])
def test_half_precision(ops, mode, dtype):
    def pool(maps: torch.Tensor) -> torch.Tensor:
        rois = torch.tensor(ROIS, dtype=maps.dtype)
        return ops.roi_pool(maps, rois, SIZE, SCALE) if mode == "pool" else ops.roi_align(maps, rois, SIZE, SCALE, 2, mode)

    # rounded once, so that both see the same features; the regions are rounded like them
    maps = features(2, 3, 8, 9).to(dtype).requires_grad_()
    pooled = pool(maps)
    assert pooled.dtype == dtype
    rois = torch.tensor(ROIS, dtype=dtype).double()
    if mode == "pool":
        wanted = roi_pool_by_definition(maps.detach().double(), rois)
    else:
        wanted = roi_align_by_definition(maps.detach().double(), rois, 2, mode, True)
    torch.testing.assert_close(pooled.double(), wanted, rtol=0.01, atol=0.01)
    pooled.sum().backward()
    assert maps.grad.dtype == dtype
    assert maps.grad.any()
