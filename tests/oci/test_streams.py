"""Streams, threads and compression: the same bytes, errors in their place, no thread left running."""

import hashlib
import io
import os
import random
import subprocess
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overlayfs.oci import compression
from overlayfs.oci.compression import Compression, DecompressingReader, compressor, detect
from overlayfs.oci.streams import HashingReader, PeekableReader, Prefetch
from overlayfs.oci.tar_entry import ArchiveError

SAMPLE = random.Random(3).randbytes(1_500_000) + bytes(3_000_000) + b"text " * 200_000
PACKED = [Compression.GZIP, Compression.ZSTD]
PROGRAMS = {Compression.GZIP: "gzip", Compression.ZSTD: "zstd"}


def compressed(data: bytes, kind: Compression, step: int = 300_001) -> bytes:
    squeeze = compressor(kind)
    parts = [piece for at in range(0, len(data), step) for piece in squeeze.feed(data[at : at + step])]
    parts += squeeze.finish()
    squeeze.close()
    return b"".join(parts)


def expanded(data: bytes, kind: Compression, most: int = 1 << 16) -> bytes:
    source = io.BytesIO(data)
    stream = DecompressingReader(lambda size: source.read(min(size, most)), kind)
    return b"".join(iter(lambda: stream.read(1 << 20), b""))


@pytest.fixture(params=["fast", "plain"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With isal, and without it."""
    if request.param == "plain":
        monkeypatch.setattr(compression, "_isal", None)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("kind", Compression)
def test_what_was_packed_comes_back(kind: Compression) -> None:
    packed = compressed(SAMPLE, kind)
    assert detect(packed) is kind
    assert expanded(packed, kind) == SAMPLE
    if kind is not Compression.NONE:
        assert len(packed) < len(SAMPLE) // 2
        done = subprocess.run([PROGRAMS[kind], "-dc"], input=packed, capture_output=True, check=True)
        assert done.stdout == SAMPLE


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("kind", PACKED)
def test_bytes_depend_only_on_the_input(kind: Compression, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = compressed(SAMPLE, kind)
    assert compressed(SAMPLE, kind, 70_000) == packed
    for processors in (1, 7):
        monkeypatch.setattr(compression, "threads", lambda count=processors: count)
        assert compressed(SAMPLE, kind) == packed


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("kind", PACKED)
def test_several_members_are_one_stream(kind: Compression) -> None:
    one, two = (
        subprocess.run([PROGRAMS[kind], "-c"], input=part, capture_output=True, check=True).stdout
        for part in (SAMPLE[:1_600_000], SAMPLE[1_600_000:])
    )
    assert expanded(one + two, kind) == SAMPLE
    if kind is Compression.GZIP:
        assert expanded(one + two + bytes(2000), kind) == SAMPLE
    else:
        skipped = b"\x50\x2a\x4d\x18\x04\0\0\0skip"
        assert detect(skipped) is kind
        assert expanded(skipped + one + skipped + two, kind) == SAMPLE


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("kind", PACKED)
def test_damage_is_found(kind: Compression) -> None:
    packed = compressed(SAMPLE[:400_000], kind)
    for cut in (1, 5, len(packed) // 2, len(packed) - 1):
        with pytest.raises(ArchiveError, match="ends too early"):
            expanded(packed[:cut], kind)
    source = random.Random(5)
    for _ in range(20):
        at = source.randrange(12, len(packed))
        flipped = bytes([packed[at] ^ 1 << source.randrange(8)])
        with pytest.raises(ArchiveError):
            expanded(packed[:at] + flipped + packed[at + 1 :], kind)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("kind", PACKED)
def test_a_compression_bomb_is_read_in_small_pieces(kind: Compression) -> None:
    packed = compressed(bytes(64 << 20), kind)
    assert len(packed) < 1 << 20
    source = io.BytesIO(packed)
    stream = DecompressingReader(source.read, kind)
    sizes = [len(piece) for piece in iter(lambda: stream.read(1 << 20), b"")]
    assert sum(sizes) == 64 << 20
    assert max(sizes) <= 1 << 20


@settings(max_examples=40, deadline=None)
@given(st.lists(st.binary(max_size=2000), max_size=8), st.sampled_from(list(Compression)))
def test_any_input(parts: list[bytes], kind: Compression) -> None:
    squeeze = compressor(kind)
    packed = b"".join([piece for part in parts for piece in squeeze.feed(part)] + list(squeeze.finish()))
    squeeze.close()
    assert expanded(packed, kind, 7) == b"".join(parts)


@pytest.mark.parametrize(("start", "name"), [(b"\xfd7zXZ\0", "xz"), (b"BZh91", "bzip2"), (b"\x04\x22\x4d\x18", "lz4")])
def test_other_compressions_are_named(start: bytes, name: str) -> None:
    with pytest.raises(ArchiveError, match=f"compressed with {name}"):
        detect(start)


# --- threads


def test_pieces_come_in_order() -> None:
    with Prefetch(iter([b"%d" % number for number in range(1000)]), "test") as ahead:
        assert list(ahead) == [b"%d" % number for number in range(1000)]
        assert ahead.read(1) == b""


def test_a_failure_is_raised_in_its_place_in_the_stream() -> None:
    def fails() -> Iterator[bytes]:
        yield b"first"
        raise OSError(5, os.strerror(5))

    with Prefetch(fails(), "test") as ahead:
        assert ahead.read(1) == b"first"
        with pytest.raises(OSError, match="Input/output error"):
            ahead.read(1)


def test_prefetch_is_bounded_and_ends_with_its_reader() -> None:
    given, closed = [], threading.Event()

    def endless() -> Iterator[bytes]:
        try:
            while True:
                given.append(b"x")
                yield b"x"
        finally:
            closed.set()

    with Prefetch(endless(), "test") as ahead:
        assert ahead.read(1) == b"x"
    assert closed.wait(10)
    assert len(given) < 20
    assert not any(thread.name == "test" for thread in threading.enumerate())


def test_leaving_waits_for_the_piece_in_progress() -> None:
    begun, go_on, made = threading.Event(), threading.Event(), []

    def slow() -> Iterator[bytes]:
        begun.set()
        go_on.wait(10)
        made.append(b"x")
        yield b"x"

    with Prefetch(slow(), "test", join_timeout=None):
        assert begun.wait(10)
        threading.Timer(1.2, go_on.set).start()  # longer than the default join_timeout
    assert made == [b"x"]


def test_a_stream_knows_its_digest() -> None:
    stream = HashingReader(io.BytesIO(b"abc" * 1000).read)
    assert b"".join(stream.pieces()) == b"abc" * 1000
    assert stream.size == 3000
    assert stream.digest == "sha256:" + hashlib.sha256(b"abc" * 1000).hexdigest()


def test_peeked_bytes_are_read_again() -> None:
    source = io.BytesIO(b"abcdef")
    stream = PeekableReader(lambda size: source.read(min(size, 2)))
    assert stream.peek(3) == b"abc"
    assert stream.peek(100) == b"abcdef"
    assert b"".join(iter(lambda: stream.read(4), b"")) == b"abcdef"
