"""A commit of a workspace in use: nothing visible changes, and the layer has the content of the upper."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from overlayfs import Overlay, StackConfig, sysio
from overlayfs.errors import UserError, oserror
from overlayfs.fs import Changes, Node
from overlayfs.store import hashing
from tests.crash.harness import ROOT, build_layers, view, write
from tests.crash.operations import OPERATIONS
from tests.store.live import IMAGE, NAME, Site, Used

pytestmark = pytest.mark.root


@pytest.fixture
def site(place: Path) -> Site:
    """An image of two layers."""
    build_layers(place / "base", place / "top")
    return Site(place, place / "top", place / "base")


@pytest.fixture
def used(site: Site) -> Iterator[Used]:
    """Its workspace, in use."""
    with site.used() as opened:
        yield opened


def at(overlay: Overlay, path: str) -> Node:
    """The node at a path."""
    return overlay.resolve(os.fsencode(path))


def numbers(overlay: Overlay) -> dict[bytes, int]:
    """The inode number of every path."""
    found: dict[bytes, int] = {}
    pending: list[tuple[Node, bytes]] = [(overlay.root, b"")]
    while pending:
        directory, path = pending.pop()
        for name in overlay.list_names(directory):
            node = overlay.lookup(directory, name)
            attributes = overlay.attributes(node)
            found[path + b"/" + name] = attributes.ino
            if attributes.mode & 0o170000 == 0o040000:
                pending.append((node, path + b"/" + name))
    return found


def read(overlay: Overlay, path: str) -> bytes:
    """The content of a file."""
    fh = overlay.files.open(at(overlay, path), os.O_RDONLY)
    try:
        return overlay.files.read(fh, 0, 1 << 20)
    finally:
        overlay.files.release(fh)


def make(overlay: Overlay, path: str, data: bytes) -> None:
    """Make a file."""
    directory, _, name = path.rpartition("/")
    _, fh = overlay.create(at(overlay, directory), os.fsencode(name), 0o644, os.O_RDWR | os.O_EXCL, ROOT)
    overlay.files.write(fh, 0, data)
    overlay.files.release(fh)


def layer_file(used: Used, path: str) -> Path:
    """A file of the newest layer, on the disk."""
    return Path(os.fsdecode(used.overlay.config.lower[0])) / path


# --- results --------------------------------------------------------------------------------------


def test_stack_image_and_record(site: Site) -> None:
    with site.used() as used:
        make(used.overlay, "new", b"new")
        shown = view(used.overlay)
        made = used.commit("site:2", message="first")
        assert made.image == "site:2"
        assert used.unhashed == [made.layer]
        assert view(used.overlay) == shown
        with site.open() as store:
            layer, image = store.layers.find(made.layer), store.images.find("site:2")
            assert (layer.record.state, layer.record.message) == ("hashing", "first")
            assert layer.record.below == store.images.find(IMAGE).layers
            assert image.layers == (made.layer, *store.images.find(IMAGE).layers)
            assert image.history[-1].comment == "first"
            assert store.workspaces.find(NAME).record.layers == image.layers
    with site.image_view("site:2") as overlay:
        assert view(overlay) == shown
    assert os.listdir(site.place / "store" / "workspaces" / NAME / "upper") == []
    assert os.listdir(site.place / "store" / "intents") == []


def test_without_an_image_only_the_workspace_grows(site: Site) -> None:
    with site.used() as used:
        make(used.overlay, "new", b"new")
        made = used.commit()
        assert made.image is None
    assert site.layers()[0] == made.layer
    with site.open() as store:
        assert [image.name for image in store.images()] == [IMAGE]


@pytest.mark.parametrize("name", OPERATIONS)
def test_after_every_operation(site: Site, name: str) -> None:
    """Whiteouts, opaque directories, redirects, metadata-only copies, links: the tree and its numbers stay."""
    with site.used() as used:
        for operation in _preparing(name):
            operation(used.overlay)
        OPERATIONS[name](used.overlay)
        shown, numbered = view(used.overlay), numbers(used.overlay)
        used.commit("site:2", allow_empty=True)
        assert view(used.overlay) == shown
        assert numbers(used.overlay) == numbered
    with site.used() as again:
        assert view(again.overlay) == shown
        assert numbers(again.overlay) == numbered
    with site.image_view("site:2") as image:
        assert view(image) == shown


def _preparing(name: str) -> Iterator[Callable[[Overlay], object]]:
    from tests.crash.harness import change_upper
    from tests.crash.operations import PREPARATIONS

    yield change_upper
    if name in PREPARATIONS:
        yield PREPARATIONS[name]


def test_ten_in_a_row(site: Site) -> None:
    with site.used() as used:
        for turn in range(10):
            make(used.overlay, f"lower/inner/{turn}", b"%d" % turn)
            write(used.overlay, b"file", b"%d" % turn)
            shown, numbered = view(used.overlay), numbers(used.overlay)
            used.commit()
            assert view(used.overlay) == shown
            assert numbers(used.overlay) == numbered
    assert len(site.layers()) == 12
    with site.used() as again:
        assert view(again.overlay) == shown
        assert numbers(again.overlay) == numbered


def test_an_empty_upper(site: Site) -> None:
    with site.used() as used:
        with pytest.raises(UserError, match="nothing to commit"):
            used.commit()
        assert used.commit(allow_empty=True).layer
        with pytest.raises(UserError, match="nothing to commit"):
            used.commit()
        used.overlay.set_attributes(used.overlay.root, Changes(mode=0o711))
        used.commit()
        assert used.overlay.attributes(used.overlay.root).mode & 0o777 == 0o711
    assert len(site.layers()) == 4


# --- open files and directories --------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["file", "new"], ids=["copied up", "made"])
def test_a_writer_continues_in_the_new_upper(used: Used, path: str) -> None:
    overlay = used.overlay
    if path == "new":
        make(overlay, path, b"0123456789")
    fh = overlay.files.open(at(overlay, path), os.O_RDWR)
    overlay.files.write(fh, 0, b"before")
    reader = overlay.files.open(at(overlay, path), os.O_RDONLY)
    used.commit()
    committed = layer_file(used, path).read_bytes()
    assert overlay.files.read(fh, 0, 6) == overlay.files.read(reader, 0, 6) == b"before"
    overlay.files.write(fh, 0, b"AFTER!")
    assert overlay.files.read(fh, 0, 6) == overlay.files.read(reader, 0, 6) == b"AFTER!"
    assert layer_file(used, path).read_bytes() == committed
    overlay.fsync(fh)
    for handle in (fh, reader):
        overlay.files.release(handle)
    assert read(overlay, path)[:6] == b"AFTER!"


def test_reading_through_an_old_handle_changes_no_time_in_the_layer(used: Used) -> None:
    overlay = used.overlay
    make(overlay, "new", b"new")
    handles = [overlay.files.open(at(overlay, "new"), flags) for flags in (os.O_RDWR, os.O_RDONLY)]
    used.commit()
    os.utime(layer_file(used, "new"), ns=(0, layer_file(used, "new").stat().st_mtime_ns))
    for fh in handles:
        assert overlay.files.read(fh, 0, 3) == b"new"
        overlay.files.release(fh)
    assert layer_file(used, "new").stat().st_atime_ns == 0


def test_writers_survive_many_commits(used: Used) -> None:
    overlay = used.overlay
    make(overlay, "log", b"")
    fh = overlay.files.open(at(overlay, "log"), os.O_RDWR)
    for turn in range(20):
        overlay.files.write(fh, turn * 4, b"%03d\n" % turn)
        used.commit()
    assert overlay.files.read(fh, 0, 100) == b"".join(b"%03d\n" % turn for turn in range(20))
    overlay.files.release(fh)


def test_a_writer_continues_after_changes_of_attributes(used: Used) -> None:
    """The file is then in the new upper, without its data."""
    overlay = used.overlay
    fh = overlay.files.open(at(overlay, "file"), os.O_RDWR)
    used.commit(allow_empty=True)
    overlay.set_attributes(at(overlay, "file"), Changes(mode=0o640))
    overlay.files.write(fh, 0, b"CONTENT")
    overlay.files.release(fh)
    assert read(overlay, "file").startswith(b"CONTENT of a lower file")


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_WRONLY | os.O_TRUNC])
def test_an_inode_number_survives_data_over_attributes_over_data(site: Site, flags: int) -> None:
    """Three uppers hold the file: with data, with only new attributes, and with data again."""
    with site.used() as used:
        write(used.overlay, b"file", b"CONTENT")
        used.commit()
        used.overlay.set_attributes(at(used.overlay, "file"), Changes(mode=0o640))
        used.commit()
        write(used.overlay, b"file", b"again", flags=flags)
        before = numbers(used.overlay)
    with site.used() as used:
        assert numbers(used.overlay) == before


def test_an_unlinked_file_stays_writable_and_out_of_the_layer(used: Used) -> None:
    overlay = used.overlay
    make(overlay, "doomed", b"here")
    fh = overlay.files.open(at(overlay, "doomed"), os.O_RDWR)
    overlay.names.unlink(overlay.root, b"doomed")
    make(overlay, "kept", b"")
    used.commit()
    overlay.files.write(fh, 4, b", still")
    assert overlay.files.read(fh, 0, 100) == b"here, still"
    assert not layer_file(used, "doomed").exists()
    overlay.files.release(fh)


def test_an_unlinked_file_with_another_name_never_looked_up(site: Site) -> None:
    """Data written through it must show under the other name, and not in the layer."""
    with site.used() as used:
        make(used.overlay, "first", b"here")
        used.overlay.names.link(at(used.overlay, "first"), at(used.overlay, "lower"), b"other")
    with site.used("site:1") as used:
        overlay = used.overlay
        fh = overlay.files.open(at(overlay, "first"), os.O_RDWR)
        overlay.names.unlink(overlay.root, b"first")
        used.commit()
        overlay.files.write(fh, 0, b"HERE")
        assert read(overlay, "lower/other") == b"HERE"
        assert layer_file(used, "lower/other").read_bytes() == b"here"
        overlay.files.release(fh)


def test_a_removed_directory_stays_empty(used: Used) -> None:
    overlay = used.overlay
    overlay.names.mkdir(overlay.root, b"dir", 0o755, ROOT)
    node = at(overlay, "dir")
    fh = overlay.files.open_dir(node)
    overlay.names.rmdir(overlay.root, b"dir")
    make(overlay, "kept", b"")
    used.commit()
    assert list(overlay.files.read_dir(fh, 0)) == []
    assert overlay.attributes(node).nlink == 0
    overlay.files.release(fh)


def test_an_open_directory_continues(used: Used) -> None:
    overlay = used.overlay
    for number in range(50):
        make(overlay, f"lower/{number}", b"")
    fh = overlay.files.open_dir(at(overlay, "lower"))
    entries = overlay.files.read_dir(fh, 0)
    first = [next(entries) for _ in range(20)]
    used.commit()
    rest = list(overlay.files.read_dir(fh, first[-1].offset))
    assert sorted(child.name for child in (*first, *rest)) == sorted([b"inner", *(b"%d" % n for n in range(50))])
    overlay.files.release(fh)


def test_a_read_only_mode_does_not_stop_a_writer(used: Used) -> None:
    overlay = used.overlay
    (node, _), fh = overlay.create(overlay.root, b"object", 0o444, os.O_WRONLY | os.O_EXCL, ROOT)
    overlay.files.write(fh, 0, b"first")
    used.commit()
    overlay.files.write(fh, 5, b" second")
    overlay.files.release(fh)
    assert read(overlay, "object") == b"first second"
    assert overlay.attributes(node).mode & 0o777 == 0o444


# --- hard links -------------------------------------------------------------------------------------------


def test_aliases_in_the_index_only(site: Site) -> None:
    """One name of a lower file is written, the other was never looked up: the layer has both."""
    with site.used() as used:
        write(used.overlay, b"one", b"TWO")
        used.commit("site:2")
        assert layer_file(used, "one").samefile(layer_file(used, "two"))
        assert read(used.overlay, "two") == b"TWO names"
        assert used.overlay.attributes(at(used.overlay, "two")).nlink == 2
        write(used.overlay, b"two", b"One")
        assert read(used.overlay, "one") == b"One names"
        used.commit("site:3")
    with site.image_view("site:3") as image:
        assert read(image, "one") == read(image, "two") == b"One names"
        assert image.attributes(at(image, "one")).ino == image.attributes(at(image, "two")).ino
        assert image.attributes(at(image, "one")).nlink == 2


def test_an_alias_in_a_moved_directory(site: Site) -> None:
    with site.used() as used:
        used.overlay.names.link(at(used.overlay, "file"), at(used.overlay, "lower"), b"second")
        used.commit()
    with site.used() as used:
        used.overlay.names.rename(used.overlay.root, b"lower", used.overlay.root, b"moved")
        write(used.overlay, b"file", b"CHANGED")
        used.commit("site:2")
        assert read(used.overlay, "moved/second")[:7] == b"CHANGED"
    with site.image_view("site:2") as image:
        assert read(image, "moved/second")[:7] == b"CHANGED"
        assert image.attributes(at(image, "file")).nlink == 2


# --- failures -----------------------------------------------------------------------------


def test_a_failed_move_changes_nothing(site: Site) -> None:
    with site.used() as used:
        overlay = used.overlay
        make(overlay, "new", b"new")
        fh = overlay.files.open(at(overlay, "new"), os.O_RDWR)
        shown = view(overlay)
        upcoming = site.place / "upcoming"
        upcoming.mkdir()

        def fail() -> None:
            raise oserror(errno.EXDEV)

        with pytest.raises(OSError, match="cross-device"):
            overlay.rotation().rotate(os.fsencode(upcoming), os.fsencode(site.place / "layer"), fail)
        overlay.files.write(fh, 0, b"NEW")
        assert (site.place / "store" / "workspaces" / NAME / "upper" / "new").read_bytes() == b"NEW"
        overlay.files.release(fh)
        write(overlay, b"new", b"new")
        assert view(overlay) == shown
        assert len(overlay.config.lower) == 2


def test_files_written_in_passthrough_mode(used: Used, monkeypatch: pytest.MonkeyPatch) -> None:
    make(used.overlay, "new", b"new")
    monkeypatch.setattr(used.engine, "nodes_written_in_passthrough", lambda: {at(used.overlay, "new")})
    with pytest.raises(UserError, match="io=cached"):
        used.commit()
    assert len(used.overlay.config.lower) == 2
    monkeypatch.undo()
    used.commit()


def test_fsync_waits_until_the_commit_is_durable(used: Used) -> None:
    overlay = used.overlay
    make(overlay, "new", b"new")
    fh = overlay.files.open(at(overlay, "new"), os.O_RDWR)
    barrier = overlay.hold_syncs()
    done = threading.Event()

    def sync(call: Callable[[], None]) -> None:
        call()
        done.set()

    waiting = threading.Thread(target=sync, args=(overlay.prepare_fsync(fh),))
    waiting.start()
    assert not done.is_set()
    overlay.release_syncs(barrier)
    waiting.join()
    assert done.is_set()
    overlay.files.release(fh)


def test_fsync_fails_if_the_commit_is_not_durable(used: Used) -> None:
    overlay = used.overlay
    make(overlay, "new", b"new")
    fh = overlay.files.open(at(overlay, "new"), os.O_RDWR)
    barrier = overlay.hold_syncs()
    call = overlay.prepare_fsync(fh)
    overlay.release_syncs(barrier, oserror(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        call()
    with pytest.raises(OSError, match="Input/output"):
        overlay.fsync(fh)
    overlay.files.release(fh)


def test_a_new_upper_keeps_the_root_as_it_was(site: Site) -> None:
    with site.used() as used:
        overlay = used.overlay
        overlay.set_attributes(overlay.root, Changes(uid=7, gid=8, mode=0o1775, mtime_ns=10**18))
        overlay.setxattr(overlay.root, b"user.kept", b"value")
        before = overlay.attributes(overlay.root)
        used.commit()
        after = overlay.attributes(overlay.root)
        assert after._replace(ctime_ns=0, blocks=0, size=0) == before._replace(ctime_ns=0, blocks=0, size=0)
        assert overlay.metadata.getxattr(overlay.root, b"user.kept") == b"value"
        upper = site.place / "store" / "workspaces" / NAME / "upper"
        assert not [name for name in os.listxattr(upper) if "overlay." in name]


def test_without_an_upper_there_is_nothing_to_commit(place: Path) -> None:
    (place / "layer").mkdir()
    overlay = Overlay(StackConfig(lower=(os.fsencode(place / "layer"),)))
    assert not overlay.is_changed
    assert overlay.read_only
    overlay.close()


def test_what_was_left_unhashed_is_hashed_once(site: Site) -> None:
    with site.used() as used:
        make(used.overlay, "new", b"new")
        layer = used.commit().layer
    with site.open() as store:
        assert layer in [each.id for each in store.layers.unfinished()]
        tree = store.layers.find(layer).tree_fd()
        sysio.try_lock(tree)  # as the hashing process does
        assert hashing.hash_layer(store, store.layers.find(layer)) is None
        os.close(tree)
        hashing.hash_unfinished(store)
        assert list(store.layers.unfinished()) == []
        assert store.layers.find(layer).record.digest is not None


def test_the_access_mode_of_a_descriptor(place: Path) -> None:
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
        fd = os.open(place / "file", flags | os.O_CREAT)
        assert sysio.access_mode(fd) == flags
        os.close(fd)
