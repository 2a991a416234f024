"""Small file systems of a chosen kind on loop devices or in memory; always taken down again."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support import syscalls
from tests.support.requirements import need_filesystem, need_program, need_root

MAKE = {
    "ext4": ["mkfs.ext4", "-q", "-F"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
}
SIZE = {"xfs": 320 << 20, "btrfs": 160 << 20}
KINDS = ("ext4", "xfs", "btrfs", "tmpfs")


@contextmanager
def disk(kind: str, base: Path, size: int | None = None) -> Iterator[Path]:
    """A fresh file system of this kind mounted at `base`/mnt, of `size` bytes."""
    need_root()
    need_filesystem(kind)
    base.mkdir()
    point = base / "mnt"
    point.mkdir()
    _mount(kind, base / "image", point, size)
    try:
        yield point
    finally:
        syscalls.umount(str(point).encode())
        (base / "image").unlink(missing_ok=True)
        point.rmdir()
        base.rmdir()


def _mount(kind: str, image: Path, point: Path, size: int | None) -> None:
    if kind in ("tmpfs", "ramfs"):
        data = b"mode=755" + (b"" if size is None else f",size={size}".encode())
        syscalls.mount(kind.encode(), str(point).encode(), kind.encode(), 0, data)
        return
    command = MAKE[kind]
    need_program(command[0], "losetup")
    with open(image, "wb") as file:
        file.truncate(size or SIZE.get(kind, 64 << 20))
    subprocess.run([*command, str(image)], check=True, capture_output=True)
    # mount(8) sets the loop device up so that the last unmount frees it
    subprocess.run(["mount", "-o", "loop", str(image), str(point)], check=True, capture_output=True)
