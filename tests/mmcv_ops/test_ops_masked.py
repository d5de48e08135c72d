"""Masked convolution against an ordinary one, and its two functions against unfold."""

import pytest
import torch
import torch.nn.functional as F

from hgkd.mmcv_ops.masked import masked_col2im_forward, masked_im2col_forward


@pytest.mark.parametrize(("kernel", "padding"), [((3, 3), (1, 1)), ((1, 3), (0, 1)), ((5, 1), (2, 0)), ((2, 3), (0, 2))])
def test_columns_are_those_of_unfold(kernel, padding):
    x = torch.randn(1, 3, 6, 7)
    columns = F.unfold(x, kernel, padding=padding)[0]
    out = [n + 2 * p - k + 1 for n, p, k in zip(x.shape[2:], padding, kernel, strict=True)]
    rows, cols = torch.where(torch.rand(*out) < 0.4)
    buffer = torch.full((columns.shape[0], len(rows)), torch.nan)
    masked_im2col_forward(x, rows, cols, buffer, *kernel, *padding)
    assert torch.equal(buffer, columns[:, rows * out[1] + cols])


def test_results_go_to_their_places():
    output = torch.zeros(1, 2, 3, 4)
    masked_col2im_forward(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0, 2]), torch.tensor([3, 1]), output, 3, 4, 2)
    assert output[0, :, 0, 3].tolist() == [1, 3]
    assert output[0, :, 2, 1].tolist() == [2, 4]
    assert output.count_nonzero() == 4


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_layer(ops, share):
    layer, x = ops.MaskedConv2d(3, 5, 3, padding=1), torch.randn(1, 3, 6, 7)
    mask = (torch.rand(1, 6, 7) < share).float()
    wanted = F.conv2d(x, layer.weight, layer.bias, padding=1) * mask[:, None]
    torch.testing.assert_close(layer(x, mask), wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1))
