"""Images of podman, buildah, skopeo and umoci imported, and our exports read by them: the same trees, byte for byte."""

import os
import shutil
from pathlib import Path

import pytest

from overlayfs.oci.compression import Compression
from overlayfs.oci.image_export import ExportOptions, Format, export_image
from overlayfs.oci.image_import import import_image
from overlayfs.store.store import LayerStore
from tests.oci import archives, samples
from tests.oci.engines import Engines, filled, like_podman, plain
from tests.support import syscalls
from tests.support.dump import Dump, same

pytestmark = [pytest.mark.root, pytest.mark.slow]


FORMS = {
    "oci-archive": ("podman", "save", "-q", "--format", "oci-archive", "-o"),
    "docker-archive": ("podman", "save", "-q", "--format", "docker-archive", "-o"),
    "oci": ("podman", "save", "-q", "--format", "oci-dir", "-o"),
}


@pytest.mark.parametrize("form", FORMS)
def test_images_of_podman(peers: Engines, store: LayerStore, place: Path, shown: Dump, form: str) -> None:
    peers.run(*FORMS[form], place / "saved", "localhost/two:1")
    made = import_image(store, os.fsencode(place / "saved"), "two")
    assert len(made.layers) == 2
    assert made.config["Env"] == ["A=b c"]
    assert made.config["Entrypoint"] == ["/bin/su"]
    assert made.config["User"] == "7:8"
    same(filled(samples.view(store, "two")), shown)


@pytest.mark.parametrize("packing", ["gzip", "zstd"])
def test_images_that_skopeo_compresses(
    peers: Engines, store: LayerStore, place: Path, shown: Dump, packing: str
) -> None:
    peers.run("podman", "save", "-q", "--format", "oci-archive", "-o", place / "saved", "localhost/two:1")
    peers.run(
        "skopeo", "copy", "-q", "--dest-compress", "--dest-compress-format", packing, f"oci-archive:{place}/saved",
        f"oci:{place}/layout:tag",
    )  # fmt: skip
    import_image(store, os.fsencode(place / "layout:tag"), "two")
    same(filled(samples.view(store, "two")), shown)


@pytest.mark.kernel
def test_our_layers_under_the_kernels_overlayfs(peers: Engines, store: LayerStore, place: Path, shown: Dump) -> None:
    peers.run("podman", "save", "-q", "--format", "oci-archive", "-o", place / "saved", "localhost/two:1")
    made = import_image(store, os.fsencode(place / "saved"), "two")
    lower = ":".join(os.fsdecode(store.layers.find(each).tree_path) for each in made.layers)
    (place / "mnt").mkdir()
    syscalls.mount(b"overlay", os.fsencode(place / "mnt"), b"overlay", 1, os.fsencode(f"lowerdir={lower}"))
    try:
        same(filled(archives.picture(place / "mnt")), shown)
    finally:
        syscalls.umount(os.fsencode(place / "mnt"))


def _export(store: LayerStore, place: Path, kind: Format, packing: Compression | None = None) -> Dump:
    """Export a sample image to `out`; return its merged tree."""
    samples.add_image(store, "localhost/sample:1")
    export_image(store, "localhost/sample:1", os.fsencode(place / "out"), ExportOptions(kind, packing))
    return samples.unlinked(samples.view(store, "localhost/sample:1"))


LOADED = [(Format.OCI_ARCHIVE, kind) for kind in Compression] + [(Format.DOCKER_ARCHIVE, Compression.NONE)]


@pytest.mark.parametrize(("kind", "packing"), LOADED)
def test_podman_shows_what_we_export(
    peers: Engines, store: LayerStore, place: Path, kind: Format, packing: Compression
) -> None:
    expected = _export(store, place, kind, packing)
    loaded = peers.run("podman", "load", "-q", "-i", place / "out")
    assert loaded.endswith("localhost/sample:1")
    try:
        with peers.mounted("localhost/sample:1") as point:
            same(like_podman(archives.picture(point)), like_podman(expected))
        said = peers.run(
            "podman", "image", "inspect", "--format", "{{.Config.Env}} {{.User}} {{.Author}}", "localhost/sample:1"
        )
        assert said == "[PATH=/bin EMPTY=] 7:8 somebody"
    finally:
        peers.run("podman", "rmi", "-f", "localhost/sample:1")


