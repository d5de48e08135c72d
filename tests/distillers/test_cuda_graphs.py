"""Steps by recorded graphs: on the CPU with a recorder that runs the work again, on a GPU with CUDA graphs."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mmengine.optim import OptimWrapper
from operation_counts import CountingOperations
from refusals import refused
from test_masked import FakeTeacher
from torch import Tensor, nn

from hgkd.distillers import MaskedDistiller, graphs
from hgkd.distillers.graphs import StepGraphs, taken_apart
from hgkd.structures import TeacherOutput


def batch(seed: int = 0, n: int = 4) -> Tensor:
    return torch.randint(0, 256, (n, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


HGKD = dict(hgkd=dict(type="HGKD", supervise="all"))
Work = Callable[[], None]


class Recorder:
    """Stands for CUDA graphs on a CPU: records the work by doing it, and does it again at every replay."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, work: Work) -> Work:
        self.recorded += 1
        work()

        def replay() -> None:
            self.replayed += 1
            work()

        return replay


def model(cuda_graph: bool | str = "auto", record: Recorder | None = None, **options: Any) -> MaskedDistiller:
    torch.manual_seed(0)
    made = MaskedDistiller(
        **{
            "student": dict(
                type="SparseUNet", encoder="test_resnet", decoder_width=32, encoder_kwargs=dict(drop_path_rate=0.5)
            ),
            "objectives": HGKD,
            "mask": dict(type="RandomMask", mask_ratio=0.5),
            "image_size": 64,
            "teacher": dict(type=FakeTeacher.__name__),
            "cuda_graph": cuda_graph,
            **options,
        }
    )
    if record is not None:
        made._graphs = StepGraphs(cuda_graph, record)
    return made.train()


def train(net: MaskedDistiller, steps: int = 4, accumulated: int = 1) -> list[Tensor]:
    """Losses of the steps, then the state."""
    wrapper = OptimWrapper(torch.optim.SGD(net.parameters(), 0.1, momentum=0.9), accumulative_counts=accumulated)
    wrapper.initialize_count_status(net, 0, steps)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        found = net.train_step(dict(inputs=batch(step)), wrapper)
        losses.append(found["loss"].detach())
    return [*losses, *net.state_dict().values()]


@pytest.mark.parametrize("accumulated", [1, 2])
def test_replayed_steps_train_as_eager_ones(accumulated: int) -> None:
    """Losses, weights and running statistics, with stochastic depth, whose draws are those of the eager step."""
    record = Recorder()
    eager, graphed = model(False), model(record=record)
    graphed.load_state_dict(eager.state_dict())
    graphed.teacher.load_state_dict(eager.teacher.state_dict())
    for found, expected in zip(train(graphed, 4, accumulated), train(eager, 4, accumulated), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert record.recorded == 2
    assert record.replayed == 2 * (4 + 1)  # the steps, and the comparison with the eager one


def test_gradients_do_not_share_the_memory_that_is_replayed_into() -> None:
    net = model(record=Recorder())
    sum(net(batch(), mode="loss").values()).backward()
    (graph,) = net._graphs._graphs.values()
    kept = {g.data_ptr() for g in graph._gradients if g is not None}
    assert kept
    assert not kept & {p.grad.data_ptr() for p in net.parameters() if p.grad is not None}


def test_one_graph_for_each_number_of_cells_and_each_batch_size() -> None:
    record = Recorder()
    net = model(record=record, mask=dict(type="RandomMask", mask_ratio=0.25, final_mask_ratio=0.75))
    for progress, images in ((0.0, 4), (1.0, 4), (0.0, 4), (0.0, 3)):
        net.mask.progress = progress
        net(batch()[:images], mode="loss")
    assert record.recorded == 2 * 3


def test_masks_of_an_image_and_a_whole_view_are_counted() -> None:
    net = model(masks_per_image=2, whole_view=True, record=Recorder())
    eager = model(False, masks_per_image=2, whole_view=True)
    eager.load_state_dict(net.state_dict())
    eager.teacher.load_state_dict(net.teacher.state_dict())
    torch.testing.assert_close(train(net, 2), train(eager, 2), rtol=1e-6, atol=1e-7)
    assert len(net._graphs._graphs) == 1


@pytest.mark.parametrize(
    "options",
    [
        dict(mask=dict(type="RandomMask", mask_ratio=[0.25, 0.75])),
        dict(cuda_graph=False),
    ],
)
def test_nothing_is_recorded_where_counts_vary_or_none_is_wanted(options: dict[str, Any]) -> None:
    record = Recorder()
    model(record=record, **options)(batch(), mode="loss")
    assert record.recorded == 0


def test_nothing_is_recorded_without_training_or_gradients() -> None:
    record = Recorder()
    net = model(record=record)
    with torch.no_grad():
        net(batch(), mode="loss")
    net.eval()(batch(), mode="loss")
    assert record.recorded == 0


def test_a_layer_that_is_watched_is_called() -> None:
    record = Recorder()
    net = model(record=record)
    seen = []
    net.student.decoder.register_forward_hook(lambda *call: seen.append(call))
    handle = net.student.densify["32"].register_forward_hook(lambda *call: seen.append(call))
    net(batch(), mode="loss")
    handle.remove()
    assert (record.recorded, len(seen)) == (0, 1)
    assert "hook" in net._graphs.refusal


def test_several_processes_train_without_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "get_world_size", lambda: 2)
    for choice, recorded in (("auto", 0), (True, 2)):
        record = Recorder()
        model(choice, record)(batch(), mode="loss")
        assert record.recorded == recorded


