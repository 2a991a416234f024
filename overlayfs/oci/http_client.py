"""HTTP as a client of registries needs it.

TLS always, except with this machine itself and only on request.  A secret belongs to one origin (scheme, host, port)
and is left out as soon as a redirect leads elsewhere.  What may be repeated is repeated: busy servers (429, 5xx) and
broken connections get more attempts, further and further apart.  Nothing is read without a limit.
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
PIECE = 1 << 18  # bytes read at a time
TEXT_LIMIT = 1 << 16  # bytes of an answer that is only looked at for its message
MAX_RETRY_AFTER = 300.0  # seconds; a server that asks for more is not waited for
RETRY_STATUSES = {408, 429, 500, 502, 503, 504}
_ALWAYS = {"User-Agent": "overlayfs", "Accept-Encoding": "identity"}
REDIRECT_STATUSES = {301, 302, 303, 307, 308}


class BrokenConnectionError(Exception):
    """The connection broke, or the answer is not whole; trying again may help."""


class CancelledError(Exception):
    """Another thread has failed, or the user has interrupted: this work is no longer wanted."""


class RetryPolicy:
    """How often and when to try again; `stop` ends every wait, now and later."""

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
        self._stopped = threading.Event()
        self._wait = wait or self._stopped.wait
        self._jitter = jitter

    def pause(self, attempt: int, asked: float = 0.0) -> None:
        """Wait after attempt `attempt` (from 0): each time twice as long, half of it random; at least `asked` s."""
        backoff: float = min(self._longest, self._first * 2**attempt)
        self.rest(max(asked, backoff * (0.5 + 0.5 * self._jitter())))

    def rest(self, seconds: float) -> None:
        """Wait, unless the work is given up meanwhile."""
        self._wait(seconds)
        self.check()

    def stop(self) -> None:
        """End all waits."""
        self._stopped.set()

    @property
    def stopped(self) -> bool:
        """Whether the work is given up."""
        return self._stopped.is_set()

    def check(self) -> None:
        """Raise `GivenUpError` after `stop`."""
        if self.stopped:
            raise CancelledError


class Body(NamedTuple):
    """What a request carries: its size in bytes and a function that gives it from the beginning."""

    size: int
    pieces: Callable[[], Iterable[bytes]]


class Response:
    """An answer whose body has not been read; close it, or read it to its end."""

    def __init__(self, response: urllib3.BaseHTTPResponse, url: str, client: "HttpClient") -> None:
        self._response = response
        self._client = client
        self.url = url
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers

    def listed(self, header: str) -> list[str]:
        """Return every line of a header that may come more than once."""
        return list(self._response.headers.getlist(header))

    def pieces(self) -> Iterator[bytes]:
        """Give the body piece by piece. Raises `BrokenError` where it ends too early."""
        try:
            while piece := self._response.read(PIECE, decode_content=False):
                self._client.retry.check()
                yield piece
        except HTTPError as error:
            self._client.retry.check()
            raise BrokenConnectionError(_reason(error)) from None
        finally:
            self.close()

    def text(self, limit: int = TEXT_LIMIT) -> bytes:
        """Return the whole body. Raises `UserError` when it is longer than `limit` bytes, `BrokenError` as `pieces`."""
        data = bytearray()
        for piece in self.pieces():
            data += piece
            if len(data) > limit:
                self.close()
                raise UserError(f"{host_of(self.url)} answers with more than {limit} bytes where little was expected")
        return bytes(data)

    def close(self) -> None:
        """Let go of the connection; it serves again only if the body was read to its end."""
        self._client.forget(self)
        if getattr(self._response, "length_remaining", None) == 0:
            self._response.read()
        self._response.close()


class HttpClient:
    """Connections to any number of hosts, shared by threads."""

    def __init__(
        self, *, plain_http: bool = False, ca: str | None = None, connections: int = 4, retry: RetryPolicy | None = None
    ) -> None:
        self.retry = retry or RetryPolicy()
        self.scheme = "http" if plain_http else "https"
        self._tls = _tls_context(ca)
        self._connections = connections
        self._managers: dict[str, urllib3.PoolManager] = {}
        self._connections_made: weakref.WeakSet[Any] = weakref.WeakSet()
        self._open: set[Response] = set()
        self._answered: set[str] = set()
        self._lock = threading.Lock()

    def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: Body | bytes = b"",
        secret: str | None = None,
        again: bool = True,
    ) -> Response:
        """Return the answer to a request, whatever its status; GET and HEAD follow redirects.

        `secret` is the value of Authorization, for the host of `url` alone.  With `again` busy servers and broken
        connections are tried again, and a `UserError` is raised when that does not help; without, they are the
        caller's: a status that it must look at, or `BrokenError`.
        """
        for attempt in range(self.retry.attempts):
            self.retry.check()
            last = attempt + 1 == self.retry.attempts
            try:
                reply = self._follow(method, url, dict(headers or {}), body, secret)
            except BrokenConnectionError as error:
                if not again:
                    raise
                if last or (isinstance(error, UnreachableError) and host_of(url) not in self._answered):
                    raise UserError(f"cannot reach {host_of(url)}: {error}") from None
                self.retry.pause(attempt)
                continue
            if reply.status not in RETRY_STATUSES or not again:
                return reply
            asked = _asked_pause(reply)
            reply.close()
            if last or asked > MAX_RETRY_AFTER:
                raise UserError(_busy_sentence(reply, asked))
            self.retry.pause(attempt, asked)
        raise AssertionError("the last attempt returns or raises")

    def _follow(
        self, method: str, url: str, headers: dict[str, str], body: Body | bytes, secret: str | None
    ) -> Response:
        home = origin(url)
        for _ in range(MAX_REDIRECTS + 1):
            sent = dict(headers)
            if secret is not None and origin(url) == home:
                sent["Authorization"] = secret
            reply = self._send(method, url, sent, body)
            target = reply.headers.get("Location")
            if method not in ("GET", "HEAD") or reply.status not in REDIRECT_STATUSES or target is None:
                return reply
            reply.close()
            url = self.joined(url, target)
        raise UserError(f"{home.host} sends us from one address to the next without end")

    def _send(self, method: str, url: str, headers: dict[str, str], body: Body | bytes) -> Response:
        self._allow(url)
        payload: bytes | Iterable[bytes] | None = body or None if isinstance(body, bytes) else body.pieces()
        if not isinstance(body, bytes):
            headers["Content-Length"] = str(body.size)
        try:
            response = self._manager(url).request(
                method, url, body=payload, headers={**_ALWAYS, **headers},
                preload_content=False, decode_content=False, redirect=False, retries=False,
            )  # fmt: skip
        except (HTTPError, OSError) as error:
            raise self._failure(url, error) from None
        reply = Response(response, url, self)
        with self._lock:
            self._open.add(reply)
            self._answered.add(host_of(url))
        return reply

    def _failure(self, url: str, error: Exception) -> Exception:
        self.retry.check()
        if isinstance(error, LocationParseError):
            return UserError(_no_address(url))
        if isinstance(error, SSLError):
            return UserError(_tls_sentence(host_of(url), error))
        if isinstance(error, (NameResolutionError, NewConnectionError)):
            return UnreachableError(_reason(error))
        return BrokenConnectionError(_reason(error))

    def joined(self, url: str, target: str) -> str:
        """Return where a Location leads from `url`. Raises `UserError` where it may not lead."""
        try:
            found = urllib.parse.urljoin(url, target)
        except ValueError:
            raise UserError(_no_address(target)) from None
        self._allow(found)
        return found

    def _allow(self, url: str) -> None:
        scheme, host, _ = origin(url)
        if scheme == "https" or (self.scheme == scheme == "http" and is_loopback(host)):
            return
        raise UserError(f"refused to talk to {host_of(url)} without TLS; --plain-http is for this machine alone")

    def _manager(self, url: str) -> urllib3.PoolManager:
        proxy = _proxy_for(url)
        with self._lock:
            if proxy not in self._managers:
                self._managers[proxy] = self._new_manager(proxy)
            return self._managers[proxy]

    def _new_manager(self, proxy: str) -> urllib3.PoolManager:
        timeout = urllib3.Timeout(connect=CONNECT_TIMEOUT, read=READ_TIMEOUT)
        made: urllib3.PoolManager
        if proxy:
            made = urllib3.ProxyManager(proxy, ssl_context=self._tls, timeout=timeout, maxsize=self._connections)
        else:
            made = urllib3.PoolManager(ssl_context=self._tls, timeout=timeout, maxsize=self._connections)
        made.pool_classes_by_scheme = _watched_pools(self._watch)
        return made

    def _watch(self, connection: urllib3.connection.HTTPConnection) -> None:
        """Remember a new connection, so that `stop` can end what a thread waits for on it."""
        self._connections_made.add(connection)
        self.retry.check()

    def forget(self, reply: Response) -> None:
        """Take an answer off the list of those that `stop` ends."""
        with self._lock:
            self._open.discard(reply)

    def stop(self) -> None:
        """Make every thread that waits for a host, or for its turn, come back with `GivenUpError`."""
        self.retry.stop()
        for connection in tuple(self._connections_made):
            with contextlib.suppress(OSError, AttributeError):  # it may be closed already, and then has no socket
                connection.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close all connections; answers that nobody has read go with them."""
        for reply in tuple(self._open):
            reply.close()
        for manager in self._managers.values():
            manager.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class UnreachableError(BrokenConnectionError):
    """There was no connection at all: no such host, or nobody listens."""


