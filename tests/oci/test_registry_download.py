"""Property: whatever a registry and the disk do, the file is the blob in the end, or the pull fails."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from typing import NamedTuple, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overlayfs.errors import UserError
from overlayfs.oci.download import fetch
from overlayfs.oci.http_client import BrokenConnectionError, RetryPolicy
from overlayfs.oci.image_spec import OCI_LAYER_GZIP, Descriptor
from overlayfs.oci.registry import Repository

ATTEMPTS = 4


class Fault(NamedTuple):
    """A fault of one response, and where it occurs."""

    kind: str
    at: int = 0


class Answer:
    """A response as `fetch` reads it; after `sent` bytes the connection ends or breaks."""

    def __init__(self, status: int, headers: dict[str, str], sent: bytes, breaks: bool) -> None:
        self.status = status
        self.headers = headers
        self._sent = sent
        self._breaks = breaks

    def pieces(self) -> Iterator[bytes]:
        for start in range(0, len(self._sent), 7):
            yield self._sent[start : start + 7]
        if self._breaks:
            raise BrokenConnectionError("cut")

    def close(self) -> None:
        pass


class Registry:
    """Responds with a blob; the first responses have one fault each."""

    def __init__(self, blob: bytes, faults: list[Fault]) -> None:
        self._blob = blob
        self._faults = list(faults)
        self.asked = 0

    def blob(self, digest: str, start: int = 0) -> Answer:
        self.asked += 1
        fault = self._faults.pop(0) if self._faults else Fault("none")
        if fault.kind == "busy":
            raise BrokenConnectionError("no answer")
        if fault.kind == "no such part":
            return Answer(416, {}, b"", False)
        if fault.kind == "deaf":
            start = 0
        offset = min(start + fault.at, len(self._blob)) if fault.kind == "shifted" and start else start
        return self._answer(fault, start, offset)

    def _answer(self, fault: Fault, start: int, offset: int) -> Answer:
        rest = bytearray(self._blob[offset:])
        headers = {"Content-Range": f"bytes {offset}-{len(self._blob) - 1}/{len(self._blob)}"} if start else {}
        if fault.kind == "flip" and rest:
            rest[fault.at % len(rest)] ^= 1
        if fault.kind == "long":
            rest += bytes(fault.at + 1)
        if fault.kind != "silent about size":
            headers["Content-Length"] = str(len(rest))
        breaks = fault.kind in ("cut", "silent about size")
        return Answer(206 if start else 200, headers, bytes(rest[: fault.at] if breaks else rest), fault.kind == "cut")


KINDS = ("cut", "busy", "flip", "deaf", "shifted", "long", "no such part", "silent about size")
FAULTS = st.builds(Fault, st.sampled_from(KINDS), st.integers(0, 120))
BLOBS = st.binary(min_size=0, max_size=100)


def run(blob: bytes, faults: list[Fault], left: bytes) -> tuple[bytes, Registry]:
    """Fetch a blob into a file with what an earlier pull left; return the file's content."""
    registry = Registry(blob, faults)
    descriptor = Descriptor(OCI_LAYER_GZIP, "sha256:" + hashlib.sha256(blob).hexdigest(), len(blob))
    progress: list[int] = []
    with tempfile.TemporaryFile() as file:
        os.pwrite(file.fileno(), left, 0)
        retry = RetryPolicy(attempts=ATTEMPTS, wait=lambda _: None)
        fetch(cast(Repository, registry), descriptor, file.fileno(), retry, progress.append)
        assert all(done <= len(blob) for done in progress)
        return os.pread(file.fileno(), len(blob) + 200, 0), registry


@settings(max_examples=400, deadline=None)
@given(blob=BLOBS, faults=st.lists(FAULTS, max_size=2 * ATTEMPTS), left=st.binary(max_size=120), own=st.booleans())
def test_the_blob_or_nothing(blob: bytes, faults: list[Fault], left: bytes, own: bool) -> None:
    try:
        content, registry = run(blob, faults, blob[: len(left)] if own else left)
    except UserError:
        return
    assert content == blob and registry.asked <= 2 * ATTEMPTS


@settings(max_examples=200, deadline=None)
@given(blob=BLOBS, faults=st.lists(FAULTS, max_size=ATTEMPTS - 1), left=st.binary(max_size=120))
def test_a_few_broken_connections_are_survived(blob: bytes, faults: list[Fault], left: bytes) -> None:
    """Whatever the file contains before, as long as the registry does not send wrong bytes."""
    honest = [fault for fault in faults if fault.kind not in ("flip", "long")]
    content, _ = run(blob, honest, left)
    assert content == blob


def test_a_blob_of_nothing() -> None:
    assert run(b"", [], b"left")[0] == b""


def test_too_many_broken_connections() -> None:
    with pytest.raises(UserError, match="broke 4 times at byte 3 of blob"):
        run(b"0123456789", [Fault("cut", 1)] * 3 + [Fault("busy")], b"")
