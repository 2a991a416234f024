"""Bugs that show only after some steps on the same tree."""

from collections.abc import Callable
from typing import Any
from unittest import mock

from overlayfs.fs import reseat
from overlayfs.fs.nodes import File
from overlayfs.tree.upper import Upper


def _no_opaque(self: Upper, dirfd: int, name: bytes) -> None:
    """Leave what lies below in sight."""


def _writer_kept(node: File, writer: int) -> None:
    """Let who has a file open go on writing into the layer."""


MUTANTS: dict[str, Callable[[], Any]] = {
    "a new directory is not made opaque": lambda: mock.patch.object(Upper, "set_opaque", _no_opaque),
    "a commit leaves writers their file": lambda: mock.patch.object(reseat, "_retire_writer", _writer_kept),
}
