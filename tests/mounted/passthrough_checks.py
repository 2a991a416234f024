"""What must be true in every mode of I/O: each check is a function that gets a mount.

The checks run on the real engine, and on engines with one planted fault, where the checks for that fault must fail.
"""

import errno
import itertools
import mmap
import os
import shutil
import struct
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from tests.mounted import sequences
from tests.mounted.conftest import Mount
from tests.mounted.sequences import SIZE
from tests.support import syscalls
from tests.support.outcome import errno_of
from tests.support.users import ALICE, ROOT, User, run_as

LIMIT = 30.0
RANDOM_PROGRAMS = 250
CAPABILITY = struct.pack("<IIIII", 0x2000001, 1 << 10, 0, 0, 0)  # cap_net_bind_service=ep (linux/capability.h)

Check = Callable[[Mount], None]


class Layer:
    """The lower layer of a mount, filled before it is mounted."""

    def __init__(self, mount: Mount) -> None:
        self.path = mount.stack.base / "low"
        self.plain = mount.stack.base / "plain"
        self.plain.mkdir(mode=0o777)
        for number in range(12):
            sequences.fill(self.path, f"large{number}")
            sequences.fill(self.path, f"small{number}", 100)
        for name in ("large", "small"):
            os.link(self.path / f"{name}9", self.path / f"{name}.link")
        os.chmod(self.path, 0o777)

    def fill_for_programs(self, programs: list[tuple[str, ...]]) -> None:
        """Make a file for each program, large and small ones in turn."""
        for number in range(len(programs)):
            for place in (self.path, self.plain):
                sequences.fill(place, f"p{number}", (SIZE, 100)[number % 2])


def _writer(path: Path, data: bytes = b"new", at: int = 0, flags: int = os.O_RDWR) -> None:
    fd = os.open(path, flags)
    try:
        assert os.pwrite(fd, data, at) == len(data)
        assert flags & os.O_ACCMODE == os.O_WRONLY or os.pread(fd, len(data), at) == data
    finally:
        os.close(fd)


def layers_are_never_written(mount: Mount) -> None:
    """A reader has the lower file open, in every possible way; then a writer opens and changes it."""
    low, point = mount.stack.base / "low", mount.point
    for number, flags in enumerate((os.O_RDWR, os.O_WRONLY, os.O_RDWR | os.O_APPEND, os.O_RDWR | os.O_TRUNC)):
        for name in (f"large{number}", f"small{number}"):
            before = (low / name).read_bytes()
            with open(point / name, "rb", buffering=0) as reader:
                assert reader.read(20) == before[:20]
                pages = mmap.mmap(reader.fileno(), 50, access=mmap.ACCESS_READ)
                assert pages[:20] == before[:20]
                _writer(point / name, b"new", 5, flags & ~os.O_APPEND)
                assert (low / name).read_bytes() == before, "a layer was written"
                assert (point / name).read_bytes()[5:8] == b"new"
                assert (mount.stack.upper / name).read_bytes()[5:8] == b"new"
                pages.close()


def readers_see_what_is_written_after_copy_up(mount: Mount) -> None:
    """The promise of io=auto: readers that had the file open see the change, by read and by map."""
    for name in ("large4", "small4"):
        path = mount.point / name
        with open(path, "rb", buffering=0) as reader:
            reader.read(20)
            pages = mmap.mmap(reader.fileno(), 50, access=mmap.ACCESS_READ)
            assert pages[:3] == b"ABC"
            _writer(path)
            assert os.pread(reader.fileno(), 6, 0) == b"newDEF"
            assert pages[:6] == b"newDEF"
            pages.close()


def no_order_of_opens_is_an_error(mount: Mount, data: bool = True) -> None:
    """Programs of opens, closes, duplicates, forks, maps, writes, unlinks and renames, beside a plain directory."""
    plain = mount.stack.base / "plain"
    lines = []
    for number, steps in enumerate(_programs()):
        lines += sequences.differences(mount.point, plain, f"p{number}", steps, data)
    assert lines == []


def no_order_of_opens_fails_otherwise(mount: Mount) -> None:
    """The same where readers of large files may keep the old data: only failures are compared."""
    no_order_of_opens_is_an_error(mount, data=False)


def _programs() -> list[tuple[str, ...]]:
    return list(sequences.programs(1, RANDOM_PROGRAMS))


def pages_are_current_after_a_write(mount: Mount) -> None:
    """What was read through the page cache and then written in any mode is read as written."""
    for name in ("small5", "large5"):
        path = mount.point / name
        for turn in range(4):
            mark = b"%03d" % turn
            _writer(path, mark, 7, (os.O_RDWR, os.O_WRONLY)[turn % 2])
            assert path.read_bytes()[7:10] == mark
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 50, access=mmap.ACCESS_READ) as pages:
                assert pages[7:10] == mark


