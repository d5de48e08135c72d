"""Kernels and backends by measurement, under a clock that the test moves: what is chosen, kept, said, and left undisturbed."""

import json
import types

import pytest
import torch
import torch.nn.functional as F
from refusals import refused
from torch import Tensor, nn

from hgkd.diagnosis import environment
from hgkd.sparse import CellLayout, MaskedTensor, PackedTensor, choice, convert, kernels, measured, sparsify
from hgkd.sparse.choice import Choice, fastest_backend, fastest_kernel, kernels_mode, use_kernels
from hgkd.sparse.rectangle import RectangleTensor
from hgkd.sparse.tensor import SparseTensor
from hgkd.training.sync_norm import SyncedBatchNorm2d

CPU = torch.device("cpu")
VISIBLE = torch.tensor([[[True, False], [False, True]], [[True, True], [False, True]]])


class Clock:
    """Seconds that pass when a kernel, or the step of a backend, is computed, and at no other time."""

    def __init__(self, monkeypatch, steps: dict[str, float] | None = None, **kernel_ms: float) -> None:
        self.seconds, self.runs = 0.0, 0
        convolve, step = kernels.convolve, measured._step

        def slow_convolve(packed, weight, bias, groups, geometry, layout, kernel=None):
            self.seconds += kernel_ms.get(kernel, 0.0) / 1e3
            return convolve(packed, weight, bias, groups, geometry, layout, kernel)

        def slow_step(network, images):
            kind = {PackedTensor: "gather", MaskedTensor: "masked"}.get(type(images), "dense")
            self.seconds += (steps or {}).get(kind, 0.0) / 1e3
            self.runs += 1
            step(network, images)

        monkeypatch.setattr(kernels, "convolve", slow_convolve)
        monkeypatch.setattr(measured, "_step", slow_step)
        monkeypatch.setattr(measured, "now", lambda: self.seconds)
        monkeypatch.setattr(measured, "spent_by_processor", lambda: self.seconds)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64)
        self.deep, self.drop = nn.Conv2d(64, 8, 3, padding=1), nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        return self.deep(self.drop(F.relu(self.norm(self.stem(x)))))


@pytest.fixture(autouse=True)
def _measuring(monkeypatch, tmp_path):
    monkeypatch.setenv("HGKD_KERNELS", "measure")
    monkeypatch.setenv("HGKD_KERNELS_CACHE", str(tmp_path / "kernels"))


def net() -> nn.Module:
    torch.manual_seed(0)
    return sparsify(Net(), 4).train()


def pack(network: nn.Module, visible: Tensor = VISIBLE) -> SparseTensor:
    return network.pack(torch.randn(len(visible), 3, 8, 8), visible)


# --- the rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gather", "masked", "dense", "backend"),
    [
        (1.0, 4.0, 3.0, "gather"),
        (2.0, 1.0, 0.9, "masked"),
        (1.0, 0.97, 2.0, "gather"),  # a gain within the noise changes nothing
        (1.08, 1.04, 1.0, "masked"),  # but for the promise
        (1.04, 1.03, 1.0, "gather"),
        (1.3, 1.2, 1.0, "masked"),  # nothing keeps it
        (1.2, 1.3, 1.0, "gather"),
    ],
)
def test_which_backend(gather, masked, dense, backend) -> None:
    steps = {"gather": gather, "masked": masked, "dense": dense}
    found, why = fastest_backend(steps)
    assert found == backend
    assert steps[found] <= min(gather, masked) / 0.95, "never far from the fastest"
    kept = steps[found] <= 1.05 * dense
    assert kept or min(gather, masked) > 1.05 * dense, "never slower than dense by more than 5 % where that can be had"
    assert ("of the dense network's step" in why) == (not kept)


def test_which_kernel() -> None:
    assert fastest_kernel({"im2col": 1.0, "halo": 0.92}, "im2col") == "im2col"
    assert fastest_kernel({"im2col": 1.0, "halo": 0.8}, "im2col") == "halo"
    assert fastest_kernel({"halo": 5.0, "map": 6.0}, "im2col") == "halo", "the rule's did not run"


