"""Order and randomness of the training images."""

import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmengine.registry import DATA_SAMPLERS
from PIL import Image
from refusals import refused
from torch.utils.data import DataLoader

from hgkd.data import EpochSampler, SeededIndex, UnlabelledImages
from hgkd.data.sampler import SeededBatch, epoch_seed, image_seed, in_arrays, mixed_seed, seeded


def sampler(count, rank=0, world=1, **options):
    made = EpochSampler(range(count), **{"seed": 0, **options})
    made.rank, made.world_size = rank, world
    return made


@given(count=st.integers(1, 60), world=st.integers(1, 5), epoch=st.integers(0, 3))
def test_processes_share_an_epoch_without_overlap(count, world, epoch):
    shares = []
    for rank in range(world):
        part = sampler(count, rank, world)
        part.set_epoch(epoch)
        shares.append([int(i) for i in part])
        assert len(shares[-1]) == len(part)
    shown = [shares[place % world][place // world] for place in range(len(shares[0]) * world)]
    assert sorted(shown[:count]) == list(range(count))
    assert shown[count:] == shown[: len(shown) - count]  # the rest repeats the beginning


@given(count=st.integers(1, 40), skip=st.integers(0, 40), world=st.integers(1, 3))
def test_a_skipped_part_is_left_out_once(count, skip, world):
    whole = list(sampler(count, 0, world))
    resumed = sampler(count, 0, world)
    resumed.skip = skip
    assert list(resumed) == whole[skip:]
    assert list(resumed) == whole
    assert len(resumed) == len(whole)


def test_order_depends_on_seed_and_epoch_only():
    orders = []
    for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0)):
        torch.manual_seed(len(orders))
        part = sampler(30, seed=seed)
        part.set_epoch(epoch)
        orders.append(list(part))
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3
    assert list(sampler(5, shuffle=False)) == [0, 1, 2, 3, 4]


def test_steps_of_two_processes_are_those_of_one_with_twice_the_batch():
    one = list(sampler(16))
    two = [list(sampler(16, rank, 2)) for rank in range(2)]
    for step in range(4):
        assert {*two[0][2 * step : 2 * step + 2], *two[1][2 * step : 2 * step + 2]} == {*one[4 * step : 4 * step + 4]}


def test_without_a_seed_one_is_drawn():
    assert EpochSampler(range(3)).seed >= 0


def test_registered():
    assert isinstance(DATA_SAMPLERS.build({"type": "hgkd.EpochSampler", "dataset": range(3), "seed": 1}), EpochSampler)


def test_a_seeded_index_is_a_number_that_travels():
    index = pickle.loads(pickle.dumps(SeededIndex(7, 2**62)))
    assert index == 7
    assert [10] * (index + 1) == [10] * 8
    assert index.epoch_seed == 2**62


@given(base=st.integers(0, 2**63 - 1), pair=st.lists(st.integers(0, 2**40), min_size=2, max_size=2, unique=True))
def test_no_two_images_share_a_seed(base, pair):
    seeds = [image_seed(base, index) for index in pair]
    assert seeds[0] != seeds[1]
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_mixed_seeds_depend_on_the_order():
    assert len({mixed_seed(1, 2), mixed_seed(2, 1), mixed_seed(1, 2, 0), mixed_seed(1, 3)}) >= 3
    assert mixed_seed(1, 2) == mixed_seed(1, 2)


def test_seeded_restores_the_generator():
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    first = torch.rand(1)
    with seeded(9):
        inside = torch.rand(1)
    with seeded(None):
        second = torch.rand(1)
    assert torch.equal(torch.cat([first, second]), expected)
    assert torch.equal(inside, torch.rand(1, generator=torch.Generator().manual_seed(9)))


@pytest.fixture
def dataset(tmp_path):
    for n in range(6):
        Image.effect_noise((40, 40), 80).convert("RGB").save(tmp_path / f"{n}.png")
    return UnlabelledImages(tmp_path, image_size=16, max_bad_share=0.5)


@pytest.mark.parametrize("options", [{"num_workers": 2}, {"num_workers": 1, "persistent_workers": True}])
def test_crops_do_not_depend_on_who_reads(dataset, options):
    part = EpochSampler(dataset, seed=3)
    loaders = [DataLoader(dataset, 2, sampler=part), DataLoader(dataset, 2, sampler=part, **options)]
    epochs = []
    for epoch in range(2):
        part.set_epoch(epoch)
        found = []
        for loader in loaders:
            torch.manual_seed(len(found))
            found.append({int(i): x for batch in loader for i, x in zip(batch["index"], batch["inputs"], strict=True)})
        assert all(torch.equal(found[0][i], found[1][i]) for i in range(6))
        epochs.append(found[0])
    assert not torch.equal(epochs[0][0], epochs[1][0])


