"""Push and pull with a real registry: what is sent, what is not, and what harm on the way does to neither."""

import errno
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from overlayfs.errors import UserError
from overlayfs.oci import media, platforms, staging
from overlayfs.oci.auth import Credential
from overlayfs.oci.pull import Pulled, pull
from overlayfs.oci.push import Pushed, push
from overlayfs.oci.reference import Reference, parse
from overlayfs.oci.registry import Repository, Source, sha256
from overlayfs.oci.transfer import Step
from overlayfs.oci.wire import Pace, Wire
from overlayfs.store.store import LayerStore
from tests.oci import registries
from tests.oci.registries import Answer, Proxy, Request, Server, TokenServer, cut, flip, longer, redirect, status
from tests.store.samples import add_image, there

BASE = {"etc/motd": "hello\n", "usr/lib/big": "".join(f"{number}\n" for number in range(200_000))}
TOP = {"etc/motd": "bye\n"}


@pytest.fixture(scope="module")
def server(scratch: Path) -> Iterator[str]:
    """A registry for the tests of this file; each uses repositories of its own."""
    with registries.registry(scratch / "transfers") as host:
        yield host


class Side:
    """A store, and push and pull with it; pauses cost nothing and are kept in `waits`."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir()
        self.store = LayerStore(os.fsencode(place / "store"))
        self.waits: list[float] = []
        self.steps: list[Step] = []
        self.find: Callable[[Reference], Credential | None] = lambda _: None

    def _wire(self) -> Wire:
        return Wire(plain_http=True, pace=Pace(attempts=4, wait=self.waits.append, jitter=lambda: 1.0))

    def pull(self, text: str, name: str = "it", platform: str | None = None) -> Pulled:
        wanted = None if platform is None else platforms.parse(platform)
        with self._wire() as wire:
            return pull(
                self.store, parse(text), name=name, wire=wire, platform=wanted, find=self.find,
                on_step=self.steps.append,
            )  # fmt: skip

    def push(self, name: str, text: str) -> Pushed:
        with self._wire() as wire:
            return push(self.store, name, parse(text), wire=wire, find=self.find, on_step=self.steps.append)

    def files(self, name: str = "it") -> list[dict[str, str]]:
        """The regular files of each layer, top first."""
        return [_files(Path(os.fsdecode(layer.tree_path))) for layer in self.store.stack_of(name)]

    def is_clean(self) -> bool:
        """Whether nothing half done lies in the store."""
        rooms = there(self.place)
        return not rooms["staging"] and not rooms["trash"]


def _files(tree: Path) -> dict[str, str]:
    return {str(path.relative_to(tree)): path.read_text() for path in sorted(tree.rglob("*")) if path.is_file()}


@pytest.fixture
def sides(place: Path) -> Iterator[Callable[[str], Side]]:
    """Makes sides, each with a store of its own."""
    with ExitStack() as undo:

        def make(name: str) -> Side:
            side = Side(place / name)
            undo.callback(side.store.close)
            return side

        yield make


@pytest.fixture
def here(sides: Callable[[str], Side]) -> Side:
    """A side with the image `it` of two layers."""
    side = sides("here")
    add_image(side.store, "it", BASE, TOP)
    return side


@pytest.fixture
def away(sides: Callable[[str], Side]) -> Side:
    """A side with an empty store."""
    return sides("away")


def same(left: Side, right: Side) -> bool:
    return left.files() == right.files() == [TOP, BASE]


# --- there and back


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
    with pytest.raises(UserError, match="is pushed to a tag"):
        here.push("it", f"{server}/digest/it@{digest}")


def test_the_same_image_has_the_same_digest_everywhere(server: str, sides: Callable[[str], Side]) -> None:
    digests = set()
    for name in ("one", "two"):
        side = sides(name)
        record = add_image(side.store, "it", BASE, TOP)
        side.store.put_image(type(record)(name="it", layers=record.layers, created="2026-01-01T00:00:00Z"))
        digests.add(side.push("it", f"{server}/{name}/same").digest)
    assert len(digests) == 1


def test_an_image_without_layers(server: str, sides: Callable[[str], Side], away: Side) -> None:
    side = sides("empty")
    add_image(side.store, "it")
    side.push("it", f"{server}/empty/it")
    assert away.pull(f"{server}/empty/it").layers == ()
    assert away.store.image("it").layers == ()


def test_a_layer_that_comes_twice_goes_once(server: str, sides: Callable[[str], Side], away: Side) -> None:
    side = sides("twice")
    add_image(side.store, "it", BASE, TOP, BASE)
    pushed = side.push("it", f"{server}/twice/it")
    assert pushed.layers[0] == pushed.layers[2] != pushed.layers[1]
    away.pull(f"{server}/twice/it")
    assert away.files() == [BASE, TOP, BASE]


# --- what is there already


def test_nothing_is_loaded_twice(server: str, here: Side, away: Side) -> None:
    here.push("it", f"{server}/again/it")
    with Proxy(server) as proxy:
        away.pull(f"{proxy.host}/again/it")
        again = away.pull(f"{proxy.host}/again/it", "other")
        assert len(proxy.seen("GET", "/blobs/")) == 2 + 2 * 1  # the layers once, the configuration each time
    assert not any(layer.downloaded for layer in again.layers)
    assert here.pull(f"{server}/again/it", "mine").layers[0].downloaded is False  # it made them itself


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
        assert len(proxy.seen("DELETE", "/nomount/b/blobs/uploads/")) == 2  # no upload is left open there
    assert [layer.how for layer in again.layers] == ["uploaded", "uploaded"]


def test_what_is_remembered_wrongly_is_sent(server: str, here: Side, place: Path) -> None:
    here.push("it", f"{server}/forgotten/it")
    with registries.registry(place / "fresh") as fresh:
        again = here.push("it", f"{fresh}/forgotten/it")
    assert [layer.how for layer in again.layers] == ["uploaded", "uploaded"]
    for path in (here.place / "store/layers").glob("*/remote"):
        path.write_text("{")
    assert [layer.how for layer in here.push("it", f"{server}/forgotten/it").layers] == ["present", "present"]


# --- images of others


def foreign(host: str, repository: str, **words: Any) -> str:
    """Put an image as Docker makes them: other media types, other compression, members unknown to us. Its digest."""
    with Wire(plain_http=True) as wire:
        target = Repository(wire, parse(f"{host}/{repository}"), lambda: None, push=True)

        def upload(data: bytes) -> tuple[str, int]:
            target.upload(Source(sha256(data), len(data), lambda: iter((data,))))
            return sha256(data), len(data)

        tar = _tar()
        layer, size = upload(_gzip(tar))
        config = {
            "architecture": words.get("architecture", "amd64"), "os": "linux", "docker_version": "1", "x": [1.50],
            "rootfs": {"type": "layers", "diff_ids": words.get("diff_ids", [sha256(tar)])},
            "config": {"Env": ["A=b"], "Labels": {"l": "m"}}, "created": "2020-01-02T03:04:05.678901234Z",
            "history": [{"created": "2020-01-02T03:04:05Z", "created_by": "ADD x"},
                        {"created": "2020-01-02T03:04:06Z", "created_by": "CMD", "empty_layer": True}],
        }  # fmt: skip
        config_digest, config_size = upload(json.dumps(config, indent=3).encode())
        manifest = {
            "schemaVersion": 2, "mediaType": media.DOCKER_MANIFEST,
            "config": {"mediaType": words.get("config_type", media.DOCKER_CONFIG), "size": config_size,
                       "digest": config_digest},
            "layers": [{"mediaType": words.get("layer_type", media.DOCKER_LAYER_GZIP), "size": size, "digest": layer}],
        }  # fmt: skip
        return target.put_manifest(
            words.get("tag", "latest"), media.DOCKER_MANIFEST, json.dumps(manifest, indent=1).encode()
        )


def _tar() -> bytes:
    import io
    import tarfile

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as file:
        member = tarfile.TarInfo("./etc/motd")
        member.size = 6
        file.addfile(member, io.BytesIO(b"hello\n"))
    return buffer.getvalue()


def _gzip(data: bytes) -> bytes:
    import gzip

    return gzip.compress(data, 1, mtime=7)


def test_an_unchanged_image_keeps_its_manifest(server: str, away: Side) -> None:
    digest = foreign(server, "docker/x")
    pulled = away.pull(f"{server}/docker/x")
    assert pulled.digest == digest and pulled.image.config["Labels"] == {"l": "m"}
    pushed = away.push("it", f"{server}/docker/y")
    assert (pushed.digest, pushed.same) == (digest, True)
    away.store.tag("it", "other:name")
    assert away.push("other:name", f"{server}/docker/z").digest == digest


def test_a_changed_image_gets_another_manifest(server: str, away: Side) -> None:
    digest = foreign(server, "docker/changed")
    record = away.pull(f"{server}/docker/changed").image
    away.store.put_image(type(record)(name="it", layers=record.layers, created=record.created, config={"Env": []}))
    pushed = away.push("it", f"{server}/docker/changed:2")
    assert pushed.digest != digest and pushed.same is None
    assert [layer.how for layer in pushed.layers] == ["present"]


def test_where_the_blobs_are_missing_the_manifest_is_our_own(server: str, away: Side, here: Side, place: Path) -> None:
    digest = foreign(server, "docker/moved")
    away.pull(f"{server}/docker/moved")
    with registries.registry(place / "other") as other:
        pushed = away.push("it", f"{other}/docker/moved")
        assert pushed.digest != digest and pushed.same is False
        again = here.pull(f"{other}/docker/moved", "moved")
    assert again.digest == pushed.digest
    assert here.files("moved") == [{"etc/motd": "hello\n"}] == away.files()
    assert here.store.image("moved").config == away.store.image("it").config


def put_index(host: str, repository: str, manifests: list[tuple[str, str, str]], tag: str = "latest") -> None:
    """Put an index of (digest, media type, platform)."""
    listed = []
    for digest, kind, platform in manifests:
        os_name, architecture = platform.split("/")
        listed.append({"mediaType": kind, "digest": digest, "size": 1,
                       "platform": {"os": os_name, "architecture": architecture}})  # fmt: skip
    data = json.dumps({"schemaVersion": 2, "mediaType": media.OCI_INDEX, "manifests": listed}).encode()
    with Wire(plain_http=True) as wire:
        Repository(wire, parse(f"{host}/{repository}"), lambda: None, push=True).put_manifest(
            tag, media.OCI_INDEX, data
        )


def test_several_platforms(server: str, away: Side) -> None:
    other = "s390x" if platforms.host().architecture != "s390x" else "riscv64"
    mine = foreign(server, "multi/x", architecture=platforms.host().architecture, tag="mine")
    theirs = foreign(server, "multi/x", architecture=other, tag="theirs")
    put_index(
        server, "multi/x",
        [(theirs, media.DOCKER_MANIFEST, f"linux/{other}"),
         (mine, media.DOCKER_MANIFEST, f"linux/{platforms.host().architecture}")],
    )  # fmt: skip
    assert away.pull(f"{server}/multi/x").digest == mine
    pulled = away.pull(f"{server}/multi/x", platform=f"linux/{other}")
    assert pulled.digest == theirs and pulled.image.architecture == other
    with pytest.raises(UserError, match=rf"is not for plan9/mips; it has linux/{other}, .*--platform"):
        away.pull(f"{server}/multi/x", platform="plan9/mips")
    with pytest.raises(UserError, match=f"is for linux/{other}, not for linux/mips"):
        away.pull(f"{server}/multi/x:theirs", platform="linux/mips")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ({"config_type": "application/vnd.cncf.helm.config.v1+json"}, "is no image for containers but"),
        ({"layer_type": "text/plain"}, "has a layer of the unknown type 'text/plain'"),
        ({"diff_ids": []}, "its manifest has 1 layers, its configuration 0"),
        ({"diff_ids": ["sha256:" + "0" * 64]}, "is refused: its content is sha256:"),
        ({"diff_ids": ["sha256:../../x"]}, "is not a sha256 digest"),
    ],
)
def test_what_is_no_image_is_refused(server: str, away: Side, words: dict[str, Any], reason: str) -> None:
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


# --- harm on the way


@pytest.fixture
def proxy(server: str) -> Iterator[Proxy]:
    with Proxy(server) as proxy:
        yield proxy


def biggest(here: Side, server: str, repository: str) -> str:
    """Push the image and return the digest of its largest blob."""
    pushed = here.push("it", f"{server}/{repository}")
    return max(pushed.layers, key=lambda layer: layer.size).digest


def test_a_broken_download_goes_on(server: str, proxy: Proxy, here: Side, away: Side) -> None:
    digest = biggest(here, server, "broken/it")
    proxy.harm("GET", f"/blobs/{digest}", cut(1000), cut(0), status(503), cut(20_000))
    away.pull(f"{proxy.host}/broken/it")
    assert proxy.harmless and same(here, away) and away.is_clean()
    ranges = [headers.get("range") for headers in proxy.seen("GET", f"/blobs/{digest}")]
    assert ranges == [None, "bytes=1000-", "bytes=1000-", "bytes=1000-", "bytes=21000-"]
    assert away.waits == [1.0, 2.0, 1.0, 4.0]


def test_a_server_without_ranges(server: str, proxy: Proxy, here: Side, away: Side) -> None:
    digest = biggest(here, server, "whole/it")
    proxy.harm("GET", f"/blobs/{digest}", cut(5000), proxy.deaf_to_ranges)
    away.pull(f"{proxy.host}/whole/it")
    assert proxy.harmless and same(here, away)


def another_range(request: Request, answer: Answer) -> None:
    """Answer a range with bytes from somewhere else."""
    request.give(206, {**answer.headers, "Content-Range": "bytes 7-9/10"}, answer.data)


def test_a_range_that_was_not_asked_for_is_not_used(server: str, proxy: Proxy, here: Side, away: Side) -> None:
    digest = biggest(here, server, "other-range/it")
    proxy.harm("GET", f"/blobs/{digest}", cut(5000), another_range)
    away.pull(f"{proxy.host}/other-range/it")
    assert proxy.harmless and same(here, away)
    assert [headers.get("range") for headers in proxy.seen("GET", f"/blobs/{digest}")] == [None, "bytes=5000-", None]


def test_a_flipped_bit_is_found_and_loaded_again(server: str, proxy: Proxy, here: Side, away: Side) -> None:
    digest = biggest(here, server, "flip/it")
    proxy.harm("GET", f"/blobs/{digest}", flip(12_345))
    away.pull(f"{proxy.host}/flip/it")
    assert proxy.harmless and same(here, away)


def test_a_bit_that_is_always_flipped_is_refused(server: str, proxy: Proxy, here: Side, away: Side) -> None:
    digest = biggest(here, server, "flips/it")
    proxy.harm("GET", f"/blobs/{digest}", flip(12_345), flip(54_321))
    with pytest.raises(UserError, match=rf"{digest} does not match this digest; nothing of it was stored"):
        away.pull(f"{proxy.host}/flips/it")
    assert not list(away.store.images())
    away.pull(f"{proxy.host}/flips/it")
    assert same(here, away) and away.is_clean()


@pytest.mark.parametrize("path", ["/manifests/", "/blobs/CONFIG"])
def test_a_flipped_bit_in_a_document(server: str, proxy: Proxy, here: Side, away: Side, path: str) -> None:
    digest = here.push("it", f"{server}/document/it").digest
    with Wire(plain_http=True) as wire:
        data = Repository(wire, parse(f"{server}/document/it"), lambda: None).manifest("latest").data
    config = json.loads(data)["config"]["digest"]
    proxy.harm("GET", path.replace("CONFIG", config), *[flip(20)] * (2 if "CONFIG" in path else 1))
    with pytest.raises(UserError, match="nothing was stored"):
        away.pull(f"{proxy.host}/document/it@{digest}")
    proxy.harm("GET", path.replace("CONFIG", config), *[flip(20)] * (2 if "CONFIG" in path else 1))
    with pytest.raises(UserError, match=r"sent something else|does not match its digest"):
        away.pull(f"{proxy.host}/document/it")
    assert there(away.place)["staging"] == there(away.place)["layers"] == []


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (longer(b"more"), "the registry announces .* which should have"),
        (
            lambda request, answer: request.give(200, answer.headers | {"Content-Length": "7"}, answer.data[:7]),
            "announces 7 bytes",
        ),
    ],
)
def test_a_wrong_length_is_refused(
    server: str, proxy: Proxy, here: Side, away: Side, harm: registries.Harm, reason: str
) -> None:
    digest = biggest(here, server, "length/it")
    proxy.harm("GET", f"/blobs/{digest}", harm)
    with pytest.raises(UserError, match=reason):
        away.pull(f"{proxy.host}/length/it")
    assert not list(away.store.images())


def endless(request: Request, answer: Answer) -> None:
    """Send the blob, and then more, without saying how much it will be."""
    request.send_response(200)
    request.send_header("Connection", "close")
    request.end_headers()
    request.wfile.write(answer.data)
    for _ in range(64):
        request.wfile.write(bytes(1 << 16))
    request.close_connection = True


def test_more_than_announced_is_not_taken(server: str, proxy: Proxy, here: Side, away: Side) -> None:
    digest = biggest(here, server, "endless/it")
    proxy.harm("GET", f"/blobs/{digest}", endless)
    with pytest.raises(UserError, match=r"sends more than the \d+ bytes"):
        away.pull(f"{proxy.host}/endless/it")


def test_a_connection_that_never_gets_anywhere(server: str, proxy: Proxy, here: Side, away: Side) -> None:
    digest = biggest(here, server, "never/it")
    proxy.harm("GET", f"/blobs/{digest}", *[cut(0)] * 4)
    with pytest.raises(UserError, match=rf"broke 4 times at byte 0 of blob {digest} .*it goes on from there"):
        away.pull(f"{proxy.host}/never/it")
    assert away.waits == [1.0, 2.0, 4.0]


def test_the_next_run_goes_on(server: str, proxy: Proxy, here: Side, away: Side) -> None:
    digest = biggest(here, server, "runs/it")
    proxy.harm("GET", f"/blobs/{digest}", cut(30_000), *[cut(0)] * 3)
    with pytest.raises(UserError, match="at byte 30000 "):
        away.pull(f"{proxy.host}/runs/it")
    left = f"blob-{digest.removeprefix('sha256:')}"
    assert left in there(away.place)["staging"]
    away.pull(f"{proxy.host}/runs/it")
    assert proxy.seen("GET", f"/blobs/{digest}")[-1]["range"] == "bytes=30000-"
    assert same(here, away) and away.is_clean()


def test_what_the_last_run_left_is_not_believed(server: str, proxy: Proxy, here: Side, away: Side) -> None:
    digest = biggest(here, server, "damaged/it")
    damages: list[Callable[[bytes], bytes]] = [lambda data: b"x" + data[1:], lambda data: data * 100]
    for damage in damages:
        proxy.harm("GET", f"/blobs/{digest}", cut(30_000), *[cut(0)] * 3)
        with pytest.raises(UserError):
            away.pull(f"{proxy.host}/damaged/it")
        file = away.place / f"store/staging/blob-{digest.removeprefix('sha256:')}/data"
        file.write_bytes(damage(file.read_bytes()))
    away.pull(f"{proxy.host}/damaged/it")
    assert same(here, away)


def test_gc_takes_what_a_broken_pull_left(server: str, proxy: Proxy, here: Side, away: Side) -> None:
    digest = biggest(here, server, "left/it")
    proxy.harm("GET", f"/blobs/{digest}", cut(30_000), *[cut(0)] * 3)
    with pytest.raises(UserError):
        away.pull(f"{proxy.host}/left/it")
    away.store.gc(False)
    assert away.is_clean()


def test_a_busy_registry_is_waited_for(server: str, proxy: Proxy, here: Side, away: Side) -> None:
    here.push("it", f"{server}/busy/it")
    proxy.harm("GET", "/manifests/", status(429, Retry_After="7"), status(503))
    away.pull(f"{proxy.host}/busy/it")
    assert away.waits == [7.0, 2.0] and same(here, away)


def test_a_broken_upload_is_made_again(server: str, proxy: Proxy, here: Side, away: Side) -> None:
    proxy.harm("PUT", "/blobs/uploads/", registries.hang_up, status(500))
    proxy.harm("PUT", "/manifests/", status(503))
    pushed = here.push("it", f"{proxy.host}/upload/it")
    assert proxy.harmless and [layer.how for layer in pushed.layers] == ["uploaded", "uploaded"]
    assert away.pull(f"{server}/upload/it").digest == pushed.digest and same(here, away)
    assert here.is_clean()


def test_a_manifest_that_arrives_changed(proxy: Proxy, here: Side) -> None:
    other = "sha256:" + "1" * 64
    proxy.harm("PUT", "/manifests/", lambda request, answer: request.give(201, {"Docker-Content-Digest": other}))
    with pytest.raises(UserError, match=f"has arrived as {other} instead of"):
        here.push("it", f"{proxy.host}/arrives/it")


def test_one_layer_fails_and_the_others_stop(server: str, proxy: Proxy, here: Side, away: Side) -> None:
    digest = biggest(here, server, "stop/it")
    pushed = here.push("it", f"{server}/stop/it")
    other = next(layer.digest for layer in pushed.layers if layer.digest != digest)
    begun = threading.Event()

    def wait_and_fail(request: Request, answer: Answer) -> None:
        assert begun.wait(20)
        request.give(403)

    def never_ends(request: Request, answer: Answer) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(len(answer.data)))
        request.end_headers()
        request.wfile.write(answer.data[:1])
        request.wfile.flush()
        begun.set()
        request.connection.settimeout(20)
        assert request.connection.recv(1) == b""  # the client hangs up

    proxy.harm("GET", f"/blobs/{other}", wait_and_fail)
    proxy.harm("GET", f"/blobs/{digest}", never_ends)
    with pytest.raises(UserError, match=f"does not allow access to blob {other}"):
        away.pull(f"{proxy.host}/stop/it")
    assert not list(away.store.images())


def test_two_pulls_at_once_load_once(server: str, here: Side, away: Side) -> None:
    digest = biggest(here, server, "both/it")
    second = LayerStore(away.store.path)
    held = threading.Event()

    def slow(request: Request, answer: Answer) -> None:
        held.set()
        assert waiting.wait(20)
        request.give(*answer)

    waiting = threading.Event()

    def see(step: Step) -> None:
        if step.doing == "waiting" and step.key == digest:
            waiting.set()

    outcome: list[Pulled] = []

    def other_pull() -> None:
        assert held.wait(20)
        with Wire(plain_http=True) as wire:
            reference = parse(f"{proxy.host}/both/it")
            outcome.append(pull(second, reference, name="other", wire=wire, find=lambda _: None, on_step=see))

    with Proxy(server) as proxy:
        proxy.harm("GET", f"/blobs/{digest}", slow)
        thread = threading.Thread(target=other_pull)
        thread.start()
        away.pull(f"{proxy.host}/both/it")
        thread.join(30)
        assert len(proxy.seen("GET", f"/blobs/{digest}")) == 1
    second.close()
    assert outcome and away.files("other") == [TOP, BASE] and away.is_clean()


def test_a_full_disk(server: str, here: Side, away: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    here.push("it", f"{server}/full/it")
    add_image(here.store, "more", {"more": "and more"})
    works: list[tuple[Side, Callable[[], object]]] = [
        (here, lambda: here.push("more", f"{server}/full/more")),
        (away, lambda: away.pull(f"{server}/full/it")),
    ]
    for side, work in works:
        with monkeypatch.context() as patch:
            patch.setattr("overlayfs.sysio.write_at", full)
            with pytest.raises(UserError, match=f"the store {side.place}/store fails: No space left on device; put"):
                work()
        side.store.gc(False)
        assert side.is_clean()
        work()


def test_gc_at_every_step_takes_nothing_of_it(server: str, here: Side, away: Side) -> None:
    """Whatever a transfer has in its hands is held, from the first byte to the image that names it."""
    for side in (here, away):
        with LayerStore(side.store.path) as other:
            lock = threading.Lock()

            def collect(_: Step, other: LayerStore = other, lock: threading.Lock = lock) -> None:
                with lock:
                    other.gc(False)

            with Wire(plain_http=True) as wire:
                reference = parse(f"{server}/gc/it")
                if side is here:
                    push(here.store, "it", reference, wire=wire, find=side.find, on_step=collect)
                else:
                    pull(away.store, reference, name="it", wire=wire, find=side.find, on_step=collect)
            other.gc(False)
    assert same(here, away) and here.is_clean() and away.is_clean()


def test_the_file_for_a_blob_is_held(away: Side) -> None:
    digest = "sha256:" + "0" * 64

    class Enough(Exception):
        pass

    def enough(_: float) -> None:
        raise Enough

    with staging.incoming(away.store.place, digest, enough):
        away.store.gc(False)
        assert there(away.place)["staging"] == ["blob-" + "0" * 64]
        with pytest.raises(Enough):
            staging.incoming(away.store.place, digest, enough)
    away.store.gc(False)
    assert away.is_clean()


# --- who sees a secret


Find = Callable[[Reference], Credential | None]


def as_user(user: str, secret: str) -> Find:
    """A login for whatever is asked."""
    return lambda _: Credential(user, secret, "a test")


KNOWN = as_user(registries.USER, registries.PASSWORD)


def test_a_redirect_of_a_blob_gets_no_password(place: Path, here: Side, away: Side) -> None:
    with registries.registry(place / "private", auth=registries.with_password(place / "private")) as host:
        here.find = away.find = KNOWN
        digest = biggest(here, host, "leak/it")
        blob = _blob(host, "leak/it", digest)
        with Server(lambda request: request.give(200, data=blob)) as storage, Proxy(host) as proxy:
            proxy.harm("GET", f"/blobs/{digest}", redirect(f"http://{storage.host}"))
            away.pull(f"{proxy.host}/leak/it")
    assert same(here, away)
    assert [(name, path) for name, path, _ in storage.requests] == [("GET", f"/v2/leak/it/blobs/{digest}")]
    assert "authorization" not in storage.requests[0][2]
    assert proxy.seen("GET", f"/blobs/{digest}")[0]["authorization"] == registries.BASIC


def _blob(host: str, repository: str, digest: str) -> bytes:
    with Wire(plain_http=True) as wire:
        target = Repository(wire, parse(f"{host}/{repository}"), lambda: KNOWN(parse(f"{host}/x")))
        return b"".join(target.blob(digest).pieces())


def test_a_stranger_that_asks_for_a_password_gets_none(place: Path, here: Side, away: Side) -> None:
    """A 401 from where a redirect leads is not the registry's (CVE-2020-15157)."""

    def ask(request: Request) -> None:
        request.give(401, {"WWW-Authenticate": f'Bearer realm="http://{storage.host}/token",service="x"'})

    with registries.registry(place / "private", auth=registries.with_password(place / "private")) as host:
        here.find = away.find = KNOWN
        digest = biggest(here, host, "stranger/it")
        with Server(ask) as storage, Proxy(host) as proxy:
            proxy.harm("GET", f"/blobs/{digest}", redirect(f"http://{storage.host}"))
            with pytest.raises(UserError, match="does not allow access to blob"):
                away.pull(f"{proxy.host}/stranger/it")
    assert len(storage.requests) == 1 and "authorization" not in storage.requests[0][2]


