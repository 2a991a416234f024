"""Import and export of images: every format, in both directions, completely or not at all."""

import hashlib
import io
import json
import os
import shlex
import socket
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from overlayfs.errors import UserError
from overlayfs.oci import image_import, image_spec, platforms
from overlayfs.oci.blobs import read_blob, write_blob
from overlayfs.oci.compression import Compression
from overlayfs.oci.image_export import ExportOptions, Format, export_image
from overlayfs.oci.image_import import ImportOptions, import_image
from overlayfs.store.records import ImageRecord
from overlayfs.store.store import LayerStore
from tests.oci import archives, samples
from tests.oci.archives import END, directory, file, symlink
from tests.store.samples import there
from tests.support.builder import build
from tests.support.dump import same
from tests.support.spec import Dir, Link, Whiteout

pytestmark = pytest.mark.root

LAYERED = (Format.OCI, Format.OCI_ARCHIVE, Format.DOCKER_ARCHIVE)


def export(store: LayerStore, target: Path, kind: Format, packing: Compression | None = None) -> bytes:
    export_image(store, "sample:1", os.fsencode(target), ExportOptions(kind, packing))
    return os.fsencode(target)


def alike(one: ImageRecord, other: ImageRecord) -> bool:
    """Whether two images are the same apart from their names and ids."""
    parts = ("created", "author", "architecture", "os", "variant", "config", "history")
    return all(getattr(one, part) == getattr(other, part) for part in parts)


def contents(path: Path) -> dict[str, bytes]:
    """All files of a directory or of an archive."""
    if path.is_dir():
        return {str(each.relative_to(path)): each.read_bytes() for each in path.rglob("*") if each.is_file()}
    with tarfile.open(path) as opened:
        return {each.name: opened.extractfile(each).read() for each in opened if each.isfile()}  # type: ignore[union-attr]


@pytest.fixture
def other(place: Path) -> Iterator[LayerStore]:
    """A second store, independent of the first."""
    (place / "elsewhere").mkdir()
    with LayerStore(os.fsencode(place / "elsewhere" / "store")) as opened:
        yield opened


# --- round trips


@pytest.mark.parametrize("packing", [None, *Compression])
@pytest.mark.parametrize("kind", LAYERED)
def test_layers_and_configuration_come_back(
    store: LayerStore, other: LayerStore, place: Path, kind: Format, packing: Compression | None
) -> None:
    made = samples.add_image(store)
    got = import_image(other, export(store, place / "out", kind, packing), "other:2")
    assert got.name == "other:2"
    assert alike(got, made)
    assert got.annotations == (made.annotations if kind is not Format.DOCKER_ARCHIVE else {})
    assert [other.layers.find(each).record.digest for each in got.layers] == [
        store.layers.find(each).record.digest for each in made.layers
    ]
    same(samples.view(store, "sample:1"), samples.view(other, "other:2"))
    assert [other.layers.find(each).record.message for each in got.layers] == ["top", "ADD base"]


@pytest.mark.parametrize("kind", [Format.TAR, Format.DIRECTORY])
def test_a_merged_tree_comes_back(store: LayerStore, other: LayerStore, place: Path, kind: Format) -> None:
    samples.add_image(store)
    got = import_image(other, export(store, place / "out", kind), "other")
    assert len(got.layers) == 1
    expected = samples.view(store, "sample:1")
    found = samples.view(other, "other")
    # A merged directory has no true link count.
    same(*({path: each._replace(nlink=0) for path, each in one.items()} for one in (found, expected)))


@pytest.mark.parametrize("kind", [*LAYERED, Format.TAR])
def test_the_same_image_is_the_same_bytes(store: LayerStore, other: LayerStore, place: Path, kind: Format) -> None:
    samples.add_image(store)
    export(store, place / "one", kind)
    samples.add_image(other)
    export(other, place / "two", kind)
    if kind is Format.OCI:
        assert contents(place / "one") == contents(place / "two")
    else:
        assert (place / "one").read_bytes() == (place / "two").read_bytes()


