"""What must be synced before a file or directory counts as durable: the names that lead to it included.

A call is prepared on the loop, which knows the nodes, and made in any thread: it holds descriptors and values only.
"""

import errno
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from overlayfs import sysio
from overlayfs.errors import oserror
from overlayfs.fs.core import Core, Verbs
from overlayfs.fs.nodes import Dir, File, Node

_Sync = Callable[[int], None]


class SyncBarrier:
    """What every fsync waits for while a commit is not durable yet: until then no new change can be, either."""

    def __init__(self) -> None:
        self._finished = threading.Event()
        self._errno = 0

    def finish(self, error: OSError | None = None) -> None:
        """Let the waiting calls go on, or fail with the error of the commit."""
        self._errno = 0 if error is None else error.errno or errno.EIO
        self._finished.set()

    def wait(self) -> None:
        """Wait. In any thread but the one that calls `finish`."""
        self._finished.wait()
        if self._errno:
            raise oserror(self._errno)


class _Listed(NamedTuple):
    """A directory whose names are to be synced, what `changed` was when that was decided, and a descriptor of ours."""

    node: Dir
    changed: int
    fd: int


class Durability(Verbs):
    """Prepares the calls that make nodes of one overlay durable."""

    def __init__(self, core: Core) -> None:
        super().__init__(core)
        self.barrier: SyncBarrier | None = None

    def of_file(self, node: File, datasync: bool) -> Callable[[], None]:
        """Return the call that makes a file durable.

        A failed one is reported by every later one of the node until its last handle goes (C3 of docs/reliability.md).
        """
        if self._stack.config.volatile or not (node.in_upper or self.barrier or node.sync_error):
            return _nothing
        before, after = self._directories(node, [])
        try:
            fd, sync = self._real(node, datasync) if node.in_upper else (None, sysio.fsync)
        except BaseException:
            _close([*before, *after])
            raise
        barrier, unmarked = self.barrier, node.unmarked

        def call() -> None:
            try:
                _check(node, barrier)
                _sync_file(before, fd, sync, after)
            except OSError as error:
                node.sync_error = error.errno or errno.EIO
                raise
            finally:
                _close([*before, *after], fd)
            if node.unmarked == unmarked:
                node.unmarked = 0

        return call

    def _real(self, node: File, datasync: bool) -> tuple[int, _Sync]:
        """Return a descriptor of the upper's own object, and how to sync that: readers may have the lower one."""
        # The place of the data may be new, and only a mark says so, which fdatasync(2) would leave out.
        sync = sysio.fdatasync if datasync and node.data is None and not node.unmarked else sysio.fsync
        if node.writer is not None:
            return os.dup(node.writer), sync
        _, dirfd, name = self._objects.locate(node)
        flags = os.O_RDONLY | os.O_NONBLOCK
        try:
            return self._stack.dirfds.open_child(dirfd, name, flags), sync
        except PermissionError:  # rootless, and a mode that keeps the owner out
            return os.dup(self._upper.sync_fd), sysio.syncfs

    def of_directory(self, node: Dir) -> Callable[[], None]:
        """Return the call that makes the names in a directory durable, and those that lead to it."""
        if self._stack.config.volatile or not (node.in_upper or self.barrier):
            return _nothing
        before, after = self._directories(node, [] if node.removed else [node])
        barrier = self.barrier

        def call() -> None:
            try:
                if barrier is not None:
                    barrier.wait()
                _sync_file(before, None, sysio.fsync, after)
            finally:
                _close([*before, *after])

        return call

    def of_places_left(self, node: Node) -> Callable[[], None]:
        """Return the call that makes the places durable that a node has left, by itself or with its directory.

        To be made before the object is synced: that may make its name durable as well.
        """
        if self._stack.config.volatile:
            return _nothing
        listed = self._list(dict.fromkeys(left for _, each in _way_up(node) for left in each.unsynced_before()))

        def call() -> None:
            try:
                _sync_names(listed)
            finally:
                _close(listed)

        return call

    # --- which directories -----------------------------------------------------------------------------

    def _directories(self, node: Node, own: list[Dir]) -> tuple[list[_Listed], list[_Listed]]:
        """Return the directories to sync before a node, and those after it: `own`, and what leads to it."""
        wanted = dict.fromkeys((*own, *self._unsynced(node)))
        before = dict.fromkeys(left for each in wanted for left in each.unsynced_before())
        after = [each for each in wanted if each not in before]
        listed = self._list((*before, *after))
        return listed[: len(before)], listed[len(before) :]

    @staticmethod
    def _unsynced(node: Node) -> list[Dir]:
        """Return the directories that must be synced before the names that lead to a node are durable.

        Other changes in those directories do not matter here: a journal that comes and goes beside a
        database costs the database nothing.
        """
        found = {
            parent: None
            for child, parent in _way_up(node)
            if parent.in_upper and not parent.removed and parent.synced < child.appeared
        }
        return list(found)

    def _list(self, directories: Iterable[Dir]) -> list[_Listed]:
        listed: list[_Listed] = []
        try:
            listed.extend(map(self._listed, directories))
        except BaseException:
            _close(listed)
            raise
        return listed

    def _listed(self, directory: Dir) -> _Listed:
        fd = sysio.open_child(self._objects.locate(directory)[1], b"", os.O_RDONLY | os.O_DIRECTORY)
        return _Listed(directory, directory.changed, fd)


def _parents(node: Node) -> Iterator[Dir]:
    if isinstance(node, File):
        yield from (parent for parent, _ in node.names)
    elif isinstance(node, Dir) and node.parent is not None:
        yield node.parent


def _way_up(node: Node) -> Iterator[tuple[Node, Dir]]:
    """Yield each pair of a child and a parent of it from a node to the root.

    Not recursive: a tree may be deeper than the interpreter's stack.
    """
    walk, seen = [node], {node}
    while walk:
        child = walk.pop()
        for parent in _parents(child):
            yield child, parent
            if parent not in seen:
                seen.add(parent)
                walk.append(parent)


def _nothing() -> None:
    """There is nothing to make durable."""


def _check(node: File, barrier: SyncBarrier | None) -> None:
    if node.sync_error:
        raise oserror(node.sync_error)
    if barrier is not None:
        barrier.wait()


def _sync_file(before: list[_Listed], fd: int | None, sync: _Sync, after: list[_Listed]) -> None:
    """Sync what a file has left, then the file, then the names that lead to it."""
    _sync_names(before)
    if fd is not None:
        sync(fd)
    _sync_names(after)


def _sync_names(listed: list[_Listed]) -> None:
    for node, changed, fd in listed:
        sysio.fsync(fd)
        node.synced = changed


def _close(listed: list[_Listed], fd: int | None = None) -> None:
    for each in listed:
        sysio.close(each.fd)
    if fd is not None:
        sysio.close(fd)