def test_an_upload_to_another_host_gets_no_password(place: Path, here: Side) -> None:
    got: list[bytes] = []

    def take(request: Request) -> None:
        got.append(request.body())
        request.give(201)

    with registries.registry(place / "private", auth=registries.with_password(place / "private")) as host:
        here.find = KNOWN
        with Server(take) as storage, Proxy(host) as proxy:
            elsewhere = {"Location": f"http://{storage.host}/up?state=x%3D1"}
            proxy.harm("POST", "/blobs/uploads/", *[lambda request, answer: request.give(202, elsewhere)] * 3)
            proxy.harm("PUT", "/manifests/", status(201))
            here.push("it", f"{proxy.host}/offsite/it")
    assert len(got) == 3 and all("authorization" not in headers for _, _, headers in storage.requests)
    # Several go at once: the order in which they are taken is not that in which they were noted.
    wanted = {f"/up?state=x%3D1&digest=sha256%3A{hashlib.sha256(data).hexdigest()}" for data in got}
    assert {path for _, path, _ in storage.requests} == wanted


def test_a_password(place: Path, here: Side, away: Side) -> None:
    with registries.registry(place / "private", auth=registries.with_password(place / "private")) as host:
        with pytest.raises(UserError, match=f"{host} wants a login; run 'podman login {host}'"):
            here.push("it", f"{host}/a/b")
        here.find = as_user("somebody", "wrong")
        with pytest.raises(UserError, match=r"refuses the login of somebody \(from a test\)"):
            here.push("it", f"{host}/a/b")
        here.find = away.find = KNOWN
        here.push("it", f"{host}/a/b")
        away.pull(f"{host}/a/b")
    assert same(here, away)


