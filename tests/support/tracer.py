"""Kills or fails a process at one exact system call, counted over all its threads; ptrace(2) from a process of its own.

strace(1) does this by the name of a call and counts for each thread, and the one of Debian 12 does not know the calls
fchmodat2 and getxattrat, which the daemon makes for every second change.

    with Tracer(pid, Aim(at=7, error=errno.ENOSPC)) as tracer:
        ...                     # make the process work here
    tracer.calls, tracer.hit    # the names of the calls that were counted

Calls that read or change a file system are counted (CALLS), except those on /dev/fuse and on sockets. Leaving the
context detaches from the process.
"""

import ctypes
import mmap
import os
import platform
import signal
import struct
from typing import NamedTuple, Self

from tests.support.requirements import need

# The numbers of x86-64 (arch/x86/entry/syscalls/syscall_64.tbl).
CALLS = {
    1: "write", 2: "open", 3: "close", 4: "stat", 5: "fstat", 6: "lstat", 8: "lseek", 16: "ioctl", 17: "pread64",
    18: "pwrite64", 32: "dup", 72: "fcntl", 73: "flock", 74: "fsync", 75: "fdatasync", 76: "truncate", 77: "ftruncate",
    82: "rename", 83: "mkdir", 84: "rmdir", 86: "link", 87: "unlink", 88: "symlink", 89: "readlink", 90: "chmod",
    91: "fchmod", 92: "chown", 93: "fchown", 94: "lchown", 133: "mknod", 137: "statfs", 138: "fstatfs",
    188: "setxattr", 189: "lsetxattr", 190: "fsetxattr", 191: "getxattr", 192: "lgetxattr", 193: "fgetxattr",
    194: "listxattr", 195: "llistxattr", 196: "flistxattr", 197: "removexattr", 198: "lremovexattr",
    199: "fremovexattr", 217: "getdents64", 257: "openat", 258: "mkdirat", 259: "mknodat", 260: "fchownat",
    262: "newfstatat", 263: "unlinkat", 264: "renameat", 265: "linkat", 266: "symlinkat", 267: "readlinkat",
    268: "fchmodat", 280: "utimensat", 285: "fallocate", 295: "preadv", 296: "pwritev", 303: "name_to_handle_at",
    304: "open_by_handle_at", 306: "syncfs", 316: "renameat2", 326: "copy_file_range", 327: "preadv2", 328: "pwritev2",
    332: "statx", 437: "openat2", 452: "fchmodat2", 463: "setxattrat", 464: "getxattrat", 465: "listxattrat",
    466: "removexattrat",
}  # fmt: skip
LOOKING = frozenset(
    {
        *("close", "stat", "fstat", "lstat", "lseek", "pread64", "dup", "fcntl", "flock", "readlink", "statfs"),
        *("fstatfs", "getxattr", "lgetxattr", "fgetxattr", "listxattr", "llistxattr", "flistxattr", "getdents64"),
        *("newfstatat", "readlinkat", "preadv", "name_to_handle_at", "open_by_handle_at", "preadv2", "statx"),
        *("getxattrat", "listxattrat", "ioctl"),
    }
)
"""Calls that change nothing visible; ioctl may only share the blocks of a file with a copy that is not published."""
_ON_FILES = {"write", "ioctl", "close", "fcntl"}  # counted only on files, not on pipes, sockets and /dev

