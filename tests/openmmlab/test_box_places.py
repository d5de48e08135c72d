"""Boxes of another order than x, y, width, height are told by where they lie, or by their areas; right ones pass."""

import numpy as np
import pytest

from hgkd.openmmlab.data_checks.box_places import Places

IMAGE = {"width": 640, "height": 480}


def boxes(count=60, seed=0):
    """x, y, width and height of boxes of 20 to 200 pixels inside an image."""
    rng = np.random.default_rng(seed)
    size = rng.integers(20, 200, (count, 2))
    place = rng.random((count, 2)) * (np.array([640, 480]) - size)
    return np.concatenate([place.round(), size], 1).tolist()


def places(found, area=lambda x, y, w, h: w * h, image=IMAGE):
    counted = Places()
    for number, box in enumerate(found):
        counted.add({"id": number, "bbox": box, "area": area(*box)}, image)
    return counted


def corners(x, y, w, h):
    return [x, y, x + w, y + h]


def centre(x, y, w, h):
    return [x + w / 2, y + h / 2, w, h]


def test_right_boxes_pass():
    counted = places(boxes())
    assert (counted.total, counted.problem(), counted.remarks()) == (60, None, [])
    whole = [[0, 0, 640, 480]] * 9  # an object that fills its image, in every order
    assert (places(whole).problem(), places(whole).remarks()) == (None, [])
    large = [[32, 24, 576, 432]] * 9
    assert (places(large).problem(), places(large).remarks()) == (None, [])
    masks = places(boxes(), area=lambda x, y, w, h: 0.6 * w * h)
    assert masks.problem() is None


@pytest.mark.parametrize(("order", "name"), [(corners, "x1, y1, x2, y2"), (centre, "x and y of the centre, width, height")])
def test_boxes_of_another_order(order, name):
    counted = places([order(*box) for box in boxes()])
    message = counted.problem()
    assert f"{counted.leaving} of 60 boxes leave their image by more than 2 pixels (annotation " in message
    assert f"read as {name} they fit. Write x, y, width, height" in message
    assert "if objects do reach out of their images, clip the boxes to them" in message


def test_corners_by_their_areas():
    """Small objects near the upper left corner fit their image in both orders."""
    small = [corners(x / 8, y / 8, w / 8, h / 8) for x, y, w, h in boxes()]
    counted = places(small, area=lambda x1, y1, x2, y2: (x2 - x1) * (y2 - y1))
    assert counted.leaving == 0
    assert "the area of" in counted.problem()
    assert "what it would be if bbox was x1, y1, x2, y2. Write x, y, width, height" in counted.problem()
    assert places(small).problem() is None  # with areas of width * height nothing tells them


def test_boxes_of_another_scale():
    counted = places([[4 * value for value in box] for box in boxes()])
    assert "boxes leave their image" in counted.problem()
    assert "they fit" not in counted.problem()
    assert "Write x, y, width, height in pixels of the image as it is" in counted.problem()


def test_objects_that_reach_out_of_their_images():
    """As in data sets that box what is hidden, too; clipping, as the message advises, lets all pass."""
    found = boxes() + [[600, 100, 80, 300], [-20, 50, 60, 60]] * 4
    counted = places(found)
    assert counted.problem() is None
    assert counted.remarks() == [
        "8 of 68 boxes leave their image by more than 2 pixels "
        "(annotation 60 has bbox=[600, 100, 80, 300] in an image of 640 x 480)"
    ]
    clipped = [[max(x, 0), y, min(x + w, 640) - max(x, 0), h] for x, y, w, h in found]
    assert places(clipped).remarks() == []


def test_rounding_is_let_pass():
    assert places([[639, 1, 3, 10], [1, 470, 5, 12]]).remarks() == []