class Origin(NamedTuple):
    """Whom a secret is for."""

    scheme: str
    host: str
    port: int


def origin(url: str) -> Origin:
    """Return scheme, host and port of an address, ports filled in."""
    try:  # by the parser that connects, not by another one that may understand an address otherwise
        found = urllib3.util.parse_url(url)
    except LocationParseError:
        found = urllib3.util.Url()
    if not found.scheme or not found.host or found.auth is not None:
        raise UserError(_no_address(url))
    return Origin(found.scheme, found.host.lower(), found.port or {"http": 80, "https": 443}.get(found.scheme, 0))


def _no_address(text: str) -> str:
    return f"{printable(text)} is no address that we go to"


def host_of(url: str) -> str:
    """Return HOST[:PORT] of an address that may be gone to, for messages."""
    found = urllib3.util.parse_url(url)
    return printable(found.netloc or "")


def printable(text: str, limit: int = 300) -> str:
    """Return what others wrote as one short line without control characters."""
    return "".join(character if character.isprintable() else "?" for character in text[:limit])


def _tls_context(ca: str | None) -> ssl.SSLContext:
    """The system's certificates, or those of `$SSL_CERT_FILE`; `ca` is a file of more."""
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ca is not None:
        try:
            context.load_verify_locations(cafile=ca)
        except OSError as error:
            raise UserError(f"cannot read certificates from {ca}: {error.strerror or error}") from None
    return context


