"""Masks that pycocotools cannot draw, or draws as something else, are told; those that it draws pass."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hgkd.openmmlab.data_checks.instance_masks import is_number, mask_problem

IMAGE = {"height": 6, "width": 5}


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (None, "has no 'segmentation', but the config reads masks"),
        ([], "has no 'segmentation'"),
        ({}, "has no 'segmentation'"),
        ("nonsense", "has segmentation='nonsense', needed is a list of polygons, or RLE"),
        ([[1, 1, float("nan"), 1, 4, 4]], "has nan in a polygon, needed are the x and y of three corners or more"),
        ([[1, 1, float("inf"), 1, 4, 4]], "has inf in a polygon"),
        ([[1, 1, 10**400, 1, 4, 4]], "has 1000000.* in a polygon"),
        ([[1, 1, None, 1, 4, 4]], "has None in a polygon"),
        ([["1", "1", "3", "1", "3", "3"]], "has '1' in a polygon"),
        ([[[1, 1], [3, 1], [3, 3]]], r"has \[1, 1\] in a polygon"),
        ([1, 1, 4, 1, 4, 4], r"has a flat list as its mask \(\[1, 1, 4, 1, 4, 4\]\), needed is a list of polygons: \[\[x1, y1"),
        ([[1, 1, 4, 4]], r"has a polygon of 4 numbers \(\[1, 1, 4, 4\]\), needed are the x and y of three corners or more"),
        ([[]], r"has a polygon of 0 numbers"),
        ([[1, 1]], r"has a polygon of 2 numbers"),
        ([[1, 1, 4, 1, 4, 4, 2]], r"has a polygon of 7 numbers"),
        ([[1, 1, 4, 1, 4, 4], [1, 1]], r"has a polygon of 2 numbers"),
        ([{"x": 1}], r"has \{'x': 1\} as a polygon"),
        ([[1, 1, 500_000, 1, 4, 4]], "has a polygon that reaches to 500000, far outside its image"),
        ({"counts": [30]}, r"has a mask \(RLE\) with \['counts'\], needed are 'size' \(height, width\) and 'counts'"),
        ({"size": [6, 5]}, r"has a mask \(RLE\) with \['size'\]"),
        ({"size": [5, 6], "counts": [30]}, r"of size \[5, 6\], but its image has height and width \[6, 5\]"),
        ({"size": "6x5", "counts": [30]}, "of size 6x5, but its image"),
        ({"size": [6, 5], "counts": [10]}, r"has a mask \(RLE\) of 10 pixels, but its image has 6 x 5 = 30"),
        ({"size": [6, 5], "counts": []}, "of 0 pixels, but"),
        ({"size": [6, 5], "counts": [40, -10]}, r"with counts=\[40, -10\], needed are run lengths"),
        ({"size": [6, 5], "counts": [1.5, 28.5]}, r"with counts=\[1.5, 28.5\], needed are run lengths"),
        ({"size": [6, 5], "counts": ["30"]}, "needed are run lengths"),
        ({"size": [6, 5], "counts": "nonsense!"}, "with counts='nonsense!', needed are run lengths"),
        ({"size": [6, 5], "counts": "x"}, "needed are run lengths"),  # ends amid a number
        ({"size": [6, 5], "counts": "0"}, "of 0 pixels, but"),
        ({"size": [6, 5], "counts": 30}, "with counts=30, needed are run lengths"),
    ],
)
def test_masks_that_cannot_be_drawn(mask, message):
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(mask_problem(mask, IMAGE))


@pytest.mark.parametrize(
    "mask",
    [
        [[1, 1, 4, 1, 4, 4]],
        [[1.5, 1, 4, 1, 4, 4], [0, 0, 1, 0, 1, 1, 0, 1]],
        [[-3, -3, 50, 1, 4, 44]],  # an object that reaches out of its image
        {"size": [6, 5], "counts": [30]},
        {"size": [6, 5], "counts": [0, 30]},
        {"size": [6, 5], "counts": [10.0, 20]},
    ],
)
def test_masks_that_can(mask):
    assert mask_problem(mask, IMAGE) is None


@given(st.lists(st.booleans(), min_size=1, max_size=300))
def test_the_text_form_of_pycocotools_is_read(pixels):
    """Whatever pycocotools writes passes for its own size, and for no other."""
    numpy = pytest.importorskip("numpy")
    tools = pytest.importorskip("pycocotools.mask")
    encoded = tools.encode(numpy.asfortranarray(pixels, dtype=numpy.uint8).reshape(-1, 1))
    mask = {"size": [len(pixels), 1], "counts": encoded["counts"].decode()}
    assert mask_problem(mask, {"height": len(pixels), "width": 1}) is None
    other = mask | {"size": [len(pixels) + 1, 1]}
    assert f"of {len(pixels)} pixels" in mask_problem(other, {"height": len(pixels) + 1, "width": 1})


def test_numbers():
    assert all(map(is_number, (0, -1, 2.5, True)))
    assert not any(map(is_number, (None, "1", float("nan"), float("-inf"), 10**400, [1])))
