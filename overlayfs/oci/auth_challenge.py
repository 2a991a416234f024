"""What a registry wants to see before it answers: nothing, a password, or a token that another server gives out.

The flow is that of the distribution project's token specification.  A password goes to the registry itself (Basic) or
to the token server that the registry names (Bearer); a token goes to the registry alone.
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

CLIENT = "overlayfs"
DEFAULT_LIFE = 60.0  # seconds that a token lives whose server does not say
MARGIN = 10.0  # seconds before its end in which a token is no longer used
LARGEST_TOKEN = 1 << 20

Scopes = tuple[str, ...]

_PARAMETER = re.compile(r'([A-Za-z0-9_-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s",]+))\s*,?\s*', re.ASCII)
_SCHEME = re.compile(r"([A-Za-z0-9_-]+)(?:\s+(?=[^=\s]+\s*=)|\s*,\s*|\s*$)", re.ASCII)


class Challenge(NamedTuple):
    """One way to log in that a registry offers (RFC 9110, 11.6.1); the scheme is in lower case."""

    scheme: str
    parameters: dict[str, str]


class Token(NamedTuple):
    """The value of an Authorization header, and the time (monotonic clock) after which it is worth nothing."""

    header: str
    until: float


class Authorizer:
    """The way into one registry, shared by threads; `find` is asked for a credential when one is first wanted."""

    def __init__(self, client: HttpClient, registry: str, find: Callable[[], Credential | None]) -> None:
        self._client = client
        self._registry = registry
        self._find = find
        self._asked = False
        self._credential: Credential | None = None
        self._basic: str | None = None
        self._tokens: dict[Scopes, Token] = {}
        self._challenge: Challenge | None = None
        self._lock = threading.Lock()

    def header(self, scopes: Scopes) -> str | None:
        """Return what to send as Authorization, None for nothing; a token at its end is renewed."""
        with self._lock:
            if self._basic is not None or self._challenge is None:
                return self._basic
            token = self._tokens.get(scopes)
            if token is None or token.until < time.monotonic():
                token = self._tokens[scopes] = self._fetch(self._challenge, scopes)
            return token.header

    def answer(self, reply: Response, sent: str | None, scopes: Scopes) -> None:
        """Find what a 401 asks for, so that `header` gives it. Raises `UserError` if there is nothing else to send."""
        offered = list(challenges(reply.listed("WWW-Authenticate")))
        with self._lock:
            if sent != self._present(scopes):
                return  # another thread has been here
            bearer = next((offer for offer in offered if offer.scheme == "bearer"), None)
            if bearer is not None:
                self._challenge = bearer
                self._tokens[scopes] = self._fetch(bearer, scopes)
            elif any(offer.scheme == "basic" for offer in offered):
                self._basic = self._password(sent)
            else:
                raise UserError(f"{self._registry} wants a login of a kind that is not known here")

    def _present(self, scopes: Scopes) -> str | None:
        token = self._tokens.get(scopes)
        return self._basic or (token.header if token else None)

    def _password(self, sent: str | None) -> str:
        credential = self._own()
        if credential is None or not credential.user:
            raise UserError(f"{self._registry} wants a login; run 'podman login {self._registry}' or 'docker login'")
        if sent is not None:
            raise UserError(_refused(self._registry, credential))
        return credential.basic

    def _own(self) -> Credential | None:
        if not self._asked:
            self._credential = self._find()
            self._asked = True
        return self._credential

    def _fetch(self, challenge: Challenge, scopes: Scopes) -> Token:
        realm = challenge.parameters.get("realm", "")
        origin(realm)  # it must be an address, and a whole one
        credential = self._own()
        reply = self._ask(realm, challenge.parameters.get("service", ""), scopes, credential)
        with contextlib.closing(reply):
            if reply.status in (400, 401, 403):
                raise UserError(self._denied(realm, credential))
            if reply.status != 200:
                raise UserError(f"{host_of(realm)} gives no token for {self._registry} (status {reply.status})")
            return _token(reply.text(LARGEST_TOKEN), host_of(realm))

    def _ask(self, realm: str, service: str, scopes: Scopes, credential: Credential | None) -> Response:
        wanted = [("service", service)] if service else []
        if credential is not None and not credential.user:
            form = [*wanted, ("grant_type", "refresh_token"), ("client_id", CLIENT), ("scope", " ".join(scopes)),
                    ("refresh_token", credential.secret)]  # fmt: skip
            kind = {"Content-Type": "application/x-www-form-urlencoded"}
            return self._client.request("POST", realm, headers=kind, body=urllib.parse.urlencode(form).encode())
        query = urllib.parse.urlencode([*wanted, *(("scope", scope) for scope in scopes)])
        joint = "&" if urllib.parse.urlsplit(realm).query else "?"
        return self._client.request("GET", f"{realm}{joint}{query}", secret=credential.basic if credential else None)

    def _denied(self, realm: str, credential: Credential | None) -> str:
        if credential is None:
            return f"{self._registry} wants a login; run 'podman login {self._registry}' or 'docker login'"
        return _refused(host_of(realm), credential)


def _refused(host: str, credential: Credential) -> str:
    who = f"the login of {printable(credential.user)}" if credential.user else "the login"
    return f"{host} refuses {who} (from {credential.source}); log in again"


def _token(data: bytes, host: str) -> Token:
    try:
        answer = json.loads(data)
        text = answer.get("token") or answer.get("access_token")
        life = float(answer.get("expires_in") or DEFAULT_LIFE)
    except (ValueError, TypeError, AttributeError, RecursionError):
        text, life = None, 0.0
    if not isinstance(text, str) or not text or not text.isascii() or not text.isprintable():
        raise UserError(f"{host} answers with something else than a token")
    return Token(f"Bearer {text}", time.monotonic() + max(life - MARGIN, MARGIN))


def challenges(lines: list[str]) -> Iterator[Challenge]:
    """Give the challenges in WWW-Authenticate headers, of which one line may hold several."""
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
