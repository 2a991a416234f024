"""T12: disks that fail, are full or become read-only: what was lost is reported, and the rest continues."""

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple, ParamSpec

import pytest

from tests.crash.harness import View
from tests.crash.power.conftest import Memory
from tests.crash.power.rig import LOWER, Rig, left, rigged
from tests.crash.power.session import ours
from tests.support import engines
from tests.support.campaign import Campaign
from tests.support.watched import KINDS

OPTIONS = {"ext4": "errors=remount-ro"}
COMPLETE = 10  # bytes of a small file
BROKEN = (errno.EIO, errno.EROFS)

pytestmark = [pytest.mark.campaign("T12"), pytest.mark.timeout(600)]
P = ParamSpec("P")
every_engine = pytest.mark.parametrize("engine", engines.NAMES)
every_kind = pytest.mark.parametrize("kind", KINDS)


def outcome(act: Callable[P, object], *args: P.args, **keywords: P.kwargs) -> int:
    """Return the errno of a call, 0 for none."""
    try:
        act(*args, **keywords)
    except OSError as error:
        return error.errno or errno.EIO
    return 0


# --- an error that passes


def _on_disk(rig: Rig, _fd: int) -> None:
    """The kernel writes the pages back on its own: no caller sees the error."""
    outcome(rig.disk.sync)


def _asked(_rig: Rig, fd: int) -> None:
    assert outcome(os.fsync, fd) in BROKEN


LOSSES = {"asked": _asked, "unasked": _on_disk}


@every_engine
@every_kind
@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_is_reported_until_the_file_is_opened_again(
    campaign: Campaign, memory: Memory, kind: str, engine: str, loss: str
) -> None:
    """By every fsync, through every descriptor, even long after the disk works again."""
    wrong: list[str] = []
    with rigged(kind, memory.fresh(), ours(f"engine={engine}"), OPTIONS.get(kind, "")) as rig:
        with ExitStack() as held:
            writer, reader = (_opened(rig.point / "a", flags, held) for flags in (os.O_RDWR, os.O_RDONLY))
            os.pwrite(writer, b"1" * COMPLETE, 0)
            os.fsync(writer)
            rig.disk.sync()
            os.pwrite(writer, b"2" * COMPLETE, 0)
            rig.disk.behave("error")
            LOSSES[loss](rig, writer)
            rig.disk.behave("")
            wrong += _silent({"writer": writer, "writer again": writer, "reader": reader})
            with suppress(OSError):  # of a file system that has shut down
                wrong += _silent({"one that was opened later": _opened(rig.point / "a", os.O_RDWR, held)})
        wrong += _recovers(rig)
    campaign.held(f"a disk that lost data, engine {engine}", 4, wrong)


def _opened(path: Path, flags: int, held: ExitStack) -> int:
    fd = os.open(path, flags)
    held.callback(os.close, fd)
    return fd


def _silent(descriptors: Mapping[str, int]) -> Iterator[str]:
    for name, fd in descriptors.items():
        if outcome(os.fsync, fd) not in BROKEN:
            yield f"fsync by the {name} says that all is well"


def _recovers(rig: Rig) -> Iterator[str]:
    """A file system that has not shut down makes new data durable again; one that has shut down reports it."""
    if outcome(_write, rig.point / "a", b"3") not in (0, *BROKEN):
        yield "the file cannot be written again"
    yield from _goes_on(rig)


def _goes_on(rig: Rig) -> Iterator[str]:
    """Lower files show as long as the upper can be searched for what hides them; XFS then refuses every look-up."""
    if outcome(os.listdir, rig.disk.point / "up"):
        if outcome(os.lstat, rig.point / "unknown") != errno.EIO:
            yield "what cannot be looked up is absent"
        return
    if (rig.point / "c").read_bytes() != b"c" * LOWER["c"]:
        yield "a lower file cannot be read"
    if not {"a", "b", "c", "d"} <= set(os.listdir(rig.point)):
        yield "the root cannot be listed"


def _write(path: Path, byte: bytes) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.pwrite(fd, byte * COMPLETE, 0)
        os.fsync(fd)
    finally:
        os.close(fd)


# --- an error that stays


@every_engine
@every_kind
def test_what_was_reported_durable_is_there(campaign: Campaign, memory: Memory, kind: str, engine: str) -> None:
    """The disk fails for good before each step of a load: reads go on, and nothing reported durable is lost."""
    wrong, points = [], 0
    for at in range(0, len(CHANGES) + 1, campaign.size(4, 1)):
        points += 1
        with rigged(kind, memory.fresh(), ours(f"engine={engine}"), OPTIONS.get(kind, "")) as rig:
            durable = list(_changes_until(rig, at))
            wrong += [f"failing before change {at}: {line}" for line in _goes_on(rig)]
            rig.end()
        wrong += [f"failing before change {at}: {line}" for line in _lost(left(rig), durable)]
    campaign.held(f"errors that stay, engine {engine}", points, wrong)


class Change(NamedTuple):
    """A file gets ten new bytes and is made durable; `mode` is set first."""

    path: str
    byte: bytes
    mode: int = 0

    def make(self, point: Path) -> None:
        """Do it."""
        (point / self.path).parent.mkdir(exist_ok=True)
        if self.mode:
            (point / self.path).chmod(self.mode)
        _write(point / self.path, self.byte)


CHANGES = (
    Change("a", b"1"), Change("new", b"1"), Change("d/x", b"1"), Change("a", b"2"), Change("dir/in", b"1"),
    Change("new", b"2"), Change("b", b"1", 0o600), Change("d/y", b"1"),
)  # fmt: skip


def _changes_until(rig: Rig, failing: int) -> Iterator[Change]:
    """Make all changes; yield each that was reported durable."""
    for number, change in enumerate(CHANGES):
        if number == failing:
            rig.disk.behave("error")
        error = outcome(change.make, rig.point)
        assert error in (0, *BROKEN), f"{change} ends with {errno.errorcode[error]}"
        if not error:
            yield change
    rig.disk.behave("error")


def _lost(found: View, durable: list[Change]) -> Iterator[str]:
    for change in {change.path: change for change in durable}.values():
        data = _data(found, change.path)
        later = [each.byte for each in CHANGES if each.path == change.path and each.byte >= change.byte]
        if data[:COMPLETE] not in [byte * COMPLETE for byte in later]:
            yield f"{change} was reported durable and is {data[:COMPLETE]!r}"
    for name, size in LOWER.items():
        if _data(found, name)[COMPLETE:] != name[-1].encode() * (size - COMPLETE):
            yield f"{name} has lost content that was not written"


def _data(found: View, path: str) -> bytes:
    facts = found.get(b"/" + path.encode(), (b"",))
    return facts[-1] if isinstance(facts[-1], bytes) else b""
