"""T12: uppers without space, over their quota, or read-only: an errno, the old view, and later all works again."""

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.crash.power.conftest import Memory
from tests.crash.power.rig import LOWER, Rig, rigged
from tests.crash.power.session import ours
from tests.crash.power.test_failing import every_engine, every_kind, outcome
from tests.support.campaign import Campaign
from tests.support.requirements import need_program

BIG = 2 << 20  # bytes of a file for which there is no room

pytestmark = [pytest.mark.campaign("T12"), pytest.mark.timeout(600)]


def _fill(ballast: Path) -> None:
    """Allocate all free space of a disk."""
    fd = os.open(ballast, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        at, step = 0, 32 << 20
        while step >= 4096:
            with suppress(OSError):
                os.posix_fallocate(fd, at, step)
                at += step
                continue
            step //= 2
    finally:
        os.close(fd)


def _large(lower: Path) -> None:
    (lower / "large").write_bytes(b"l" * BIG)


def _big(path: Path) -> None:
    path.write_bytes(bytes(BIG))


def _byte(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(b"1")


def _goes_on(rig: Rig, code: int) -> Iterator[str]:
    """Changes that need space fail with this errno and leave nothing; everything else works."""
    before = os.listdir(rig.point)
    for name, error in {
        "writing a lot": outcome(_big, rig.point / "big"),
        "copying a file up": outcome(_byte, rig.point / "large"),
    }.items():
        if error != code:
            yield f"{name} gives {errno.errorcode.get(error, 'success')}"
    with suppress(FileNotFoundError):
        (rig.point / "big").unlink()
    if sorted(os.listdir(rig.point)) != sorted(before):
        yield "names have come or gone"
    if os.listdir(rig.disk.point / rig.stack.inside / "work" / "work"):
        yield "a temporary is left"
    yield from _reads(rig)


def _reads(rig: Rig) -> Iterator[str]:
    if (rig.point / "large").read_bytes() != b"l" * BIG:
        yield "the lower file is not what it was"
    if (rig.point / "b").read_bytes() != b"b" * LOWER["b"]:
        yield "a lower file cannot be read"


def _works(rig: Rig) -> Iterator[str]:
    """Once the cause is removed, the same calls succeed."""
    for name, error in {
        "writing": outcome(_big, rig.point / "big"),
        "copying a file up": outcome(_byte, rig.point / "large"),
        "unlinking": outcome(os.unlink, rig.point / "a"),
        "chmod": outcome(os.chmod, rig.point / "b", 0o600),
    }.items():
        if error:
            yield f"{name} gives {errno.errorcode[error]} although nothing is in the way any more"
    if (rig.point / "large").read_bytes() != b"1" + b"l" * (BIG - 1):
        yield "the file that was copied up is not what it should be"


@every_engine
@every_kind
def test_a_full_disk(campaign: Campaign, memory: Memory, kind: str, engine: str) -> None:
    """What is in the upper can still be deleted."""
    base = memory.fresh()
    with rigged(kind, base, ours(f"engine={engine}"), build=_large) as rig:
        (rig.point / "upper").write_bytes(b"u" * 5_000)
        rig.disk.sync()
        _fill(rig.disk.point / "ballast")
        wrong = list(_goes_on(rig, errno.ENOSPC))
        if outcome(os.unlink, rig.point / "upper"):
            wrong.append("a file of the upper cannot be deleted")
        (rig.disk.point / "ballast").unlink()
        rig.disk.sync()
        wrong += _works(rig)
        rig.end()
    campaign.held(f"a full disk, engine {engine}", 10, wrong)


@every_engine
def test_a_quota(campaign: Campaign, memory: Memory, engine: str) -> None:
    """A subvolume of btrfs that may hold 1 MiB."""
    need_program("btrfs")
    base = memory.fresh()
    with rigged("btrfs", base, ours(f"engine={engine}"), inside="sub", build=_large) as rig:
        _btrfs("quota", "enable", str(rig.disk.point))
        _btrfs("qgroup", "limit", "1M", str(rig.disk.point / "sub"))
        wrong = list(_goes_on(rig, errno.EDQUOT))
        _btrfs("qgroup", "limit", "none", str(rig.disk.point / "sub"))
        wrong += _works(rig)
        rig.end()
    campaign.held(f"a quota, engine {engine}", 9, wrong)


def _btrfs(*words: str) -> None:
    subprocess.run(["btrfs", *words], check=True, capture_output=True)


@every_engine
@every_kind
def test_an_upper_that_turns_read_only(campaign: Campaign, memory: Memory, kind: str, engine: str) -> None:
    """As after an error that made the file system read-only; then it is remounted."""
    base = memory.fresh()
    with rigged(kind, base, ours(f"engine={engine}"), build=_large) as rig:
        _remount(rig, "ro")
        wrong = list(_goes_on(rig, errno.EROFS))
        for name, error in {
            "chmod": outcome(os.chmod, rig.point / "b", 0o600),
            "unlink": outcome(os.unlink, rig.point / "a"),
            "mkdir": outcome(os.mkdir, rig.point / "dir"),
        }.items():
            if error != errno.EROFS:
                wrong.append(f"{name} gives {errno.errorcode.get(error, 'success')}")
        _remount(rig, "rw")
        wrong += _works(rig)
        rig.end()
    campaign.held(f"an upper that turns read-only, engine {engine}", 12, wrong)


def _remount(rig: Rig, word: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{word}", str(rig.disk.point)], check=True, capture_output=True)
