"""Sigmoid and softmax focal loss against their formulas (float64, gradients by autograd) and torchvision's."""

import importlib

import pytest
import torch
import torch.nn.functional as F
import torchvision

CLASSES = 4


def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(12, CLASSES, dtype=torch.float64, generator=generator)
    target = torch.randint(0, CLASSES, (12,), generator=generator)
    return logits.requires_grad_(), target, torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)


def reduced(loss: torch.Tensor, reduction: str, rows: int) -> torch.Tensor:
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / rows}[reduction]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("gamma", [0.0, 1.5, 2.0])
def test_sigmoid_is_torchvisions(ops, gamma, reduction):
    logits, target, _ = data()
    target[:3] = CLASSES  # background
    loss = ops.sigmoid_focal_loss(logits, target, gamma, 0.3, None, reduction)
    places = F.one_hot(target, CLASSES + 1)[:, :CLASSES].double()
    wanted = reduced(torchvision.ops.sigmoid_focal_loss(logits, places, 0.3, gamma, "none"), reduction, 12)
    torch.testing.assert_close(loss, wanted)
    upstream = torch.rand_like(loss)
    grads = [torch.autograd.grad(value, logits, upstream)[0] for value in (loss, wanted)]
    torch.testing.assert_close(*grads)


def test_sigmoid_class_weights(ops):
    logits, target, weight = data()
    loss = ops.sigmoid_focal_loss(logits, target, 2.0, 0.25, weight, "none")
    plain = ops.sigmoid_focal_loss(logits, target, 2.0, 0.25, None, "none")
    torch.testing.assert_close(loss, plain * weight[target][:, None])
    assert torch.autograd.gradcheck(lambda x: ops.sigmoid_focal_loss(x, target, 2.0, 0.25, weight, "mean"), logits)


def test_sigmoid_class_weights_leave_background_alone(ops):
    logits, _, weight = data()
    target = torch.full((12,), CLASSES)
    loss = ops.sigmoid_focal_loss(logits, target, 2.0, 0.25, weight, "none")
    torch.testing.assert_close(loss, ops.sigmoid_focal_loss(logits, target, 2.0, 0.25, None, "none"))


def test_sigmoid_by_hand(ops):
    # logit 0: p = 1/2, alpha * (1/2)^2 * log 2 for the class, (1 - alpha) * (1/2)^2 * log 2 for the other
    loss = ops.sigmoid_focal_loss(torch.zeros(1, 2), torch.tensor([1]), 2.0, 0.25, None, "none")
    torch.testing.assert_close(loss, torch.tensor([[0.75, 0.25]]) * 0.25 * torch.tensor(2.0).log())


def test_sigmoid_of_large_logits(ops):
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
    loss = ops.sigmoid_focal_loss(logits, torch.tensor([0, 0]), 2.0, 0.25, None, "none")
    # nothing for what is right, alpha * 200 and (1 - alpha) * 200 for what is wrong: the logarithm is not clipped
    torch.testing.assert_close(loss, torch.tensor([[0.0, 0.0], [50.0, 150.0]]))
    loss.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.0, 0.0], [-0.25, 0.75]]))


def softmax_formula(logits, target, gamma, alpha, weight):
    log_p = F.log_softmax(logits, 1).gather(1, target.clamp(min=0)[:, None])[:, 0]
    weights = 1.0 if weight is None else weight[target.clamp(min=0)]
    return torch.where(target >= 0, -alpha * (1 - log_p.exp()) ** gamma * log_p * weights, 0.0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_softmax(ops, gamma, reduction, weighted):
    logits, target, weight = data()
    target[:2] = -1  # ignored
    weight = weight if weighted else None
    loss = ops.softmax_focal_loss(logits, target, gamma, 0.3, weight, reduction)
    wanted = reduced(softmax_formula(logits, target, gamma, 0.3, weight), reduction, 12)
    torch.testing.assert_close(loss, wanted)
    grads = [torch.autograd.grad(value, logits)[0] for value in (loss, wanted)]
    torch.testing.assert_close(*grads)
    assert not grads[0][:2].any()
    assert grads[0][2:].any(dim=1).all()


def test_softmax_without_reduction(ops):
    logits, target, weight = data()
    loss = ops.SoftmaxFocalLoss(2.0, 0.25, weight, "none")(logits, target)
    torch.testing.assert_close(loss, softmax_formula(logits, target, 2.0, 0.25, weight))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_softmax_of_certain_rows(ops, gamma):
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    loss = ops.softmax_focal_loss(logits, torch.tensor([0, 0]), gamma, 0.25, None, "sum")
    loss.backward()
    assert loss.isfinite()
    torch.testing.assert_close(logits.grad[0], torch.zeros(2))
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("name", ["sigmoid_focal_loss", "softmax_focal_loss"])
def test_no_rows(ops, name):
    logits = torch.zeros(0, CLASSES, requires_grad=True)
    loss = getattr(ops, name)(logits, torch.zeros(0, dtype=torch.long), 2.0, 0.25, None, "sum")
    loss.backward()
    assert loss == 0
    assert logits.grad.shape == (0, CLASSES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["sigmoid_focal_loss", "softmax_focal_loss"])
def test_half_precision_is_rounded_once(ops, name, dtype):
    logits, target, weight = data()
    half, weight = logits.detach().to(dtype).requires_grad_(), weight.to(dtype)
    given = half if name.startswith("sigmoid") else half.softmax(1)  # mmcv takes the softmax before the operator
    exact = given.detach().float()
    ext = importlib.import_module("mmcv._ext")
    shape = (12, CLASSES) if name.startswith("sigmoid") else (12,)
    for part in ("forward", "backward"):
        results = []
        for values in (given.detach(), exact):
            out = values.new_zeros(shape if part == "forward" else (12, CLASSES))
            buffers = [values.new_zeros(12)] if (name, part) == ("softmax_focal_loss", "backward") else []
            function = getattr(ext, f"{name}_{part}")
            function(values, target, weight.to(values), *buffers, out, gamma=2.0, alpha=0.25)
            results.append(out)
        assert torch.equal(results[0], results[1].to(dtype))
