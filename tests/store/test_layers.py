"""Layers at rest: published atomically, found by prefixes of their ids, stored once, locked while in use."""

import os
import stat
from pathlib import Path

import pytest

from overlayfs.errors import UserError
from overlayfs.store import records
from overlayfs.store.manifest import Manifest
from overlayfs.store.records import ImageRecord, now
from overlayfs.store.store import LayerStore
from tests.store.samples import add_image, add_layer, fill, finish, open_store, there


def test_a_new_store_is_private_and_has_a_format(store: LayerStore, place: Path) -> None:
    assert (place / "store" / "store").read_text() == '{"format": 1}\n'
    for directory in (place / "store", *filter(Path.is_dir, (place / "store").iterdir())):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_opening_again(store: LayerStore, place: Path) -> None:
    layer = add_layer(store, {"a": "1"}, author="me", message="first")
    with open_store(place, create=False) as other:
        found = other.layers.find(layer.id)
        assert found.record == layer.record
        assert (found.record.author, found.record.message, found.record.size) == ("me", "first", 1)
        assert Path(os.fsdecode(found.tree_path), "a").read_text() == "1"


@pytest.mark.parametrize(
    ("head", "sentence"),
    [('{"format": 2}', "has format 2, this program knows format 1"), ("{}", "is damaged"), ("x", "is damaged")],
)
def test_another_format_is_refused(store: LayerStore, place: Path, head: str, sentence: str) -> None:
    (place / "store" / "store").write_text(head)
    with pytest.raises(UserError, match=sentence):
        open_store(place)


def test_no_store(place: Path) -> None:
    with pytest.raises(UserError, match="there is no store at"):
        open_store(place, create=False)
    (place / "store").mkdir()
    with pytest.raises(UserError, match="is not a store"):
        open_store(place, create=False)
    (place / "store" / "letters").mkdir()
    with pytest.raises(UserError, match="is not a store"):
        open_store(place)
    (place / "store" / "letters").rmdir()
    (place / "store").rmdir()
    (place / "store").write_text("a file")
    with pytest.raises(UserError, match="cannot open the store"):
        open_store(place)


def test_leaving_without_publishing_discards(store: LayerStore, place: Path) -> None:
    before = there(place)
    with store.layers.stage() as staged:
        fill(staged.tree_path, {"a": "1"})
        assert there(place) != before
    assert there(place) == before


def test_an_id_is_found_by_its_prefix(store: LayerStore) -> None:
    one, two = add_layer(store, {"a": "1"}), add_layer(store, {"a": "2"})
    assert store.layers.find(one.id[:12]).id == one.id
    assert one.record.digest is not None
    assert store.layers.find(one.record.digest).id == one.id
    assert store.layers.find(one.record.digest[:20]).id == one.id
    with pytest.raises(UserError, match="is no layer"):
        store.layers.find("no hex")
    with pytest.raises(UserError, match="is no layer"):
        store.layers.find("0" * 32)
    with pytest.raises(UserError, match="is no layer"):
        store.layers.find("")
    many = [add_layer(store, {"a": str(number)}) for number in range(3, 30)]
    starts = [layer.id[0] for layer in (one, two, *many)]
    shared = next(start for start in starts if starts.count(start) > 1)
    with pytest.raises(UserError, match="several"):
        store.layers.find(shared)


def test_equal_layers_are_stored_once(store: LayerStore, place: Path) -> None:
    one = add_layer(store, {"a": "1"}, message="first")
    again = add_layer(store, {"a": "1"}, message="second", diff_id="sha256:" + "a" * 64)
    assert again.id == one.id
    assert again.record.message == "first"
    assert again.record.diff_id == "sha256:" + "a" * 64
    assert there(place)["layers"] == [one.id]
    found = store.layers.by_diff_id("sha256:" + "a" * 64)
    assert found is not None
    assert found.id == one.id


