"""SHA-256 of files, against hashlib over the whole content."""

import hashlib
import io
import os

from hgkd.digests import ends_digest, file_digest, files_digest, stream_digest

CONTENT = bytes(range(256)) * 20_000  # more than one block


def test_digests_are_those_of_the_content(tmp_path):
    expected = hashlib.sha256(CONTENT).hexdigest()
    (tmp_path / "file").write_bytes(CONTENT)
    assert file_digest(tmp_path / "file") == stream_digest(io.BytesIO(CONTENT)) == expected


def test_a_part_of_a_stream_and_one_that_ends_early():
    stream = io.BytesIO(CONTENT)
    assert stream_digest(stream, 1000) == hashlib.sha256(CONTENT[:1000]).hexdigest()
    assert stream.tell() == 1000
    assert stream_digest(io.BytesIO(b"abc"), 10) == hashlib.sha256(b"abc").hexdigest()


def test_the_ends_of_a_file():
    for content in (b"", b"abc", b"abcdef", b"abcdefg", b"abcdefgh", CONTENT):
        expected = content if len(content) <= 8 else content[:4] + content[-4:]
        assert ends_digest(io.BytesIO(content), 4) == hashlib.sha256(expected).hexdigest()


def test_a_list_of_files_is_told_by_names_sizes_and_order():
    first = files_digest([("a", 1), ("b", 2)])
    assert first == hashlib.sha256(b"a\x001\0b\x002\0").hexdigest()
    assert len({first, files_digest([("b", 2), ("a", 1)]), files_digest([("a", 1), ("b", 3)])}) == 3


def test_names_of_files_are_bytes():
    assert files_digest([(os.fsdecode(b"\xe9"), 1)]) == hashlib.sha256(b"\xe9\x001\0").hexdigest()