class TestMistakes:
    """A graph that cannot be made, or gives other numbers, costs the speed, never the training."""

    def failing(self, work: Work) -> Work:
        raise RuntimeError("operation not permitted when stream is capturing")

    def wrong(self, work: Work) -> Work:
        work()

        def replay() -> None:
            work()
            graph = work.__self__  # type: ignore[attr-defined]
            graph._gradients = tuple(None if g is None else g * 1.1 for g in graph._gradients)

        return replay

    @pytest.mark.parametrize(("record", "why"), [("failing", "capturing"), ("wrong", "gradients by 0.1")])
    def test_auto_goes_on_eagerly(self, record: str, why: str) -> None:
        eager, net = model(False), model(record=getattr(self, record))
        net.load_state_dict(eager.state_dict())
        net.teacher.load_state_dict(eager.teacher.state_dict())
        for found, expected in zip(train(net, 2), train(eager, 2), strict=True):
            assert torch.equal(found, expected)
        assert why in net._graphs.refusal

    @pytest.mark.parametrize("record", ["failing", "wrong"])
    def test_true_refuses(self, record: str) -> None:
        net = model(True, getattr(self, record))
        with refused(ValueError, "cuda-graph-impossible", "cuda_graph=True"):
            net(batch(), mode="loss")

    def test_true_needs_a_gpu_and_a_fixed_number_of_cells(self) -> None:
        with refused(ValueError, "cuda-graph-impossible", "cpu"):
            model(True)(batch(), mode="loss")
        with refused(ValueError, "cuda-graph-impossible", "0.25"):
            model(True, mask=dict(type="RandomMask", mask_ratio=[0.25, 0.75]))
        with refused(ValueError, "cuda-graph-unknown", "'always'"):
            model("always")


def test_another_place_of_the_weights_makes_another_graph() -> None:
    record = Recorder()
    net = model(record=record)
    net(batch(), mode="loss")
    net.student.densify["32"].projection.weight.data = net.student.densify["32"].projection.weight.data.clone()
    net(batch(), mode="loss")
    assert record.recorded == 4
    assert len(net._graphs._graphs) == 1


def test_a_copy_of_the_model_has_no_graphs() -> None:
    net = model(record=Recorder())
    net(batch(), mode="loss")
    assert net._graphs._graphs
    assert not copy.deepcopy(net)._graphs._graphs


@pytest.mark.parametrize(
    "objectives",
    [HGKD, dict(pooled=dict(type="PooledFeature")), dict(pixels=dict(type="PixelReconstruction")), dict(mgd=dict(type="MGD"))],
    ids=["hgkd", "pooled", "pixels", "mgd"],
)
def test_what_is_recorded_waits_for_nothing(objectives: dict[str, Any]) -> None:
    """A wait for the device cannot be part of a graph; on the CPU the count of the mask is checked, and nothing else read."""
    needs_teacher = "pixels" not in objectives
    net = model(False, objectives=objectives, teacher=dict(type=FakeTeacher.__name__) if needs_teacher else None)
    images, visible, outs = net._show(batch().float() / 255, None)
    with CountingOperations() as counted:
        terms = net._terms_of(net._student_sees(images, visible, net._known(4, 4)), outs)
        sum(weight * term.loss() for weight, term in terms.values()).backward()
    assert counted.waits == 1


def test_outputs_of_teachers_are_put_together_again() -> None:
    shared = TeacherOutput({1: torch.zeros(1), 2: torch.ones(1)}, (2, 2), cls=torch.full((1,), 2.0))
    other = TeacherOutput({}, (4, 4), decoded=torch.full((1,), 3.0))
    tensors, rebuilt = taken_apart({"a": shared, "b": shared, "c": other})
    assert [float(value) for value in tensors] == [0.0, 1.0, 2.0, 3.0] or sorted(map(float, tensors)) == [0.0, 1.0, 2.0, 3.0]
    found = rebuilt([value + 10 for value in tensors])
    assert {block: float(value) for block, value in found["b"].tokens.items()} == {1: 10.0, 2: 11.0}
    assert (float(found["a"].cls), found["a"].decoded, found["c"].grid) == (12.0, None, (4, 4))
    assert float(found["c"].decoded) == 13.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_cuda_graphs_train_as_the_eager_step(dtype: torch.dtype | None) -> None:
    found = {}
    for choice in (False, True):
        net = model(choice).cuda()
        wrapper = OptimWrapper(torch.optim.SGD(net.parameters(), 0.1))
        losses = []
        for step in range(6):
            torch.manual_seed(step)
            with torch.autocast("cuda", dtype or torch.float32, enabled=dtype is not None):
                terms = net(batch(step).cuda(), mode="loss")
            loss = sum(terms.values(), torch.zeros((), device="cuda"))
            wrapper.update_params(loss)
            losses.append(float(loss.detach()))
        assert len(net._graphs._graphs) == choice
        found[choice] = (losses, nn.utils.parameters_to_vector(net.parameters()).detach())
    limit = 1e-4 if dtype is None else 1e-2
    assert found[True][0] == pytest.approx(found[False][0], rel=limit)
    assert float((found[True][1] - found[False][1]).norm() / found[False][1].norm()) < limit