@pytest.mark.parametrize("kind", [*LAYERED[1:], Format.TAR])
def test_through_pipes_both_ways(store: LayerStore, other: LayerStore, place: Path, kind: Format) -> None:
    """A pipe receives the same bytes as a file, and can be imported from."""
    samples.add_image(store)
    export(store, place / "file", kind)
    os.mkfifo(place / "pipe")
    pipe, copy = shlex.quote(str(place / "pipe")), shlex.quote(str(place / "copy"))
    reader = subprocess.Popen(f"cat {pipe} > {copy}", shell=True)
    export(store, place / "pipe", kind)
    assert reader.wait() == 0
    assert sorted(contents(place / "copy")) == sorted(contents(place / "file"))
    feeder = subprocess.Popen(f"cat {copy} > {pipe}", shell=True)
    import_image(other, os.fsencode(place / "pipe"), "other")
    assert feeder.wait() == 0
    assert samples.view(other, "other").keys() == samples.view(store, "sample:1").keys()


@pytest.mark.parametrize("packing", ["gzip", "zstd"])
@pytest.mark.parametrize("kind", [Format.OCI_ARCHIVE, Format.DOCKER_ARCHIVE, Format.TAR])
def test_compressed_as_a_whole(store: LayerStore, place: Path, kind: Format, packing: str) -> None:
    made = samples.add_image(store)
    packed = subprocess.run([packing, "-c", export(store, place / "out", kind)], capture_output=True, check=True).stdout
    (place / "packed").write_bytes(packed)
    got = import_image(store, os.fsencode(place / "packed"), "other")
    assert (got.layers == made.layers) == (kind is not Format.TAR)


def test_layers_that_the_store_has_are_not_read(store: LayerStore, place: Path) -> None:
    made = samples.add_image(store)
    out = export(store, place / "out", Format.OCI)
    for blob in (place / "out" / "blobs" / "sha256").iterdir():
        if blob.read_bytes()[:2] == b"\x1f\x8b":
            blob.unlink()
    before = there(place)
    assert import_image(store, out, "other").layers == made.layers
    assert there(place)["layers"] == before["layers"]


def test_a_layer_that_occurs_twice_is_written_once(store: LayerStore, other: LayerStore, place: Path) -> None:
    made = samples.add_image(store, "sample:1", {"f": b"1"}, {"f": b"2"}, {"f": b"1"})
    assert made.layers[0] == made.layers[2]
    got = import_image(other, export(store, place / "out", Format.OCI_ARCHIVE), "other")
    assert got.layers[0] == got.layers[2] != got.layers[1]
    assert len(contents(place / "out")) == 4 + 2


def test_the_diff_id_of_the_canonical_tar_is_recorded(store: LayerStore) -> None:
    layer = samples.add(store, samples.BASE)
    assert layer.record.diff_id is None
    blob = write_blob(store, layer, lambda piece: None)
    assert store.layers.find(layer.id).record.diff_id == blob.diff_id
    found = store.layers.by_diff_id(blob.diff_id)
    assert found is not None
    assert found.id == layer.id


def test_layers_with_marks_are_exported_over_their_stack(store: LayerStore, other: LayerStore, place: Path) -> None:
    samples.add_marked_image(store, place, "sample:1")
    got = import_image(other, export(store, place / "out", Format.OCI), "other")
    assert other.layers.find(got.layers[0]).record.flags == ()
    same(samples.view(other, "other"), samples.view(store, "sample:1"))


# --- single layers and directories