def sizes_and_times_are_current_at_once(mount: Mount) -> None:
    """After writes in passthrough and stores to shared memory, with and without the file open."""
    for name in ("large6", "small6", "made"):
        path = mount.point / name
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        real = mount.stack.upper / name
        for act in (
            lambda fd=fd: os.pwrite(fd, b"x" * 5000, 0),
            lambda fd=fd: os.ftruncate(fd, 20_000),
            lambda fd=fd: os.pwrite(fd, b"end", 30_000),
            lambda fd=fd: os.posix_fallocate(fd, 0, 50_000),
        ):
            act()
            _same_attributes(path, real, fd)
        pages = mmap.mmap(fd, 8192)
        for close_first in (False, True):
            _same_attributes(path, real, None)
            os.utime(path, ns=(1, 1))
            assert path.stat().st_mtime_ns == 1
            if close_first:
                os.close(fd)
            pages[100] = 7 + close_first
            pages.flush()
            assert path.stat().st_mtime_ns > 1, "a store to shared memory changed no time"
        pages.close()
        _same_attributes(path, real, None)
        assert path.read_bytes() == real.read_bytes()


def _same_attributes(path: Path, real: Path, fd: int | None) -> None:
    wanted = real.stat()
    for found in (path.stat(), *([] if fd is None else [os.fstat(fd)])):
        assert (found.st_size, found.st_mtime_ns, found.st_ctime_ns) == (
            wanted.st_size,
            wanted.st_mtime_ns,
            wanted.st_ctime_ns,
        )
        assert found.st_blocks == wanted.st_blocks


def a_program_is_busy_while_it_runs_or_is_written(mount: Mount) -> None:
    sleep = shutil.which("sleep")
    assert sleep is not None
    for name in ("new", "again"):
        path = mount.point / name
        shutil.copy(sleep, path)
        for flags in (os.O_WRONLY, os.O_RDWR):
            fd = os.open(path, flags)
            assert errno_of(_output, path) == errno.ETXTBSY
            os.close(fd)
        with subprocess.Popen([path, "60"]) as running:
            assert errno_of(os.open, path, os.O_WRONLY) == errno.ETXTBSY
            assert errno_of(os.truncate, path, 0) == errno.ETXTBSY
            running.kill()
        os.close(os.open(path, os.O_RDWR))


# --- set-id bits ---------------------------------------------------------------------------------------


def _punch(fd: int) -> None:
    syscalls.fallocate(fd, syscalls.PUNCH_HOLE | syscalls.KEEP_SIZE, 0, 10)


def _copy(fd: int) -> None:
    os.copy_file_range(fd, fd, 4, 0, 50)


def _store(fd: int) -> None:
    with mmap.mmap(fd, 20) as pages:
        pages[0] = 7
        pages.flush()


CHANGES: dict[str, Callable[[int], object]] = {
    "write": lambda fd: os.write(fd, b"x"),
    "writev at": lambda fd: os.pwritev(fd, [b"x", b"y"], 3),
    "cut": lambda fd: os.ftruncate(fd, 3),
    "grow": lambda fd: os.ftruncate(fd, 300),
    "allocate": lambda fd: os.posix_fallocate(fd, 0, 500),
    "punch": _punch,
    "copy": _copy,
    "store": _store,
    "nothing": lambda fd: None,
}
MODES = (0o4755, 0o2755, 0o6777, 0o2745, 0o755)


def set_id_bits_are_cleared_as_on_a_local_file_system(mount: Mount) -> None:
    """Each change with each mode, as root and as a user, to a file that is opened for it and has a capability."""
    assert _after_changes(mount.point) == _after_changes(mount.stack.base / "plain")


def _after_changes(directory: Path) -> dict[tuple[object, ...], object]:
    found: dict[tuple[object, ...], object] = {}
    number = itertools.count()
    for (what, act), mode, user in itertools.product(CHANGES.items(), MODES, (ROOT, ALICE)):
        for flags in (os.O_RDWR, os.O_RDWR | os.O_TRUNC):
            path = _set_id_file(directory, next(number), mode)
            _as(user, partial(_open_and, path, flags, act))
            bits, capable = _privileges(path)
            # Without passthrough a store reaches the file as a write of the daemon, which removes the capability.
            found[what, oct(mode), user.uid, flags] = bits, capable and what != "store"
    for mode, user in itertools.product(MODES, (ROOT, ALICE)):
        path = _set_id_file(directory, next(number), mode)
        _as(user, partial(os.truncate, path, 3))
        found["truncate", oct(mode), user.uid] = _privileges(path)
        os.chown(path, 7, 7)
        found["chown", oct(mode), user.uid] = _privileges(path)
    return found


def _set_id_file(directory: Path, number: int, mode: int) -> Path:
    path = directory / f"set{number}"
    path.write_bytes(b"0123456789" * 10)
    os.chown(path, ALICE.uid, ALICE.gid)
    os.setxattr(path, "security.capability", CAPABILITY)
    os.chmod(path, mode)
    return path