_SEIZE, _INTERRUPT, _LISTEN, _SYSCALL, _SYSCALL_INFO = 0x4206, 0x4207, 0x4208, 24, 0x420E
_POKEUSER = 6
_TRACE_SYSGOOD, _TRACE_CLONE = 1, 8
_EVENT_STOP = 128
_WALL = 0x40000000
_RAX, _ORIG_RAX = 80, 120  # offsets in struct user of <sys/user.h>
_STOPPING = (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
_INFO = struct.Struct("=B3xIQQQ6Q")  # struct ptrace_syscall_info at the entry of a call
_ENTRY = 1

_LOG = 1 << 16  # bytes: a counter, a flag, and two for the number of each call
_HEAD = struct.Struct("=IB")
_CALL = struct.Struct("=H")


class Aim(NamedTuple):
    """The call numbered `at`, from 1, and the ones after it up to `times` fail with `error`; without one: SIGKILL."""

    at: int
    error: int = 0
    times: int = 1


class Tracer:
    """Traces all threads of a process within a context; a second use needs a second one."""

    def __init__(self, pid: int, aim: Aim | None = None) -> None:
        need(platform.machine() == "x86_64", "needs x86-64: the tracer knows its registers and numbers of calls")
        self._pid = pid
        self._aim = aim or Aim(0)
        self._log = mmap.mmap(-1, _LOG)

    @property
    def calls(self) -> list[str]:
        """The names of the calls so far, in their order."""
        count, _ = _HEAD.unpack_from(self._log)
        numbers = (_CALL.unpack_from(self._log, _HEAD.size + _CALL.size * each)[0] for each in range(count))
        return [CALLS[number] for number in numbers]

    @property
    def hit(self) -> bool:
        """Whether the call that was aimed at was made."""
        return bool(_HEAD.unpack_from(self._log)[1])

    @property
    def where(self) -> str:
        """A description of the aim, for a message."""
        calls = self.calls
        name = calls[self._aim.at - 1] if self._aim.at <= len(calls) else "no call"
        return f"{name}, call {self._aim.at}"

    def __enter__(self) -> Self:
        reading, writing = os.pipe()
        self._child = os.fork()
        if not self._child:
            os.close(reading)
            _trace(_Traced(self._pid, self._aim, self._log), writing)
        os.close(writing)
        attached = os.read(reading, 1)
        os.close(reading)
        assert attached, f"process {self._pid} cannot be traced"
        return self

    def __exit__(self, *_: object) -> None:
        os.kill(self._child, signal.SIGKILL)  # the kernel detaches everything that it traced
        os.waitpid(self._child, 0)


# --- the process that traces ---------------------------------------------------------------------------------

_libc = ctypes.CDLL(None, use_errno=True)
_ptrace = _libc.ptrace
_ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_ptrace.restype = ctypes.c_long


def _request(request: int, tid: int, address: int = 0, data: int = 0) -> int:
    """Make a request; ProcessLookupError when the thread has gone, or has been killed, meanwhile."""
    result: int = _ptrace(request, tid, address, data)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _trace(traced: "_Traced", ready: int) -> None:
    """Run the tracer until killed, or until nothing is left to trace."""
    try:
        traced.seize()
        os.write(ready, b"1")
        os.close(ready)
        while True:
            traced.handle_stop(*os.waitpid(-1, _WALL))
    except ChildProcessError:
        pass
    finally:
        os._exit(0)


class _Traced:
    """The threads of one process. A failing call is not made, except close, which closes in any case."""

    def __init__(self, pid: int, aim: Aim, log: mmap.mmap) -> None:
        self._pid = pid
        self._aim = aim
        self._log = log
        self._count = 0
        self._failing: set[int] = set()  # threads in a call whose result is to be replaced
        self._info = ctypes.create_string_buffer(_INFO.size)

    def seize(self) -> None:
        """Attach to every thread; new threads are attached automatically.

        A thread that ends meanwhile is ESRCH, or EPERM while it exits; the main thread has to be there.
        """
        for name in os.listdir(f"/proc/{self._pid}/task"):
            try:
                _request(_SEIZE, int(name), 0, _TRACE_SYSGOOD | _TRACE_CLONE)
                _request(_INTERRUPT, int(name))
            except (ProcessLookupError, PermissionError):
                if int(name) == self._pid:
                    raise

    def handle_stop(self, tid: int, status: int) -> None:
        """Handle one stop of one thread and resume it."""
        if not os.WIFSTOPPED(status):
            return
        try:
            self._resume(tid, os.WSTOPSIG(status), status >> 16)
        except ProcessLookupError:
            self._failing.discard(tid)

    def _resume(self, tid: int, number: int, event: int) -> None:
        if number == signal.SIGTRAP | 0x80:
            self._handle_call(tid)
            _request(_SYSCALL, tid)
        elif event == _EVENT_STOP and number in _STOPPING:
            _request(_LISTEN, tid)
        else:
            _request(_SYSCALL, tid, 0, 0 if event or number == signal.SIGTRAP else number)

    def _handle_call(self, tid: int) -> None:
        _request(_SYSCALL_INFO, tid, _INFO.size, ctypes.addressof(self._info))
        operation, _, _, _, number, *arguments = _INFO.unpack(self._info)
        if operation != _ENTRY:
            if tid in self._failing:
                self._failing.discard(tid)
                _request(_POKEUSER, tid, _RAX, -self._aim.error & 0xFFFFFFFFFFFFFFFF)
        elif number in CALLS and self._counts(CALLS[number], arguments):
            self._enter(tid, number)

    def _counts(self, name: str, arguments: list[int]) -> bool:
        if name not in _ON_FILES:
            return True
        try:
            target = os.readlink(f"/proc/{self._pid}/fd/{arguments[0] & 0xFFFFFFFF}")
        except FileNotFoundError:
            return False
        return target.startswith("/") and not target.startswith("/dev/")

    def _enter(self, tid: int, number: int) -> None:
        self._count += 1
        aimed = 0 < self._aim.at <= self._count < self._aim.at + self._aim.times
        _CALL.pack_into(self._log, _HEAD.size + _CALL.size * (self._count - 1), number)
        _HEAD.pack_into(self._log, 0, self._count, aimed or bool(self._log[4]))
        if not aimed:
            return
        if not self._aim.error:
            os.kill(self._pid, signal.SIGKILL)
            return
        self._failing.add(tid)
        if CALLS[number] != "close":
            _request(_POKEUSER, tid, _ORIG_RAX, -1 & 0xFFFFFFFFFFFFFFFF)
