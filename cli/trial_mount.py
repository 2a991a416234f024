"""A mount for a moment, in a temporary directory: whether mounting works here, and whether data bypasses the daemon."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from overlayfs.errors import MountError, UserError

_DATA = b"x" * 4096


@dataclass(frozen=True)
class Trial:
    """What the mount did. `error` is the reason why there was none; None if it worked."""

    engine: str = ""
    passes_through: bool = False
    error: str | None = None


def try_mount() -> Trial:
    """Mount a stack of two directories, write through it, and unmount it. Nothing is left behind."""
    with tempfile.TemporaryDirectory(prefix="overlayfs-doctor-") as scratch:
        point = Path(scratch, "mnt")
        try:
            _mount(Path(scratch), point)
        except (UserError, OSError) as error:
            return Trial(error=str(error))
        try:
            return _used(point)
        except (UserError, OSError) as error:
            return Trial(error=f"a stack was mounted, but did not work: {error}")
        finally:
            _unmount(os.fsencode(point))


def _unmount(point: bytes) -> None:
    """Unmount and wait for the daemon; if another program looks into the mount, do not wait."""
    from overlayfs.mount.unmount import unmount

    try:
        unmount(point)
    except MountError:
        unmount(point, lazy=True)


def _mount(scratch: Path, point: Path) -> None:
    from overlayfs.mount import start
    from overlayfs.mount.options import Draft

    for name in ("lower", "upper", "work", "mnt"):
        (scratch / name).mkdir()
    (scratch / "lower/file").write_bytes(_DATA)
    draft = Draft()
    draft.lower = [os.fsencode(scratch / "lower")]
    draft.upper, draft.work = os.fsencode(scratch / "upper"), os.fsencode(scratch / "work")
    start.mount(draft.build(), os.fsencode(point))


def _used(point: Path) -> Trial:
    """Read a file of the layer and write a new one; OSError if either shows something else."""
    from overlayfs.mount.control_client import Client

    if (point / "file").read_bytes() != _DATA:
        raise OSError("a file of a layer has another content")
    (point / "new").write_bytes(_DATA)
    if (point / "new").read_bytes() != _DATA:
        raise OSError("a new file has another content")
    found = Client.at(os.fsencode(point)).stats()
    return Trial(found.engine, passes_through="WRITE" not in found.requests)
