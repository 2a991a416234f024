"""Answering a registry's authentication challenge: with nothing, with a password, or with a token.

The flow is that of the distribution project's "Token Authentication Specification". A password is sent to the registry
itself (Basic) or to the token server that the registry names (Bearer); a token is sent only to the registry.
"""

import contextlib
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import NamedTuple

from overlayfs.errors import UserError
from overlayfs.oci.credentials import Credential
from overlayfs.oci.http_client import HttpClient, Response, host_of, origin, printable

CLIENT_ID = "overlayfs"
DEFAULT_LIFETIME = 60.0  # seconds that a token is valid when the server does not say (the specification's default)
MARGIN = 10.0  # seconds before its expiry from which a token is no longer used
LARGEST_TOKEN = 1 << 20

Scopes = tuple[str, ...]
"""What a token allows, such as ``repository:team/site:pull,push``."""

_PARAMETER = re.compile(r'([A-Za-z0-9_-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s",]+))\s*,?\s*', re.ASCII)
_SCHEME = re.compile(r"([A-Za-z0-9_-]+)(?:\s+(?=[^=\s]+\s*=)|\s*,\s*|\s*$)", re.ASCII)


class Challenge(NamedTuple):
    """One authentication scheme that a registry offers (RFC 9110, section 11.6.1); `scheme` is in lower case."""

    scheme: str
    parameters: dict[str, str]


class Token(NamedTuple):
    """The value of an Authorization header, and the time (monotonic clock) after which it is no longer used."""

    header: str
    until: float


class Authorizer:
    """Provides the Authorization header for one registry, and is shared by threads.

    `find` is called once, when the registry first asks for a credential.
    """

    def __init__(self, client: HttpClient, registry: str, find: Callable[[], Credential | None]) -> None:
        self._client = client
        self._registry = registry
        self._find = find
        self._searched = False
        self._credential: Credential | None = None
        self._basic: str | None = None
        self._tokens: dict[Scopes, Token] = {}
        self._bearer: Challenge | None = None
        self._lock = threading.Lock()

    def header(self, scopes: Scopes) -> str | None:
        """Return the value to send as Authorization, None to send none; an expired token is renewed first."""
        with self._lock:
            if self._basic is not None or self._bearer is None:
                return self._basic
            token = self._tokens.get(scopes)
            if token is None or token.until < time.monotonic():
                token = self._tokens[scopes] = self._fetch_token(self._bearer, scopes)
            return token.header

    def respond(self, response: Response, sent: str | None, scopes: Scopes) -> None:
        """Take the challenge of a 401 response, so that `header` returns what it asks for.

        `sent` is the header that the failed request carried. Raises `UserError` if there is nothing else to send.
        """
        offered = list(challenges(response.header_lines("WWW-Authenticate")))
        with self._lock:
            if sent != self._current(scopes):
                return  # another thread has responded since the request was sent
            bearer = next((offer for offer in offered if offer.scheme == "bearer"), None)
            if bearer is not None:
                self._bearer = bearer
                self._tokens[scopes] = self._fetch_token(bearer, scopes)
            elif any(offer.scheme == "basic" for offer in offered):
                self._basic = self._password(sent)
            else:
                raise UserError(f"{self._registry} asks for a kind of login that is not supported")

    def _current(self, scopes: Scopes) -> str | None:
        token = self._tokens.get(scopes)
        return self._basic or (token.header if token else None)

    def _password(self, sent: str | None) -> str:
        credential = self._find_once()
        if credential is None or not credential.user:
            raise UserError(self._login_required())
        if sent is not None:
            raise UserError(_login_refused(self._registry, credential))
        return credential.basic

    def _find_once(self) -> Credential | None:
        if not self._searched:
            self._credential = self._find()
            self._searched = True
        return self._credential

    def _fetch_token(self, challenge: Challenge, scopes: Scopes) -> Token:
        realm = challenge.parameters.get("realm", "")
        origin(realm)  # raises unless it is an absolute URL
        credential = self._find_once()
        response = self._request_token(realm, challenge.parameters.get("service", ""), scopes, credential)
        with contextlib.closing(response):
            if response.status in (400, 401, 403):
                refused = self._login_required() if credential is None else _login_refused(host_of(realm), credential)
                raise UserError(refused)
            if response.status != 200:
                raise UserError(f"{host_of(realm)} issues no token for {self._registry} (status {response.status})")
            return _parse_token(response.read_body(LARGEST_TOKEN), host_of(realm))

    def _request_token(self, realm: str, service: str, scopes: Scopes, credential: Credential | None) -> Response:
        wanted = [("service", service)] if service else []
        if credential is not None and not credential.user:
            form = [*wanted, ("grant_type", "refresh_token"), ("client_id", CLIENT_ID), ("scope", " ".join(scopes)),
                    ("refresh_token", credential.secret)]  # fmt: skip
            kind = {"Content-Type": "application/x-www-form-urlencoded"}
            return self._client.request("POST", realm, headers=kind, body=urllib.parse.urlencode(form).encode())
        query = urllib.parse.urlencode([*wanted, *(("scope", scope) for scope in scopes)])
        joint = "&" if urllib.parse.urlsplit(realm).query else "?"
        return self._client.request("GET", f"{realm}{joint}{query}", secret=credential.basic if credential else None)

    def _login_required(self) -> str:
        return f"{self._registry} requires a login; run 'podman login {self._registry}' or 'docker login'"


def _login_refused(host: str, credential: Credential) -> str:
    login = f"the login of {printable(credential.user)}" if credential.user else "the login"
    return f"{host} refuses {login} (from {credential.source}); log in again"


def _parse_token(data: bytes, host: str) -> Token:
    try:
        answer = json.loads(data)
        text = answer.get("token") or answer.get("access_token")
        lifetime = float(answer.get("expires_in") or DEFAULT_LIFETIME)
    except (ValueError, TypeError, AttributeError, RecursionError):
        text, lifetime = None, 0.0
    if not isinstance(text, str) or not text or not text.isascii() or not text.isprintable():
        raise UserError(f"{host} does not answer with a token")
    return Token(f"Bearer {text}", time.monotonic() + max(lifetime - MARGIN, MARGIN))


def challenges(lines: list[str]) -> Iterator[Challenge]:
    """Yield the challenges in the values of WWW-Authenticate headers, each of which may hold several."""
    for line in lines:
        position = 0
        while scheme := _SCHEME.match(line, position):
            position = scheme.end()
            parameters: dict[str, str] = {}
            while found := _PARAMETER.match(line, position):
                position = found.end()
                quoted = found[2] if found[2] is not None else found[3]
                parameters[found[1].lower()] = re.sub(r"\\(.)", r"\1", quoted)
            yield Challenge(scheme[1].lower(), parameters)
