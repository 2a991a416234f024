"""How files are open: the kernel's rules for passthrough hold after any sequence of opens, copy-ups and closes."""

import errno
import os
import stat
import tempfile
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from overlayfs.fuse.kernel.passthrough import LARGE, STORED, Io, OpenFiles, ReplacedError, Target
from overlayfs.fuse.kernel.protocol import Open


class FakeKernel:
    """What the kernel would hold: backing ids by file, and pages given to it; it fails as the real one does."""

    def __init__(self, problem: int = 0) -> None:
        self.problem = problem
        self.backing_files: dict[int, int] = {}  # id -> descriptor
        self.next = 1
        self.stored: list[tuple[int, bytes]] = []

    # Backings

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
    """The real thing over a fake kernel."""
    return OpenFiles(kernel, kernel if passes else None, io, keep_cache)  # type: ignore[arg-type]


@pytest.fixture
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes], int]:
    """Makes descriptors of small files; all are closed by the end of the process' test directory."""
    made = []

    def make(content: bytes) -> int:
        with tempfile.TemporaryFile() as file:
            file.write(content)
            file.flush()
            made.append(os.dup(file.fileno()))
        return made[-1]

    return make


def target(nodeid: int = 5, upper: bool = True, writes: bool = True, size: int = 0, mode: int = 0o644) -> Target:
    """What is opened, without a file behind it."""
    return Target(nodeid, -1, upper, writes, size, stat.S_IFREG | mode)


def test_writers_of_the_upper_go_past_us_by_one_id() -> None:
    kernel = FakeKernel()
    ways = open_files(kernel)
    assert ways.open(target()) == (True, Open.PASSTHROUGH, 1)
    assert ways.open(target(writes=False)) == (True, Open.PASSTHROUGH, 1)
    ways.close(5, True)
    assert kernel.backing_files
    ways.close(5, True)
    assert not kernel.backing_files
    assert ways.open(target()) == (True, Open.PASSTHROUGH, 2)
    ways.close(5, True)


def test_who_comes_while_a_cached_open_lives_is_cached() -> None:
    ways = open_files(FakeKernel())
    assert ways.open(target(writes=False, upper=False))[0] is False
    assert ways.open(target())[0] is False
    ways.close(5, False)
    assert ways.open(target())[0] is False
    ways.close(5, False)
    ways.close(5, False)
    assert ways.open(target())[0] is True


@pytest.mark.parametrize("size", [LARGE, LARGE * 100])
def test_large_files_of_layers(size: int) -> None:
    reader = target(upper=False, writes=False, size=size)
    assert open_files(FakeKernel()).open(reader)[0] is False
    assert open_files(FakeKernel(), Io.PASSTHROUGH).open(reader)[0] is True
    assert open_files(FakeKernel(), Io.CACHED).open(reader)[0] is False


def test_a_writer_never_gets_the_file_of_a_layer() -> None:
    kernel = FakeKernel()
    ways = open_files(kernel, Io.PASSTHROUGH)
    reader = target(upper=False, writes=False, size=LARGE)
    assert ways.open(reader)[0] is True
    with pytest.raises(ReplacedError):
        ways.open(target(size=LARGE))
    with pytest.raises(ReplacedError):  # readers would see the old data for ever
        ways.open(target(writes=False, size=LARGE))
    ways.close(5, True)
    assert not kernel.backing_files and ways.open(target(size=LARGE))[0] is True


@pytest.mark.parametrize("mode", [0o4755, 0o2755, 0o6777])
def test_set_id_files_go_through_us(mode: int) -> None:
    """The kernel would drop the bits at any write past us, root's too, which keeps them on a local file system."""
    assert open_files(FakeKernel()).open(target(mode=mode))[0] is False


@pytest.mark.parametrize("problem", [errno.EPERM, errno.ELOOP, errno.EOPNOTSUPP])
def test_where_the_kernel_cannot_it_is_not_asked_again(problem: int) -> None:
    kernel = FakeKernel(problem)
    ways = open_files(kernel)
    assert ways.open(target())[0] is False
    kernel.problem = 0
    assert ways.open(target(6))[0] is False


def test_content_is_given_once_and_kept(small: Callable[[bytes], int]) -> None:
    kernel = FakeKernel()
    ways = open_files(kernel)
    reader = Target(5, small(b"content"), False, False, 7, stat.S_IFREG | 0o644)
    for _ in range(3):
        assert ways.open(reader) == (False, Open.KEEP_CACHE, 0)
        ways.close(5, False)
    assert kernel.stored == [(5, b"content")]
    ways.forget(5)
    ways.open(reader)
    assert kernel.stored == [(5, b"content")] * 2