# --- measured -------------------------------------------------------------------------------------------------------------


def test_a_layer_is_computed_by_what_was_the_fastest(monkeypatch) -> None:
    Clock(monkeypatch, {"gather": 1, "masked": 2, "dense": 3}, halo=4.0, im2col=2.0, map=1.0)
    network = net()
    packed = pack(network)
    assert type(packed) is PackedTensor
    assert packed.cells.chosen == {"3 -> 64, 3x3/1 pad 1,1, 4 a side": "map", "64 -> 8, 3x3/1 pad 1,1, 4 a side": "map"}
    used = []
    convolve = kernels._kernel_for
    monkeypatch.setattr(kernels, "_kernel_for", lambda *a: used.append(convolve(*a)) or used[-1])
    network(packed)
    assert used == ["map", "map"]


def test_nothing_wins_by_a_lucky_run(monkeypatch) -> None:
    """The rule's kernel is judged by its fastest run, another by its slowest; one that is far too slow by its first."""
    seconds = {"rule": iter([2.0, 5.0, 3.0, 6.0]), "lucky": iter([1.0, 1.0, 4.0, 1.0]), "slow": iter([8.0])}
    passed = [0.0]

    def run(name):
        passed[0] += next(seconds[name])

    monkeypatch.setattr(measured, "now", lambda: passed[0])
    monkeypatch.setattr(measured, "spent_by_processor", lambda: passed[0])
    runs = {name: lambda name=name: run(name) for name in ("lucky", "slow", "rule")}
    found = measured._times(runs, CPU, 1e9, ("rule",))
    assert found == {"lucky": 4000.0, "slow": 8000.0, "rule": 3000.0}
    assert fastest_kernel(found, "rule") == "rule"
    seconds = {name: iter([2.0] * 9) for name in runs}
    assert measured._times(runs, CPU, passed[0] + 3, ("rule",)) == {}, "time was up while they warmed up"


def test_a_network_is_computed_masked_where_that_is_faster_with_equal_numbers(monkeypatch) -> None:
    Clock(monkeypatch, {"gather": 9, "masked": 2, "dense": 3})
    network, by_rule = net().double(), net().double()
    network.drop.p = by_rule.drop.p = 0.0
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    out = network(images, visible=VISIBLE)
    assert type(out) is MaskedTensor
    monkeypatch.setenv("HGKD_KERNELS", "rule")
    expected = by_rule(images, visible=VISIBLE)
    assert type(expected) is PackedTensor
    torch.testing.assert_close(out.to_dense(), expected.to_dense(), rtol=1e-12, atol=1e-12)