# --- tokens


class Tokens(NamedTuple):
    server: TokenServer
    host: str


@pytest.fixture
def tokens(place: Path) -> Iterator[Tokens]:
    """A registry that wants tokens, and who gives them out."""
    keys = registries.make_keys(place)
    with TokenServer(keys, refresh="identity") as server, registries.registry(place / "t", auth=server.auth()) as host:
        yield Tokens(server, host)


def test_a_token_for_a_password(tokens: Tokens, here: Side, away: Side) -> None:
    here.find = away.find = KNOWN
    here.push("it", f"{tokens.host}/t/it")
    away.pull(f"{tokens.host}/t/it")
    assert same(here, away)
    scopes = [re.findall(r"scope=([^&]*)", path) for _, path, _ in tokens.server.requests]
    assert scopes == [["repository%3At%2Fit%3Apull%2Cpush"], ["repository%3At%2Fit%3Apull"]]
    here.push("it", f"{tokens.host}/u/it")  # the layers are mounted, which takes a token for both repositories
    assert ["repository%3Au%2Fit%3Apull%2Cpush", "repository%3At%2Fit%3Apull"] in [
        re.findall(r"scope=([^&]*)", path) for _, path, _ in tokens.server.requests
    ]


def test_the_password_goes_to_the_token_server_alone(tokens: Tokens, here: Side) -> None:
    here.find = KNOWN
    with Proxy(tokens.host) as proxy:
        here.push("it", f"{proxy.host}/t/it")
        sent = {headers.get("authorization", "")[:7] for _, _, headers in proxy.requests}
    assert sent == {"", "Bearer "}
    assert {headers["authorization"] for _, _, headers in tokens.server.requests} == {registries.BASIC}