@pytest.mark.parametrize("size", [0, STORED + 1])
def test_nothing_and_large_files_are_not_given(small: Callable[[bytes], int], size: int) -> None:
    kernel = FakeKernel()
    open_files(kernel).open(Target(5, small(b"x" * size), False, False, size, stat.S_IFREG))
    assert not kernel.stored


def test_a_file_that_is_shorter_than_its_size_is_not_given(small: Callable[[bytes], int]) -> None:
    kernel = FakeKernel()
    open_files(kernel).open(Target(5, small(b"x"), False, False, 2, stat.S_IFREG))
    assert not kernel.stored


def test_pages_from_before_a_write_past_us_are_dropped_once(small: Callable[[bytes], int]) -> None:
    kernel = FakeKernel()
    ways = open_files(kernel)
    ways.open(target(size=STORED * 2))
    ways.close(5, True)
    reader = Target(5, small(b""), True, False, STORED + 1, stat.S_IFREG)
    assert ways.open(reader)[1] == 0
    ways.close(5, False)
    assert ways.open(reader)[1] == Open.KEEP_CACHE
    ways.close(5, False)


def test_content_is_given_anew_after_a_write_past_us(small: Callable[[bytes], int]) -> None:
    kernel = FakeKernel()
    ways = open_files(kernel)
    reader = Target(5, small(b"old"), True, False, 3, stat.S_IFREG)
    ways.open(reader)
    ways.close(5, False)
    ways.open(target())
    ways.close(5, True)
    ways.open(Target(5, small(b"new"), True, False, 3, stat.S_IFREG))
    assert kernel.stored == [(5, b"old"), (5, b"new")]


def test_where_others_change_the_layers_nothing_is_kept(small: Callable[[bytes], int]) -> None:
    kernel = FakeKernel()
    ways = open_files(kernel, keep_cache=False, passes=False)
    assert ways.open(Target(5, small(b"x"), False, False, 1, stat.S_IFREG)) == (False, 0, 0)
    assert not kernel.stored


class Machine(RuleBasedStateMachine):
    """Files that are opened, copied up and closed in any order."""

    handles = Bundle("handles")

    @initialize(io=st.sampled_from(list(Io)), sizes=st.lists(st.sampled_from([0, 10, LARGE]), min_size=3, max_size=3))
    def begin(self, io: Io, sizes: list[int]) -> None:
        self.kernel = FakeKernel()
        self.ways = open_files(self.kernel, io)
        self.sizes = sizes
        self.in_upper = [False, False, False]
        self.number = [10, 20, 30]  # what the kernel knows the files by now
        self.fd_of: dict[int, tuple[int, bool]] = {}  # a file's own descriptor -> which, and whether of the upper
        self.modes: dict[int, list[tuple[bool, int, bool]]] = {}  # number -> (through, backing id, lower) of each open

    @rule(target=handles, which=st.integers(0, 2), writes=st.booleans(), set_id=st.booleans())
    def open(self, which: int, writes: bool, set_id: bool) -> tuple[int, bool, int, bool]:
        self.in_upper[which] |= writes  # an open for writing lifts
        upper = self.in_upper[which]
        fd = 1000 + which * 2 + upper
        mode = stat.S_IFREG | (0o4755 if set_id else 0o644)
        for _ in range(2):
            number = self.number[which]
            wanted = Target(number, fd, upper, writes, self.sizes[which], mode, direct=True)
            try:
                through, flags, backing = self.ways.open(wanted)
                break
            except ReplacedError:
                assert upper and any(lower for _, _, lower in self.modes.get(number, []))
                self.number[which] += 1  # the kernel looks the name up and finds a new number
        else:
            raise AssertionError("a number that was just given is to be replaced")
        assert bool(flags & Open.PASSTHROUGH) == through == bool(backing)
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
        self.ways.close(number, through)
        self.modes[number].remove((through, backing, lower))
        if not self.modes[number]:
            del self.modes[number]

    @invariant()
    def one_way_and_one_backing_each(self) -> None:
        for opened in getattr(self, "modes", {}).values():
            assert len({through for through, _, _ in opened}) == 1, "a cached and a passthrough open side by side"
            assert len({backing for _, backing, _ in opened}) == 1, "two backing files of one inode"

    @invariant()
    def ids_live_as_long_as_their_opens(self) -> None:
        if hasattr(self, "kernel"):
            used = {backing for opened in self.modes.values() for through, backing, _ in opened if through}
            assert set(self.kernel.backing_files) == used
            assert all(self.ways.is_open(number) for number in self.modes)


Machine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestMachine = Machine.TestCase
