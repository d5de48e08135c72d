"""From bytes to what a student sees: the same bits as by the plain formula, with fewer passes over the images."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hgkd.distillers import MaskedDistiller
from hgkd.pixels import to_unit_range


def model(flip: float = 0.0, **student: Any) -> MaskedDistiller:
    torch.manual_seed(0)
    return MaskedDistiller(
        student=dict(type="SparseUNet", encoder="test_resnet", decoder_width=32, **student),
        objectives=dict(pixels=dict(type="PixelReconstruction")),
        mask=dict(type="RandomMask", mask_ratio=0.5),
        image_size=64,
        flip=flip,
    )


def bytes_of(n: int = 8, channels: int = 3) -> Tensor:
    return torch.randint(0, 256, (n, channels, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class FlippedBytes(TorchDispatchMode):
    """Context that sums the memory of all mirrored images."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ == "flip":
            self.count += out.nbytes
        return out


def test_every_byte_is_divided_as_before() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(1, 4, 8, 8)
    for given in (values, values.contiguous(memory_format=torch.channels_last)):
        found = to_unit_range(given)
        assert found.dtype == torch.float32
        assert torch.equal(found, given.float().div_(255.0))
        assert found.stride() == given.stride()


def test_images_are_mirrored_as_bytes() -> None:
    """As floats they would be four times the memory; mirroring and division do not disturb each other."""
    net, images = model(flip=0.5), bytes_of()
    seen = []
    for given in (images, images.float().div_(255.0)):
        torch.manual_seed(3)
        with FlippedBytes() as mirrored:
            seen.append((*net._show(given, None)[:2], mirrored.count))
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])  # the mask is drawn from the same random numbers
    assert (seen[0][2], seen[1][2]) == (images.nbytes, 4 * images.nbytes)
    torch.manual_seed(3)
    flipped = torch.rand(len(images)) < 0.5
    assert 0 < int(flipped.sum()) < len(images)
    plain = images.float().div_(255.0)
    assert torch.equal(seen[0][0], torch.where(flipped[:, None, None, None], plain.flip(3), plain))


def test_pixels_are_normalised_by_the_plain_formula() -> None:
    student, images = model().student, torch.rand(2, 3, 64, 64)
    before = images.clone()
    assert torch.equal(student.normalise(images), (images - student.mean) / student.std)
    assert torch.equal(images, before)


def test_images_of_many_channels_keep_their_floats() -> None:
    """16-bit and many-channel images come as floats in [0, 1], with more than bytes can hold."""
    net = model(flip=1.0, in_chans=5, normalize=((0.5,) * 5, (0.25,) * 5))
    images = torch.rand(2, 5, 64, 64)
    assert torch.equal(net._show(images, None)[0], images.flip(3))