def test_an_index_is_checked_against_the_records(store: LayerStore, place: Path) -> None:
    one, two = add_layer(store, {"a": "1"}), add_layer(store, {"a": "2"})
    assert one.record.digest is not None
    assert two.record.digest is not None
    index = place / "store" / "digests" / one.record.digest.removeprefix("sha256:")
    index.write_text(two.id)
    assert store.layers.by_digest(one.record.digest) is None
    index.write_text("../../etc")
    assert store.layers.by_digest(one.record.digest) is None
    index.unlink()
    assert store.layers.by_digest(one.record.digest) is None
    assert store.layers.by_digest("sha256:../../x") is None


def test_an_incomplete_layer_is_not_found(store: LayerStore, place: Path) -> None:
    one, two = add_layer(store, {"a": "1"}), add_layer(store, {"a": "2"})
    (place / "store" / "layers" / one.id / "record").unlink()
    (place / "store" / "layers" / two.id / "tree").rename(place / "tree")
    (place / "store" / "layers" / "strange").write_text("")
    assert list(store.layers()) == []


def test_a_damaged_record_is_named(store: LayerStore, place: Path) -> None:
    one = add_layer(store, {"a": "1"})
    record = place / "store" / "layers" / one.id / "record"
    record.write_text('{"id": 1}')
    with pytest.raises(UserError, match=f"{record} is damaged: .*restore it"):
        store.layers.find(one.id)


def test_hashing_ends_in_a_complete_layer(store: LayerStore, place: Path) -> None:
    layer = add_layer(store, {"a": "12345"}, hashed=False)
    assert (layer.record.state, layer.record.digest) == ("hashing", None)
    assert [each.id for each in store.layers.unfinished()] == [layer.id]
    assert store.stack_of(layer.id)[0].id == layer.id
    done = finish(store, layer)
    assert (done.id, done.record.state, done.record.size, done.record.entries) == (layer.id, "complete", 5, 2)
    assert list(store.layers.unfinished()) == []
    assert store.layers.by_digest(done.record.digest or "") is not None
    with Manifest.open(done.manifest_fd()) as manifest:
        assert manifest.digest == done.record.digest


def test_hashing_finds_an_equal_layer(store: LayerStore) -> None:
    """Images refer to the existing layer; the new one is garbage as soon as it is not in use."""
    first = add_layer(store, {"a": "1"})
    second = add_layer(store, {"a": "1"}, hashed=False)
    image = store.images.put(ImageRecord(name="two", layers=(second.id, first.id), created=now()))
    assert image.layers == (second.id, first.id)
    assert finish(store, second).id == first.id
    assert store.images.find("two").layers == (first.id, first.id)
    assert store.layers.find(second.id).record.same_as == first.id
    assert store.images.put(ImageRecord(name="late", layers=(second.id,), created=now())).layers == (first.id,)
    assert [each.name for each in store.gc()] == [second.id]


def test_equal_layers_with_redirects_over_other_layers_are_different(store: LayerStore) -> None:
    """A redirect has another target over another stack, so equal content is not enough."""
    base, other = add_layer(store, {"a": "1"}), add_layer(store, {"a": "2"})
    made = []
    for below in ((base.id,), (other.id,), (base.id,)):
        with store.layers.stage() as staged:
            fill(staged.tree_path, {"b": "1"})
            with Manifest.build(staged.tree_fd) as manifest:
                made.append(staged.publish(manifest=manifest, flags=("redirect",), below=below))
    assert made[0].id == made[2].id != made[1].id
    assert [layer.id for layer in store.stack_of(made[1].id)] == [made[1].id, other.id]


def test_a_held_layer_stays(store: LayerStore, place: Path) -> None:
    layer = add_layer(store, {"a": "1"})
    with open_store(place) as other:
        assert other.gc() == []
        store.close()
        with other.layers.find(layer.id).hold():
            assert other.gc() == []
        assert [(each.kind, each.name) for each in other.gc()] == [("layer", layer.id)]
        gone = type(layer)(other.directory, layer.record)
        with pytest.raises(UserError, match="is not in the store any more"):
            gone.hold()


