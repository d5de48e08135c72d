"""The check of the fused kernels before their first use, against kernels that are wrong in one way each; and what follows."""

import os
import warnings

import pytest
import torch
from refusals import refused

from hgkd.sparse import CellLayout, kernels, self_check
from hgkd.sparse.choice import kernels_mode

fused = pytest.importorskip("hgkd.sparse.fused")
CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_fused.py, in the interpreter")


def product(source, index, matrix):
    """What the kernel computes, by torch."""
    rows = torch.cat([source, source.new_zeros(1, source.shape[1])])
    return (rows[index].flatten(1).float() @ matrix.float()).to(source.dtype)


def slopes(source, index, grad):
    rows = torch.cat([source, source.new_zeros(1, source.shape[1])])
    return grad.float().t() @ rows[index].flatten(1).float()


def reads_behind_the_last_row(source, index, matrix):
    memory = torch.as_strided(source, (source.shape[0] + 1, source.shape[1]), source.stride())
    return (memory[index].flatten(1).float() @ matrix.float()).to(source.dtype)


def leaves_the_tail(source, index, matrix):
    out = torch.full((len(index), matrix.shape[1]), float("nan"), dtype=source.dtype)
    whole = len(index) // 128 * 128
    out[:whole] = product(source, index[:whole], matrix)
    return out


def forgets_the_last_tap(source, index, matrix):
    return product(source, torch.cat([index[:, :-1], torch.full_like(index[:, :1], len(source))], 1), matrix)


def differs_from_run_to_run(source, index, matrix):
    return product(source, index, matrix) * (1 + 1e-4 * torch.rand(1))


def does_not_compile(source, index, matrix):
    raise RuntimeError("out of resource: shared memory")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(self_check, "_verdicts", {})
    monkeypatch.setattr(kernels, "_started", set())
    monkeypatch.setattr(kernels, "_failed", set())
    monkeypatch.delenv("HGKD_KERNELS", raising=False)


def use(monkeypatch, forward, gradient=slopes):
    monkeypatch.setattr(fused, "gather_multiply", forward)
    monkeypatch.setattr(fused, "weight_gradient", gradient)


@pytest.mark.parametrize("dtype", list(self_check.LIMITS))
def test_right_kernels_pass_in_every_type(dtype, monkeypatch) -> None:
    use(monkeypatch, product)
    found = self_check.check(CPU, dtype)
    assert found.ok, found.why
    assert set(found.errors) == {"product", "input gradient", "weight gradient"}
    assert max(found.errors.values()) < self_check.LIMITS[dtype] / 2


@pytest.mark.parametrize(
    ("forward", "gradient", "why"),
    [
        (reads_behind_the_last_row, slopes, "errors product inf"),
        (leaves_the_tail, slopes, "errors product inf"),
        (forgets_the_last_tap, slopes, "wrong numbers"),
        (product, lambda s, i, g: slopes(s, i, g) * 1.01, r"weight gradient 1.0e-02, allowed 4e-03"),
        (differs_from_run_to_run, slopes, "two runs differ"),
        (does_not_compile, slopes, r"do not run \(out of resource"),
    ],
)
def test_wrong_kernels_are_warned_of_once_with_numbers(forward, gradient, why, monkeypatch) -> None:
    use(monkeypatch, forward, gradient)
    with pytest.warns(UserWarning, match=f"fused kernels are not used in torch.float16 on cpu.*{why}"):
        assert not self_check.passed(CPU, torch.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not self_check.passed(CPU, torch.float16)


def test_nothing_is_checked_or_kept_while_a_graph_is_recorded(monkeypatch) -> None:
    monkeypatch.setattr(self_check, "is_capturing", lambda device: True)
    monkeypatch.setattr(self_check, "check", lambda *_: pytest.fail("it waits for the device"))
    assert not self_check.passed(CPU, torch.float16)
    assert not self_check._verdicts


def test_the_environment_overrides(monkeypatch) -> None:
    monkeypatch.setenv("HGKD_KERNELS", "fused")
    monkeypatch.setattr(self_check, "check", lambda *_: pytest.fail("unchecked was asked for"))
    assert self_check.passed(CPU, torch.float16)
    monkeypatch.setenv("HGKD_KERNELS", "trition")
    with refused(ValueError, "kernels-unknown", "trition", "torch", "fused"):
        kernels_mode()


def gather_step() -> list[torch.Tensor]:
    """Value and gradients of one layer by ``im2col``."""
    cells = CellLayout(torch.tensor([[[True, False], [True, True]]]), 4)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 16, 4, 4, generator=generator).requires_grad_()
    weight = torch.randn(8, 16, 3, 3, generator=generator).requires_grad_()
    geometry = kernels.ConvGeometry(4, (3, 3), (1, 1), (1, 1), (1, 1))
    out = kernels.convolve(rows, weight, None, 1, geometry, cells, "im2col")
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [rows, weight])]