def test_a_directory_is_what_a_mount_of_it_shows(store: LayerStore, place: Path) -> None:
    source = place / "source"
    source.mkdir()
    build(source, Dir({**samples.BASE, "gone": Whiteout(), ".wh.too": b"", "twin": Link("etc/motd")}, mode=0o711))
    got = import_image(store, os.fsencode(source), "dir", ImportOptions(message="m", author="me"))
    assert (got.architecture, got.os, len(got.layers)) == (platforms.host().architecture, "linux", 1)
    assert [step.created_by for step in got.history] == [f"import {source}"]
    assert (store.layers.find(got.layers[0]).record.message, store.layers.find(got.layers[0]).record.author) == (
        "m",
        "me",
    )
    found, expected = samples.view(store, "dir"), archives.picture(source)
    assert found[b""]._replace(mtime_ns=0) == expected[b""]
    same(
        samples.unlinked(found), {p: e for p, e in samples.unlinked(expected).items() if p not in (b"gone", b".wh.too")}
    )
    assert found[b"hole"].sparse


def test_importing_a_directory_leaves_out_the_store_in_it(store: LayerStore, place: Path) -> None:
    (place / "file").write_text("text")
    import_image(store, os.fsencode(place), "all")
    assert set(samples.view(store, "all")) == {b"", b"file"}


@pytest.mark.parametrize("first", [b"", b"./", b"blobs/", b"repositories"])
def test_a_layer_may_begin_as_an_image_does(store: LayerStore, place: Path, first: bytes) -> None:
    start = {b"": b"", b"repositories": file(b"repositories")}.get(first, directory(first or b"."))
    (place / "layer.tar").write_bytes(start + file(b"x" * 99, b"data" * 30_000) + END)
    import_image(store, os.fsencode(place / "layer.tar"), "layer")
    assert b"x" * 99 in samples.view(store, "layer")


def test_a_layer_with_a_long_first_entry(store: LayerStore, place: Path) -> None:
    (place / "layer.tar").write_bytes(archives.pax({b"SCHILY.xattr.user.x": b"v" * 4000}) * 40 + file(b"f") + END)
    import_image(store, os.fsencode(place / "layer.tar"), "layer")
    assert set(samples.view(store, "layer")) == {b"", b"f"}


def test_an_image_begins_with_its_topmost_opaque_root(store: LayerStore, other: LayerStore, place: Path) -> None:
    samples.add_image(store, "sample:1", {"a": b"1"}, Dir({"b": b"2"}, opaque="trusted"), {"c": b"3"})
    got = import_image(other, export(store, place / "out", Format.OCI), "other")
    assert len(got.layers) == 2
    assert set(samples.view(other, "other")) == {b"", b"b", b"c"}


def test_history_says_that_hidden_layers_are_empty(store: LayerStore, other: LayerStore, place: Path) -> None:
    made = samples.add_image(store)
    layers = (samples.add(store, Dir({"b": b"2"}, opaque="trusted")).id, made.layers[1])
    store.images.put(msgspec.structs.replace(made, layers=layers))
    got = import_image(other, export(store, place / "out", Format.OCI), "other:1")
    assert [step.empty_layer for step in got.history] == [True, True, False]
    export_image(other, "other:1", os.fsencode(place / "again"), ExportOptions(Format.OCI))
    assert import_image(store, os.fsencode(place / "again"), "back").history == got.history


# --- which image


def _index(place: Path, *descriptors: dict[str, Any]) -> bytes:
    document = {"schemaVersion": 2, "mediaType": image_spec.OCI_INDEX, "manifests": descriptors}
    (place / "out" / "index.json").write_text(json.dumps(document))
    return os.fsencode(place / "out")


def _put(place: Path, document: object) -> dict[str, Any]:
    data = json.dumps(document).encode()
    digest = hashlib.sha256(data).hexdigest()
    (place / "out" / "blobs" / "sha256" / digest).write_bytes(data)
    return {"digest": f"sha256:{digest}", "size": len(data)}


