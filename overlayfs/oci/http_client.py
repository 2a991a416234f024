"""HTTP for a registry client: TLS, redirects, retries and cancellation on top of urllib3.

Every connection uses TLS, except to this machine, and there only on request. An Authorization header belongs to one
origin (scheme, host, port) and is not sent where a redirect leads to another one. Busy servers (429, 5xx) and broken
connections are retried with exponential backoff. Every read has a limit.
"""

import contextlib
import email.utils
import random
import socket
import ssl
import threading
import time
import urllib.parse
import urllib.request
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Self

import urllib3
from urllib3.exceptions import (
    HTTPError,
    IncompleteRead,
    LocationParseError,
    NameResolutionError,
    NewConnectionError,
    SSLError,
)

from overlayfs.errors import UserError
from overlayfs.oci.reference import is_loopback

CONNECT_TIMEOUT = 15.0  # seconds
READ_TIMEOUT = 60.0  # seconds without a byte
MAX_REDIRECTS = 5
PIECE = 1 << 18  # bytes per read
MAX_SHORT_BODY = 1 << 16  # bytes of a body that is only read for its message
MAX_RETRY_AFTER = 300.0  # seconds; a longer Retry-After is an error at once
RETRY_STATUSES = {408, 429, 500, 502, 503, 504}
REDIRECT_STATUSES = {301, 302, 303, 307, 308}
_HEADERS = {"User-Agent": "overlayfs", "Accept-Encoding": "identity"}


class BrokenConnectionError(Exception):
    """The connection broke, or the response is incomplete; a retry may help."""


class UnreachableError(BrokenConnectionError):
    """No connection could be made: the host does not exist, or nothing listens on the port."""


class CancelledError(Exception):
    """The transfer was cancelled: another thread has failed, or the user has interrupted."""