def test_a_token_for_an_identity_token(tokens: Tokens, here: Side) -> None:
    here.find = as_user("", "identity")
    here.push("it", f"{tokens.host}/t/it")
    assert {name for name, _, _ in tokens.server.requests} == {"POST"}


def test_a_token_for_nobody(tokens: Tokens, here: Side) -> None:
    tokens.server.private = False
    here.push("it", f"{tokens.host}/t/it")
    assert all("authorization" not in headers for _, _, headers in tokens.server.requests)


def test_no_token(tokens: Tokens, here: Side) -> None:
    with pytest.raises(UserError, match=f"{tokens.host} wants a login"):
        here.push("it", f"{tokens.host}/t/it")
    here.find = as_user("somebody", "wrong")
    with pytest.raises(UserError, match=f"{tokens.server.host} refuses the login of somebody"):
        here.push("it", f"{tokens.host}/t/it")


def test_a_token_that_allows_less_than_was_asked_for(tokens: Tokens, here: Side) -> None:
    here.find = KNOWN
    tokens.server.allowed = {"pull"}
    with pytest.raises(UserError, match="does not accept the login"):
        here.push("it", f"{tokens.host}/t/it")


def test_a_token_at_its_end_is_renewed(tokens: Tokens, here: Side, away: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    here.find = away.find = KNOWN
    here.push("it", f"{tokens.host}/t/it")
    seconds = 0.0

    def later() -> float:
        nonlocal seconds
        seconds += 1000.0
        return seconds

    monkeypatch.setattr("overlayfs.oci.login.time.monotonic", later)
    before = len(tokens.server.requests)
    away.pull(f"{tokens.host}/t/it")
    assert len(tokens.server.requests) - before > 1 and same(here, away)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"{", "something else than a token"),
        (b'{"token": 1}', "something else than a token"),
        (b'{"token": "a\\r\\nX: y"}', "something else than a token"),
        (b'{"token": "ok", "expires_in": "soon"}', "something else than a token"),
        (b"[" * 100_000, "something else than a token"),
        (b'"' + b"x" * (1 << 20) + b'"', "more than 1048576 bytes"),
    ],
)
def test_what_is_no_token(away: Side, data: bytes, reason: str) -> None:
    def answer(request: Request) -> None:
        if request.path.startswith("/token"):
            request.give(200, data=data)
        else:
            request.give(401, {"WWW-Authenticate": f'Bearer realm="http://{registry.host}/token"'})

    with Server(answer) as registry, pytest.raises(UserError, match=reason):
        away.pull(f"{registry.host}/a/b")