@pytest.fixture
def manifest(store: LayerStore, place: Path) -> dict[str, Any]:
    """The descriptor of an image in the layout `out`."""
    samples.add_image(store)
    export(store, place / "out", Format.OCI)
    (found,) = json.loads((place / "out" / "index.json").read_text())["manifests"]
    assert found.pop("platform") == {"architecture": "amd64", "os": "linux"}
    assert found.pop("annotations") == {image_spec.REF_NAME: "1", image_spec.FULL_NAME: "sample:1"}
    return dict(found)


def _for(manifest: dict[str, Any], architecture: str, system: str = "linux", **more: Any) -> dict[str, Any]:
    return {**manifest, "platform": {"architecture": architecture, "os": system}, **more}


def test_an_image_for_several_platforms(store: LayerStore, place: Path, manifest: dict[str, Any]) -> None:
    broken = {**manifest, "digest": "sha256:" + "0" * 64}
    host = platforms.host().architecture
    attestation = _for(broken, "unknown", "unknown")
    inner = _put(place, {"schemaVersion": 2, "mediaType": image_spec.OCI_INDEX, "manifests": [
        attestation, _for(broken, "s390x"), _for(manifest, host), _for(broken, host, "windows")]})  # fmt: skip
    source = _index(place, {"mediaType": image_spec.OCI_INDEX, **inner})
    import_image(store, source, "host")
    with pytest.raises(UserError, match=r"riscv64.*s390x"):
        import_image(store, source, "x", ImportOptions(platforms.parse("linux/riscv64")))
    with pytest.raises(UserError, match=r"0000.*cannot be read"):
        import_image(store, source, "x", ImportOptions(platforms.parse("linux/s390x")))


def test_the_only_image_is_taken_unless_another_platform_is_asked_for(
    store: LayerStore, place: Path, manifest: dict[str, Any]
) -> None:
    source = _index(place, manifest)
    import_image(store, source, "one")
    import_image(store, source, "one", ImportOptions(platforms.parse("linux/amd64")))
    with pytest.raises(UserError, match="is for linux/amd64, not for linux/arm64"):
        import_image(store, source, "one", ImportOptions(platforms.parse("linux/arm64")))


def test_one_of_several_by_its_name(store: LayerStore, place: Path, manifest: dict[str, Any]) -> None:
    names = [{"annotations": {image_spec.REF_NAME: name}} for name in ("v1", "v2")]
    source = _index(place, *({**manifest, **name} for name in names))
    with pytest.raises(UserError, match=r"several images \(v1, v2\)"):
        import_image(store, source, "x")
    import_image(store, source + b":v2", "x")
    with pytest.raises(UserError, match="no image v3; it has v1, v2"):
        import_image(store, source + b":v3", "x")


def test_long_image_names_are_cut_in_messages(store: LayerStore, place: Path, manifest: dict[str, Any]) -> None:
    names = [{"annotations": {image_spec.REF_NAME: f"{number:03}" + "n" * 5000}} for number in range(100)]
    source = _index(place, *({**manifest, **name} for name in names))
    with pytest.raises(UserError, match="90 more") as caught:
        import_image(store, source, "x")
    assert len(str(caught.value)) < 2500


def test_one_of_several_in_a_docker_archive(store: LayerStore, place: Path) -> None:
    samples.add_image(store)
    source = export(store, place / "out", Format.DOCKER_ARCHIVE)
    import_image(store, source + b":sample:1", "x")
    with pytest.raises(UserError, match="no image other:1; it has sample:1"):
        import_image(store, source + b":other:1", "x")