def test_a_kernel_that_fails_at_its_first_launch_falls_back_for_its_layer(monkeypatch) -> None:
    expected = gather_step()
    tried = []

    def fails(source, index, matrix):
        tried.append(tuple(matrix.shape))
        return does_not_compile(source, index, matrix) if matrix.shape[1] == 8 else product(source, index, matrix)

    use(monkeypatch, fails)
    monkeypatch.setattr(kernels, "_fused", lambda rows: fused)
    with pytest.warns(UserWarning, match="gather_multiply of 16 -> 8 channels, 9 taps in torch.float32.*out of resource"):
        found = gather_step()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert tried == [(144, 8), (72, 16)], "the other direction works and is used"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gather_step()
    assert tried == [(144, 8), (72, 16), (72, 16)], "what failed is not tried again"


def test_an_error_after_the_first_launch_is_not_hidden(monkeypatch) -> None:
    use(monkeypatch, product)
    monkeypatch.setattr(kernels, "_fused", lambda rows: fused)
    gather_step()
    use(monkeypatch, does_not_compile)
    with pytest.raises(RuntimeError, match="out of resource"):
        gather_step()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_memory_and_faults_are_not_the_kernels_matter(error, monkeypatch) -> None:
    def fails(*_):
        raise error("no")

    use(monkeypatch, fails)
    monkeypatch.setattr(kernels, "_fused", lambda rows: fused)
    with pytest.raises(error):
        gather_step()


def test_columns_are_never_fused(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "_fused", lambda rows: pytest.fail("asked for the fused kernels"))
    cells = CellLayout(torch.ones(1, 2, 2, dtype=torch.bool), 4)
    geometry = kernels.ConvGeometry(4, (3, 3), (1, 1), (1, 1), (1, 1))
    weight = torch.randn(8, 16, 3, 3, requires_grad=True)
    kernels.convolve(torch.randn(4, 16, 4, 4), weight, None, 1, geometry, cells, "columns").sum().backward()


@pytest.mark.parametrize(
    ("capability", "said"), [((7, 5), "compute capability 7.5 is below 8.0"), ((9, 0), "torch kernels; wrong numbers")]
)
def test_the_doctor_says_what_serves_and_why(capability, said, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
    monkeypatch.setattr(torch.version, "hip", None)
    wrong = self_check.Verdict(False, "wrong numbers")
    monkeypatch.setattr(self_check, "check", lambda device, dtype: wrong)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert any(said in line for line in self_check.describe(torch.device("cuda:0")))
    assert "torch's kernels" in self_check.describe(CPU)[0]


@interpreted
def test_the_kernels_pass_in_the_interpreter() -> None:
    """fp16 alone: the interpreter has no bfloat16 products, which the check finds."""
    found = self_check.check(CPU, torch.float16, sizes=(3,))
    assert found.ok, found.why
