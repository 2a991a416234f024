"""Squash: fewer layers show the same tree, to this program and to the kernel."""

import os
import subprocess
from pathlib import Path

import msgspec
import pytest

from overlayfs.errors import UserError
from overlayfs.store.compare import Tree, compare
from overlayfs.store.records import History
from overlayfs.store.squash import squash, squash_image
from overlayfs.store.store import LayerStore
from overlayfs.store.verify import verify
from tests.store.samples import add_image
from tests.support.drivers.mounts import KernelOverlay
from tests.support.drivers.overlay import FsDriver
from tests.support.drivers.stack import Stack
from tests.support.dump import dump, same
from tests.support.spec import Dir, File, Link, Special, Symlink, Whiteout
from tests.support.spec import Tree as Spec

pytestmark = pytest.mark.root

BASE: Spec = {
    "keep": {"a": "1", "b": {"c": "2"}},
    "gone": {"x": "3"},
    "file": File(b"old", mode=0o600, uid=9),
    "one": "linked",
    "two": Link("one"),
    "deep": {"e": {"f": "4", "g": "5"}},
    "replaced": {"dir": "6"},
    "sparse": File(pieces=((0, b"x"), (5 << 20, b"y")), size=6 << 20),
}
MIDDLE: Spec = {
    "file": File(b"new", mode=0o4711, xattrs={"user.x": b"y", "trusted.overlay.overlay.nested": b"z"}),
    "deep": {"e": {"f": Whiteout(), "h": "7"}, "i": "8"},
    "here": Symlink(target="/nowhere", uid=3),
    "hidden": "9",
}
TOP: Spec = {
    "gone": Whiteout(),
    "hidden": Whiteout(),
    "replaced": Dir({"other": "10", "pipe": Special(kind="p")}, opaque="trusted", mode=0o1770),
    "moved": Dir({"new": "11"}, xattrs={"trusted.overlay.redirect": b"/keep"}),
    "keep": Whiteout(),
    "p": {"q": "12", "r": Link("p/q")},
}
STACK: list[Spec] = [TOP, MIDDLE, BASE]


def made(place: Path, layers: list[Spec], count: int) -> Stack:
    """The stack with its first layers squashed, next to the stack itself."""
    stack = Stack(place / "s", list(layers), None)
    target, work = place / "squashed", place / "work"
    target.mkdir()
    work.mkdir()
    squash(tuple(map(os.fsencode, stack.lower)), count, os.fsencode(target), os.fsencode(work))
    stack.check()
    return stack


def over(stack: Stack, place: Path, count: int) -> list[Path]:
    return [place / "squashed", *stack.lower[count:]]


def shows_the_same(place: Path, stack: Stack, count: int) -> None:
    """Compared through this program, through the kernel's mount, and by `compare`."""
    before = FsDriver(stack)
    expected = dump(before)
    before.close()
    layers = stack.lower
    stack.lower = over(stack, place, count)
    whole, squashed = (Tree(tuple(map(os.fsencode, each))) for each in (layers, stack.lower))
    try:
        for kind in (FsDriver, KernelOverlay):
            if kind is KernelOverlay and len(stack.lower) == 1:
                (place / "empty").mkdir(exist_ok=True)  # the kernel requires two layers where there is no upper
                stack.lower = [*stack.lower, place / "empty"]
            shown = kind(stack)
            try:
                same(dump(shown), expected)
            finally:
                shown.close()
        assert not list(compare(whole, squashed))
    finally:
        stack.lower = layers


@pytest.mark.parametrize("count", [1, 2, 3])
def test_shows_the_same(place: Path, count: int) -> None:
    stack = made(place, STACK, count)
    shows_the_same(place, stack, count)


def test_all_layers_need_no_marks(place: Path) -> None:
    made(place, STACK, 3)
    for where, directories, files in os.walk(place / "squashed"):
        for name in directories + files:
            found = os.lstat(os.path.join(where, name))
            assert not (found.st_rdev == 0 and found.st_mode & 0o170000 == 0o020000), name
            marks = [a for a in os.listxattr(os.path.join(where, name), follow_symlinks=False) if "overlay" in a]
            assert marks in ([], ["trusted.overlay.overlay.nested"]), name


def test_what_the_last_two_hide(place: Path) -> None:
    made(place, STACK, 2)
    squashed = place / "squashed"
    whiteouts = {str(p.relative_to(squashed)) for p in squashed.rglob("*") if p.is_char_device()}
    assert whiteouts == {"gone", "keep", "deep/e/f"}  # not "hidden", which is only in the squashed layers
    assert os.getxattr(squashed / "replaced", "trusted.overlay.opaque") == b"y"
    assert not (squashed / "two").exists() and not (squashed / "sparse").exists()
    assert (squashed / "moved" / "b" / "c").read_text() == "2"


def test_links_and_holes(place: Path) -> None:
    made(place, STACK, 3)
    squashed = place / "squashed"
    assert os.path.samefile(squashed / "one", squashed / "two")
    assert os.path.samefile(squashed / "p/q", squashed / "p/r")
    found = (squashed / "sparse").stat()
    assert found.st_size == 6 << 20 and found.st_blocks * 512 < 1 << 20