def test_a_docker_archive_with_links_between_its_layers(store: LayerStore, place: Path) -> None:
    made = samples.add_image(store)
    export(store, place / "out", Format.DOCKER_ARCHIVE)
    files = contents(place / "out")
    index = json.loads(files.pop("manifest.json"))
    parts = []
    for number, name in enumerate(index[0]["Layers"]):
        parts.append(archives.file(b"data/%d.tar" % number, files.pop(name)))
        parts.append(symlink(b"%d/layer.tar" % number, b"../data/%d.tar" % number))
        index[0]["Layers"][number] = f"{number}/layer.tar"
    parts += [file(name.encode()[:99], data) for name, data in files.items()]
    (place / "linked").write_bytes(
        file(b"repositories") + b"".join(parts) + file(b"manifest.json", json.dumps(index).encode()) + END
    )
    assert import_image(store, os.fsencode(place / "linked"), "x").layers == made.layers


# --- what is refused


def _edit_manifest(place: Path, manifest: dict[str, Any], change: Callable[[dict[str, Any]], object]) -> bytes:
    document = json.loads((place / "out" / "blobs" / "sha256" / manifest["digest"][7:]).read_text())
    change(document)
    return _index(place, {**manifest, **_put(place, document)})


def _edit_config(place: Path, manifest: dict[str, Any], change: Callable[[dict[str, Any]], object]) -> bytes:
    def edit(document: dict[str, Any]) -> None:
        config = json.loads((place / "out" / "blobs" / "sha256" / document["config"]["digest"][7:]).read_text())
        change(config)
        document["config"].update(_put(place, config))

    return _edit_manifest(place, manifest, edit)


def _swap(document: dict[str, Any]) -> None:
    document["layers"].reverse()