@pytest.mark.parametrize("realm", ["", "/token", "http://tokens.example/", "file:///etc/passwd", "http://[::1"])
def test_a_token_server_must_be_reached_by_tls(away: Side, realm: str) -> None:
    away.find = KNOWN
    with (
        Server(lambda request: request.give(401, {"WWW-Authenticate": f'Bearer realm="{realm}"'})) as server,
        pytest.raises(UserError, match=r"without TLS|is no address that we go to"),
    ):
        away.pull(f"{server.host}/a/b")


def test_an_unknown_kind_of_login(away: Side) -> None:
    with (
        Server(lambda request: request.give(401, {"WWW-Authenticate": "Negotiate"})) as server,
        pytest.raises(UserError, match="a login of a kind that is not known here"),
    ):
        away.pull(f"{server.host}/a/b")


# --- what a registry may answer


def hostile(manifest: object, kind: str = media.OCI_MANIFEST, **headers: str) -> Server:
    """A registry whose every answer is this document."""
    data = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    return Server(lambda request: request.give(200, {"Content-Type": kind, **headers}, data))


@pytest.mark.parametrize(
    ("manifest", "kind", "reason"),
    [
        (b"", media.OCI_MANIFEST, "cannot be used"),
        (b"x" * (5 << 20), media.OCI_MANIFEST, "more than 4194304 bytes"),
        (b"[" * 1_000_000, media.OCI_MANIFEST, "cannot be used"),
        ({"schemaVersion": 1}, "application/vnd.docker.distribution.manifest.v1+prettyjws", "of the unknown type"),
        ({"schemaVersion": 2}, "", "of the unknown type ''"),
        ({"schemaVersion": 2, "manifests": []}, media.OCI_INDEX, "holds no image"),
        (
            {"schemaVersion": 2, "layers": [], "config": {"mediaType": "x", "digest": "sha256:../x", "size": 1}},
            media.OCI_MANIFEST,
            "is not a sha256 digest",
        ),
        (
            {"schemaVersion": 2, "layers": [], "config": {"mediaType": media.OCI_CONFIG, "digest": "sha256:" + "0" * 64,
                                                          "size": 1 << 40}},
            media.OCI_MANIFEST,
            "is larger than 4 MiB",
        ),
    ],
)  # fmt: skip
def test_hostile_documents(away: Side, manifest: object, kind: str, reason: str) -> None:
    with hostile(manifest, kind) as server, pytest.raises(UserError, match=reason):
        away.pull(f"{server.host}/a/b")
    assert away.is_clean() and not list(away.store.images())


def test_an_index_that_leads_to_itself_ends(away: Side) -> None:
    def answer(request: Request) -> None:
        entry = {"mediaType": media.OCI_INDEX, "digest": "sha256:" + "0" * 64, "size": 1}
        request.give(
            200, {"Content-Type": media.OCI_INDEX}, json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode()
        )

    with Server(answer) as server, pytest.raises(UserError, match="sent something else"):
        away.pull(f"{server.host}/a/b")


def test_messages_of_a_registry_cannot_write_on_the_terminal(away: Side) -> None:
    errors = json.dumps({"errors": [{"message": "\x1b[2Jgone\n" + "x" * 1000}]}).encode()
    with Server(lambda request: request.give(418, {}, errors)) as server, pytest.raises(UserError) as caught:
        away.pull(f"{server.host}/a/b")
    assert "status 418 for " in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_an_upload_without_a_place(here: Side) -> None:
    def answer(request: Request) -> None:
        request.body()
        request.give(404 if request.command == "HEAD" else 202)

    with Server(answer) as server, pytest.raises(UserError, match="takes an upload but does not say where"):
        here.push("it", f"{server.host}/a/b")
    assert not [name for name in there(here.place)["staging"] if name.startswith("blob")]
