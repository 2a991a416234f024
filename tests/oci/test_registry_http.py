"""HTTP under bad conditions: what is retried and when, which host receives a secret, what is refused."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from overlayfs.errors import UserError
from overlayfs.oci.http_client import Body, BrokenConnectionError, CancelledError, HttpClient, RetryPolicy
from tests.oci import registries
from tests.oci.registries import Request, Server

SECRET = "Basic c2VjcmV0"


class Waits:
    """A clock that only records how long it should sleep."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def retry(self, jitter: float = 1.0) -> RetryPolicy:
        return RetryPolicy(attempts=4, first=1.0, longest=3.0, wait=self.seconds.append, jitter=lambda: jitter)


@pytest.fixture
def waits() -> Waits:
    return Waits()


@pytest.fixture
def client(waits: Waits) -> Iterator[HttpClient]:
    with HttpClient(plain_http=True, retry=waits.retry()) as client:
        yield client


def answers(*statuses: int, **headers: str) -> Server:
    """A server that responds with these statuses in turn, and then with 200."""
    left = list(statuses)

    def answer(request: Request) -> None:
        request.body()
        request.give(left.pop(0) if left else 200, headers, b"text")

    return Server(answer)


def get(client: HttpClient, server: Server, path: str = "/", secret: str | None = None) -> bytes:
    return client.request("GET", f"http://{server.host}{path}", secret=secret).read_body()


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_busy_server_is_retried(client: HttpClient, waits: Waits, status: int) -> None:
    with answers(status, status, status) as server:
        assert get(client, server) == b"text"
    assert waits.seconds == [1.0, 2.0, 3.0]


def test_half_of_a_pause_is_random(waits: Waits) -> None:
    waits.retry(jitter=0.0).backoff(0)
    waits.retry(jitter=0.5).backoff(1)
    assert waits.seconds == [0.5, 1.5]


def test_retry_after_is_obeyed(client: HttpClient, waits: Waits) -> None:
    with answers(429, 503, **{"Retry-After": "7"}) as server:
        get(client, server)
    assert waits.seconds == [7.0, 7.0]