def test_podman_shows_layers_with_redirects_and_metacopies(peers: Engines, store: LayerStore, place: Path) -> None:
    """A moved directory, and a file of which only the mode was changed; archives have no form for either."""
    samples.add_marked_image(store, place, "localhost/marked:1")
    expected = samples.view(store, "localhost/marked:1")
    export_image(store, "localhost/marked:1", os.fsencode(place / "out"), ExportOptions(Format.OCI_ARCHIVE))
    peers.run("podman", "load", "-q", "-i", place / "out")
    try:
        with peers.mounted("localhost/marked:1") as point:
            same(like_podman(archives.picture(point)), like_podman(expected))
    finally:
        peers.run("podman", "rmi", "-f", "localhost/marked:1")


@pytest.mark.parametrize("packing", [Compression.GZIP, Compression.NONE])
def test_umoci_unpacks_what_we_export(peers: Engines, store: LayerStore, place: Path, packing: Compression) -> None:
    expected = _export(store, place, Format.OCI, packing)
    peers.run("umoci", "unpack", "--image", f"{place}/out:1", place / "bundle")
    found = archives.picture(place / "bundle" / "rootfs")
    same(plain(found), plain(expected))


def test_what_umoci_repacks(peers: Engines, store: LayerStore, place: Path) -> None:
    _export(store, place, Format.OCI)
    peers.run("umoci", "unpack", "--image", f"{place}/out:1", place / "bundle")
    rootfs = place / "bundle" / "rootfs"
    shutil.rmtree(rootfs / "lib")
    (rootfs / "etc" / "motd").unlink()
    (rootfs / "pipe" / "now").write_text("later")
    (rootfs / "lib").write_text("a file now")
    peers.run("umoci", "repack", "--image", f"{place}/out:2", place / "bundle")
    made = import_image(store, os.fsencode(place / "out:2"), "again")
    assert len(made.layers) == 3
    assert made.layers[1:] == store.images.find("localhost/sample:1").layers
    # It rounds times, and sets one for a directory that it writes only as a parent.
    found, expected = plain(samples.view(store, "again")), plain(archives.picture(rootfs))
    same(*({path: entry._replace(mtime_ns=0) for path, entry in tree.items()} for tree in (found, expected)))


@pytest.mark.parametrize("kind", [Format.OCI, Format.OCI_ARCHIVE, Format.DOCKER_ARCHIVE])
def test_skopeo_copies_what_we_export(peers: Engines, store: LayerStore, place: Path, kind: Format) -> None:
    _export(store, place, kind)
    source = f"{kind.value}:{place}/out" + (":1" if kind is Format.OCI else "")
    for target in (f"oci:{place}/layout:x", f"docker-archive:{place}/archive:x:1", f"oci-archive:{place}/oci:x"):
        peers.skopeo(source, target)
    layers = store.images.find("localhost/sample:1").layers
    for name in ("layout", "archive", "oci"):
        assert import_image(store, os.fsencode(place / name), "back").layers == layers
    assert store.images.find("back").history == store.images.find("localhost/sample:1").history


def test_a_round_trip_through_podman(peers: Engines, store: LayerStore, place: Path) -> None:
    """Podman writes a new tar with whole seconds: apart from that, the tree is the same."""
    expected = _export(store, place, Format.OCI_ARCHIVE)
    peers.run("podman", "load", "-q", "-i", place / "out")
    try:
        peers.run("podman", "save", "-q", "--format", "oci-archive", "-o", place / "back", "localhost/sample:1")
    finally:
        peers.run("podman", "rmi", "-f", "localhost/sample:1")
    got = import_image(store, os.fsencode(place / "back"), "back")
    assert got.config == store.images.find("localhost/sample:1").config
    same(like_podman(samples.view(store, "back")), like_podman(expected))


def test_a_flat_export_is_what_podman_imports(peers: Engines, store: LayerStore, place: Path) -> None:
    expected = _export(store, place, Format.TAR)
    peers.run("podman", "import", "-q", place / "out", "localhost/flat:1")
    try:
        with peers.mounted("localhost/flat:1") as point:
            found = archives.picture(point)
    finally:
        peers.run("podman", "rmi", "-f", "localhost/flat:1")
    same(plain(like_podman(found)), plain(like_podman(expected)))