class RetryPolicy:
    """How often and after which pauses requests are retried, and whether the transfer they belong to is cancelled.

    attempts: including the first. first, longest: seconds of backoff. wait(seconds) sleeps; jitter() is in [0, 1).
    """

    def __init__(
        self,
        attempts: int = 6,
        first: float = 1.0,
        longest: float = 30.0,
        wait: Callable[[float], object] | None = None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.attempts = attempts
        self._first = first
        self._longest = longest
        self._cancelled = threading.Event()
        self._wait = wait or self._cancelled.wait
        self._jitter = jitter

    def backoff(self, attempt: int, at_least: float = 0.0) -> None:
        """Sleep after attempt `attempt` (from 0): twice as long each time, half of it random; `at_least` seconds.

        Raises `CancelledError`.
        """
        seconds: float = min(self._longest, self._first * 2**attempt)
        self.sleep(max(at_least, seconds * (0.5 + 0.5 * self._jitter())))

    def sleep(self, seconds: float) -> None:
        """Sleep; raises `CancelledError` as soon as the transfer is cancelled."""
        self._wait(seconds)
        self.raise_if_cancelled()

    def cancel(self) -> None:
        """Cancel the transfer: sleeping threads wake up."""
        self._cancelled.set()

    def raise_if_cancelled(self) -> None:
        """Raise `CancelledError` after `cancel`."""
        if self._cancelled.is_set():
            raise CancelledError


class Body(NamedTuple):
    """A request body: its size in bytes, and a function that yields it from the beginning (for each attempt)."""

    size: int
    pieces: Callable[[], Iterable[bytes]]


class Response:
    """A response whose body has not been read yet; read it to its end, or close it."""

    def __init__(self, response: urllib3.BaseHTTPResponse, url: str, client: "HttpClient") -> None:
        self._response = response
        self._client = client
        self.url = url
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers

    def header_lines(self, header: str) -> list[str]:
        """Return all values of a header that may be repeated."""
        return list(self._response.headers.getlist(header))

    def pieces(self) -> Iterator[bytes]:
        """Yield the body in pieces. Raises `BrokenConnectionError` when it ends too early, or `CancelledError`."""
        try:
            while piece := self._response.read(PIECE, decode_content=False):
                self._client.retry.raise_if_cancelled()
                yield piece
        except HTTPError as error:
            self._client.retry.raise_if_cancelled()
            raise BrokenConnectionError(_reason(error)) from None
        finally:
            self.close()

    def read_body(self, limit: int = MAX_SHORT_BODY) -> bytes:
        """Return the whole body. Raises `UserError` if it is longer than `limit` bytes, and the errors of `pieces`."""
        data = bytearray()
        for piece in self.pieces():
            data += piece
            if len(data) > limit:
                self.close()
                raise UserError(f"{host_of(self.url)} answers with more than {limit} bytes where few were expected")
        return bytes(data)

    def close(self) -> None:
        """Release the connection; it is reused only if the body was read to its end."""
        self._client.forget(self)
        if getattr(self._response, "length_remaining", None) == 0:
            self._response.read()
        self._response.close()


class HttpClient:
    """Connections to any number of hosts, shared by threads. Use it as a context manager.

    plain_http: speak HTTP, which is allowed only to this machine. ca: a file of certificates to trust as well.
    """

    def __init__(
        self, *, plain_http: bool = False, ca: str | None = None, connections: int = 4, retry: RetryPolicy | None = None
    ) -> None:
        self.retry = retry or RetryPolicy()
        self.scheme = "http" if plain_http else "https"
        self._tls = _tls_context(ca)
        self._connections_per_host = connections
        self._managers: dict[str, urllib3.PoolManager] = {}
        self._connections: weakref.WeakSet[Any] = weakref.WeakSet()
        self._open_responses: set[Response] = set()
        self._reached_hosts: set[str] = set()
        self._lock = threading.Lock()

    def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: Body | bytes = b"",
        secret: str | None = None,
        retry_failures: bool = True,
    ) -> Response:
        """Return the response to a request, whatever its status; GET and HEAD follow redirects.

        `secret` is the value of the Authorization header, sent only to the origin of `url`. With `retry_failures`,
        busy servers and broken connections are retried, and `UserError` is raised after the last attempt. Without it,
        the caller has to handle them: a status in `RETRY_STATUSES`, or `BrokenConnectionError`.
        """
        for attempt in range(self.retry.attempts):
            self.retry.raise_if_cancelled()
            last = attempt + 1 == self.retry.attempts
            try:
                response = self._follow(method, url, dict(headers or {}), body, secret)
            except BrokenConnectionError as error:
                if not retry_failures:
                    raise
                if last or (isinstance(error, UnreachableError) and host_of(url) not in self._reached_hosts):
                    raise UserError(f"cannot reach {host_of(url)}: {error}") from None
                self.retry.backoff(attempt)
                continue
            if response.status not in RETRY_STATUSES or not retry_failures:
                return response
            retry_after = _retry_after(response)
            response.close()
            if last or retry_after > MAX_RETRY_AFTER:
                raise UserError(_busy_message(response, retry_after))
            self.retry.backoff(attempt, retry_after)
        raise AssertionError("the last attempt returns or raises")

    def _follow(
        self, method: str, url: str, headers: dict[str, str], body: Body | bytes, secret: str | None
    ) -> Response:
        home = origin(url)
        for _ in range(MAX_REDIRECTS + 1):
            sent = dict(headers)
            if secret is not None and origin(url) == home:
                sent["Authorization"] = secret
            response = self._send(method, url, sent, body)
            target = response.headers.get("Location")
            if method not in ("GET", "HEAD") or response.status not in REDIRECT_STATUSES or target is None:
                return response
            response.close()
            url = self.resolve_location(url, target)
        raise UserError(f"{home.host} redirects more than {MAX_REDIRECTS} times")

    def _send(self, method: str, url: str, headers: dict[str, str], body: Body | bytes) -> Response:
        self._require_tls(url)
        payload: bytes | Iterable[bytes] | None = body or None if isinstance(body, bytes) else body.pieces()
        if not isinstance(body, bytes):
            headers["Content-Length"] = str(body.size)
        try:
            answer = self._manager(url).request(
                method, url, body=payload, headers={**_HEADERS, **headers},
                preload_content=False, decode_content=False, redirect=False, retries=False,
            )  # fmt: skip
        except (HTTPError, OSError) as error:
            raise self._failure(url, error) from None
        response = Response(answer, url, self)
        with self._lock:
            self._open_responses.add(response)
            self._reached_hosts.add(host_of(url))
        return response

    def _failure(self, url: str, error: Exception) -> Exception:
        self.retry.raise_if_cancelled()
        if isinstance(error, LocationParseError):
            return UserError(_bad_url_message(url))
        if isinstance(error, SSLError):
            return UserError(_tls_message(host_of(url), error))
        if isinstance(error, (NameResolutionError, NewConnectionError)):
            return UnreachableError(_reason(error))
        return BrokenConnectionError(_reason(error))

    def resolve_location(self, url: str, target: str) -> str:
        """Return the URL that a Location header in a response from `url` means.

        Raises `UserError` for what is no URL, or leads to a host that must not be spoken to without TLS.
        """
        try:
            found = urllib.parse.urljoin(url, target)
        except ValueError:
            raise UserError(_bad_url_message(target)) from None
        self._require_tls(found)
        return found

    def _require_tls(self, url: str) -> None:
        scheme, host, _ = origin(url)
        if scheme == "https" or (self.scheme == scheme == "http" and is_loopback(host)):
            return
        raise UserError(f"refused to talk to {host_of(url)} without TLS; --plain-http works only for this machine")

    def _manager(self, url: str) -> urllib3.PoolManager:
        proxy = _proxy_for(url)
        with self._lock:
            if proxy not in self._managers:
                self._managers[proxy] = self._new_manager(proxy)
            return self._managers[proxy]

    def _new_manager(self, proxy: str) -> urllib3.PoolManager:
        timeout = urllib3.Timeout(connect=CONNECT_TIMEOUT, read=READ_TIMEOUT)
        size = self._connections_per_host
        made: urllib3.PoolManager
        if proxy:
            made = urllib3.ProxyManager(proxy, ssl_context=self._tls, timeout=timeout, maxsize=size)
        else:
            made = urllib3.PoolManager(ssl_context=self._tls, timeout=timeout, maxsize=size)
        made.pool_classes_by_scheme = _watched_pools(self._watch)
        return made

    def _watch(self, connection: urllib3.connection.HTTPConnection) -> None:
        """Remember a new connection for `cancel`, which has to interrupt threads that are blocked on it."""
        self._connections.add(connection)
        self.retry.raise_if_cancelled()

    def forget(self, response: Response) -> None:
        """Drop a closed response; `Response.close` calls this."""
        with self._lock:
            self._open_responses.discard(response)

    def cancel(self) -> None:
        """Cancel the transfer: threads that wait for a host, or sleep between attempts, get `CancelledError`."""
        self.retry.cancel()
        for connection in tuple(self._connections):
            with contextlib.suppress(OSError, AttributeError):  # a closed connection has no socket
                connection.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close all connections, those of unread responses too."""
        for response in tuple(self._open_responses):
            response.close()
        for manager in self._managers.values():
            manager.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Origin(NamedTuple):
    """The scheme, host and port that a secret belongs to (RFC 6454)."""

    scheme: str
    host: str
    port: int


def origin(url: str) -> Origin:
    """Return the origin of a URL, with the default port filled in. Raises `UserError` for what is no absolute URL."""
    try:  # with the parser that connects: another one might read the same URL differently
        found = urllib3.util.parse_url(url)
    except LocationParseError:
        found = urllib3.util.Url()
    if not found.scheme or not found.host or found.auth is not None:
        raise UserError(_bad_url_message(url))
    return Origin(found.scheme, found.host.lower(), found.port or {"http": 80, "https": 443}.get(found.scheme, 0))


def _bad_url_message(text: str) -> str:
    return f"{printable(text)} is not a URL that can be used"


def host_of(url: str) -> str:
    """Return HOST[:PORT] of a URL that `origin` accepts, for messages."""
    found = urllib3.util.parse_url(url)
    return printable(found.netloc or "")


def printable(text: str, limit: int = 300) -> str:
    """Return text from outside as one line of at most `limit` characters, without control characters."""
    return "".join(character if character.isprintable() else "?" for character in text[:limit])


def _tls_context(ca: str | None) -> ssl.SSLContext:
    """The system's certificates, or those of `$SSL_CERT_FILE`, and those in the file `ca`."""
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ca is not None:
        try:
            context.load_verify_locations(cafile=ca)
        except OSError as error:
            raise UserError(f"cannot read certificates from {ca}: {error.strerror or error}") from None
    return context


