"""The contenders of a measurement: how each of them is mounted, and why some are missing.

A contender is a command line with words to fill in: LOWER (layers, top first, joined by colons), BRANCHES (the same
for programs that take the upper in one list), UPPER, WORK and MOUNTPOINT. Layers are named relative to their common
directory, in which the command runs: 500 of them must fit into the one page that mount(2) reads.
"""

import errno
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PLAIN = "plain"
KERNEL = "kernel"
OURS = "ours"
MERGERFS = "category.create=ff,minfreespace=0,cache.files=auto-full,use_ino"  # its advice for files that are mapped
LIMIT = 120.0  # seconds for a mount command; the slowest peer takes three with 500 layers
END_LIMIT = 30.0  # seconds until the daemon of an unmounted mount must be gone


class RefusedError(Exception):
    """A contender could not be mounted; the text says why in its own words."""


@dataclass(frozen=True)
class Stack:
    """The directories of one mount: layers top first, all in the directory `base`, named relative to it."""

    base: Path
    lowers: tuple[str, ...]
    upper: Path
    work: Path
    point: Path

    def words(self, template: tuple[str, ...]) -> list[str]:
        """Return a command line with its words filled in."""
        branches = [f"{self.upper}=RW", *(f"{name}=RO" for name in self.lowers)]
        filled = {
            "BRANCHES": ":".join(branches),
            "LOWER": ":".join(self.lowers),
            "UPPER": str(self.upper),
            "WORK": str(self.work),
            "MOUNTPOINT": str(self.point),
        }
        return [_filled(word, filled) for word in template]


