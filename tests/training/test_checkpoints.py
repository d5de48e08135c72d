"""Seals, and the hook that writes checkpoints."""

import zipfile

import pytest
import torch
from refusals import refused

from hgkd.errors import WeightsError
from hgkd.training import RunCheckpointHook
from hgkd.weights import find_last_checkpoint
from hgkd.weights.run_folder import is_damaged, known_checkpoints, read_run_checkpoint, seal


@pytest.fixture
def sealed(tmp_path):
    path = tmp_path / "epoch_1.pth"
    torch.save({"meta": {"iter": 3}, "state_dict": {"a": torch.randn(300)}, "message_hub": {}}, path)
    seal(path)
    return path


def test_a_sealed_file_is_read_as_ever(sealed):
    assert not is_damaged(sealed)
    found = read_run_checkpoint(sealed)
    assert found["meta"] == {"iter": 3}
    assert torch.equal(torch.load(sealed, weights_only=True)["state_dict"]["a"], found["state_dict"]["a"])
    assert torch.equal(torch.load(sealed, weights_only=True, mmap=True)["state_dict"]["a"], found["state_dict"]["a"])
    with zipfile.ZipFile(sealed) as archive:
        assert archive.comment.startswith(b"hgkd-sha256:")
        assert archive.testzip() is None


def test_every_flipped_byte_is_found(sealed):
    content = sealed.read_bytes()
    # all but the words of the seal itself, without which the file counts as unsealed
    places = [*range(0, len(content) - 76, 37), len(content) - 1]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 0x40
        sealed.write_bytes(bytes(damaged))
        assert is_damaged(sealed), place
    with refused(WeightsError, "file-hash-differs"):
        read_run_checkpoint(sealed)


def test_what_cannot_be_sealed(sealed, tmp_path):
    with refused(ValueError, "seal-of-other-file", "torch.save"):
        seal(sealed)  # twice
    (tmp_path / "x").write_bytes(b"short")
    with refused(ValueError, "seal-of-other-file", "torch.save"):
        seal(tmp_path / "x")


def test_files_without_a_seal_are_not_judged(tmp_path):
    (tmp_path / "x").write_bytes(b"")
    assert not is_damaged(tmp_path / "x")


def test_folders_of_before_have_a_note_only(sealed, tmp_path):
    (tmp_path / "last_checkpoint").write_text("/moved/since/epoch_1.pth")
    assert known_checkpoints(tmp_path) == ["epoch_1.pth"]
    assert find_last_checkpoint(tmp_path) == str(sealed)


def test_a_first_checkpoint_that_was_never_completed_is_nothing_to_resume(tmp_path):
    (tmp_path / "checkpoints.txt").write_text("epoch_1.pth\n")
    assert find_last_checkpoint(tmp_path) is None
    assert find_last_checkpoint(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        ({"max_keep_ckpts": 1}, ("too-few-kept-checkpoints", "max_keep_ckpts", "2", "1")),
        ({"every_steps": 0}, ("interval-not-positive", "every_steps", "0")),
        ({"every_minutes": -1}, ("interval-not-positive", "every_minutes", "-1")),
    ],
)
def test_refusals(options, refusal):
    with refused(ValueError, *refusal):
        RunCheckpointHook(**options)
