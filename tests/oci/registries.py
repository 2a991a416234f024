"""Registries for tests: docker-registry on a local port, a token server, and a proxy that injects faults."""

import base64
import contextlib
import http.client
import http.server
import json
import os
import queue
import re
import socket
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple, Self

from tests.support import processes, requirements

USER, PASSWORD = "somebody", "pa:ss wörd"
HASHED = "$2y$05$abcdefghijklmnopqrstuuHYAqSTZaD2G3ZsfHYCUGgOo5vA33Sre"  # bcrypt of it, as htpasswd -B writes
BASIC = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()


class Keys(NamedTuple):
    """A self-signed certificate for this machine, and its key."""

    certificate: Path
    key: Path


def make_keys(place: Path, names: str = "IP:127.0.0.1,DNS:localhost") -> Keys:
    keys = Keys(place / "ca.pem", place / "key.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test",
         "-addext", f"subjectAltName={names}", "-keyout", keys.key, "-out", keys.certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    return keys


@contextlib.contextmanager
def registry(place: Path, through: Sequence[str] = (), **settings: object) -> Iterator[str]:
    """Run docker-registry with its data in `place`; yield HOST:PORT.

    `settings` are sections of its configuration, `through` are the words before its own on the command line.
    """
    requirements.need_program("docker-registry")
    place.mkdir(exist_ok=True)
    config = {
        "version": 0.1,
        "log": {"level": "info", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(place / "data")}, "delete": {"enabled": True}},
        "http": {"addr": "127.0.0.1:0", "secret": "of these tests", **settings.pop("http", {})},  # type: ignore[dict-item]
        **settings,
    }
    (place / "config.yml").write_text(json.dumps(config))  # JSON is YAML
    # It reads its settings from REGISTRY_..., and takes podman's REGISTRY_AUTH_FILE for one of them.
    child = subprocess.Popen(
        [*through, "docker-registry", "serve", place / "config.yml"],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        env={name: value for name, value in os.environ.items() if not name.startswith("REGISTRY_")},
    )  # fmt: skip
    assert child.stderr is not None
    ports: queue.SimpleQueue[str] = queue.SimpleQueue()
    reader = threading.Thread(target=_read_log, args=(child.stderr, ports))
    reader.start()
    try:
        host = ports.get(timeout=processes.LIMIT)
        assert host, f"docker-registry did not start with {config}"
        yield host
    finally:
        child.terminate()
        child.wait(processes.LIMIT)
        reader.join()
        child.stderr.close()


def _read_log(log: IO[str], ports: "queue.SimpleQueue[str]") -> None:
    """Find the port, and keep reading: a full pipe would block the registry."""
    for line in log:
        if found := re.search(r"listening on (127\.0\.0\.1:[0-9]+)", line):
            ports.put(found[1])
    ports.put("")


def with_password(place: Path) -> dict[str, object]:
    """The `auth` section of a registry that requires `USER` and `PASSWORD`."""
    place.mkdir(exist_ok=True)
    (place / "htpasswd").write_text(f"{USER}:{HASHED}\n")
    return {"htpasswd": {"realm": "test", "path": str(place / "htpasswd")}}


class Server:
    """An HTTP server in a thread; `answer(request)` is called for each request."""

    def __init__(self, answer: Callable[["Request"], None]) -> None:
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self._connections: set[socket.socket] = set()
        outer = self

        class Handler(Request):
            def setup(self) -> None:
                outer._connections.add(self.request)
                super().setup()

            def finish(self) -> None:
                outer._connections.discard(self.request)
                super().finish()

            def handle_any(self) -> None:
                outer.requests.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
                answer(self)

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = False
        self.host = f"127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._thread.join()
        for connection in tuple(self._connections):  # clients keep them open
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._http.server_close()

    def seen(self, method: str, pattern: str) -> list[dict[str, str]]:
        """The headers of all requests so far with this method and a path that contains the pattern."""
        return [headers for name, path, headers in self.requests if name == method and re.search(pattern, path)]


class Request(http.server.BaseHTTPRequestHandler):
    """One request, and ways to answer it."""

    protocol_version = "HTTP/1.1"
    timeout = 20

    def handle_any(self) -> None:
        raise NotImplementedError

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = lambda self: self.handle_any()

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # clients may disconnect at any time
            super().handle()

    def log_message(self, *_: object) -> None:
        return

    def do_CONNECT(self) -> None:
        self.handle_any()

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def give(self, status: int, headers: dict[str, str] | None = None, data: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)


class Answer(NamedTuple):
    """The response of the registry behind a proxy."""

    status: int
    headers: dict[str, str]
    data: bytes


Harm = Callable[[Request, Answer], None]


