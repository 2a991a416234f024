"""Trees that are deeper than the interpreter's stack, with paths too long for any system call."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from overlayfs import Overlay
from overlayfs.fs.config import StackConfig
from overlayfs.fs.metadata import Changes
from overlayfs.fs.nodes import Node
from tests.hostile import forms
from tests.support.requirements import need_root

DEPTH = 1500


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Overlay]:
    """A stack whose layer holds one file, below `DEPTH` directories."""
    need_root()
    lower, upper, work = (tmp_path / name for name in ("lower", "upper", "work"))
    for path in (lower, upper, work):
        path.mkdir()
    forms.deep(lower, DEPTH, b"d")
    opened = Overlay(StackConfig((os.fsencode(lower),), os.fsencode(upper), os.fsencode(work)))
    yield opened
    opened.close()
    subprocess.run(["rm", "-rf", lower, upper], check=True)  # pytest's own removal is recursive


def bottom(overlay: Overlay) -> Node:
    """The file."""
    at: Node = overlay.root
    for _ in range(DEPTH):
        at = overlay.lookup(at, b"d")
    return overlay.lookup(at, b"f")


def test_the_file_at_the_bottom_is_changed_and_made_durable(overlay: Overlay) -> None:
    """First the mode, by a copy without data, then the data."""
    file = bottom(overlay)
    overlay.set_attributes(file, Changes(mode=0o600))
    fh = overlay.files.open(file, os.O_RDWR)
    overlay.files.write(fh, 0, b"changed")
    overlay.fsync(fh)
    assert overlay.files.read(fh, 0, 100) == b"changed"
    overlay.files.release(fh)
