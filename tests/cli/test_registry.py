"""`overlayfs push` and `overlayfs pull` as they are typed."""

import json
import os
import random
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from overlayfs.oci import platforms
from overlayfs.oci.transfer import LayerProgress
from overlayfs.store.store import LayerStore
from overlayfs_cli import registry as shown
from tests.cli.conftest import Ended, Run, process, program
from tests.cli.test_terminal import Terminal
from tests.oci import registries
from tests.oci.registries import Answer, Proxy, Request
from tests.oci.transfers import BASE, TOP, foreign
from tests.store.samples import add_image, open_store
from tests.support import requirements


@pytest.fixture(scope="module")
def server(scratch: Path) -> Iterator[str]:
    with registries.registry(scratch / "commands") as host:
        yield host


@pytest.fixture
def store(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with the image `it`, which the commands use."""
    with open_store(place) as opened:
        add_image(opened, "it", BASE, TOP)
    monkeypatch.setenv("OVERLAYFS_STORE", str(place / "store"))
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(_logins(place, {})))
    return place / "store"


def _logins(place: Path, auths: dict[str, object]) -> Path:
    (place / "auth.json").write_text(json.dumps({"auths": auths}))
    return place / "auth.json"


def test_there_and_back(overlayfs: Run, store: Path, server: str) -> None:
    pushed = overlayfs("push", "it", f"{server}/site:v1", "--plain-http")
    assert pushed.code == 0 and pushed.err == ""
    reference, digest = pushed.out.split()
    assert reference == f"{server}/site:v1"
    assert overlayfs("pull", reference, "--plain-http") == Ended(0, f"{reference} {digest}\n", "")
    assert overlayfs("pull", reference, "--plain-http", "-t", "mine", "-q") == Ended(0, f"{digest}\n", "")
    assert overlayfs("push", "mine", f"{server}/mine", "--plain-http", "-q") == Ended(0, f"{digest}\n", "")
    with LayerStore(os.fsencode(store)) as opened:
        assert (
            opened.images.find("mine").layers == opened.images.find(reference).layers == opened.images.find("it").layers
        )


def test_json(overlayfs: Run, store: Path, server: str) -> None:
    pushed = json.loads(overlayfs("push", "it", f"{server}/json:v1", "--plain-http", "--json").out)
    assert {layer["how"] for layer in pushed.pop("layers")} <= {"uploaded", "mounted"}
    assert pushed.keys() == {"reference", "digest"}
    pulled = json.loads(overlayfs("pull", f"{server}/json:v1", "--plain-http", "--json").out)
    assert (pulled["image"], pulled["digest"]) == (f"{server}/json:v1", pushed["digest"])
    with LayerStore(os.fsencode(store)) as opened:
        assert [layer["layer"] for layer in pulled["layers"]] == list(opened.images.find("it").layers)
    assert {layer["downloaded"] for layer in pulled["layers"]} == {False}


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (("pull", "alpine"), 2, "alpine: name the registry too, as in docker.io/library/alpine"),
        (("pull", "{host}/x"), 1, "{host} does not speak TLS; if it is on this machine, use --plain-http"),
        (("pull", "{host}/x", "--plain-http"), 1, "{host}/x:latest is not in {host} (manifest unknown)"),
        (("pull", "{host}/x@sha256:" + "0" * 64, "--plain-http"), 2, "{host}/x@sha256:" + "0" * 64
         + ": a digest is not a name; give the image one with -t"),
        (("pull", "{host}/x", "--plain-http", "--platform", "/"), 2,
         "'/' is not a platform; write OS/ARCHITECTURE[/VARIANT], as in linux/arm64"),
        (("pull", "registry.example/x", "--plain-http"), 1,
         "refused to talk to registry.example without TLS; --plain-http works only for this machine"),
        (("pull", "{host}/x", "--ca", "/none"), 1, "cannot read certificates from /none: No such file or directory"),
        (("push", "none", "{host}/x"), 1, "there is no image none:latest; `overlayfs images` lists them"),
        (("push", "it", "{host}/x@sha256:" + "0" * 64, "--plain-http"), 2,
         "{host}/x@sha256:" + "0" * 64 + ": push to a tag; the digest follows from the content"),
    ],
)  # fmt: skip
def test_refusals(overlayfs: Run, store: Path, server: str, words: tuple[str, ...], code: int, sentence: str) -> None:
    assert overlayfs(*(word.format(host=server) for word in words)) == Ended(
        code, "", f"overlayfs: {sentence.format(host=server)}\n"
    )


def test_a_login_of_skopeo(overlayfs: Run, store: Path, place: Path) -> None:
    requirements.need_program("skopeo")
    with registries.registry(place / "private", auth=registries.with_password(place / "private")) as host:
        refused = overlayfs("push", "it", f"{host}/a/b", "--plain-http")
        assert refused.code == 1 and f"{host} requires a login; run 'podman login {host}'" in refused.err
        subprocess.run(
            ["skopeo", "login", "--tls-verify=false", "-u", registries.USER, "--password-stdin", host],
            input=registries.PASSWORD.encode(), check=True, capture_output=True,
        )  # fmt: skip
        assert overlayfs("push", "it", f"{host}/a/b", "--plain-http").code == 0


def test_tls_with_an_authority_of_ones_own(overlayfs: Run, store: Path, place: Path) -> None:
    keys = registries.make_keys(place)
    tls = {"tls": {"certificate": str(keys.certificate), "key": str(keys.key)}}
    with registries.registry(place / "tls", http=tls) as host:
        refused = overlayfs("push", "it", f"{host}/a/b")
        assert refused.code == 1 and f"the certificate of {host} is not trusted" in refused.err
        pushed = overlayfs("push", "it", f"{host}/a/b", "--ca", str(keys.certificate), "-q")
        assert pushed.code == 0
        assert overlayfs("pull", f"{host}/a/b", "--ca", str(keys.certificate), "-q") == pushed


def test_a_note_where_the_digest_cannot_be_kept(overlayfs: Run, store: Path, server: str, place: Path) -> None:
    foreign(server, "note/x")
    overlayfs("pull", f"{server}/note/x", "--plain-http", "-t", "x")
    with registries.registry(place / "other") as other:
        done = overlayfs("push", "x", f"{other}/note/x", "--plain-http")
        assert done.code == 0
        assert done.err == (
            "overlayfs: note: the digest is not that of the pulled image: its layers had to be compressed again\n"
        )


def test_a_note_where_the_image_is_for_another_machine(overlayfs: Run, store: Path, server: str) -> None:
    other = "s390x" if platforms.host().architecture != "s390x" else "riscv64"
    foreign(server, "other/x", architecture=other)
    done = overlayfs("pull", f"{server}/other/x", "--plain-http")
    assert done.err == (
        f"overlayfs: note: {server}/other/x:latest is for linux/{other}; this machine is {platforms.host()}\n"
    )
    assert overlayfs("pull", f"{server}/other/x", "--plain-http", "--platform", f"linux/{other}").err == ""


def test_a_line() -> None:
    key = "sha256:0123456789abcdef"
    assert shown.line(LayerProgress(key, "unpacking", 512, 2048)) == "0123456789ab  unpacking      25%  512 B of 2 KiB"
    assert shown.line(LayerProgress(key, "compressing", 2048)) == "0123456789ab  compressing   2 KiB"
    assert shown.line(LayerProgress("0123456789abcdef", "looking")) == "0123456789ab  looking"


class Stall:
    """Sends the beginning of a blob, and the rest when `go_on` is set."""

    def __init__(self) -> None:
        self.go_on = threading.Event()

    def __call__(self, request: Request, answer: Answer) -> None:
        request.send_response(answer.status)
        request.send_header("Content-Length", str(len(answer.data)))
        request.end_headers()
        half = len(answer.data) - len(answer.data) // 8
        request.wfile.write(answer.data[:half])
        request.wfile.flush()
        self.go_on.wait(30)
        request.wfile.write(answer.data[half:])


@pytest.fixture
def big(store: Path, server: str) -> str:
    """An image in the registry whose only layer is downloaded in several pieces; returns the digest of its blob."""
    text = random.Random(1).randbytes(1 << 20).hex()
    with LayerStore(os.fsencode(store)) as opened:
        add_image(opened, "big", {"big": text})
    pushed = json.loads(process("overlayfs", "push", "big", f"{server}/big", "--plain-http", "--json").out)
    return str(pushed["layers"][0]["digest"])


def _pull(place: Path, terminal: Terminal, host: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [program("overlayfs"), "pull", f"{host}/big", "--plain-http", "--store", place / "empty"],
        stderr=terminal.theirs, stdout=subprocess.PIPE, env={**os.environ, "COLUMNS": "80", "LINES": "24"},
    )  # fmt: skip


def test_a_terminal_shows_a_line_for_each_layer(server: str, big: str, place: Path) -> None:
    terminal, stall = Terminal(), Stall()
    with Proxy(server) as proxy:
        proxy.harm("GET", f"/blobs/{big}", stall)
        child = _pull(place, terminal, proxy.host)
        terminal.started()
        terminal.wait_for(big.removeprefix("sha256:")[:12].encode() + b"  downloading")
        stall.go_on.set()
        out, _ = child.communicate(timeout=60)
    assert child.returncode == 0 and out.startswith(f"{proxy.host}/big:latest sha256:".encode())
    assert terminal.rest().endswith(b"\x1b[J")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_an_interrupted_pull_leaves_what_it_has_to_the_next_one(
    server: str, big: str, place: Path, number: signal.Signals, code: int
) -> None:
    terminal, stall = Terminal(), Stall()
    with Proxy(server) as proxy:
        proxy.harm("GET", f"/blobs/{big}", stall)
        child = _pull(place, terminal, proxy.host)
        terminal.started()
        terminal.wait_for(b"downloading")
        child.send_signal(number)
        out, _ = child.communicate(timeout=60)
        assert (child.returncode, out) == (code, b"")
        assert b"Traceback" not in terminal.rest()
        stall.go_on.set()
        with LayerStore(os.fsencode(place / "empty")) as opened:
            assert not list(opened.images()) and not list(opened.layers())
        done = process("overlayfs", "pull", f"{proxy.host}/big", "--plain-http", "--store", str(place / "empty"))
        assert done.code == 0 and done.err == ""
        first, second = proxy.seen("GET", f"/blobs/{big}")
    with LayerStore(os.fsencode(place / "empty")) as opened:
        assert not opened.gc(dry_run=True)
    assert "range" not in first and int(second["range"].removeprefix("bytes=").rstrip("-")) > 0