def test_measuring_leaves_the_training_as_it_was(monkeypatch) -> None:
    Clock(monkeypatch, {"gather": 1, "masked": 2, "dense": 3})
    network = net()
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    random = torch.get_rng_state()
    network.pack(torch.zeros(2, 3, 8, 8), VISIBLE)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in network.named_buffers())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_it_is_measured_once_and_kept_on_disk(monkeypatch) -> None:
    clock = Clock(monkeypatch, {"gather": 9, "masked": 2, "dense": 3})
    network = net()
    pack(network)
    first = clock.runs
    pack(network)
    assert type(pack(net())) is MaskedTensor, "another process, which reads the file"
    assert clock.runs == first
    file = choice.cache_file(CPU)
    assert torch.__version__.partition("+")[0] in file.name
    (kept,) = json.loads(file.read_text()).values()
    assert kept["step_ms"] == pytest.approx({"gather": 9.0, "masked": 2.0, "dense": 3.0})
    said = environment.check_kernels().found
    assert "masked, faster than gather (gather 9.0 ms, masked 2.0 ms, the whole image, dense: 3.0 ms)" in said
    file.write_text("{")
    pack(net())
    assert clock.runs > first, "what cannot be read is measured again"


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(monkeypatch, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HGKD_KERNELS_CACHE", str(tmp_path / "file/inside"))
    Clock(monkeypatch, {"gather": 9, "masked": 2, "dense": 3})
    assert type(pack(net())) is MaskedTensor


def test_only_a_training_step_measures(monkeypatch) -> None:
    clock = Clock(monkeypatch)
    pack(net().eval())
    with torch.no_grad():
        pack(net())
    pack(net().requires_grad_(False))
    monkeypatch.setattr(measured, "is_capturing", lambda device: True)
    pack(net())
    monkeypatch.setenv("HGKD_KERNELS", "rule")
    pack(net())
    assert clock.runs == 0
    assert not choice.kept(CPU)


def test_time_and_memory_that_run_out_leave_the_rules(monkeypatch) -> None:
    Clock(monkeypatch, {"gather": 9000, "masked": 1, "dense": 1}, halo=4000, im2col=4000, map=4000)
    network = net()
    assert type(pack(network)) is PackedTensor
    (found,) = network.sparse_choices.values()
    assert found.backend == "gather"
    assert not found.layers
    assert "by rule" in found.why

    def fails(network, images):
        raise torch.OutOfMemoryError("no memory for it")

    monkeypatch.setattr(measured, "_step", fails)
    network = net()
    network.double()
    assert type(network.pack(torch.zeros(2, 3, 8, 8, dtype=torch.float64), VISIBLE)) is PackedTensor
    assert "no memory for it" in next(iter(network.sparse_choices.values())).why


def test_a_backend_without_memory_is_left_out(monkeypatch) -> None:
    clock = Clock(monkeypatch, {"gather": 2})
    step = measured._step

    def fails(network, images):
        if type(images) is MaskedTensor:
            raise torch.OutOfMemoryError("no")
        step(network, images)

    monkeypatch.setattr(measured, "_step", fails)
    assert type(pack(net())) is PackedTensor
    assert clock.runs > 2


def one_of_two_processes(monkeypatch, rank: int, other_gathers: bool = True) -> list[object]:
    """Let this process seem to be one of two; returns what it tells the other.

    Args:
        other_gathers: the other's mask needs gathering.
    """
    told: list[object] = []

    def all_reduce(first, operation):
        assert operation == "min"
        first.clamp_(max=(1 - rank) if other_gathers else 2)

    def broadcast(objects, src, device=None):
        told.append(objects[0])
        if rank != src:
            objects[0] = ("the other's", Choice("masked", f"as process {src} says"))

    distributed = types.SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        get_world_size=lambda: 2,
        get_rank=lambda: rank,
        get_backend=lambda: "gloo",
        ReduceOp=types.SimpleNamespace(MIN="min"),
        all_reduce=all_reduce,
        broadcast_object_list=broadcast,
    )
    monkeypatch.setattr(measured.torch, "distributed", distributed)
    return told


def test_a_network_whose_norms_talk_is_not_measured_by_one_process(monkeypatch) -> None:
    """The others would wait for the choice, and it for their statistics."""
    clock, told = Clock(monkeypatch), one_of_two_processes(monkeypatch, 0)
    network = net()
    network.norm.__class__ = SyncedBatchNorm2d
    assert type(pack(network)) is PackedTensor
    assert clock.runs == len(told) == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_decides_for_all(rank, monkeypatch) -> None:
    clock = Clock(monkeypatch, {"gather": 9, "masked": 2, "dense": 3})
    told = one_of_two_processes(monkeypatch, rank)
    network = net()
    assert type(pack(network)) is MaskedTensor
    assert type(pack(network, torch.tensor([[[True, False], [True, True]]]))) is MaskedTensor, "other shapes, no second talk"
    assert len(told) == 1
    assert (told[0] is None) == bool(rank)
    assert bool(clock.runs) == (not rank)