def _tls_message(host: str, error: SSLError) -> str:
    text = str(error)
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return (
            f"the certificate of {host} is not trusted ({_between(text, 'failed: ', ' (_ssl')}); "
            "name the authority that signed it with --ca FILE"
        )
    if "WRONG_VERSION_NUMBER" in text or "RECORD_LAYER_FAILURE" in text:
        return f"{host} does not speak TLS; if it is on this machine, use --plain-http"
    return f"cannot make a TLS connection with {host}: {_reason(error)}"


def _between(text: str, start: str, end: str) -> str:
    return printable(text.partition(start)[2].partition(end)[0])


def _reason(error: Exception) -> str:
    """Return the innermost cause, which urllib3 wraps in several exceptions, in the system's words."""
    seen: BaseException = error
    while inner := seen.__cause__ or (seen.__context__ if not seen.__suppress_context__ else None):
        seen = inner
    if isinstance(seen, IncompleteRead):
        return "the connection was closed"
    if isinstance(seen, OSError) and seen.strerror:
        return seen.strerror
    return printable(str(seen).rpartition(">: ")[2]) or type(seen).__name__


def _retry_after(response: Response) -> float:
    """Return the seconds in Retry-After, which has a number or a date (RFC 9110, section 10.2.3); 0 without it."""
    text = response.headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _busy_message(response: Response, retry_after: float) -> str:
    when = f" and asks to wait {retry_after:.0f} seconds" if retry_after else ""
    return f"{host_of(response.url)} is busy (status {response.status}){when}; try again later"


def _proxy_for(url: str) -> str:
    """Return the proxy for a URL from `https_proxy`, `no_proxy` and the like; "" for none, and for this machine."""
    scheme, host, port = origin(url)
    if is_loopback(host) or urllib.request.proxy_bypass(f"{host}:{port}"):
        return ""
    return urllib.request.getproxies().get(scheme, "")


def _watched_pools(watch: Callable[[Any], None]) -> dict[str, Any]:
    """Return urllib3's connection pools by scheme, with connections that call `watch(connection)` once connected."""

    def watched(base: Any) -> Any:
        def connect(self: Any) -> None:
            base.connect(self)
            watch(self)

        return type(base.__name__, (base,), {"connect": connect})

    pools: tuple[Any, ...] = (urllib3.HTTPConnectionPool, urllib3.HTTPSConnectionPool)
    return {pool.scheme: type(pool.__name__, (pool,), {"ConnectionCls": watched(pool.ConnectionCls)}) for pool in pools}