def test_a_link_out_of_a_moved_directory_stays_one(place: Path) -> None:
    layers: list[Spec] = [
        {"to": Dir(xattrs={"trusted.overlay.redirect": b"/from"}), "from": Whiteout()},
        {"from": {"a": "data", "alone": "x"}, "sub": {"far": {"b": Link("from/a")}, "other": "y"}},
    ]
    stack = made(place, layers, 1)
    shows_the_same(place, stack, 1)
    assert os.path.samefile(place / "squashed/to/a", place / "squashed/sub/far/b")
    assert not (place / "squashed/sub/other").exists()


def test_metadata_only_copies_get_their_data(place: Path) -> None:
    layers: list[Spec] = [
        {"f": File(size=4, mode=0o600, xattrs={"trusted.overlay.metacopy": b""})},
        {"f": "data", "g": "other"},
    ]
    stack = made(place, layers, 1)
    shows_the_same(place, stack, 1)
    assert (place / "squashed/f").read_text() == "data"
    assert os.listxattr(place / "squashed/f") == []


@pytest.mark.parametrize("form", ["device", "file", "xattr"])
def test_every_form_of_whiteout(place: Path, form: str) -> None:
    layers: list[Spec] = [{"d": {"a": Whiteout(form)}}, {"d": {"b": "1"}}, {"d": {"a": "2"}}]  # type: ignore[arg-type]
    stack = made(place, layers, 2)
    before = FsDriver(stack)
    expected = dump(before)
    before.close()
    stack.lower = over(stack, place, 2)
    after = FsDriver(stack)
    same(dump(after), expected)
    after.close()
    assert (place / "squashed/d/a").is_char_device()


def test_deeper_than_the_interpreter(place: Path) -> None:
    for layer in ("top", "base"):
        here = place / layer
        here.mkdir()
        fd = os.open(here, os.O_PATH)
        for _ in range(1100):
            os.mkdir("d", dir_fd=fd)
            inside = os.open("d", os.O_PATH, dir_fd=fd)
            os.close(fd)
            fd = inside
        os.mknod(layer, dir_fd=fd)
        os.close(fd)
    for name in ("squashed", "work"):
        (place / name).mkdir()
    stack = (os.fsencode(place / "top"), os.fsencode(place / "base"))
    squash(stack, 2, os.fsencode(place / "squashed"), os.fsencode(place / "work"))
    assert not list(compare(Tree(stack), Tree((os.fsencode(place / "squashed"),))))
    subprocess.run(["rm", "-rf", "top", "base", "squashed"], cwd=place, check=True)  # shutil is recursive


# --- images


def test_an_image(store: LayerStore) -> None:
    image = add_image(store, "site", {"a": "1"}, {"b": "2"}, {"c": "3"})
    calls: list[tuple[int, int]] = []
    made = squash_image(
        store, "site", "small", 2, message="why", author="me", progress=lambda *numbers: calls.append(numbers)
    )
    assert made.name == "small:latest" and made.layers[1:] == image.layers[2:] and len(made.layers) == 2
    layer = store.layers.find(made.layers[0])
    assert sorted(os.listdir(layer.tree_path)) == [b"b", b"c"]
    assert (layer.record.message, layer.record.author, layer.record.flags) == ("why", "me", ())
    assert layer.record.state == "complete" and os.listdir(layer.path).count(b"work") == 0
    assert calls[-1][1] == 2
    assert store.images.find("site") == image
    assert not verify(store.directory, None).problems


def test_equal_layers_are_stored_once(store: LayerStore) -> None:
    add_image(store, "site", {"a": "1"}, {"b": "2"})
    one, two = squash_image(store, "site", "one"), squash_image(store, "site", "two")
    assert one.layers == two.layers and len(one.layers) == 1


def test_history(store: LayerStore) -> None:
    image = add_image(store, "site", {"a": "1"}, {"b": "2"}, {"c": "3"})
    steps = tuple(History(created_by=name, empty_layer=name == "env") for name in ("a", "b", "env", "c"))
    store.images.put(msgspec.structs.replace(image, history=steps, config={"Env": ["A=b"]}))
    made = squash_image(store, "site", "small", 2)
    assert made.config == {"Env": ["A=b"]}
    assert [(step.created_by, step.empty_layer) for step in made.history] == [
        ("a", False), ("b", True), ("env", True), ("c", True), ("overlayfs squash", False)
    ]  # fmt: skip


@pytest.mark.parametrize("last", [0, 3, -1])
def test_too_many(store: LayerStore, last: int) -> None:
    add_image(store, "site", {"a": "1"}, {"b": "2"})
    with pytest.raises(UserError, match="has 2 layers"):
        squash_image(store, "site", "small", last)


def test_an_invalid_name_is_refused_before_any_work(store: LayerStore) -> None:
    add_image(store, "site", {"a": "1"}, {"b": "2"})
    with pytest.raises(UserError, match="is not an image name"):
        squash_image(store, "site", "No Name", progress=lambda entries, size: pytest.fail("work"))


@pytest.mark.parametrize("when", ["copying", "hashing"])
def test_interrupted(store: LayerStore, place: Path, when: str) -> None:
    add_image(store, "site", {"a": "1"}, {"b": "2"})

    def stop(entries: int, size: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        squash_image(
            store, "site", "small", progress=stop if when == "copying" else None,
            hash_progress=stop if when == "hashing" else None,
        )  # fmt: skip
    assert [image.name for image in store.images()] == ["site:latest"]
    assert not os.listdir(place / "store" / "staging") and not os.listdir(place / "store" / "trash")
    assert len(list(store.layers())) == 2
