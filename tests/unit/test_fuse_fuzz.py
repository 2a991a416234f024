"""Requests that no kernel sends do not stop the kernel engine; tests.unit.fuse_fuzz runs longer campaigns."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from overlayfs import Overlay, StackConfig
from overlayfs.fuse.kernel.passthrough import Io
from overlayfs.fuse.kernel.protocol import LAYOUTS, OUT_HEADER, Op
from tests.support.disks import disk
from tests.unit.fuse_fuzz import OFFERED, Recorder, campaign

pytestmark = pytest.mark.root

COUNT = int(os.environ.get("OVERLAYFS_FUZZ_REQUESTS", "3000"))
MOST = 200 << 20  # bytes of memory that the largest of these requests may take


@pytest.fixture
def small_disk(place: Path) -> Iterator[Path]:
    """A small tmpfs, where no file can become large."""
    with disk("tmpfs", place / "disk", 32 << 20) as point:
        yield point


@pytest.mark.parametrize(
    ("seed", "io", "timeout"), [(1, Io.PASSTHROUGH, None), (2, Io.CACHED, None), (3, Io.AUTO, 0.0)]
)
def test_every_request_is_answered_once(small_disk: Path, seed: int, io: Io, timeout: float | None) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    found = campaign(small_disk, COUNT, seed, io, timeout)
    assert found.wrong == []
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before < MOST
    assert found.answers["success"] > COUNT // 5, "most requests make no sense: nothing is tested"


def test_requests_before_the_handshake_are_refused(place: Path) -> None:
    overlay = Overlay(StackConfig(lower=(os.fsencode(place),)))
    engine = Recorder(overlay, Io.AUTO, None)
    engine.put(Op.LOOKUP, 5, 1, b"name\0")
    (refusal,) = engine.replies
    assert OUT_HEADER.unpack(refusal) == (OUT_HEADER.size, -5, 5)
    engine.put(Op.INIT, 7, 0, LAYOUTS["init_in"].pack(8, 0, 0, 0, 0))  # it sends INIT again with our version
    engine.put(Op.INIT, 9, 0, LAYOUTS["init_in"].pack(7, 45, 0, OFFERED & 0xFFFF_FFFF, 0)[:16])  # before Linux 5.17
    later = [LAYOUTS["init_out"].decode(reply[OUT_HEADER.size :]) for reply in engine.replies[1:]]
    assert [(each["major"], each["minor"], each["flags2"]) for each in later] == [(7, 0, 0), (7, 45, 0)]
    engine.detach()
    overlay.close()
