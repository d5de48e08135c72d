"""Number formats: torchvision's operators have no bfloat16, and sums in half precision lose digits."""

from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor itself if float32 or float64, otherwise in float32."""
    return tensor if tensor.dtype.itemsize >= 4 else tensor.float()
