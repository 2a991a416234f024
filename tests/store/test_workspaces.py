"""Workspaces: uppers kept by name; their trees become layers by one rename."""

import errno
import os
import stat
from pathlib import Path

import pytest

from overlayfs.errors import UserError
from overlayfs.store.commit_transaction import NewLayer
from overlayfs.store.records import ImageRecord, now
from overlayfs.store.store import LayerStore
from tests.store.samples import add_image, add_layer, fill, finish, open_store, there
from tests.support.disks import disk

root = pytest.mark.root


def test_a_workspace_is_made_kept_and_removed(store: LayerStore, place: Path) -> None:
    image = add_image(store, "site", {"a": "1"}, {"b": "2"})
    made = store.workspaces.create("site", "mine")
    assert (made.record.image, made.record.layers, made.record.ephemeral) == ("site:latest", image.layers, False)
    with open_store(place) as other:
        assert [each.record for each in other.workspaces()] == [made.record]
        assert [layer.id for layer in other.stack_of("mine")] == list(image.layers)
        with pytest.raises(UserError, match="there is a workspace mine already"):
            other.workspaces.create("site", "mine")
        other.workspaces.remove("mine")
        with pytest.raises(UserError, match="there is no workspace mine"):
            store.workspaces.find("mine")
    assert there(place)["workspaces"] == there(place)["trash"] == []


@root
def test_a_new_upper_looks_like_the_top_layer(store: LayerStore) -> None:
    with store.layers.stage() as staged:
        os.chown(staged.tree_fd, 5, 6)
        os.chmod(staged.tree_fd, 0o1751)
        os.setxattr(staged.tree_fd, "user.kept", b"value")
        os.setxattr(staged.tree_fd, "trusted.overlay.opaque", b"y")
        os.utime(staged.tree_fd, ns=(1, 2))
        layer = staged.publish(manifest=None)
    store.images.put(ImageRecord(name="site", layers=(layer.id,), created=now()))
    upper = store.workspaces.create("site", "mine").upper_path
    found = os.stat(upper)
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid, found.st_mtime_ns) == (0o1751, 5, 6, 2)
    assert os.listxattr(upper) == ["user.kept"]


def test_a_claimed_workspace_is_locked(store: LayerStore, place: Path) -> None:
    add_image(store, "site", {"a": "1"})
    add_image(store, "other", {"a": "2"})
    workspace, hold, *_ = store.workspaces.claim("site", "mine")
    with open_store(place) as other:
        with hold:
            other.workspaces.find("mine")
            assert other.workspaces.find("mine").try_hold() is None
            assert other.gc() == []
        again, held, new, _ = other.workspaces.claim("site", "mine")
        assert again.record == workspace.record
        held.release()
        assert not new
        with pytest.raises(UserError, match="belongs to site:latest, not to other:latest"):
            other.workspaces.claim("other", "mine")
        with pytest.raises(UserError, match="leave --ephemeral out"):
            other.workspaces.claim("site", "mine", ephemeral=True)
        with pytest.raises(UserError, match="there is no image nothing:latest"):
            other.workspaces.claim("nothing", "mine")
        with pytest.raises(UserError, match="is not a workspace name"):
            other.workspaces.claim("site", "../mine")


def test_a_workspace_name_is_chosen(store: LayerStore) -> None:
    add_image(store, "registry.example/team/site:v1", {"a": "1"})
    one, first, *_ = store.workspaces.claim("registry.example/team/site:v1")
    two, second, *_ = store.workspaces.claim("registry.example/team/site:v1")
    with first, second:
        assert one.name.startswith("site-")
        assert one.name != two.name


def test_an_ephemeral_workspace_is_removed_once_its_lock_is_free(store: LayerStore, place: Path) -> None:
    add_image(store, "site", {"a": "1"})
    workspace, hold, *_ = store.workspaces.claim("site", ephemeral=True)
    with hold, open_store(place) as other:
        assert other.gc(dry_run=True) == []
        assert [each.name for each in other.workspaces()] == [workspace.name]
    assert [(each.kind, each.name) for each in store.gc(dry_run=True)] == [("workspace", workspace.name)]
    with open_store(place) as other:
        assert list(other.workspaces()) == []
    assert there(place)["workspaces"] == there(place)["trash"] == []


def test_a_commit_moves_the_tree_and_rotates_the_upper(store: LayerStore, place: Path) -> None:
    image = add_image(store, "site", {"a": "1"})
    workspace = store.workspaces.create("site", "mine")
    fill(workspace.upper_path, {"b": "22"})
    before = os.stat(workspace.upper_path)
    record = ImageRecord(name="site:2", layers=image.layers, created=now())
    layer = store.commit_directory(
        workspace.upper_path,
        NewLayer(workspace="mine", image=record, author="me", message="b", below=image.layers),
    )
    assert os.stat(layer.tree_path).st_ino == before.st_ino
    assert Path(os.fsdecode(layer.tree_path), "b").read_text() == "22"
    assert (
        store.workspaces.find("mine").record.layers == store.images.find("site:2").layers == (layer.id, *image.layers)
    )
    assert store.workspaces.find("mine").record.image == "site:2"
    assert os.listdir(workspace.upper_path) == []
    assert sorted(os.listdir(os.fsdecode(workspace.path))) == ["lock", "record", "upper", "work"]
    assert there(place)["intents"] == []
    done = finish(store, layer)
    assert (done.id, done.record.message, done.record.below) == (layer.id, "b", ())


