"""The functions of ``mmcv._ext`` that there are, by mmcv's names; any other name is refused when it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from hgkd.errors import MissingOperatorError
from hgkd.mmcv_ops import attention, deform, focal, masked, nms, roi


def get_compiler_version() -> str:
    """Text for mmcv's environment report in place of the compiler's version."""
    return "none (hgkd.mmcv_ops)"


def get_compiling_cuda_version() -> str:
    """Text for mmcv's environment report in place of the CUDA version of its compiled operators."""
    return "none (hgkd.mmcv_ops)"


FUNCTIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        nms.nms,
        nms.softnms,
        roi.roi_align_forward,
        roi.roi_align_backward,
        roi.roi_pool_forward,
        roi.roi_pool_backward,
        focal.sigmoid_focal_loss_forward,
        focal.sigmoid_focal_loss_backward,
        focal.softmax_focal_loss_forward,
        focal.softmax_focal_loss_backward,
        deform.deform_conv_forward,
        deform.deform_conv_backward_input,
        deform.deform_conv_backward_parameters,
        deform.modulated_deform_conv_forward,
        deform.modulated_deform_conv_backward,
        masked.masked_im2col_forward,
        masked.masked_col2im_forward,
        attention.ms_deform_attn_forward,
        attention.ms_deform_attn_backward,
        get_compiler_version,
        get_compiling_cuda_version,
    )
}


def refused(name: str) -> Callable[..., NoReturn]:
    """A function that can be imported under ``name``, as mmcv does with all of its operators, and refuses to be called."""

    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise MissingOperatorError(
            "mmcv-operator-missing",
            f"mmcv operator {name!r} has no replacement in hgkd.mmcv_ops (there are {', '.join(FUNCTIONS)}); "
            "install mmcv with compiled operators (pip uninstall mmcv-lite; pip install mmcv==2.1.0 needs a compiler), "
            "or use a model without it",
        )

    refuse.__name__ = refuse.__qualname__ = name
    return refuse