def _filled(word: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        word = word.replace(name, value)
    return word


@dataclass(frozen=True)
class Contender:
    """One file system to measure. `copies_up` is false for a program that cannot change or hide files of a layer."""

    name: str
    command: tuple[str, ...]  # empty: the plain directory
    kind: str  # "plain", "kernel", "peer" or "ours"
    copies_up: bool = True
    helper: str = ""  # a program that must be installed

    @property
    def is_fuse(self) -> bool:
        """Whether a process in user space answers its requests."""
        return self.kind in ("peer", OURS)


@dataclass(frozen=True)
class Missing:
    """A contender that cannot be measured here, and why."""

    name: str
    reason: str


def program(name: str) -> str:
    """Return the path of our own installed program: the one of this Python, else the one on PATH."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name) or name


def ours(name: str, options: str = "") -> Contender:
    """Return our own mount with further options; `overlayfs mount` refuses those that it does not know."""
    wanted = f"lowerdir=LOWER,upperdir=UPPER,workdir=WORK{',' * bool(options)}{options}"
    return Contender(name, (program("overlayfs"), "mount", "-q", "-o", wanted, "MOUNTPOINT"), OURS)


def own_variants() -> list[Contender]:
    """Return our engines and their ways to pass data; "ours" is the default."""
    return [
        ours(OURS),
        ours("ours io=passthrough", "engine=kernel,io=passthrough"),
        ours("ours io=cached", "engine=kernel,io=cached"),
        ours("ours pyfuse3", "engine=pyfuse3"),
    ]


def peers() -> list[Contender]:
    """Return the other file systems that this benchmark can mount."""
    shared = ("-o", "allow_other") if os.geteuid() == 0 else ()
    stack = "lowerdir=LOWER,upperdir=UPPER,workdir=WORK"
    return [
        Contender(KERNEL, ("mount", "-t", "overlay", "overlay", "-o", stack, "MOUNTPOINT"), KERNEL),
        Contender("fuse-overlayfs", ("fuse-overlayfs", "-o", stack, "MOUNTPOINT"), "peer", helper="fuse-overlayfs"),
        Contender(
            "unionfs-fuse",
            ("unionfs", "-o", "cow,use_ino", *shared, "BRANCHES", "MOUNTPOINT"),
            "peer",
            helper="unionfs",
        ),
        Contender(
            "mergerfs",
            ("mergerfs", "-o", MERGERFS, *shared, "BRANCHES", "MOUNTPOINT"),
            "peer",
            copies_up=False,
            helper="mergerfs",
        ),
    ]


def named_peer(text: str) -> Contender:
    """Return the contender that `NAME=COMMAND` describes; ValueError if it names no place to mount on."""
    name, equals, command = text.partition("=")
    words = tuple(shlex.split(command))
    if not (name and equals and words):
        raise ValueError(f"{text!r} is not NAME=COMMAND")
    if not any("MOUNTPOINT" in word for word in words):
        raise ValueError(f"the command of {name} has no MOUNTPOINT")
    return Contender(name, words, "peer", helper=words[0])


def plain() -> Contender:
    """Return the plain directory: nothing between the program and the file system."""
    return Contender(PLAIN, (), PLAIN)


def present(wanted: Iterable[Contender], place: Path) -> tuple[list[Contender], list[Missing]]:
    """Return the contenders that work on the file system of `place`, and the others; each is tried by a small mount."""
    here: list[Contender] = []
    missing: list[Missing] = []
    for contender in wanted:
        reason = _hindrance(contender, place)
        if reason:
            missing.append(Missing(contender.name, reason))
        else:
            here.append(contender)
    return here, missing


def _hindrance(contender: Contender, place: Path) -> str:
    """Return why a contender cannot be measured here; empty if it can."""
    if contender.kind == PLAIN:
        return ""
    if contender.helper and not shutil.which(contender.helper):
        return "not installed"
    if contender.kind == KERNEL and os.geteuid() != 0:
        return "needs root"
    with tempfile.TemporaryDirectory(dir=place, prefix="try.") as directory:
        base = Path(directory)
        (base / "l").mkdir()
        (base / "l/seen").write_bytes(b"seen")
        try:
            with mounted(contender, base, ("l",)) as mount:
                return "" if (mount.root / "seen").read_bytes() == b"seen" else "shows something else than its layer"
        except (RefusedError, OSError) as error:
            return str(error)


@dataclass
class Mounted:
    """A mounted contender. `pid` is the process that serves it, None if the kernel does."""

    root: Path
    upper: Path
    pid: int | None


@contextmanager
def mounted(contender: Contender, base: Path, lowers: tuple[str, ...]) -> Iterator[Mounted]:
    """Mount a contender over layers in `base` with a fresh upper; leave nothing behind. RefusedError if it will not."""
    with tempfile.TemporaryDirectory(dir=base, prefix="run.") as directory:
        scratch = Path(directory)
        stack = Stack(base, lowers, scratch / "upper", scratch / "work", scratch / "mnt")
        for path in (stack.upper, stack.work, stack.point):
            path.mkdir()
        with over(contender, stack) as mount:
            yield mount


@contextmanager
def over(contender: Contender, stack: Stack) -> Iterator[Mounted]:
    """Mount a contender over a stack that exists already: a second mount of the same upper starts without caches."""
    try:
        start(contender, stack)
    except BaseException:
        clear(stack.point)
        raise
    pid = server(stack.point) if contender.is_fuse else None
    try:
        yield Mounted(stack.point, stack.upper, pid)
    finally:
        unmount(stack.point, pid)


def start(contender: Contender, stack: Stack) -> None:
    """Run the mount command; RefusedError if it fails or if nothing is mounted afterwards."""
    words = stack.words(contender.command)
    try:
        done = subprocess.run(
            words, cwd=stack.base, capture_output=True, timeout=LIMIT, stdin=subprocess.DEVNULL, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RefusedError(str(error)) from None
    if done.returncode:
        said = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
        raise RefusedError(said[-1] if said else f"exit code {done.returncode}")
    if not os.path.ismount(stack.point):
        raise RefusedError("nothing is mounted, though the command succeeded")


def unmount(point: Path, pid: int | None) -> None:
    """Unmount, lazily if it is in use, and wait for the daemon: it may still hold the upper."""
    ending = None if pid is None else _pidfd(pid)
    words = ["umount", str(point)] if os.geteuid() == 0 else ["fusermount3", "-u", str(point)]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        lazily = ["umount", "-l", str(point)] if os.geteuid() == 0 else ["fusermount3", "-uz", str(point)]
        subprocess.run(lazily, check=True, capture_output=True)
    if ending is not None:
        gone, _, _ = select.select([ending], [], [], END_LIMIT)
        os.close(ending)
        if not gone:
            raise RefusedError(f"its daemon {pid} lives on after the unmount")


def _pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def clear(point: Path) -> None:
    """Take away what a mount command has begun: its process, which may be about to mount, and the mount."""
    while (pid := server(point)) is not None:
        ending = _pidfd(pid)
        if ending is not None:
            os.kill(pid, signal.SIGKILL)
            select.select([ending], [], [], END_LIMIT)
            os.close(ending)
    if os.path.ismount(point) or is_dead(point):
        unmount(point, None)


def is_dead(point: Path) -> bool:
    """Return whether the process that served a mount has ended."""
    try:
        os.stat(point)
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


def server(point: Path) -> int | None:
    """Return the process that serves a mount: the one that has the mount point on its command line."""
    wanted = os.fsencode(point)
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            try:
                words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
            except OSError:  # it has ended meanwhile
                continue
            if wanted in words:
                return int(name)
    return None
