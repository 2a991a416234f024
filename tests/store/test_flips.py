"""T20: one bit of a store is flipped, or a file is truncated: verification finds it, and no reader accepts it."""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from random import Random

import pytest

from overlayfs.errors import UserError
from overlayfs.library import Store
from overlayfs.oci import blob_info_cache
from overlayfs.oci.image_spec import Descriptor
from tests.store.test_repair import TREE, put
from tests.support.campaign import Campaign

SEED = 20
DIFF_ID = "sha256:" + "5" * 64

pytestmark = [pytest.mark.root, pytest.mark.campaign("T20"), pytest.mark.timeout(600)]

Answers = dict[str, object]
Damage = Callable[[Path, Random], AbstractContextManager[str]]


def fill(base: Path) -> None:
    """Two images, a workspace, and a layer with all optional members in its record."""
    with Store(os.fsencode(base)) as store:
        low = put(store, "site", TREE)
        put(store, "other", {"file": b"another" * 5_000, "d": {"e": b"e"}}, low.id)
        store.workspaces.create("site", "draft")
        store.layers.note_diff_id(low, DIFF_ID)
        blob_info_cache.note_blob(
            store, low.id, Descriptor("application/octet-stream", DIFF_ID, 5), DIFF_ID, "host/repository"
        )


def answers(base: Path) -> Answers:
    """Everything the store returns of what it has a checksum for, or the error it raises."""
    with Store(os.fsencode(base)) as store:
        asked: dict[str, Callable[[], object]] = {
            "images": lambda: [(image.name, image.layers, image.created) for image in store.images()],
            "workspaces": lambda: [(each.name, each.record) for each in store.workspaces()],
            "layers": lambda: [layer.record for layer in store.layers()],
            "site": lambda: [layer.record for layer in store.stack_of("site")],
            "other": lambda: [layer.record for layer in store.stack_of("other")],
            "draft": lambda: [layer.record for layer in store.stack_of("draft")],
        }
        return {name: _answer(ask) for name, ask in asked.items()}


def _answer(ask: Callable[[], object]) -> object:
    try:
        return ask()
    except (UserError, OSError) as error:
        return error


# --- damage


@contextmanager
def flipped(path: Path, random: Random) -> Iterator[str]:
    """One bit of a file is flipped."""
    was = path.read_bytes()
    at, bit = random.randrange(len(was)), random.randrange(8)
    with _instead(path, was, was[:at] + bytes([was[at] ^ 1 << bit]) + was[at + 1 :]):
        yield f"bit {bit} of byte {at}"


@contextmanager
def cut(path: Path, random: Random) -> Iterator[str]:
    """A file is truncated."""
    was = path.read_bytes()
    size = random.randrange(len(was))
    with _instead(path, was, was[:size]):
        yield f"cut off at {size} of {len(was)}"


@contextmanager
def _instead(path: Path, was: bytes, now: bytes) -> Iterator[None]:
    """The content of a file differs within the block, and its times do not."""
    times = os.stat(path)
    for content in (now, was):
        with open(path, "r+b") as file:
            file.write(content)
            file.truncate()
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        if content is now:
            yield


@contextmanager
def other_mode(path: Path, random: Random) -> Iterator[str]:
    """One permission bit is flipped."""
    was = stat.S_IMODE(os.lstat(path).st_mode)
    bit = random.randrange(12)
    path.chmod(was ^ 1 << bit)
    yield f"bit {bit} of the mode"
    path.chmod(was)


@contextmanager
def other_time(path: Path, random: Random) -> Iterator[str]:
    """One bit of the modification time is flipped."""
    found, bit = os.lstat(path), random.randrange(40)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns ^ 1 << bit), follow_symlinks=False)
    yield f"bit {bit} of the time"
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns), follow_symlinks=False)


def _vouched_for(base: Path) -> list[Path]:
    """Every file of the store with content of its own; the data of a metadata-only copy is in a layer below."""
    files = (path for path in base.rglob("*") if path.is_file() and not path.is_symlink() and os.lstat(path).st_size)
    return sorted(path for path in files if path.name not in ("lock", "thin"))


def _damages(base: Path, random: Random) -> Iterator[tuple[Path, Damage]]:
    files = _vouched_for(base)
    in_trees = [path for path in base.glob("layers/*/tree/**/*") if path.is_file() and not path.is_symlink()]
    while True:
        kind = random.choice((flipped, flipped, flipped, cut, cut, other_mode, other_time))
        yield random.choice(in_trees if kind in (other_mode, other_time) else files), kind


def test_every_bit_counts(campaign: Campaign, place: Path) -> None:
    base, random = place / "store", Random(SEED)
    fill(base)
    before, wrong = answers(base), []
    damages = _damages(base, random)
    count = campaign.size(60, 2_000)
    for _ in range(count):
        path, damage = next(damages)
        with damage(path, random) as what:
            wrong += [f"{path.relative_to(base)}: {what}: {line}" for line in _unnoticed(base, before)]
    assert answers(base) == before
    campaign.held("flipped bits and truncations of a store", count, wrong, SEED)


def _unnoticed(base: Path, before: Answers) -> Iterator[str]:
    try:
        with Store(os.fsencode(base)) as store:
            if not store.verify().problems:
                yield "verify finds nothing"
        now = answers(base)
    except UserError:  # the store is not opened at all
        return
    for name, answer in now.items():
        if answer != before[name] and not isinstance(answer, Exception):
            yield f"{name} is {answer}"
