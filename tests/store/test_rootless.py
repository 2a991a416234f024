"""Comparison, squash, verification and repair without privilege: owners and devices are stored in attributes."""

import os
from pathlib import Path

import pytest

from overlayfs.library import Store
from overlayfs.oci import blobs, image_import, platforms
from overlayfs.store import compare, diff_operands, repair, squash, verify
from overlayfs.store.records import ImageRecord, now
from tests.oci import samples
from tests.oci.archives import END, device, directory, file, header, symlink
from tests.support.dump import Dump
from tests.support.users import ALICE, run_as

pytestmark = pytest.mark.root

LOADED = blobs, image_import, platforms, compare, repair, squash, diff_operands, verify  # unreadable for the user

BASE = (
    directory(b"d", uid=5, gid=6, mode=0o3750)
    + file(b"d/f", b"content", mode=0o4755, uid=7)
    + file(b"d/gone", b"x", uid=8)
    + directory(b"e", uid=9)
    + file(b"e/g", b"more", mode=0)
    + file(b"closed", b"secret", mode=0, uid=13)
    + device(b"null", 1, 3)
    + symlink(b"l", b"d/f")
    + header(b"pipe", b"6", mode=0o620, gid=9)
    + END
)
TOP = (
    directory(b"d", uid=5, gid=7, mode=0o2750)
    + file(b"d/.wh.gone")
    + file(b"d/new", b"fresh", mode=0o600, uid=11)
    + directory(b"e", uid=1)
    + file(b"e/.wh..wh..opq")
    + file(b"e/h", b"other", uid=12)
    + END
)


@pytest.fixture
def home(place: Path) -> Path:
    """A directory owned by the user, with two layer archives."""
    (place / "home").mkdir()
    for name, content in (("base", BASE), ("top", TOP)):
        (place / "home" / f"{name}.tar").write_bytes(content)
    os.chown(place / "home", ALICE.uid, ALICE.gid)
    return place / "home"


def _site(home: Path, name: str = "store") -> Store:
    store = Store(os.fsencode(home / name))
    stack = [store.import_image(os.fsencode(home / f"{name}.tar"), name).layers[0] for name in ("top", "base")]
    store.images.put(ImageRecord(name="site", layers=tuple(stack), created=now()))
    return store


def _squash(home: Path, last: int) -> tuple[Dump, Dump, list[object], list[object]]:
    with _site(home) as store:
        store.squash("site", "small", last)
        changes: list[object] = list(store.diff("site", "small"))
        return samples.view(store, "site"), samples.view(store, "small"), changes, list(store.verify().problems)


@pytest.mark.parametrize("last", [1, 2])
def test_squash(home: Path, last: int) -> None:
    before, after, changes, problems = run_as(ALICE, lambda: _squash(home, last))
    assert before == after
    assert before[b"d/new"].uid == 11 and before[b"null"].kind == "char" and b"d/gone" not in before
    assert changes == [] and problems == []


def _repair(home: Path) -> tuple[list[bytes], list[object], bool]:
    with _site(home) as store:
        before = samples.view(store, "site")
        _site(home, "copy").close()
        tree = Path(os.fsdecode(store.layers.find(store.images.find("base").layers[0]).tree_path))
        (tree / "d" / "f").unlink()
        (tree / "closed").write_bytes(b"Secret")
        os.removexattr(tree / "null", "user.containers.override_stat")
        os.chmod(tree / "e", 0o700)
        found, left = store.repair(source=os.fsdecode(home / "copy"))
        return [each.path for each in found.problems], list(left.problems), samples.view(store, "site") == before


def test_verify_and_repair(home: Path) -> None:
    found, left, same = run_as(ALICE, lambda: _repair(home))
    assert {b"d", b"d/f", b"closed", b"null", b"e"} <= set(found)
    assert left == [] and same
