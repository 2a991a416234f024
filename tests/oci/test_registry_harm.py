"""Push and pull with broken connections and damaged data, and with invalid responses of a registry."""

import errno
import json
import os
import threading
from collections.abc import Callable, Iterator

import pytest

from overlayfs.errors import UserError
from overlayfs.oci import image_spec, staging
from overlayfs.oci.http_client import HttpClient
from overlayfs.oci.pull import Pulled, pull
from overlayfs.oci.push import push
from overlayfs.oci.reference import parse
from overlayfs.oci.registry import Repository
from overlayfs.oci.transfer import LayerProgress
from overlayfs.store.store import LayerStore
from tests.oci import registries
from tests.oci.registries import Answer, Proxy, Request, Server, cut, flip, longer, status
from tests.oci.transfers import BASE, TOP, Side, biggest, same
from tests.store.samples import add_image, there

# --- faults in transit


@pytest.fixture
def proxy(server: str) -> Iterator[Proxy]:
    with Proxy(server) as proxy:
        yield proxy


def test_a_broken_download_continues(server: str, proxy: Proxy, here: Side, away: Side) -> None:
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
    """Answer a range request with another range."""
    request.give(206, {**answer.headers, "Content-Range": "bytes 7-9/10"}, answer.data)


def test_a_range_that_was_not_asked_for_is_not_used(server: str, proxy: Proxy, here: Side, away: Side) -> None:
    digest = biggest(here, server, "other-range/it")
    proxy.harm("GET", f"/blobs/{digest}", cut(5000), another_range)
    away.pull(f"{proxy.host}/other-range/it")
    assert proxy.harmless and same(here, away)
    assert [headers.get("range") for headers in proxy.seen("GET", f"/blobs/{digest}")] == [None, "bytes=5000-", None]


def test_a_blob_with_a_flipped_bit_is_downloaded_again(server: str, proxy: Proxy, here: Side, away: Side) -> None:
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
    with HttpClient(plain_http=True) as client:
        data = Repository(client, parse(f"{server}/document/it"), lambda: None).manifest("latest").data
    config = json.loads(data)["config"]["digest"]
    proxy.harm("GET", path.replace("CONFIG", config), *[flip(20)] * (2 if "CONFIG" in path else 1))
    with pytest.raises(UserError, match="nothing was stored"):
        away.pull(f"{proxy.host}/document/it@{digest}")
    proxy.harm("GET", path.replace("CONFIG", config), *[flip(20)] * (2 if "CONFIG" in path else 1))
    with pytest.raises(UserError, match=r"what the registry sent is not|does not match its digest"):
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
    """Send the blob and more, without a Content-Length."""
    request.send_response(200)
    request.send_header("Connection", "close")
    request.end_headers()
    request.wfile.write(answer.data)
    for _ in range(64):
        request.wfile.write(bytes(1 << 16))
    request.close_connection = True


def test_more_bytes_than_announced_are_refused(server: str, proxy: Proxy, here: Side, away: Side) -> None:
    digest = biggest(here, server, "endless/it")
    proxy.harm("GET", f"/blobs/{digest}", endless)
    with pytest.raises(UserError, match=r"sends more than the \d+ bytes"):
        away.pull(f"{proxy.host}/endless/it")


def test_a_connection_that_makes_no_progress(server: str, proxy: Proxy, here: Side, away: Side) -> None:
    digest = biggest(here, server, "never/it")
    proxy.harm("GET", f"/blobs/{digest}", *[cut(0)] * 4)
    with pytest.raises(UserError, match=rf"broke 4 times at byte 0 of blob {digest} .*to continue from there"):
        away.pull(f"{proxy.host}/never/it")
    assert away.waits == [1.0, 2.0, 4.0]


def test_the_next_pull_continues(server: str, proxy: Proxy, here: Side, away: Side) -> None:
    digest = biggest(here, server, "runs/it")
    proxy.harm("GET", f"/blobs/{digest}", cut(30_000), *[cut(0)] * 3)
    with pytest.raises(UserError, match="at byte 30000 "):
        away.pull(f"{proxy.host}/runs/it")
    left = f"blob-{digest.removeprefix('sha256:')}"
    assert left in there(away.place)["staging"]
    away.pull(f"{proxy.host}/runs/it")
    assert proxy.seen("GET", f"/blobs/{digest}")[-1]["range"] == "bytes=30000-"
    assert same(here, away) and away.is_clean()


def test_what_the_last_pull_left_is_verified(server: str, proxy: Proxy, here: Side, away: Side) -> None:
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


def test_gc_removes_what_a_failed_pull_left(server: str, proxy: Proxy, here: Side, away: Side) -> None:
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


def test_a_broken_upload_is_repeated(server: str, proxy: Proxy, here: Side, away: Side) -> None:
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
        assert request.connection.recv(1) == b""  # the client disconnects

    proxy.harm("GET", f"/blobs/{other}", wait_and_fail)
    proxy.harm("GET", f"/blobs/{digest}", never_ends)
    with pytest.raises(UserError, match=f"does not allow access to blob {other}"):
        away.pull(f"{proxy.host}/stop/it")
    assert not list(away.store.images())


