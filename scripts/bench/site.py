"""The file system of a measurement: made for it and removed afterwards."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench.sizes import Sizes

KINDS = ("ext4", "tmpfs", "xfs", "btrfs")
MAKE = {
    # no initialisation in the background during a measurement
    "ext4": ("mkfs.ext4", "-q", "-F", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0"),
    "xfs": ("mkfs.xfs", "-q", "-f", "-K"),
    "btrfs": ("mkfs.btrfs", "-q", "-f", "-K"),
}


def run(*words: str | Path, cwd: Path | None = None) -> None:
    """Run a command without output; RuntimeError with its standard error if it fails."""
    line = [str(word) for word in words]
    done = subprocess.run(line, cwd=cwd, capture_output=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        message = done.stderr.decode(errors="replace").strip()
        raise RuntimeError(f"{' '.join(line[:4])}: {message or f'exit code {done.returncode}'}")


@dataclass
class Site:
    """A file system for layers, uppers and plain directories; `assets` is a directory for prepared files outside it."""

    kind: str
    root: Path
    assets: Path
    sizes: Sizes
    made: set[str] = field(default_factory=set)  # the contents that exist already

    def layers(self, content: str) -> Path:
        """Return the directory of the layers of one content."""
        return self.root / content

    def sync(self) -> None:
        """Write out dirty data of this file system, so that no run pays for the previous one."""
        run("sync", "-f", self.root)


@contextmanager
def site(kind: str, gigabytes: int, place: Path, sizes: Sizes) -> Iterator[Site]:
    """Yield a new file system of a kind: on an image in `place`, mounted by loop; a tmpfs has no image.

    `kind` may also be a directory, whose file system is used unchanged.
    """
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(_directory(place)))
        root = scratch / "site"
        root.mkdir()
        if kind == "tmpfs":
            run("mount", "-t", "tmpfs", "-o", f"size={gigabytes}g", "tmpfs", root)
            stack.callback(_unmount_below, str(scratch))
        elif kind in KINDS:
            _make_image(kind, scratch / "image", gigabytes)
            run("mount", "-o", "loop", scratch / "image", root)
            stack.callback(_unmount_below, str(scratch))
        else:
            root = Path(stack.enter_context(_directory(Path(kind))))
        (scratch / "assets").mkdir()
        yield Site(kind, root, scratch / "assets", sizes)


@contextmanager
def _directory(place: Path) -> Iterator[str]:
    """Yield a temporary directory; mounts that a failure has left below it are removed at the end."""
    path = tempfile.mkdtemp(prefix="overlayfs-bench.", dir=place)
    try:
        yield path
    finally:
        _unmount_below(path)
        shutil.rmtree(path)


def _unmount_below(path: str) -> None:
    """Unmount all file systems below a directory, the newest first."""
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for point in reversed([each for each in mounts if each.startswith(f"{path}/")]):
        if subprocess.run(["umount", point], capture_output=True, check=False).returncode:
            run("umount", "-l", point)


def _make_image(kind: str, image: Path, gigabytes: int) -> None:
    with open(image, "wb") as file:
        os.truncate(file.fileno(), gigabytes << 30)
    run(*MAKE[kind], image)


def drop_caches() -> bool:
    """Make the kernel drop clean pages, dentries and inodes; return False where that is not permitted."""
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True
