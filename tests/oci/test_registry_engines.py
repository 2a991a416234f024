"""Images through a registry: ours read by skopeo, umoci and podman, and theirs by us, byte for byte."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from overlayfs import Store
from tests.cli.conftest import process
from tests.oci import archives, registries, samples
from tests.oci.engines import Engines, filled, like_podman, plain
from tests.support.dump import Dump, same

pytestmark = [pytest.mark.root, pytest.mark.slow]


@pytest.fixture
def store(place: Path) -> Iterator[Store]:
    with Store(os.fsencode(place / "store")) as opened:
        yield opened


@pytest.fixture
def sample(store: Store) -> Dump:
    """The image sample:1 in our store; its merged tree."""
    samples.add_image(store)
    return samples.view(store, "sample:1")


@contextmanager
def mounted(place: Path, image: str) -> Iterator[Path]:
    """Mount an image of the store with the command."""
    point = place / "mnt"
    point.mkdir()
    done = process("overlayfs", "mount", image, str(point), "--ephemeral", "--store", str(place / "store"))
    assert done.code == 0, done.err
    try:
        yield point
    finally:
        assert process("overlayfs", "umount", str(point)).code == 0


# --- theirs


@pytest.mark.mounted
@pytest.mark.parametrize("form", ["oci", "v2s2"])
def test_an_image_of_podman_is_mounted_as_podman_does(
    peers: Engines, store: Store, server: str, place: Path, shown: Dump, form: str
) -> None:
    reference = f"{server}/{form}/two:1"
    peers.run("podman", "push", "-q", "--tls-verify=false", "-f", form, "localhost/two:1", f"docker://{reference}")
    pulled = store.pull(reference, name="two:1", plain_http=True)
    assert pulled.image.config["Entrypoint"] == ["/bin/su"] and pulled.image.config["User"] == "7:8"
    with mounted(place, "two:1") as point:
        same(filled(archives.picture(point)), shown)
    assert store.push("two:1", f"{server}/{form}/again", plain_http=True).digest == pulled.digest


def test_podman_has_the_digest_that_we_have(peers: Engines, store: Store, server: str) -> None:
    reference = f"{server}/digest/two:1"
    peers.run("podman", "push", "-q", "--tls-verify=false", "localhost/two:1", f"docker://{reference}")
    inspected = json.loads(peers.run("skopeo", "inspect", "--tls-verify=false", f"docker://{reference}"))
    pulled = store.pull(reference, plain_http=True)
    assert pulled.digest == inspected["Digest"]
    assert [layer.digest for layer in pulled.layers] == inspected["Layers"]


def test_layers_that_skopeo_compresses_with_zstd(
    peers: Engines, store: Store, server: str, place: Path, shown: Dump
) -> None:
    peers.run("podman", "save", "-q", "--format", "oci-archive", "-o", place / "saved", "localhost/two:1")
    peers.run(
        "skopeo", "copy", "-q", "--policy", peers.base / "policy.json", "--dest-tls-verify=false",
        "--dest-compress-format", "zstd", f"oci-archive:{place}/saved", f"docker://{server}/zstd/two:1",
    )  # fmt: skip
    store.pull(f"{server}/zstd/two:1", name="two:1", plain_http=True)
    same(filled(samples.view(store, "two:1")), shown)


# --- ours


def test_skopeo_copies_on_and_umoci_unpacks(
    peers: Engines, store: Store, server: str, place: Path, sample: Dump
) -> None:
    pushed = store.push("sample:1", f"{server}/ours/sample:1", plain_http=True)
    peers.run(
        "skopeo", "copy", "-q", "--policy", peers.base / "policy.json", "--src-tls-verify=false",
        f"docker://{server}/ours/sample:1", f"oci:{place}/layout:1",
    )  # fmt: skip
    layout = json.loads((place / "layout/index.json").read_text())
    assert [each["digest"] for each in layout["manifests"]] == [pushed.digest]
    peers.run("umoci", "unpack", "--image", f"{place}/layout:1", place / "bundle")
    same(plain(archives.picture(place / "bundle/rootfs")), plain(sample))


def test_podman_pulls_what_we_push(peers: Engines, store: Store, server: str, sample: Dump) -> None:
    reference = f"{server}/pulled/sample:1"
    pushed = store.push("sample:1", reference, plain_http=True)
    peers.run("podman", "pull", "-q", "--tls-verify=false", reference)
    try:
        with peers.mounted(reference) as point:
            same(like_podman(archives.picture(point)), like_podman(sample))
        inspected = json.loads(peers.run("podman", "image", "inspect", reference))[0]
    finally:
        peers.run("podman", "rmi", "-f", reference)
    assert inspected["Digest"] == pushed.digest
    assert inspected["Config"]["Env"] == samples.CONFIG["Env"] and inspected["Author"] == "somebody"
    assert [each.get("created_by", "") for each in inspected["History"]] == [
        each.created_by for each in samples.HISTORY
    ]


def test_there_and_back_by_another_registry(
    peers: Engines, store: Store, server: str, place: Path, sample: Dump
) -> None:
    pushed = store.push("sample:1", f"{server}/first/sample:1", plain_http=True)
    with registries.registry(place / "second") as second, Store(os.fsencode(place / "other")) as other:
        peers.run(
            "skopeo", "copy", "-q", "--policy", peers.base / "policy.json", "--src-tls-verify=false",
            "--dest-tls-verify=false", f"docker://{server}/first/sample:1", f"docker://{second}/moved/on:2",
        )  # fmt: skip
        pulled = other.pull(f"{second}/moved/on:2", name="sample:1", plain_http=True)
        assert pulled.digest == pushed.digest
        same(filled(samples.view(other, "sample:1")), filled(sample))
        # Our compression is deterministic, so that a registry without the blobs gets the same ones.
        for layer in other.layers():
            (place / f"other/layers/{layer.id}/remote").unlink()
        assert other.push("sample:1", f"{second}/fresh/sample:1", plain_http=True).digest == pushed.digest


@pytest.mark.mounted
def test_a_commit_with_renames_is_pulled_by_podman(
    peers: Engines, store: Store, server: str, place: Path, sample: Dump
) -> None:
    """Archives have no redirects and metacopies; whichever program pulls the image gets the tree that they mean."""
    with mounted(place, "sample:1") as point:
        (point / "lib").rename(point / "libraries")
        (point / "bin" / "su").chmod(0o700)
        (point / "etc" / "passwd").unlink()
        (point / "etc" / "group").write_text("root:x:0:\n")
        os.link(point / "hole", point / "etc" / "hole")
        done = process("overlayfs", "commit", str(point), "-t", "changed:1", "--wait")
        assert done.code == 0, done.err
        expected = archives.picture(point)
    assert store.layers.find(store.images.find("changed:1").layers[0]).record.flags
    same(filled(samples.view(store, "changed:1")), filled(expected))
    reference = f"{server}/changed:1"
    store.push("changed:1", reference, plain_http=True)
    peers.run("podman", "pull", "-q", "--tls-verify=false", reference)
    try:
        with peers.mounted(reference) as point:
            same(like_podman(archives.picture(point)), like_podman(expected))
    finally:
        peers.run("podman", "rmi", "-f", reference)
    with Store(os.fsencode(place / "other")) as other:
        other.pull(reference, name="changed:1", plain_http=True)
        same(filled(samples.view(other, "changed:1")), filled(expected))