def _tls_sentence(host: str, error: SSLError) -> str:
    text = str(error)
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return (
            f"the certificate of {host} is not trusted ({_between(text, 'failed: ', ' (_ssl')}); "
            "name the authority that signed it with --ca FILE"
        )
    if "WRONG_VERSION_NUMBER" in text or "RECORD_LAYER_FAILURE" in text:
        return f"{host} does not speak TLS; a registry on this machine can do without: --plain-http"
    return f"no TLS connection with {host}: {_reason(error)}"


def _between(text: str, start: str, end: str) -> str:
    return printable(text.partition(start)[2].partition(end)[0])


def _reason(error: Exception) -> str:
    """The innermost cause, in the words of the system: urllib3 wraps them in layers of its own."""
    seen: BaseException = error
    while inner := seen.__cause__ or (seen.__context__ if not seen.__suppress_context__ else None):
        seen = inner
    if isinstance(seen, IncompleteRead):
        return "the connection was closed"
    if isinstance(seen, OSError) and seen.strerror:
        return seen.strerror
    return printable(str(seen).rpartition(">: ")[2]) or type(seen).__name__


def _asked_pause(reply: Response) -> float:
    """Retry-After (RFC 9110, 10.2.3): seconds, or a date."""
    text = reply.headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _busy_sentence(reply: Response, asked: float) -> str:
    when = f" and asks for {asked:.0f} seconds of rest" if asked else ""
    return f"{host_of(reply.url)} is busy (status {reply.status}){when}; try again later"


def _proxy_for(url: str) -> str:
    """The proxy that the usual variables name (`https_proxy`, `no_proxy`, ...); none for this machine."""
    scheme, host, port = origin(url)
    if is_loopback(host) or urllib.request.proxy_bypass(f"{host}:{port}"):
        return ""
    return urllib.request.getproxies().get(scheme, "")


def _watched_pools(watch: Callable[[Any], None]) -> dict[str, Any]:
    """Return the pools of urllib3, by scheme, with connections that tell `watch` when they are made."""

    def watched(base: Any) -> Any:
        def connect(self: Any) -> None:
            base.connect(self)
            watch(self)

        return type(base.__name__, (base,), {"connect": connect})

    pools: tuple[Any, ...] = (urllib3.HTTPConnectionPool, urllib3.HTTPSConnectionPool)
    return {pool.scheme: type(pool.__name__, (pool,), {"ConnectionCls": watched(pool.ConnectionCls)}) for pool in pools}