def test_two_concurrent_pulls_download_once(server: str, here: Side, away: Side) -> None:
    digest = biggest(here, server, "both/it")
    second = LayerStore(away.store.path)
    held = threading.Event()

    def slow(request: Request, answer: Answer) -> None:
        held.set()
        assert waiting.wait(20)
        request.give(*answer)

    waiting = threading.Event()

    def see(step: LayerProgress) -> None:
        if step.doing == "waiting" and step.key == digest:
            waiting.set()

    outcome: list[Pulled] = []

    def other_pull() -> None:
        assert held.wait(20)
        with HttpClient(plain_http=True) as client:
            reference = parse(f"{proxy.host}/both/it")
            outcome.append(pull(second, reference, name="other", client=client, find=lambda _: None, progress=see))

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
            with pytest.raises(UserError, match=f"the store {side.place}/store fails: No space left on device; repair"):
                work()
        side.store.gc(False)
        assert side.is_clean()
        work()


def test_gc_at_every_step_removes_nothing_in_use(server: str, here: Side, away: Side) -> None:
    """All that a transfer uses is locked, from the first byte to the image that names it."""
    for side in (here, away):
        with LayerStore(side.store.path) as other:
            lock = threading.Lock()

            def collect(_: LayerProgress, other: LayerStore = other, lock: threading.Lock = lock) -> None:
                with lock:
                    other.gc(False)

            with HttpClient(plain_http=True) as client:
                reference = parse(f"{server}/gc/it")
                if side is here:
                    push(here.store, "it", reference, client=client, find=side.find, progress=collect)
                else:
                    pull(away.store, reference, name="it", client=client, find=side.find, progress=collect)
            other.gc(False)
    assert same(here, away) and here.is_clean() and away.is_clean()


def test_the_file_for_a_blob_is_locked(away: Side) -> None:
    digest = "sha256:" + "0" * 64

    class Enough(Exception):
        pass

    def enough(_: float) -> None:
        raise Enough

    with staging.incoming(away.store.directory, digest, enough):
        away.store.gc(False)
        assert there(away.place)["staging"] == ["blob-" + "0" * 64]
        with pytest.raises(Enough):
            staging.incoming(away.store.directory, digest, enough)
    away.store.gc(False)
    assert away.is_clean()


# --- what a registry may answer


def hostile(manifest: object, kind: str = image_spec.OCI_MANIFEST, **headers: str) -> Server:
    """A registry that responds to everything with this document."""
    data = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    return Server(lambda request: request.give(200, {"Content-Type": kind, **headers}, data))


@pytest.mark.parametrize(
    ("manifest", "kind", "reason"),
    [
        (b"", image_spec.OCI_MANIFEST, "cannot be used"),
        (b"x" * (5 << 20), image_spec.OCI_MANIFEST, "more than 4194304 bytes"),
        (b"[" * 1_000_000, image_spec.OCI_MANIFEST, "cannot be used"),
        ({"schemaVersion": 1}, "application/vnd.docker.distribution.manifest.v1+prettyjws", "of the unknown type"),
        ({"schemaVersion": 2}, "", "of the unknown type ''"),
        ({"schemaVersion": 2, "manifests": []}, image_spec.OCI_INDEX, "contains no image"),
        (
            {"schemaVersion": 2, "layers": [], "config": {"mediaType": "x", "digest": "sha256:../x", "size": 1}},
            image_spec.OCI_MANIFEST,
            "is not a sha256 digest",
        ),
        (
            {"schemaVersion": 2, "layers": [],
             "config": {"mediaType": image_spec.OCI_CONFIG, "digest": "sha256:" + "0" * 64, "size": 1 << 40}},
            image_spec.OCI_MANIFEST,
            "is larger than 4 MiB",
        ),
    ],
)  # fmt: skip
def test_hostile_documents(away: Side, manifest: object, kind: str, reason: str) -> None:
    with hostile(manifest, kind) as server, pytest.raises(UserError, match=reason):
        away.pull(f"{server.host}/a/b")
    assert away.is_clean() and not list(away.store.images())


def test_an_index_that_points_to_itself_is_refused(away: Side) -> None:
    def answer(request: Request) -> None:
        entry = {"mediaType": image_spec.OCI_INDEX, "digest": "sha256:" + "0" * 64, "size": 1}
        request.give(
            200, {"Content-Type": image_spec.OCI_INDEX}, json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode()
        )

    with Server(answer) as server, pytest.raises(UserError, match="what the registry sent is not"):
        away.pull(f"{server.host}/a/b")


def test_messages_of_a_registry_have_no_control_characters(away: Side) -> None:
    errors = json.dumps({"errors": [{"message": "\x1b[2Jgone\n" + "x" * 1000}]}).encode()
    with Server(lambda request: request.give(418, {}, errors)) as server, pytest.raises(UserError) as caught:
        away.pull(f"{server.host}/a/b")
    assert "status 418 for " in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_an_upload_without_a_location(here: Side) -> None:
    def answer(request: Request) -> None:
        request.body()
        request.give(404 if request.command == "HEAD" else 202)

    with Server(answer) as server, pytest.raises(UserError, match="accepts an upload but sends no Location"):
        here.push("it", f"{server.host}/a/b")
    assert not [name for name in there(here.place)["staging"] if name.startswith("blob")]
