"""Which hosts receive a password or a token, and which do not."""

import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from overlayfs.errors import UserError
from overlayfs.oci.credentials import Credential
from overlayfs.oci.http_client import HttpClient
from overlayfs.oci.reference import Reference, parse
from overlayfs.oci.registry import Repository
from tests.oci import registries
from tests.oci.registries import Proxy, Request, Server, TokenServer, redirect, status
from tests.oci.transfers import Side, biggest, same

# --- passwords


Find = Callable[[Reference], Credential | None]


def as_user(user: str, secret: str) -> Find:
    """A credential for any registry."""
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
    with HttpClient(plain_http=True) as client:
        target = Repository(client, parse(f"{host}/{repository}"), lambda: KNOWN(parse(f"{host}/x")))
        return b"".join(target.blob(digest).pieces())


def test_another_host_that_asks_for_a_password_gets_none(place: Path, here: Side, away: Side) -> None:
    """A 401 from the target of a redirect does not come from the registry (CVE-2020-15157)."""

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
    # Layers are pushed concurrently: uploads may finish in another order than they start.
    wanted = {f"/up?state=x%3D1&digest=sha256%3A{hashlib.sha256(data).hexdigest()}" for data in got}
    assert {path for _, path, _ in storage.requests} == wanted


def test_a_password(place: Path, here: Side, away: Side) -> None:
    with registries.registry(place / "private", auth=registries.with_password(place / "private")) as host:
        with pytest.raises(UserError, match=f"{host} requires a login; run 'podman login {host}'"):
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
    """A registry that requires tokens, and the server that issues them."""
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


def test_the_password_goes_only_to_the_token_server(tokens: Tokens, here: Side) -> None:
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


def test_an_anonymous_token(tokens: Tokens, here: Side) -> None:
    tokens.server.private = False
    here.push("it", f"{tokens.host}/t/it")
    assert all("authorization" not in headers for _, _, headers in tokens.server.requests)


def test_no_token(tokens: Tokens, here: Side) -> None:
    with pytest.raises(UserError, match=f"{tokens.host} requires a login"):
        here.push("it", f"{tokens.host}/t/it")
    here.find = as_user("somebody", "wrong")
    with pytest.raises(UserError, match=f"{tokens.server.host} refuses the login of somebody"):
        here.push("it", f"{tokens.host}/t/it")


def test_a_token_that_allows_less_than_was_asked_for(tokens: Tokens, here: Side) -> None:
    here.find = KNOWN
    tokens.server.allowed = {"pull"}
    with pytest.raises(UserError, match="does not accept the login"):
        here.push("it", f"{tokens.host}/t/it")


def test_an_expired_token_is_renewed(tokens: Tokens, here: Side, away: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    here.find = away.find = KNOWN
    here.push("it", f"{tokens.host}/t/it")
    seconds = 0.0

    def later() -> float:
        nonlocal seconds
        seconds += 1000.0
        return seconds

    monkeypatch.setattr("overlayfs.oci.auth_challenge.time.monotonic", later)
    before = len(tokens.server.requests)
    away.pull(f"{tokens.host}/t/it")
    assert len(tokens.server.requests) - before > 1 and same(here, away)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"{", "does not answer with a token"),
        (b'{"token": 1}', "does not answer with a token"),
        (b'{"token": "a\\r\\nX: y"}', "does not answer with a token"),
        (b'{"token": "ok", "expires_in": "soon"}', "does not answer with a token"),
        (b"[" * 100_000, "does not answer with a token"),
        (b'"' + b"x" * (1 << 20) + b'"', "more than 1048576 bytes"),
    ],
)
def test_an_answer_without_a_token_is_an_error(away: Side, data: bytes, reason: str) -> None:
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
        pytest.raises(UserError, match=r"without TLS|is not a URL that can be used"),
    ):
        away.pull(f"{server.host}/a/b")


def test_an_unknown_kind_of_login(away: Side) -> None:
    with (
        Server(lambda request: request.give(401, {"WWW-Authenticate": "Negotiate"})) as server,
        pytest.raises(UserError, match="asks for a kind of login that is not supported"),
    ):
        away.pull(f"{server.host}/a/b")