def test_a_replacement_is_cropped_as_itself(dataset):
    base = epoch_seed(0, 0)
    own = dataset[SeededIndex(1, base)]["inputs"]
    Path(dataset.path(0)).write_bytes(b"")
    replaced = dataset[SeededIndex(0, base)]
    assert replaced["index"] == 1
    assert torch.equal(replaced["inputs"], own)


def test_repeated_augmentation_shows_copies_that_differ_and_as_many_images():
    sampler = EpochSampler(range(12), seed=3, repeats=3)
    sampler.set_epoch(1)
    shown = list(sampler)
    assert len(shown) == 12
    assert [shown[i : i + 3].count(shown[i]) for i in range(0, 12, 3)] == [3, 3, 3, 3]
    assert len(set(shown)) == 4
    assert len({image.epoch_seed for image in shown[:3]}) == 3
    once = EpochSampler(range(12), seed=3)
    once.set_epoch(1)
    assert shown[::3] == list(once)[:4]
    assert shown[0].epoch_seed == next(iter(once)).epoch_seed  # the first copy is the image of an ordinary epoch
    sampler.skip = 5
    assert [(int(i), i.epoch_seed) for i in sampler] == [(int(i), i.epoch_seed) for i in shown[5:]]
    with refused(ValueError, "count-not-positive", "1", "0"):
        EpochSampler(range(3), repeats=0)


def test_the_processes_share_the_copies_of_repeated_augmentation(monkeypatch):
    shown = []
    for rank in range(3):
        monkeypatch.setattr("hgkd.data.sampler.get_dist_info", lambda rank=rank: (rank, 3))
        shown.append(list(EpochSampler(range(9), seed=0, repeats=3)))
    assert shown[0] == shown[1] == shown[2]
    for images in zip(*shown, strict=True):
        assert len({image.epoch_seed for image in images}) == 3


@pytest.mark.parametrize("repeats", [1, 3])
def test_the_order_of_earlier_versions_is_kept(repeats):
    """Runs that were begun with them go on with the same images."""
    part = EpochSampler(range(50), seed=5, repeats=repeats)
    part.rank, part.world_size = 1, 2
    part.set_epoch(3)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(mixed_seed(5, 3, 0))).tolist()
    expected = []
    for place in range(25):
        image, copy = divmod(1 + place * 2, repeats)
        expected.append((order[image % 50], epoch_seed(5, 3, copy)))
    assert [(int(i), i.epoch_seed) for i in part] == expected
    assert part.copies(5, 9) == [(1 + place * 2) % repeats for place in range(5, 9)]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("repeats", [1, 3])
def test_batches_of_arrays_hold_the_same_images_and_seeds(drop_last, repeats):
    def pairs(batches):
        return [[(int(i), i.epoch_seed) for i in batch] for batch in batches]

    one, other = (EpochSampler(range(13), seed=4, repeats=repeats) for _ in range(2))
    plain = DataLoader(range(13), 4, sampler=one, drop_last=drop_last)
    arrays = in_arrays(DataLoader(range(13), 4, sampler=other, drop_last=drop_last))
    for epoch, skip in ((0, 0), (1, 4), (1, 0)):
        for part in (one, other):
            part.set_epoch(epoch)
            part.skip = skip
        expected, found = list(plain.batch_sampler), list(arrays.batch_sampler)
        assert all(isinstance(batch, SeededBatch) for batch in found)
        assert pairs(map(pickle.loads, map(pickle.dumps, found))) == pairs(expected)
        assert [len(batch) for batch in found] == [len(batch) for batch in expected]
    assert len(arrays) == len(plain)


def test_a_loader_with_another_sampler_stays_as_it_is():
    loader = in_arrays(DataLoader(range(5), 2, shuffle=True))
    assert sorted(int(i) for batch in loader for i in batch) == list(range(5))
    assert isinstance(next(iter(loader.batch_sampler)), list)


def test_a_batch_is_sent_as_two_arrays_whatever_its_length():
    """Objects an image would be made, pickled and counted by the process that trains."""
    sampler = EpochSampler(range(2000), seed=0)
    loader = in_arrays(DataLoader(range(2000), 1000, sampler=sampler))
    batch = next(iter(loader.batch_sampler))
    content = pickle.dumps(batch, protocol=4)
    assert content.count(b"SeededIndex") == 0
    assert len(content) < 1000 * 16 + 1000
    assert [int(i) for i in batch] == [int(i) for i in sampler][:1000]
