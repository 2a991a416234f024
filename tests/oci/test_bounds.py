"""Archives that would fill memory if their sizes were trusted: imported or refused within a fixed bound."""

import gzip
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import program
from tests.oci import archives
from tests.oci.archives import END, directory, file, header, pax

pytestmark = [pytest.mark.root, pytest.mark.slow]

# A process inherits the peak memory of its parent, so a small process is started between it and the tests.
MEASURE = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""
LIMIT = 256 << 10  # KiB of resident memory, the interpreter included


def _long_headers() -> Iterator[bytes]:
    for number in range(20):
        yield pax({b"comment": bytes(7 << 20)}) + file(b"f%d" % number)
    yield END


def _many_files() -> Iterator[bytes]:
    for number in range(100):
        yield b"".join(file(b"d%d/f%d" % (number, each)) for each in range(200))
    yield END


def _many_deletions() -> Iterator[bytes]:
    for number in range(40):
        yield b"".join(file(b"never%d/.wh.f%d" % (number, each)) for each in range(1000))
    yield END


def _many_links() -> Iterator[bytes]:
    yield file(b"f")
    for number in range(30):
        yield b"".join(archives.hardlink(b"l%d-%d" % (number, each), b"f") for each in range(1000))
    yield END


def _many_opaque_marks() -> Iterator[bytes]:
    yield directory(b"d") + b"".join(file(b"d/f%d" % each) for each in range(1000))
    for _ in range(100):
        yield file(b"d/.wh..wh..opq") * 1000
    yield END


def _zeros() -> Iterator[bytes]:
    yield header(b"zeros", size=b"\x80" + (1 << 30).to_bytes(11, "big"))
    for _ in range(1024):
        yield bytes(1 << 20)
    yield END


def _long_map() -> Iterator[bytes]:
    numbers = b"".join(b"%d\n1\n" % (2 * number) for number in range(200_000))
    table = archives.padded(b"200000\n" + numbers)
    records = {b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0", b"GNU.sparse.realsize": b"400000"}
    yield pax(records) + file(b"sparse", table + b"x" * 200_000) + END


ARCHIVES: dict[str, Callable[[], Iterator[bytes]]] = {
    "long headers": _long_headers,
    "many files": _many_files,
    "many deletions in directories that never come": _many_deletions,
    "many links": _many_links,
    "many opaque marks": _many_opaque_marks,
    "a gigabyte of zeros": _zeros,
    "a sparse file of many pieces": _long_map,
}


def packed(pieces: Iterator[bytes]) -> bytes:
    stream = io.BytesIO()
    with gzip.GzipFile(fileobj=stream, mode="wb", compresslevel=1, mtime=0) as target:
        for piece in pieces:
            target.write(piece)
    return stream.getvalue()


@pytest.mark.parametrize("name", ARCHIVES)
def test_memory_is_bounded(place: Path, name: str) -> None:
    (place / "layer.tar.gz").write_bytes(packed(ARCHIVES[name]()))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, program("overlayfs"), "import", "-q", "layer.tar.gz", "-t", "x"],
        cwd=place,
        env={**os.environ, "OVERLAYFS_STORE": str(place / "store")},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < LIMIT