def test_gc_keeps_what_is_being_created(store: LayerStore, place: Path) -> None:
    with store.layers.stage() as staged, open_store(place) as other:
        fill(staged.tree_path, {"a": "1"})
        assert other.gc(dry_run=True) == other.gc() == []
        layer = staged.publish(manifest=None)
        assert other.gc() == []
    assert [each.id for each in store.layers()] == [layer.id]


def test_a_repair_holds_the_layer_exclusively(store: LayerStore) -> None:
    layer = add_layer(store, {"a": "1"})
    with pytest.raises(UserError, match="is in use"):
        layer.hold_exclusively()
    store.images.put(ImageRecord(name="one", layers=(layer.id,), created=now()))
    with layer.hold_exclusively():
        assert store.layers.by_digest(layer.record.digest or "") is None
    with layer.hold(), layer.hold():
        pass


def test_an_image_of_missing_layers_is_refused(store: LayerStore) -> None:
    with pytest.raises(UserError, match="is not in the store, so site:latest cannot be made of it"):
        store.images.put(ImageRecord(name="site", layers=("0" * 32,), created=now()))
    assert list(store.images()) == []


def test_images_are_put_tagged_and_removed(store: LayerStore) -> None:
    one = add_image(store, "site", {"a": "1"})
    assert one.name == "site:latest"
    assert store.images.tag("site", "registry.example:5000/team/site:v2").layers == one.layers
    assert [image.name for image in store.images()] == ["registry.example:5000/team/site:v2", "site:latest"]
    store.images.remove("site")
    with pytest.raises(UserError, match="there is no image site:latest"):
        store.images.find("site")
    assert store.images.find("registry.example:5000/team/site:v2").config == {}


@pytest.mark.parametrize(
    "name", ["", "a b", "Site", "a//b", "../x", "a:", ":a", "a:b:c/", "a@sha256:1", "ä", "a" * 300]
)
def test_names_that_no_image_has(store: LayerStore, name: str) -> None:
    with pytest.raises(UserError, match="image name"):
        store.images.find(name)


def test_everything_of_an_image_is_kept(store: LayerStore) -> None:
    layer = add_layer(store, {"a": "1"})
    config = {"Env": ["A=ä"], "Entrypoint": None, "Labels": {"x": "y"}, "Unknown": [1, 2.5, {"deep": True}]}
    record = ImageRecord(
        name="full:1", layers=(layer.id,), created=now(), architecture="amd64", config=config, annotations={"k": "v"}
    )
    assert store.images.put(record) == record
    assert store.images.find("full:1") == record


def test_opening_does_not_read_ten_thousand_layers(store: LayerStore, place: Path) -> None:
    """Opening the store, and finding a layer by its id, makes no system call on other layers."""
    layer = add_layer(store, {"a": "1"})
    store.close()
    room = place / "store" / "layers"
    room.rename(place / "elsewhere")
    room.mkdir()
    with open_store(place) as opened:
        assert list(opened.images()) == []
        room.rmdir()
        (place / "elsewhere").rename(room)
    with open_store(place) as opened:
        assert opened.layers.find(layer.id).id == layer.id


@pytest.mark.parametrize(
    "document",
    [
        b'{"name": "\xff"}',
        b'{"name": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
        b'{"name": "' + b"x" * 5000 + b'"}',
        b"{}",
    ],
)
def test_a_document_with_a_valid_checksum_that_is_no_record_is_refused(document: bytes) -> None:
    with pytest.raises(UserError, match=r"the record is damaged: .*; restore it from a copy, or remove it") as caught:
        records.decode(records.with_checksum(document), ImageRecord, "the record")
    assert len(str(caught.value)) < 400
