"""Consequences that an interrupted call must not have, however rare: each of these has lost data once."""

import errno
import os
from contextlib import closing
from pathlib import Path
from unittest import mock

import pytest

from overlayfs import Overlay
from overlayfs.errors import oserror
from overlayfs.fs import Changes
from overlayfs.tree.layer import Entry, Layer
from tests.crash.harness import Fuse, Site, Stopped, abandon, write
from tests.support.requirements import need_root

CONTENT = b"content of a lower file" * 300


@pytest.fixture
def site(place: Path) -> Site:
    """A stack in which a file has a metadata-only copy in the upper."""
    need_root()
    site = Site(place / "site")
    overlay = site.open()
    overlay.set_attributes(overlay.lookup(overlay.root, b"file"), Changes(mode=0o600))
    overlay.close()
    return site


def read(overlay: Overlay) -> bytes:
    """Return the content of the file."""
    fh = overlay.files.open(overlay.lookup(overlay.root, b"file"), os.O_RDONLY)
    try:
        return overlay.files.read(fh, 0, 1 << 20)
    finally:
        overlay.files.release(fh)


@pytest.fixture
def emptied(site: Site) -> Site:
    """The stack after a kill in the middle of a truncation: the size is 0 and the mark is still there."""
    overlay = site.open()
    with Fuse(2), pytest.raises(Stopped):
        write(overlay, b"file", b"", flags=os.O_WRONLY | os.O_TRUNC)
    abandon(overlay)
    assert (site.place / "up" / "file").stat().st_size == 0
    assert os.getxattr(site.place / "up" / "file", "trusted.overlay.metacopy") == b""
    return site


def test_an_interrupted_truncation_has_not_happened(emptied: Site) -> None:
    """What is marked is as long as its data: after a power cut btrfs may have lost the size of any such copy."""
    with closing(emptied.open()) as overlay:
        assert overlay.attributes(overlay.lookup(overlay.root, b"file")).size == len(CONTENT)
        assert read(overlay) == CONTENT


def test_a_lost_size_does_not_cut_the_data(emptied: Site) -> None:
    """Not when it grows, not when it is written to, not over the next mount."""
    with closing(emptied.open()) as overlay:
        overlay.set_attributes(overlay.lookup(overlay.root, b"file"), Changes(size=len(CONTENT) + 10))
        assert read(overlay) == CONTENT + bytes(10)
        write(overlay, b"file", b"new")
    with closing(emptied.open()) as overlay:
        assert read(overlay) == b"new" + CONTENT[3:] + bytes(10)


def test_a_truncation_after_an_interrupted_one(emptied: Site) -> None:
    with closing(emptied.open()) as overlay:
        write(overlay, b"file", b"new", flags=os.O_WRONLY | os.O_TRUNC)
    with closing(emptied.open()) as overlay:
        assert read(overlay) == b"new"


def test_a_failed_look_up_leaves_no_partial_file(site: Site) -> None:
    """Found again by its inode, it would count as a file with data of its own: zeros."""
    with closing(site.open()) as overlay:
        probe = Layer.probe

        def fail_below(layer: Layer, path: bytes, name: bytes) -> Entry:
            if layer.index > 0:
                raise oserror(errno.EIO)
            return probe(layer, path, name)

        with mock.patch.object(Layer, "probe", fail_below), pytest.raises(OSError, match="Input/output"):
            overlay.lookup(overlay.root, b"file")
        assert read(overlay) == CONTENT


def test_data_that_does_not_fit_frees_its_space(site: Site) -> None:
    """The copy is tried again, completely, once there is space."""
    copied, before = site.place / "up" / "file", (site.place / "up" / "file").stat()

    def copy_half(source: int, target: int, size: int, *offsets: int) -> int:
        mock.patch.stopall()
        os.copy_file_range(source, target, size // 2, *offsets)
        raise oserror(errno.ENOSPC)

    with closing(site.open()) as overlay:
        mock.patch.object(os, "copy_file_range", copy_half).start()
        with pytest.raises(OSError, match="No space"):
            write(overlay, b"file", b"")
        found = copied.stat()
        assert (found.st_size, found.st_blocks) == (len(CONTENT), before.st_blocks)
        assert found.st_mtime_ns == before.st_mtime_ns
        write(overlay, b"file", b"")
        assert read(overlay) == CONTENT
