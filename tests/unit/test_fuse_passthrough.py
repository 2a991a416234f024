"""Passthrough: the kernel's rules are kept in any sequence of opens, copy-ups and closes."""

import errno
import os
import stat
import tempfile
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from overlayfs.fuse.kernel.passthrough import LARGE, STORED, Io, OpenFiles, Target
from overlayfs.fuse.kernel.protocol import Open


class FakeKernel:
    """The kernel's backing files by id, and the pages stored in it; it fails as the real one does."""

    def __init__(self, problem: int = 0) -> None:
        self.problem = problem
        self.backing_files: dict[int, int] = {}  # id -> descriptor
        self.next = 1
        self.stored: list[tuple[int, bytes]] = []

    # BackingFiles

    def open(self, fd: int) -> int:
        if self.problem:
            raise OSError(self.problem, os.strerror(self.problem))
        self.backing_files[self.next] = fd
        self.next += 1
        return self.next - 1

    def close(self, number: int) -> None:
        del self.backing_files[number]  # KeyError: closed twice

    # Connection

    def store(self, nodeid: int, data: bytes) -> None:
        self.stored.append((nodeid, data))


def open_files(kernel: FakeKernel, io: Io = Io.AUTO, keep_cache: bool = True, passes: bool = True) -> OpenFiles:
    """Open files over a fake kernel."""
    return OpenFiles(kernel, kernel if passes else None, io, keep_cache)  # type: ignore[arg-type]  # stands for both


@pytest.fixture
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes], int]:
    """Makes descriptors of small files."""
    made = []

    def make(content: bytes) -> int:
        with tempfile.TemporaryFile() as file:
            file.write(content)
            file.flush()
            made.append(os.dup(file.fileno()))
        return made[-1]

    return make


def target(nodeid: int = 5, upper: bool = True, writes: bool = True, size: int = 0, mode: int = 0o644) -> Target:
    """The target of an open, without a file."""
    return Target(nodeid, -1, upper, writes, size, stat.S_IFREG | mode)


def test_opens_of_an_upper_file_share_one_backing_id() -> None:
    kernel = FakeKernel()
    opened = open_files(kernel)
    assert opened.open(target()) == (Open.PASSTHROUGH, 1)
    assert opened.open(target(writes=False)) == (Open.PASSTHROUGH, 1)
    opened.close(5, True)
    assert kernel.backing_files
    opened.close(5, True)
    assert not kernel.backing_files
    assert opened.open(target()) == (Open.PASSTHROUGH, 2)
    opened.close(5, True)


def test_opens_beside_a_cached_open_are_cached() -> None:
    opened = open_files(FakeKernel())
    assert opened.open(target(writes=False, upper=False))[1] == 0
    assert opened.open(target())[1] == 0
    opened.close(5, False)
    assert opened.open(target())[1] == 0
    opened.close(5, False)
    opened.close(5, False)
    assert opened.open(target())[1] != 0


@pytest.mark.parametrize("size", [LARGE, LARGE * 100])
def test_large_files_of_layers(size: int) -> None:
    reader = target(upper=False, writes=False, size=size)
    assert open_files(FakeKernel()).open(reader)[1] == 0
    assert open_files(FakeKernel(), Io.PASSTHROUGH).open(reader)[1] != 0
    assert open_files(FakeKernel(), Io.CACHED).open(reader)[1] == 0


def test_a_writer_never_gets_the_file_of_a_layer() -> None:
    kernel = FakeKernel()
    opened = open_files(kernel, Io.PASSTHROUGH)
    reader = target(upper=False, writes=False, size=LARGE)
    assert opened.open(reader)[1] != 0
    assert opened.is_stale(5, in_upper=True)  # for readers too: they would see the old data for ever
    opened.close(5, True)
    assert not kernel.backing_files and not opened.is_stale(5, in_upper=True)
    assert opened.open(target(size=LARGE))[1] != 0


@pytest.mark.parametrize("mode", [0o4755, 0o2755, 0o6777])
def test_set_id_files_are_cached(mode: int) -> None:
    """In passthrough any write would clear the bits, even one by root, which keeps them on a local file system."""
    assert open_files(FakeKernel()).open(target(mode=mode))[1] == 0


@pytest.mark.parametrize("problem", [errno.EPERM, errno.ELOOP, errno.EOPNOTSUPP])
def test_a_refused_backing_file_is_not_tried_again(problem: int) -> None:
    kernel = FakeKernel(problem)
    opened = open_files(kernel)
    assert opened.open(target())[1] == 0
    kernel.problem = 0
    assert opened.open(target(6))[1] == 0


def test_content_is_stored_once_and_kept(small: Callable[[bytes], int]) -> None:
    kernel = FakeKernel()
    opened = open_files(kernel)
    reader = Target(5, small(b"content"), False, False, 7, stat.S_IFREG | 0o644)
    for _ in range(3):
        assert opened.open(reader) == (Open.KEEP_CACHE, 0)
        opened.close(5, False)
    assert kernel.stored == [(5, b"content")]
    opened.forget(5)
    opened.open(reader)
    assert kernel.stored == [(5, b"content")] * 2