class Proxy(Server):
    """Forwards requests to a registry; `harm` sets faults, by method and path, each for one response."""

    def __init__(self, upstream: str) -> None:
        super().__init__(self._answer)
        self._upstream = upstream
        self.hidden = "$^"  # a part of paths that the registry does not see
        self._harm: list[tuple[str, str, Harm]] = []
        self._lock = threading.Lock()

    def harm(self, method: str, pattern: str, *harm: Harm) -> None:
        """Inject these faults, in this order, into the next responses to requests that match."""
        self._harm += [(method, pattern, each) for each in harm]

    @property
    def harmless(self) -> bool:
        """Whether all faults have been injected."""
        return not self._harm

    def deaf_to_ranges(self, request: Request, answer: Answer) -> None:
        """Send a blob from its beginning, whatever range was requested, which servers may do."""
        del request.headers["Range"]
        request.give(*self._ask(request))

    def _answer(self, request: Request) -> None:
        answer = self._ask(request)
        harm = self._next(request)
        if harm is not None:
            harm(request, answer)
        else:
            request.give(*answer)

    def _next(self, request: Request) -> Harm | None:
        with self._lock:
            for index, (method, pattern, harm) in enumerate(self._harm):
                if method == request.command and re.search(pattern, request.path):
                    del self._harm[index]
                    return harm
        return None

    def _ask(self, request: Request) -> Answer:
        connection = http.client.HTTPConnection(self._upstream, timeout=20)
        try:
            path = re.sub(self.hidden, "", request.path)
            connection.request(request.command, path, request.body(), dict(request.headers.items()))
            reply = connection.getresponse()
            skipped = {"transfer-encoding", "connection", "date"}
            return Answer(reply.status, {k: v for k, v in reply.getheaders() if k.lower() not in skipped}, reply.read())
        finally:
            connection.close()


def status(code: int, **headers: str) -> Harm:
    """Answer with this status instead; the keyword `Retry_After` is the header."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda request, answer: request.give(code, named, b"")


def cut(after: int) -> Harm:
    """Announce the whole body, and disconnect after so many bytes."""

    def harm(request: Request, answer: Answer) -> None:
        request.give(answer.status, {"Content-Length": str(len(answer.data)), **answer.headers}, answer.data[:after])
        request.hang_up()

    return harm


def hang_up(request: Request, answer: Answer) -> None:
    """Disconnect without a response."""
    request.hang_up()


def flip(offset: int) -> Harm:
    """Flip one bit."""

    def harm(request: Request, answer: Answer) -> None:
        data = bytearray(answer.data)
        data[offset] ^= 1
        request.give(answer.status, answer.headers, bytes(data))

    return harm


def longer(extra: bytes) -> Harm:
    """Send more than was requested, with a Content-Length to match."""

    def harm(request: Request, answer: Answer) -> None:
        data = answer.data + extra
        request.give(answer.status, {**answer.headers, "Content-Length": str(len(data))}, data)

    return harm


def redirect(url: str, code: int = 307) -> Harm:
    """Redirect the client."""
    return lambda request, answer: request.give(code, {"Location": url + request.path})


class TokenServer(Server):
    """Issues tokens as the distribution project specifies, signed with a key that the registry trusts."""

    def __init__(self, keys: Keys, life: int = 300, refresh: str = "") -> None:
        super().__init__(self._give)
        self._keys = keys
        self._life = life
        self._refresh = refresh
        self.allowed = {"pull", "push"}
        self.private = True

    def auth(self) -> dict[str, object]:
        """The `auth` section of a registry that trusts this server."""
        return {
            "token": {
                "realm": f"http://{self.host}/token",
                "service": "tests",
                "issuer": "the tests",
                "rootcertbundle": str(self._keys.certificate),
            }
        }

    def _give(self, request: Request) -> None:
        form = urllib.parse.parse_qs(request.body().decode() or urllib.parse.urlsplit(request.path).query)
        known = request.headers.get("Authorization") == BASIC or form.get("refresh_token") == [self._refresh]
        if self.private and not known:
            return request.give(401, {}, b'{"errors":[{"code":"UNAUTHORIZED","message":"who are you"}]}')
        access = [self._access(scope) for scope in " ".join(form.get("scope", [])).split()]
        answer = {"token": self._signed(access), "expires_in": self._life}
        return request.give(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def _access(self, scope: str) -> dict[str, object]:
        kind, name, actions = scope.split(":")
        return {"type": kind, "name": name, "actions": sorted(set(actions.split(",")) & self.allowed)}

    def _signed(self, access: list[dict[str, object]]) -> str:
        der = subprocess.run(
            ["openssl", "x509", "-in", self._keys.certificate, "-outform", "DER"], check=True, capture_output=True
        ).stdout
        now = int(time.time())
        head = {"typ": "JWT", "alg": "RS256", "x5c": [base64.b64encode(der).decode()]}
        claims = {"iss": "the tests", "sub": "", "aud": "tests", "exp": now + self._life, "nbf": now - 10, "iat": now,
                  "jti": str(time.monotonic_ns()), "access": access}  # fmt: skip
        signed = f"{_url64(json.dumps(head).encode())}.{_url64(json.dumps(claims).encode())}"
        signature = subprocess.run(
            ["openssl", "dgst", "-sha256", "-sign", self._keys.key], input=signed.encode(), check=True,
            capture_output=True,
        ).stdout  # fmt: skip
        return f"{signed}.{_url64(signature)}"


def _url64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