def test_retry_after_in_the_past_means_the_usual_backoff(client: HttpClient, waits: Waits) -> None:
    with answers(503, **{"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}) as server:
        get(client, server)
    assert waits.seconds == [1.0]


@pytest.mark.parametrize("nonsense", ["soon", "-1", "1e9", "²"])
def test_an_invalid_retry_after_is_ignored(client: HttpClient, waits: Waits, nonsense: str) -> None:
    def answer(request: Request) -> None:
        request.give(503 if len(server.requests) == 1 else 200, {"Retry-After": nonsense})

    with Server(answer) as server:
        get(client, server)
    assert waits.seconds == [1.0]


def test_a_long_retry_after_is_an_error(client: HttpClient, waits: Waits) -> None:
    with answers(429, **{"Retry-After": "7200"}) as server, pytest.raises(UserError, match="asks to wait 7200 seconds"):
        get(client, server)
    assert waits.seconds == []


def test_a_server_that_stays_busy_is_an_error(client: HttpClient, waits: Waits) -> None:
    with answers(*[503] * 9) as server, pytest.raises(UserError, match=rf"{server.host} is busy \(status 503\)"):
        get(client, server)
    assert len(server.requests) == 4 and len(waits.seconds) == 3


@pytest.mark.parametrize("status", [400, 401, 404, 501])
def test_other_statuses_are_for_the_caller(client: HttpClient, waits: Waits, status: int) -> None:
    with answers(status) as server:
        assert client.request("GET", f"http://{server.host}/").status == status
    assert waits.seconds == []


def test_a_broken_connection_is_retried(client: HttpClient, waits: Waits) -> None:
    def answer(request: Request) -> None:
        if len(server.requests) < 3:
            request.hang_up()
        else:
            request.give(200, data=b"there")

    with Server(answer) as server:
        assert get(client, server) == b"there"
    assert waits.seconds == [1.0, 2.0]


def test_without_retries_failures_are_for_the_caller(client: HttpClient, waits: Waits) -> None:
    with Server(Request.hang_up) as server, pytest.raises(BrokenConnectionError):
        client.request("PUT", f"http://{server.host}/", body=b"x", retry_failures=False)
    with answers(503) as server:
        assert client.request("PUT", f"http://{server.host}/", body=b"x", retry_failures=False).status == 503
    assert waits.seconds == []


def test_a_port_without_a_listener_is_an_error_at_once(client: HttpClient, waits: Waits) -> None:
    with Server(Request.hang_up) as server:
        pass
    with pytest.raises(UserError, match=f"cannot reach {server.host}: Connection refused"):
        get(client, server)
    assert waits.seconds == []  # a wrong name is not retried


def test_a_body_that_ends_early_is_broken(client: HttpClient) -> None:
    def answer(request: Request) -> None:
        request.give(200, {"Content-Length": "100"}, b"short")
        request.hang_up()

    with Server(answer) as server, pytest.raises(BrokenConnectionError):
        get(client, server)


def test_a_body_over_the_limit_is_refused(client: HttpClient) -> None:
    with Server(lambda request: request.give(200, data=b"x" * 100)) as server:
        response = client.request("GET", f"http://{server.host}/")
        with pytest.raises(UserError, match="more than 99 bytes"):
            response.read_body(99)


def test_a_body_is_sent_again_from_its_beginning(client: HttpClient) -> None:
    got = []

    def answer(request: Request) -> None:
        got.append(request.body())
        request.give(503 if len(got) == 1 else 201)

    with Server(answer) as server:
        body = Body(6, lambda: iter((b"abc", b"def")))
        assert client.request("PUT", f"http://{server.host}/", body=body).status == 201
    assert got == [b"abcdef", b"abcdef"]
    assert {headers["content-length"] for headers in server.seen("PUT", "/")} == {"6"}


def test_connections_are_reused(client: HttpClient) -> None:
    clients = set()

    def answer(request: Request) -> None:
        clients.add(request.client_address)
        request.give(200, data=b"x")

    with Server(answer) as server:
        for _ in range(3):
            get(client, server)
            client.request("HEAD", f"http://{server.host}/").close()
        client.close()
    assert len(clients) == 1


# --- secrets and redirects


def redirecting(target: str, status: int = 307) -> Server:
    return Server(lambda request: request.give(status, {"Location": target}))


def test_a_secret_goes_to_its_host(client: HttpClient) -> None:
    with answers() as server:
        get(client, server, secret=SECRET)
    assert server.requests[0][2]["authorization"] == SECRET


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_secret_does_not_follow_a_redirect_to_another_host(client: HttpClient, status: int) -> None:
    with answers() as storage, redirecting(f"http://{storage.host}/blob", status) as server:
        assert get(client, server, secret=SECRET) == b"text"
    assert "authorization" in server.requests[0][2]
    assert storage.requests[0][1] == "/blob" and "authorization" not in storage.requests[0][2]


def test_two_names_of_one_address_are_different_hosts(client: HttpClient) -> None:
    with answers() as storage:
        port = storage.host.rpartition(":")[2]
        with redirecting(f"http://localhost:{port}/") as server:
            get(client, server, secret=SECRET)
    assert "authorization" not in storage.requests[0][2]


def test_a_secret_follows_a_redirect_on_its_host(client: HttpClient) -> None:
    def answer(request: Request) -> None:
        if request.path == "/":
            request.give(302, {"Location": "/there?x=1"})
        else:
            request.give(200, data=b"found")

    with Server(answer) as server:
        assert get(client, server, secret=SECRET) == b"found"
    assert [headers["authorization"] for headers in server.seen("GET", "")] == [SECRET, SECRET]


def test_only_get_and_head_follow_redirects(client: HttpClient) -> None:
    with redirecting("/else") as server:
        assert client.request("PUT", f"http://{server.host}/", body=b"x").status == 307


def test_too_many_redirects_are_refused(client: HttpClient) -> None:
    with redirecting("/again") as server, pytest.raises(UserError, match="redirects more than 5 times"):
        get(client, server)
    assert len(server.requests) == 6


@pytest.mark.parametrize("target", ["http://10.1.2.3/", "http://registry.example/", "file://localhost/etc", "ftp://x/"])
def test_a_redirect_may_not_lead_out_of_tls(client: HttpClient, target: str) -> None:
    with redirecting(target) as server, pytest.raises(UserError, match="without TLS"):
        get(client, server)


@pytest.mark.parametrize(
    "target", ["http://localhost:x@registry.example/", "http://u:p@127.0.0.1/", "file:///etc/passwd", "http://[::1"]
)
def test_ambiguous_urls_are_refused(client: HttpClient, target: str) -> None:
    with redirecting(target) as server, pytest.raises(UserError, match="is not a URL that can be used"):
        get(client, server)


@pytest.mark.parametrize("target", ["http://localhost:1\\@registry.example/", "http://registry.example#@localhost/"])
def test_the_host_that_is_checked_is_the_one_that_is_connected_to(client: HttpClient, target: str) -> None:
    """Whatever another parser may take for the host of a URL."""
    with redirecting(target) as server, pytest.raises(UserError, match=r"cannot reach|without TLS"):
        get(client, server)


# --- TLS


def test_plain_http_is_for_this_machine() -> None:
    with pytest.raises(UserError, match=r"refused to talk to registry\.example:5000 without TLS"):
        HttpClient(plain_http=True).request("GET", "http://registry.example:5000/")


def test_plain_http_requires_the_option() -> None:
    with answers() as server, pytest.raises(UserError, match="without TLS"):
        HttpClient().request("GET", f"http://{server.host}/")
    assert server.requests == []


def test_a_server_without_tls(waits: Waits) -> None:
    with answers() as server, pytest.raises(UserError, match=f"{server.host} does not speak TLS; .*--plain-http"):
        HttpClient(retry=waits.retry()).request("GET", f"https://{server.host}/")
    assert waits.seconds == []


def test_a_certificate_must_be_trusted(place: Path, waits: Waits, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = registries.make_keys(place)
    tls = {"tls": {"certificate": str(keys.certificate), "key": str(keys.key)}}
    with registries.registry(place / "registry", http=tls) as host:
        url = f"https://{host}/v2/"
        with pytest.raises(UserError, match=rf"certificate of {host} is not trusted \(self.signed.*--ca"):
            HttpClient(retry=waits.retry()).request("GET", url)
        with HttpClient(ca=str(keys.certificate)) as client:
            assert client.request("GET", url).read_body() == b"{}"
        monkeypatch.setenv("SSL_CERT_FILE", str(keys.certificate))
        with HttpClient() as client:
            assert client.request("GET", url).read_body() == b"{}"
    assert waits.seconds == []


def test_a_certificate_is_for_one_host(place: Path, waits: Waits) -> None:
    keys = registries.make_keys(place, "IP:127.0.0.9")
    tls = {"tls": {"certificate": str(keys.certificate), "key": str(keys.key)}}
    trusting = HttpClient(ca=str(keys.certificate))
    with (
        registries.registry(place / "registry", http=tls) as host,
        pytest.raises(UserError, match=rf"certificate of {host} is not trusted \(.*127\.0\.0\.1"),
    ):
        trusting.request("GET", f"https://{host}/v2/", secret=SECRET)


def test_a_file_that_holds_no_certificate(place: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read certificates from .*missing"):
        HttpClient(ca=str(place / "missing"))
    (place / "empty").write_text("nothing")
    with pytest.raises(UserError, match=r"cannot read certificates from .*empty"):
        HttpClient(ca=str(place / "empty"))


# --- proxies


def test_a_proxy_is_used_but_not_for_this_machine(waits: Waits, monkeypatch: pytest.MonkeyPatch) -> None:
    with Server(lambda request: request.give(200)) as proxy, answers() as server:
        for name in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(name, f"http://{proxy.host}")
        with HttpClient(plain_http=True) as direct:
            assert get(direct, server) == b"text"
        assert proxy.requests == []
        client = HttpClient(retry=waits.retry())
        with pytest.raises(UserError):  # the proxy has no tunnel
            client.request("GET", "https://registry.example/v2/", secret=SECRET)
    assert {(name, path) for name, path, _ in proxy.requests} == {("CONNECT", "registry.example:443")}
    assert all("authorization" not in headers for _, _, headers in proxy.requests)


# --- cancelling


def test_cancel_interrupts_a_blocked_read(client: HttpClient) -> None:
    begun, ended = threading.Event(), threading.Event()

    def answer(request: Request) -> None:
        request.give(200, {"Content-Length": "100"}, b"x")
        request.wfile.flush()
        begun.set()
        ended.wait(20)

    outcome: list[BaseException] = []

    def read() -> None:
        try:
            client.request("GET", f"http://{server.host}/").read_body()
        except BaseException as error:
            outcome.append(error)
        ended.set()

    with Server(answer) as server:
        reader = threading.Thread(target=read)
        reader.start()
        assert begun.wait(20)
        client.cancel()
        reader.join(20)
    assert [type(error) for error in outcome] == [CancelledError]


def test_cancel_interrupts_waiting_for_a_response(client: HttpClient) -> None:
    asked, ended = threading.Event(), threading.Event()

    def never(request: Request) -> None:
        asked.set()
        ended.wait(20)

    outcome: list[BaseException] = []

    def ask() -> None:
        try:
            client.request("GET", f"http://{server.host}/")
        except BaseException as error:
            outcome.append(error)
        ended.set()

    with Server(never) as server:
        asker = threading.Thread(target=ask)
        asker.start()
        assert asked.wait(20)
        client.cancel()
        asker.join(10)
        assert ended.is_set()
        with pytest.raises(CancelledError):
            client.request("GET", f"http://{server.host}/")
    assert [type(error) for error in outcome] == [CancelledError]


def test_cancel_ends_every_backoff() -> None:
    retry = RetryPolicy(first=1000.0, longest=1000.0)
    retry.cancel()
    with pytest.raises(CancelledError):
        retry.backoff(0)