def _shrink(document: dict[str, Any]) -> None:
    document["layers"][0]["size"] -= 1


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "layers in another order": (_swap, "as in the image's configuration"),
    "a layer that is too long": (_shrink, "longer than"),
    "a layer that is missing": (lambda d: d["layers"][0].update(digest="sha256:" + "1" * 64), "cannot be read"),
    "a layer too few": (lambda d: d["layers"].pop(), "has 1 layers"),
    "a digest that is a path": (lambda d: d["layers"][0].update(digest="sha256:../../x"), "not a sha256 digest"),
    "a digest of capitals": (lambda d: d["layers"][0].update(digest="sha256:" + "A" * 64), "not a sha256 digest"),
    "a negative size": (lambda d: d["config"].update(size=-1), "impossible size"),
    "an index as well": (lambda d: d.update(manifests=[]), "at once"),
    "an artifact": (lambda d: d["layers"][0].update(mediaType="application/wasm"), "unknown type"),
    "another version": (lambda d: d.update(schemaVersion=1), "schema version"),
    "another type": (lambda d: d.update(mediaType=image_spec.DOCKER_MANIFEST), "announced as"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_that_cannot_be_used(other: LayerStore, place: Path, manifest: dict[str, Any], name: str) -> None:
    change, reason = MANIFESTS[name]
    source = _edit_manifest(place, manifest, change)
    refused_whole(other, place, source, reason)


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "other content": (lambda d: d["rootfs"]["diff_ids"].reverse(), "as in the image's configuration"),
    "no such digest": (lambda d: d["rootfs"]["diff_ids"].append("sha256:x"), "not a sha256 digest"),
    "no root": (lambda d: d["rootfs"].update(diff_ids=[]), "configuration has 0"),
    "no list": (lambda d: d.update(rootfs=5), "cannot be used"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_that_cannot_be_used(
    other: LayerStore, place: Path, manifest: dict[str, Any], name: str
) -> None:
    change, reason = CONFIGS[name]
    source = _edit_config(place, manifest, change)
    refused_whole(other, place, source, reason)


def refused_whole(store: LayerStore, place: Path, source: bytes, reason: str) -> None:
    """The import raises a UserError; nothing of it is in the store, and no descriptor or thread is left."""
    before, descriptors = there(place / "elsewhere"), sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(UserError, match=reason) as caught:
        import_image(store, source, "x")
    assert "\n" not in str(caught.value)
    assert there(place / "elsewhere") == before
    assert sorted(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        (b"{", "cannot be used"),
        (b'{"schemaVersion":2,"manifests":[]}', "contains no image"),
        (b'{"schemaVersion":2,"manifests":' + b"[" * 100_000, "cannot be used"),
        (b" " * (5 << 20), "larger than"),
        (b"\xff", "cannot be used"),
    ],
)
def test_indexes_that_cannot_be_used(
    other: LayerStore, place: Path, manifest: dict[str, Any], index: bytes, reason: str
) -> None:
    (place / "out" / "index.json").write_bytes(index)
    refused_whole(other, place, os.fsencode(place / "out"), reason)


def test_indexes_inside_each_other(other: LayerStore, place: Path, manifest: dict[str, Any]) -> None:
    for _ in range(9):
        manifest = {"mediaType": image_spec.OCI_INDEX, **_put(place, {"schemaVersion": 2, "manifests": [manifest]})}
    refused_whole(other, place, _index(place, manifest), "nested too deeply")


def test_a_layout_is_read_beneath_its_root(other: LayerStore, place: Path, manifest: dict[str, Any]) -> None:
    blobs = place / "out" / "blobs" / "sha256"
    name = manifest["digest"][7:]
    (blobs / name).rename(place / "outside")
    (blobs / name).symlink_to(place / "outside")
    refused_whole(other, place, os.fsencode(place / "out"), "cannot be read")


def test_damaged_blobs_are_found(other: LayerStore, place: Path, manifest: dict[str, Any]) -> None:
    blobs = place / "out" / "blobs" / "sha256"
    for blob in sorted(blobs.iterdir()):
        whole = blob.read_bytes()
        for at in (10, len(whole) // 2, len(whole) - 1):
            blob.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(UserError):
                import_image(other, os.fsencode(place / "out"), "x")
        blob.write_bytes(whole)
    assert there(place / "elsewhere")["layers"] == []
    import_image(other, os.fsencode(place / "out"), "x")


HOSTILE = {
    "a path that leads out": file(b"../x"),
    "a damaged header": b"x" * 512,
    "cut short": file(b"x", b"data" * 1000)[:1000],
}


@pytest.mark.parametrize("packing", ["cat", "gzip", "zstd"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_layers_are_refused_whole(
    store: LayerStore, other: LayerStore, place: Path, name: str, packing: str
) -> None:
    archive = file(b"good", b"x" * 5000) + HOSTILE[name]
    packed = subprocess.run([packing, *([] if packing == "cat" else ["-c"])], input=archive, capture_output=True)
    (place / "hostile").write_bytes(packed.stdout)
    refused_whole(other, place, os.fsencode(place / "hostile"), "is refused: ")


@pytest.mark.parametrize("packing", ["gzip", "zstd"])
def test_damaged_compression_is_refused(store: LayerStore, other: LayerStore, place: Path, packing: str) -> None:
    archive = file(b"good", os.urandom(500_000)) + END
    packed = subprocess.run([packing, "-c"], input=archive, capture_output=True, check=True).stdout
    (place / "cut").write_bytes(packed[:300_000])
    refused_whole(other, place, os.fsencode(place / "cut"), "ends too early|is damaged")


@pytest.mark.parametrize("name", ["missing", "socket", "text", "xz"])
def test_files_that_are_not_an_image_are_refused(store: LayerStore, other: LayerStore, place: Path, name: str) -> None:
    (place / "text").write_text("no archive")
    (place / "xz").write_bytes(b"\xfd7zXZ\0" + bytes(100))
    if name == "socket":
        with socket.socket(socket.AF_UNIX) as endpoint:
            endpoint.bind(str(place / "socket"))
    reasons = {
        "missing": "does not exist",
        "socket": "cannot be read",
        "text": "is refused",
        "xz": "compressed with xz",
    }
    refused_whole(other, place, os.fsencode(place / name), reasons[name])


# --- interrupted


class Interrupted(Exception):
    """Stands for a KeyboardInterrupt, which may occur anywhere."""


@pytest.mark.parametrize("layer", [1, 2])
def test_an_import_that_is_interrupted_leaves_nothing(
    store: LayerStore, other: LayerStore, place: Path, layer: int
) -> None:
    samples.add_image(store)
    source = export(store, place / "out", Format.OCI_ARCHIVE)
    before = there(place / "elsewhere")

    def report(number: int, count: int, done: int) -> None:
        if number == layer:
            raise Interrupted

    with pytest.raises(Interrupted):
        import_image(other, source, "x", ImportOptions(progress=report))
    assert there(place / "elsewhere") == before


def test_more_layers_than_are_prepared_together(
    store: LayerStore, other: LayerStore, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples.add_image(store, "sample:1", *({f"f{number}": b"x"} for number in range(5)))
    monkeypatch.setattr(image_import, "_MAX_PREPARED", 2)
    descriptors = len(os.listdir("/proc/self/fd"))
    import_image(other, export(store, place / "out", Format.OCI), "other")
    assert len(os.listdir("/proc/self/fd")) == descriptors
    same(samples.view(store, "sample:1"), samples.view(other, "other"))


@pytest.mark.parametrize("kind", Format)
def test_an_export_that_is_interrupted_leaves_nothing(store: LayerStore, place: Path, kind: Format) -> None:
    samples.add_image(store)
    before = sorted(os.listdir(place))

    def report(number: int, count: int, done: int) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        export_image(store, "sample:1", os.fsencode(place / "out"), ExportOptions(kind, progress=report))
    assert sorted(os.listdir(place)) == before


@pytest.mark.parametrize("kind", Format)
def test_an_export_replaces_nothing(store: LayerStore, place: Path, kind: Format) -> None:
    samples.add_image(store)
    (place / "out").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        export(store, place / "out", kind)
    assert (place / "out").read_text() == "mine"
    with pytest.raises(UserError, match="No such file or directory"):
        export(store, place / "nowhere" / "out", kind)


def test_a_name_is_checked_before_any_work(store: LayerStore, place: Path) -> None:
    with pytest.raises(UserError, match="is not an image name"):
        import_image(store, os.fsencode(place / "missing"), "Bad Name")


# --- blobs


def test_a_blob_is_checked_against_digest_size_and_diff_id(store: LayerStore, other: LayerStore, place: Path) -> None:
    layer = samples.add(store, samples.BASE)
    stream = io.BytesIO()
    blob = write_blob(store, layer, stream.write)
    assert "sha256:" + hashlib.sha256(stream.getvalue()).hexdigest() == blob.digest
    assert len(stream.getvalue()) == blob.size
    for wrong in (
        {"descriptor": blob.descriptor(), "diff_id": "sha256:" + "0" * 64},
        {"descriptor": image_spec.Descriptor(blob.media_type, "sha256:" + "0" * 64, blob.size)},
        {"descriptor": image_spec.Descriptor(blob.media_type, blob.digest, blob.size + 1)},
    ):
        with pytest.raises(UserError, match="the layer is refused"):
            read_blob(other, io.BytesIO(stream.getvalue()).read, **wrong)
    assert there(place / "elsewhere")["layers"] == []
    got = read_blob(other, io.BytesIO(stream.getvalue()).read, descriptor=blob.descriptor(), diff_id=blob.diff_id)
    assert got.record.digest == layer.record.digest


def test_a_source_that_fails_is_the_callers_error(store: LayerStore, place: Path) -> None:
    def fails(size: int) -> bytes:
        raise ConnectionResetError(104, "Connection reset by peer")

    with pytest.raises(ConnectionResetError):
        read_blob(store, fails)
    assert there(place)["layers"] == there(place)["staging"] == []


def test_a_sink_that_fails_ends_the_work(store: LayerStore) -> None:
    def fails(piece: bytes) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        write_blob(store, samples.add(store, samples.BASE), fails)