@pytest.mark.parametrize("size", [0, STORED + 1])
def test_empty_and_large_files_are_not_stored(small: Callable[[bytes], int], size: int) -> None:
    kernel = FakeKernel()
    open_files(kernel).open(Target(5, small(b"x" * size), False, False, size, stat.S_IFREG))
    assert not kernel.stored


def test_a_file_that_is_shorter_than_its_size_is_not_stored(small: Callable[[bytes], int]) -> None:
    kernel = FakeKernel()
    open_files(kernel).open(Target(5, small(b"x"), False, False, 2, stat.S_IFREG))
    assert not kernel.stored


def test_pages_from_before_a_passthrough_write_are_dropped_once(small: Callable[[bytes], int]) -> None:
    kernel = FakeKernel()
    opened = open_files(kernel)
    opened.open(target(size=STORED * 2))
    opened.close(5, True)
    reader = Target(5, small(b""), True, False, STORED + 1, stat.S_IFREG)
    assert opened.open(reader)[0] == 0
    opened.close(5, False)
    assert opened.open(reader)[0] == Open.KEEP_CACHE
    opened.close(5, False)


def test_content_is_stored_again_after_a_passthrough_write(small: Callable[[bytes], int]) -> None:
    kernel = FakeKernel()
    opened = open_files(kernel)
    reader = Target(5, small(b"old"), True, False, 3, stat.S_IFREG)
    opened.open(reader)
    opened.close(5, False)
    opened.open(target())
    opened.close(5, True)
    opened.open(Target(5, small(b"new"), True, False, 3, stat.S_IFREG))
    assert kernel.stored == [(5, b"old"), (5, b"new")]


def test_nothing_is_kept_where_layers_change_from_outside(small: Callable[[bytes], int]) -> None:
    kernel = FakeKernel()
    opened = open_files(kernel, keep_cache=False, passes=False)
    assert opened.open(Target(5, small(b"x"), False, False, 1, stat.S_IFREG)) == (0, 0)
    assert not kernel.stored


class Machine(RuleBasedStateMachine):
    """Files that are opened, copied up and closed in any order."""

    handles = Bundle("handles")

    @initialize(io=st.sampled_from(list(Io)), sizes=st.lists(st.sampled_from([0, 10, LARGE]), min_size=3, max_size=3))
    def begin(self, io: Io, sizes: list[int]) -> None:
        self.kernel = FakeKernel()
        self.opened = open_files(self.kernel, io)
        self.sizes = sizes
        self.in_upper = [False, False, False]
        self.number = [10, 20, 30]  # current node ids
        self.fd_of: dict[int, tuple[int, bool]] = {}  # descriptor -> which file, and whether it is the upper one
        self.modes: dict[int, list[tuple[bool, int, bool]]] = {}  # opens by node id: (through, backing, lower)

    @rule(target=handles, which=st.integers(0, 2), writes=st.booleans(), set_id=st.booleans())
    def open(self, which: int, writes: bool, set_id: bool) -> tuple[int, bool, int, bool]:
        self.in_upper[which] |= writes  # an open for writing copies up
        upper = self.in_upper[which]
        fd = 1000 + which * 2 + upper
        mode = stat.S_IFREG | (0o4755 if set_id else 0o644)
        if self.opened.is_stale(self.number[which], upper):
            assert upper and any(lower for _, _, lower in self.modes[self.number[which]])
            self.number[which] += 1  # the kernel looks the name up and gets a new node id
        number = self.number[which]
        assert not self.opened.is_stale(number, upper)
        flags, backing = self.opened.open(Target(number, fd, upper, writes, self.sizes[which], mode, direct=True))
        through = bool(backing)
        assert bool(flags & Open.PASSTHROUGH) == through
        assert not (writes and through and not upper), "a writer got a layer's file"
        if through:
            assert self.kernel.backing_files[backing] == fd, "it reads another file than it opened"
        self.modes.setdefault(number, []).append((through, backing, not upper))
        return number, through, backing, not upper

    @rule(which=st.integers(0, 2))
    def copy_up(self, which: int) -> None:
        self.in_upper[which] = True

    @rule(handle=consumes(handles))
    def close(self, handle: tuple[int, bool, int, bool]) -> None:
        number, through, backing, lower = handle
        self.opened.close(number, through)
        self.modes[number].remove((through, backing, lower))
        if not self.modes[number]:
            del self.modes[number]

    @invariant()
    def one_mode_and_one_backing_file_each(self) -> None:
        for opens in getattr(self, "modes", {}).values():
            assert len({through for through, _, _ in opens}) == 1, "a cached and a passthrough open side by side"
            assert len({backing for _, backing, _ in opens}) == 1, "two backing files of one inode"

    @invariant()
    def ids_live_as_long_as_their_opens(self) -> None:
        if hasattr(self, "kernel"):
            used = {backing for opens in self.modes.values() for through, backing, _ in opens if through}
            assert set(self.kernel.backing_files) == used
            assert all(number in self.opened.modes for number in self.modes)


Machine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestMachine = Machine.TestCase
