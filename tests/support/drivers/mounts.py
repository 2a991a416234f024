"""Drivers that work through the kernel: a plain directory, our program's mount, and the kernel's overlayfs."""

import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

from tests.support import engines, processes, syscalls
from tests.support.builder import build
from tests.support.drivers.base import Tree
from tests.support.drivers.posix import PosixRaw
from tests.support.drivers.raw import Raw
from tests.support.spec import Dir, flatten
from tests.support.spec import Tree as Spec

COMMAND = str(Path(sys.executable).with_name("overlayfs"))
_RDONLY = 1
DETACH = 2


class PlainDirectory(Tree):
    """The merged tree copied to an ordinary directory, as the reference."""

    name = "plain"
    built = False

    def _start(self) -> Raw:
        path = self.stack.mountpoint
        if not self.built:
            self.built = True
            lower, upper = self.stack.spec
            layers = ([] if upper is None else [upper]) + lower
            build(path, flatten([_children(layer) for layer in layers]))
        return PosixRaw(os.fsencode(path))

    def _stop(self) -> None:
        pass

    def rotate(self) -> None:
        """Do nothing: there is no upper."""
        self.remount()

    def commit(self, layer: os.PathLike[str]) -> None:
        raise AssertionError("a plain directory has no layers")


def _children(layer: Spec | Dir) -> Spec:
    return layer.children if isinstance(layer, Dir) else layer


def escaped(path: Path) -> str:
    """A path in an option string: its colons, commas and backslashes are escaped."""
    text = str(path).replace("\\", "\\\\")
    return text.replace(":", "\\:").replace(",", "\\,")


def option_string(tree: Tree, extra: dict[str, str | None]) -> str:
    """`lowerdir=…,upperdir=…,workdir=…` and the options of a test; None gives an option without a value."""
    stack = tree.stack
    parts = ["lowerdir=" + ":".join(escaped(layer) for layer in stack.lower)]
    if stack.upper is not None and stack.work is not None:
        parts += [f"upperdir={escaped(stack.upper)}", f"workdir={escaped(stack.work)}"]
    parts += [name if value is None else f"{name}={value}" for name, value in extra.items()]
    return ",".join(parts)


def unmount(point: Path) -> None:
    """Unmount; if the mount is still in use, detach it and fail."""
    try:
        syscalls.umount(os.fsencode(point))
    except OSError:
        syscalls.umount(os.fsencode(point), DETACH)
        raise


def run(*command: str) -> str:
    """Run one of our programs, which must succeed, and return its standard error."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{command}: exit {done.returncode}: {done.stderr}"
    return done.stderr


class FuseMount(Tree):
    """The mount helper and its daemon, a child process of the tests; `engine` None is the engine of the test run."""

    name = "fuse"
    program: ClassVar[tuple[str, ...]] = (f"{COMMAND}-mount",)
    engine: ClassVar[str | None] = None

    def _start(self) -> Raw:
        options = dict(self.options)
        engine = self.engine or engines.asked()
        if engine is not None:
            options.setdefault("engine", engine)
        before = processes.children()
        try:
            self.messages = run(*self.program, "-o", option_string(self, options), str(self.stack.mountpoint))
        except BaseException:
            processes.reap_since(before)
            raise
        self.daemons = processes.children() - before
        return PosixRaw(os.fsencode(self.stack.mountpoint))

    def _stop(self) -> None:
        unmount(self.stack.mountpoint)
        for pid in self.daemons:
            status = processes.reap(pid)
            assert status == 0, f"the daemon ended with {status}"

    def commit(self, layer: os.PathLike[str]) -> None:
        run(COMMAND, "commit", str(self.stack.mountpoint), "--to", str(layer))


class Pyfuse3Mount(FuseMount):
    """A mount by the portable engine."""

    name = "pyfuse3"
    engine = "pyfuse3"


class CommandMount(FuseMount):
    """A mount by the command, which prints messages, and is nosuid and nodev by default."""

    name = "command"
    program = (COMMAND, "mount")


class KernelOverlay(Tree):
    """Kernel overlayfs with the features that our mounts have by default."""

    name = "kernel"
    features: ClassVar[dict[str, str | None]] = {"redirect_dir": "on", "index": "on", "metacopy": "on"}

    def _start(self) -> Raw:
        target = os.fsencode(self.stack.mountpoint)
        writable = self.stack.upper is not None
        extra = dict(self.features) if writable else {"redirect_dir": "follow", "metacopy": "on"}
        base = os.getcwd()
        os.chdir(self.stack.base)
        try:
            data = os.fsencode(option_string(self, {**extra, **self.options}).replace(f"{self.stack.base}/", ""))
            syscalls.mount(b"overlay", target, b"overlay", 0 if writable else _RDONLY, data)
        finally:
            os.chdir(base)
        return PosixRaw(target)

    def _stop(self) -> None:
        unmount(self.stack.mountpoint)

    def commit(self, layer: os.PathLike[str]) -> None:
        """Make the upper a layer; its index is lost."""
        self.close()
        assert self.stack.upper is not None
        self.stack.upper.rename(layer)