def test_a_workspace_is_not_behind_an_equal_layer(store: LayerStore, place: Path) -> None:
    """Images refer to the existing layer, the workspace keeps its own: the stacks are equal."""
    image = add_image(store, "site", {"a": "1"})
    workspace = store.workspaces.create("site", "mine")
    twin = add_layer(store, {"b": "2"})
    store.images.put(ImageRecord(name="twin", layers=(twin.id, *image.layers), created=now()))
    fill(workspace.upper_path, {"b": "2"})
    record = ImageRecord(name="site:2", layers=image.layers, created=now())
    layer = store.commit_directory(workspace.upper_path, NewLayer(workspace="mine", image=record, below=image.layers))
    assert finish(store, layer).id == twin.id
    assert store.images.find("site:2").layers == (twin.id, *image.layers)
    assert store.workspaces.find("mine").record.layers == (layer.id, *image.layers)
    for name, behind in (("site:2", False), ("twin", False), ("site", False)):
        claim = store.workspaces.claim(name, "mine")
        assert claim.behind is behind
        claim.lock.release()
    add_image(store, "site:2", {"a": "other"})
    claim = store.workspaces.claim("site:2", "mine")
    with claim.lock:
        assert claim.behind


def test_a_directory_outside_a_workspace_is_committed(store: LayerStore, place: Path) -> None:
    fill(os.fsencode(place / "tree"), {"b": "2"})
    layer = store.commit_directory(os.fsencode(place / "tree"), NewLayer(message="a tree"))
    assert not (place / "tree").exists()
    assert store.layers.find(layer.id).record.message == "a tree"


@root
def test_another_file_system_is_refused(store: LayerStore, place: Path) -> None:
    with disk("tmpfs", place / "disk") as other:
        fill(os.fsencode(other / "tree"), {"b": "2"})
        with pytest.raises(OSError, match="tree") as caught:
            store.commit_directory(os.fsencode(other / "tree"))
        assert caught.value.errno == errno.EXDEV
        assert (other / "tree" / "b").read_text() == "2"
    assert there(place)["layers"] == there(place)["intents"] == []


def test_a_prepared_transaction_is_rolled_back(store: LayerStore, place: Path) -> None:
    image = add_image(store, "site", {"a": "1"})
    workspace = store.workspaces.create("site", "mine")
    fill(workspace.upper_path, {"b": "2"})
    like = os.open(workspace.upper_path, os.O_RDONLY)
    before = there(place)
    record = ImageRecord(name="site:2", layers=image.layers, created=now())
    with store.transactions.prepare(NewLayer(workspace="mine", image=record), like) as transaction:
        assert os.path.isdir(transaction.next_upper)
        assert os.path.isdir(transaction.next_work)
        assert [layer.id for layer in store.layers()] == list(image.layers)
        assert store.gc() == []
    os.close(like)
    assert there(place) == before
    assert sorted(os.listdir(os.fsdecode(workspace.path))) == ["lock", "record", "upper", "work"]
    assert Path(os.fsdecode(workspace.upper_path), "b").read_text() == "2"


def test_rollback_keeps_a_next_upper_that_is_in_use(store: LayerStore, place: Path) -> None:
    """Of two transactions the first was abandoned, the second not finalized: the next upper is in use."""
    add_image(store, "site", {"a": "1"})
    workspace = store.workspaces.create("site", "mine")
    like, directory = os.open(workspace.upper_path, os.O_RDONLY), os.open(workspace.path, os.O_RDONLY)
    store.transactions.prepare(NewLayer(workspace="mine"), like).release()
    second = store.transactions.prepare(NewLayer(workspace="mine"), like)
    second.commit(directory, b"upper")
    fill(second.next_upper, {"written": "since"})
    second.release()
    for fd in (like, directory):
        os.close(fd)
    with open_store(place):
        assert Path(os.fsdecode(workspace.upper_path), "written").read_text() == "since"
        assert there(place)["intents"] == []


def test_an_image_of_missing_layers_prepares_nothing(store: LayerStore, place: Path) -> None:
    before = there(place)
    record = ImageRecord(name="site:2", layers=("0" * 32,), created=now())
    with pytest.raises(UserError, match="is not in the store"):
        store.transactions.prepare(NewLayer(image=record))
    assert there(place) == before


def test_garbage(store: LayerStore, place: Path) -> None:
    """gc removes exactly what a dry run returns, and keeps what is referred to."""
    kept = add_image(store, "site", {"a": "1"})
    used = add_layer(store, {"a": "used by a workspace"})
    store.images.put(ImageRecord(name="old", layers=(used.id,), created=now()))
    store.workspaces.create("old", "mine")
    store.images.remove("old")
    lost = add_layer(store, {"a": "12345", "b": "678"})
    store.close()
    base = place / "store"
    (base / "layers" / ("0" * 32)).mkdir()
    (base / "staging" / "left").mkdir()
    (base / "staging" / "left" / "data").write_text("123")
    (base / "staging" / "file-left").write_text("12")
    (base / "trash" / "left").mkdir()
    (base / "workspaces" / "half").mkdir()
    with open_store(place) as other:
        garbage = other.gc(dry_run=True)
        assert {(each.kind, each.name) for each in garbage} == {
            ("layer", lost.id),
            ("layer", "0" * 32),
            ("staging", "left"),
            ("staging", "file-left"),
            ("trash", "left"),
            ("workspace", "half"),
        }
        assert there(place)["trash"] == ["left"]
        sizes = {(each.kind, each.name): each.size for each in garbage}
        assert (sizes["staging", "left"], sizes["staging", "file-left"], sizes["trash", "left"]) == (3, 2, 0)
        assert sizes["layer", lost.id] > 8
        assert other.gc() == garbage
        assert other.gc() == []
        assert sorted(layer.id for layer in other.layers()) == sorted((*kept.layers, used.id))
        assert other.layers.by_digest(lost.record.digest or "") is None
    assert there(place)["staging"] == there(place)["trash"] == []
    assert len(there(place)["digests"]) == 2