def _as(user: User, act: Callable[[], object]) -> None:
    if user is ROOT:
        act()
    else:
        run_as(user, lambda: (act(), None)[1])


def _open_and(path: Path, flags: int, act: Callable[[int], object]) -> None:
    fd = os.open(path, flags)
    try:
        with suppress(OSError, ValueError):  # after a cut there may be nothing to map or copy
            act(fd)
    finally:
        os.close(fd)


def _privileges(path: Path) -> tuple[str, bool]:
    return oct(path.stat().st_mode), "security.capability" in os.listxattr(path)


def set_id_bits_set_after_the_open_are_cleared(mount: Mount) -> None:
    """A file is made set-id while it is open for writing; after the next write it runs with the caller's ids."""
    for number, flags in enumerate((os.O_WRONLY, os.O_RDWR)):
        program = mount.point / f"whoami{number}"
        shutil.copy("/usr/bin/id", program)
        os.chmod(program, 0o777)
        fd = os.open(program, flags)
        os.chmod(program, 0o6777)
        assert oct(program.stat().st_mode) == "0o106777"
        run_as(ALICE, partial(os.pwrite, fd, b"\x7fELF", 0))
        os.close(fd)
        answer = run_as(ALICE, partial(_output, program))
        assert "euid=0" not in answer and "egid=0" not in answer, answer
        real = mount.stack.upper / program.name
        assert oct(program.stat().st_mode) == oct(real.stat().st_mode) == "0o100777"


def _output(program: Path) -> str:
    return subprocess.run([program], capture_output=True, text=True, check=True).stdout


# --- ESTALE, notifications -----------------------------------------------------------------------------


def stale_is_for_the_kernel_only(mount: Mount) -> None:
    """A reader has the lower file open; writers open it by its name, by another name, and through /proc."""
    path, link = mount.point / "large9", mount.point / "large.link"
    with open(path, "rb", buffering=0) as reader, open(link, "rb", buffering=0) as second:
        assert reader.read(3) == second.read(3) == b"ABC"
        _writer(path, b"one", 0)
        for turn in range(3):
            by_number = errno_of(_writer, Path(f"/proc/self/fd/{reader.fileno()}"), b"two", 10 * turn + 10)
            assert by_number in (None, errno.EBUSY), errno.errorcode[by_number or 0]
            _writer(link, b"thr", 50 + turn)
            _writer(path, b"fou", 60 + turn)
        assert path.read_bytes()[:70] == link.read_bytes()[:70] == (mount.stack.upper / "large9").read_bytes()[:70]
        assert path.stat() == link.stat() == os.fstat(reader.fileno())
    assert path.read_bytes()[60:63] == b"fff"


def no_request_hangs(mount: Mount) -> None:
    """Several clients make, write, read, list, rename and remove in the same directories, for a while."""
    for name in ("x", "y"):
        (mount.point / name).mkdir()
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(60):
                _one_round(mount.point, number, turn)
        except BaseException as error:
            failures.append(error)

    clients = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(4)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(LIMIT)
        assert not client.is_alive(), "a request hangs"
    assert failures == []


def _one_round(point: Path, number: int, turn: int) -> None:
    here, there = (point / name / f"{number}.{turn % 5}" for name in ("xy"[turn % 2], "yx"[turn % 2]))
    here.write_bytes(b"content" * 100)
    assert here.read_bytes() == b"content" * 100
    fd = os.open(here, os.O_RDWR)
    with mmap.mmap(fd, 100) as pages:
        pages[0] = 65
    os.rename(here, there)
    os.listdir(point / "x")
    assert os.fstat(fd).st_size == 700
    os.unlink(there)
    os.close(fd)
    assert not there.exists()


AUTO: dict[str, Check] = {
    each.__name__: each
    for each in (
        layers_are_never_written,
        readers_see_what_is_written_after_copy_up,
        no_order_of_opens_is_an_error,
        pages_are_current_after_a_write,
        sizes_and_times_are_current_at_once,
        a_program_is_busy_while_it_runs_or_is_written,
        set_id_bits_are_cleared_as_on_a_local_file_system,
        set_id_bits_set_after_the_open_are_cleared,
        stale_is_for_the_kernel_only,
        no_request_hangs,
    )
}
PASSTHROUGH: dict[str, Check] = {
    **{name: check for name, check in AUTO.items() if "after_copy_up" not in name and "is_an_error" not in name},
    no_order_of_opens_fails_otherwise.__name__: no_order_of_opens_fails_otherwise,
}


def prepare(mount: Mount, check: str) -> None:
    """Fill the layers for a check."""
    layer = Layer(mount)
    if check.startswith("no_order"):
        layer.fill_for_programs(_programs())
