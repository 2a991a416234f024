"""Bugs that show only after some steps on the same tree, with several clients, or after a long time."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from typing import Any
from unittest import mock

from overlayfs.fs import rotate
from overlayfs.fs.copyup_steps import StepContext
from overlayfs.fs.metadata import Attributes, Changes
from overlayfs.fs.nodes import File, Node, NodeTable
from overlayfs.fs.overlay import Overlay
from overlayfs.fuse.kernel.engine import KernelEngine
from overlayfs.fuse.locks import KeyedLocks
from overlayfs.tree.upper import Upper

NO_OPAQUE = "a new directory is not made opaque"
WRITER_KEPT = "a commit leaves writers their file"
DEAF = "look-ups are not given back"
NO_STANDBY = "nobody stands in for the loop"
CUTS_IGNORED = "a file that is cut keeps its tail"
NO_LOCK = "copy-ups of a file do not wait for each other"


def _no_opaque(self: Upper, dirfd: int, name: bytes) -> None:
    """Set no mark, so that lower directories show."""


def _writer_kept(node: File, writer: int) -> None:
    """Let open handles continue to write into the layer."""


@contextmanager
def _no_lock() -> Iterator[None]:
    @asynccontextmanager
    async def hold(self: KeyedLocks, *keys: int) -> AsyncIterator[None]:
        """Take no lock."""
        yield

    def begin(self: StepContext, node: Node) -> None:
        """Let other copy-ups begin as well."""

    with mock.patch.object(KeyedLocks, "hold", hold), mock.patch.object(StepContext, "begin", begin):
        yield


def _deaf(self: NodeTable, number: int, count: int) -> None:
    """Never reduce the look-up count of a number."""


def _cut(self: Overlay, node: Node, changes: Changes) -> Attributes:
    """Change anything but make a file shorter."""
    keeps = changes.size is not None and changes.size < self.attributes(node).size
    return _CHANGE(self, node, changes._replace(size=None) if keeps else changes)


_CHANGE = Overlay.set_attributes

MUTANTS: dict[str, Callable[[], Any]] = {
    NO_OPAQUE: lambda: mock.patch.object(Upper, "set_opaque", _no_opaque),
    WRITER_KEPT: lambda: mock.patch.object(rotate, "_retire_writer", _writer_kept),
    NO_LOCK: _no_lock,
    NO_STANDBY: lambda: mock.patch.object(KernelEngine, "_with_standby", return_value=nullcontext()),
    CUTS_IGNORED: lambda: mock.patch.object(Overlay, "set_attributes", _cut),
    DEAF: lambda: mock.patch.object(NodeTable, "forget", _deaf),
}
