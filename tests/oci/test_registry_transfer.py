"""Push and pull with docker-registry: what is sent, what is not, and images of other programs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from overlayfs.errors import UserError
from overlayfs.oci import image_spec, platforms
from overlayfs.oci.http_client import HttpClient
from overlayfs.oci.reference import parse
from overlayfs.oci.registry import Repository
from tests.oci import registries
from tests.oci.registries import Proxy
from tests.oci.transfers import BASE, TOP, Side, foreign, same
from tests.store.samples import add_image

# --- round trips


def test_what_is_pushed_is_pulled(server: str, here: Side, away: Side) -> None:
    pushed = here.push("it", f"{server}/back/it:1")
    assert [layer.how for layer in pushed.layers] == ["uploaded", "uploaded"] and pushed.same is None
    pulled = away.pull(f"{server}/back/it:1")
    assert pulled.digest == pushed.digest
    assert [layer.digest for layer in pulled.layers] == [layer.digest for layer in pushed.layers]
    assert all(layer.downloaded for layer in pulled.layers)
    assert same(here, away) and here.is_clean() and away.is_clean()
    assert here.waits == away.waits == []


def test_by_digest(server: str, here: Side, away: Side) -> None:
    digest = here.push("it", f"{server}/digest/it").digest
    assert away.pull(f"{server}/digest/it@{digest}").digest == digest
    with pytest.raises(UserError, match="push to a tag"):
        here.push("it", f"{server}/digest/it@{digest}")


def test_the_same_image_has_the_same_digest_everywhere(server: str, sides: Callable[[str], Side]) -> None:
    digests = set()
    for name in ("one", "two"):
        side = sides(name)
        record = add_image(side.store, "it", BASE, TOP)
        side.store.images.put(type(record)(name="it", layers=record.layers, created="2026-01-01T00:00:00Z"))
        digests.add(side.push("it", f"{server}/{name}/same").digest)
    assert len(digests) == 1


def test_an_image_without_layers(server: str, sides: Callable[[str], Side], away: Side) -> None:
    side = sides("empty")
    add_image(side.store, "it")
    side.push("it", f"{server}/empty/it")
    assert away.pull(f"{server}/empty/it").layers == ()
    assert away.store.images.find("it").layers == ()


def test_a_layer_that_occurs_twice_is_sent_once(server: str, sides: Callable[[str], Side], away: Side) -> None:
    side = sides("twice")
    add_image(side.store, "it", BASE, TOP, BASE)
    pushed = side.push("it", f"{server}/twice/it")
    assert pushed.layers[0] == pushed.layers[2] != pushed.layers[1]
    away.pull(f"{server}/twice/it")
    assert away.files() == [BASE, TOP, BASE]


# --- layers and blobs that exist already


def test_nothing_is_downloaded_twice(server: str, here: Side, away: Side) -> None:
    here.push("it", f"{server}/again/it")
    with Proxy(server) as proxy:
        away.pull(f"{proxy.host}/again/it")
        again = away.pull(f"{proxy.host}/again/it", "other")
        assert len(proxy.seen("GET", "/blobs/")) == 2 + 2 * 1  # the layers once, the configuration each time
    assert not any(layer.downloaded for layer in again.layers)
    assert (
        here.pull(f"{server}/again/it", "mine").layers[0].downloaded is False
    )  # the store has the layers that it pushed


def test_nothing_is_sent_or_compressed_twice(server: str, here: Side) -> None:
    here.push("it", f"{server}/once/it:1")
    here.steps.clear()
    with Proxy(server) as proxy:
        again = here.push("it", f"{proxy.host}/once/it:2")
        assert not proxy.seen("PUT", "/blobs/")
    assert [layer.how for layer in again.layers] == ["present", "present"]
    here.steps.clear()
    here.push("it", f"{server}/once/it:3")
    assert "compressing" not in {step.doing for step in here.steps}


def test_a_blob_is_mounted_from_another_repository(server: str, here: Side) -> None:
    first = here.push("it", f"{server}/first/it")
    here.steps.clear()
    second = here.push("it", f"{server}/second/it")
    assert [layer.how for layer in second.layers] == ["mounted", "mounted"]
    assert second.digest == first.digest
    assert "compressing" not in {step.doing for step in here.steps}


def test_a_pulled_blob_is_mounted_too(server: str, here: Side, away: Side) -> None:
    here.push("it", f"{server}/source/it")
    away.pull(f"{server}/source/it")
    assert [layer.how for layer in away.push("it", f"{server}/target/it").layers] == ["mounted", "mounted"]


def test_a_registry_that_does_not_mount(server: str, here: Side) -> None:
    with Proxy(server) as proxy:
        here.push("it", f"{proxy.host}/nomount/a")
        proxy.hidden = r"\?mount=.*"
        again = here.push("it", f"{proxy.host}/nomount/b")
        assert len(proxy.seen("POST", "mount=")) == 2
        assert len(proxy.seen("DELETE", "/nomount/b/blobs/uploads/")) == 2  # no unfinished upload is left
    assert [layer.how for layer in again.layers] == ["uploaded", "uploaded"]


def test_a_blob_that_is_not_where_the_cache_says_is_sent(server: str, here: Side, place: Path) -> None:
    here.push("it", f"{server}/forgotten/it")
    with registries.registry(place / "fresh") as fresh:
        again = here.push("it", f"{fresh}/forgotten/it")
    assert [layer.how for layer in again.layers] == ["uploaded", "uploaded"]
    for path in (here.place / "store/layers").glob("*/remote"):
        path.write_text("{")
    assert [layer.how for layer in here.push("it", f"{server}/forgotten/it").layers] == ["present", "present"]


# --- images of other programs


def test_an_unchanged_image_keeps_its_manifest(server: str, away: Side) -> None:
    digest = foreign(server, "docker/x")
    pulled = away.pull(f"{server}/docker/x")
    assert pulled.digest == digest and pulled.image.config["Labels"] == {"l": "m"}
    pushed = away.push("it", f"{server}/docker/y")
    assert (pushed.digest, pushed.same) == (digest, True)
    away.store.images.tag("it", "other:name")
    assert away.push("other:name", f"{server}/docker/z").digest == digest


def test_a_changed_image_gets_another_manifest(server: str, away: Side) -> None:
    digest = foreign(server, "docker/changed")
    record = away.pull(f"{server}/docker/changed").image
    away.store.images.put(type(record)(name="it", layers=record.layers, created=record.created, config={"Env": []}))
    pushed = away.push("it", f"{server}/docker/changed:2")
    assert pushed.digest != digest and pushed.same is None
    assert [layer.how for layer in pushed.layers] == ["present"]


def test_without_the_original_blobs_the_manifest_is_new(server: str, away: Side, here: Side, place: Path) -> None:
    digest = foreign(server, "docker/moved")
    away.pull(f"{server}/docker/moved")
    with registries.registry(place / "other") as other:
        pushed = away.push("it", f"{other}/docker/moved")
        assert pushed.digest != digest and pushed.same is False
        again = here.pull(f"{other}/docker/moved", "moved")
    assert again.digest == pushed.digest
    assert here.files("moved") == [{"etc/motd": "hello\n"}] == away.files()
    assert here.store.images.find("moved").config == away.store.images.find("it").config


def put_index(host: str, repository: str, manifests: list[tuple[str, str, str]], tag: str = "latest") -> None:
    """Upload an index of (digest, media type, platform)."""
    listed = []
    for digest, kind, platform in manifests:
        os_name, architecture = platform.split("/")
        listed.append({"mediaType": kind, "digest": digest, "size": 1,
                       "platform": {"os": os_name, "architecture": architecture}})  # fmt: skip
    data = json.dumps({"schemaVersion": 2, "mediaType": image_spec.OCI_INDEX, "manifests": listed}).encode()
    with HttpClient(plain_http=True) as client:
        Repository(client, parse(f"{host}/{repository}"), lambda: None, push=True).put_manifest(
            tag, image_spec.OCI_INDEX, data
        )


def test_several_platforms(server: str, away: Side) -> None:
    other = "s390x" if platforms.host().architecture != "s390x" else "riscv64"
    mine = foreign(server, "multi/x", architecture=platforms.host().architecture, tag="mine")
    theirs = foreign(server, "multi/x", architecture=other, tag="theirs")
    put_index(
        server, "multi/x",
        [(theirs, image_spec.DOCKER_MANIFEST, f"linux/{other}"),
         (mine, image_spec.DOCKER_MANIFEST, f"linux/{platforms.host().architecture}")],
    )  # fmt: skip
    assert away.pull(f"{server}/multi/x").digest == mine
    pulled = away.pull(f"{server}/multi/x", platform=f"linux/{other}")
    assert pulled.digest == theirs and pulled.image.architecture == other
    with pytest.raises(UserError, match=rf"is not for plan9/mips; it has .*linux/{other}.*--platform"):
        away.pull(f"{server}/multi/x", platform="plan9/mips")
    with pytest.raises(UserError, match=f"is for linux/{other}, not for linux/mips"):
        away.pull(f"{server}/multi/x:theirs", platform="linux/mips")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ({"config_type": "application/vnd.cncf.helm.config.v1+json"}, "is not a container image but"),
        ({"layer_type": "text/plain"}, "has a layer of the unknown type 'text/plain'"),
        ({"diff_ids": []}, "its manifest has 1 layers, its configuration 0"),
        ({"diff_ids": ["sha256:" + "0" * 64]}, "is refused: its content is sha256:"),
        ({"diff_ids": ["sha256:../../x"]}, "is not a sha256 digest"),
    ],
)
def test_what_is_not_an_image_is_refused(server: str, away: Side, words: dict[str, Any], reason: str) -> None:
    foreign(server, "wrong/x", **words)
    with pytest.raises(UserError, match=reason):
        away.pull(f"{server}/wrong/x")
    assert away.is_clean() and not list(away.store.images()) and not list(away.store.layers())


def test_missing(server: str, here: Side, away: Side) -> None:
    with pytest.raises(UserError, match=rf"{server}/no/such:1 is not in {server} \(manifest unknown\)"):
        away.pull(f"{server}/no/such:1")
    with pytest.raises(UserError, match="there is no image nothing"):
        here.push("nothing", f"{server}/x/y")
    with pytest.raises(UserError, match="is not an image name"):
        away.pull(f"{server}/no/such:1", name="../x")