@pytest.mark.parametrize("whole", [False, True])
def test_a_process_whose_mask_needs_no_gathering_takes_part_in_the_choice(whole, monkeypatch) -> None:
    """The other one needs it, and would wait for ever."""
    clock, told = Clock(monkeypatch), one_of_two_processes(monkeypatch, 0)
    network, said = net(), []
    visible = torch.tensor([[[True, whole], [True, whole]]])
    with use_kernels("measure", said.append):
        assert type(pack(network, visible)) is (MaskedTensor if whole else RectangleTensor)
    assert told == [None]
    assert clock.runs == 0
    assert "measured by process 1" in said[0], "it is the first process that logs"
    assert type(pack(network)) is MaskedTensor, "as process 1 says"


def test_where_no_process_gathers_the_rules_decide_without_a_word(monkeypatch) -> None:
    clock, told = Clock(monkeypatch), one_of_two_processes(monkeypatch, 0, other_gathers=False)
    network = net()
    assert type(pack(network, torch.ones(1, 2, 2, dtype=torch.bool))) is MaskedTensor
    assert type(pack(network)) is PackedTensor
    assert clock.runs == len(told) == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_the_only_process_that_gathers_decides_for_all(rank, monkeypatch) -> None:
    clock = Clock(monkeypatch, {"gather": 9, "masked": 2, "dense": 3})
    told = one_of_two_processes(monkeypatch, rank, other_gathers=False)
    assert type(pack(net())) is MaskedTensor
    ((_, choice),) = told
    assert choice.backend == "masked"
    assert clock.runs


# --- the option -----------------------------------------------------------------------------------------------------------


def test_how_kernels_are_chosen_is_an_option(monkeypatch) -> None:
    monkeypatch.delenv("HGKD_KERNELS")
    said: list[str] = []
    assert kernels_mode() == "rule"
    with use_kernels("measure", said.append):
        assert kernels_mode() == "measure"
        Clock(monkeypatch, {"gather": 1, "masked": 2, "dense": 3})
        pack(net())
        monkeypatch.setenv("HGKD_KERNELS", "torch")
        assert kernels_mode() == "torch", "the environment comes first"
        monkeypatch.delenv("HGKD_KERNELS")
    assert kernels_mode() == "rule"
    assert len(said) == 1
    assert "gather, faster than masked" in said[0]
    with refused(ValueError, "kernels-unknown", "fast", "measure"), use_kernels("fast"):
        pass


def test_other_backends_and_whole_images_are_never_measured(monkeypatch) -> None:
    clock = Clock(monkeypatch)
    pack(sparsify(Net(), 4, "masked").train())
    pack(net(), torch.ones_like(VISIBLE))
    assert clock.runs == 0


@pytest.mark.parametrize("kernel", ["im2col", "columns", "halo", "map"])
def test_every_candidate_computes_the_same(kernel) -> None:
    cells = CellLayout(VISIBLE, 4)
    cells.chosen = dict.fromkeys(["64 -> 8, 3x3/2 pad 1,1, 4 a side"], kernel)
    layer = nn.Conv2d(64, 8, 3, 2, 1).double()
    x = torch.randn(2, 64, 8, 8, dtype=torch.float64)
    found, expected = (layer(kind.pack(x, cells)).to_dense() for kind in (PackedTensor, MaskedTensor))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert convert.BACKENDS["gather"] is PackedTensor


@pytest.mark.parametrize("kernel", ["im2col", "columns", "map"])
def test_what_was_measured_is_not_for_a_layer_that_reflects(kernel) -> None:
    """Its key is that of a layer of the same shape that pads with zeros."""
    cells = CellLayout(VISIBLE, 4)
    cells.chosen = dict.fromkeys(["64 -> 8, 3x3/1 pad 1,1, 4 a side"], kernel)
    layer = nn.Conv2d(64, 8, 3, padding=1, padding_mode="reflect").double()
    x = torch.randn(2, 64, 8, 8, dtype=torch.float64)
    found, expected = (layer(kind.pack(x, cells)).to_dense() for kind in (PackedTensor, MaskedTensor))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
