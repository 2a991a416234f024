"""Finding the credentials that podman, skopeo and docker have saved for a registry. Nothing is ever written.

The files and their order are those of containers-auth.json(5): if `$REGISTRY_AUTH_FILE` is set, only that one; else
`$XDG_RUNTIME_DIR/containers/auth.json` (`/run/containers/UID/auth.json` without that variable),
`~/.config/containers/auth.json` and `~/.docker/config.json`. Within a file, a credential helper for the registry comes
first, then the entry for the longest prefix of REGISTRY/REPO, then docker's general credential helper.
"""

import base64
import binascii
import dataclasses
import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

from overlayfs.errors import UserError
from overlayfs.oci.reference import DOCKER_HUB, Reference

HUB_KEY = "https://index.docker.io/v1/"  # docker's name for Docker Hub in its file and for its helpers
TOKEN_USER = "<token>"  # a user name that means: the secret is an identity token, not a password
NOT_FOUND = "credentials not found"  # the only difference to other failures of a helper, whose exit code is always 1
HELPER_TIMEOUT = 60.0  # seconds; a helper may ask its user to unlock a key ring
LARGEST_FILE = 1 << 20

_HELPER_NAME = re.compile(r"[A-Za-z0-9._-]+", re.ASCII)


@dataclasses.dataclass(frozen=True, slots=True)
class Credential:
    """A user and a password, or an identity token if `user` is empty; `source` is where it was found, for messages."""

    user: str
    secret: str = dataclasses.field(repr=False)
    source: str

    @property
    def basic(self) -> str:
        """The value of the Authorization header for HTTP basic authentication (RFC 7617)."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.secret}".encode()).decode()


def find(reference: Reference, environ: Mapping[str, str] | None = None) -> Credential | None:
    """Return the credential for a repository, None if there is none.

    Raises `UserError` for a file that cannot be read, or a credential helper that fails. `environ` replaces the
    environment in tests.
    """
    for path in _files(os.environ if environ is None else environ):
        document = _read(path)
        if document is not None and (found := _in_document(document, path, reference)) is not None:
            return found
    return None


def _files(environ: Mapping[str, str]) -> Iterator[str]:
    if chosen := environ.get("REGISTRY_AUTH_FILE"):
        if not os.path.exists(chosen):
            raise UserError(f"{chosen}: no such file; REGISTRY_AUTH_FILE names it")
        yield chosen
        return
    home = environ.get("HOME") or os.path.expanduser("~")
    runtime = environ.get("XDG_RUNTIME_DIR")
    yield f"{runtime}/containers/auth.json" if runtime else f"/run/containers/{os.geteuid()}/auth.json"
    yield os.path.join(environ.get("XDG_CONFIG_HOME") or f"{home}/.config", "containers/auth.json")
    yield os.path.join(environ.get("DOCKER_CONFIG") or f"{home}/.docker", "config.json")


def _read(path: str) -> dict[str, Any] | None:
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST_FILE)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"cannot read the credentials in {path}: {error.strerror}") from None
    try:
        document = json.loads(data) if data.strip() else {}
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise UserError(f"{path} is not a credentials file; repair it, or name another one in REGISTRY_AUTH_FILE")
    return document


def _in_document(document: dict[str, Any], path: str, reference: Reference) -> Credential | None:
    helpers = _table(document, "credHelpers", path)
    for key in _spellings(reference.registry):
        if name := helpers.get(key):
            return _ask_helper(str(name), key, path)
    if found := _entry(_table(document, "auths", path), path, reference):
        return found
    if general := document.get("credsStore"):
        return _ask_helper(str(general), _spellings(reference.registry)[-1], path)
    return None


def _table(document: dict[str, Any], key: str, path: str) -> dict[str, Any]:
    table = document.get(key) or {}
    if not isinstance(table, dict):
        raise UserError(f"{path}: {key} must be an object; repair the file, or log in again")
    return table


def _spellings(registry: str) -> tuple[str, ...]:
    """Return the names under which a registry may be listed; docker passes the last one to its helpers."""
    return (*DOCKER_HUB, HUB_KEY) if registry in DOCKER_HUB else (registry,)


def _entry(auths: dict[str, Any], path: str, reference: Reference) -> Credential | None:
    """Return the credential of the longest matching prefix.

    docker used to write keys as URLs, whose path means nothing; keys in podman's form take precedence.
    """
    urls = {_host_of_url(key): value for key, value in auths.items() if "://" in key}
    known = {**urls, **auths}
    for key in _prefixes(reference):
        value = known.get(key)
        if isinstance(value, dict) and (found := _decoded(value, f"{path}, entry {key}")) is not None:
            return found
    return None


def _host_of_url(key: str) -> str:
    return key.partition("://")[2].partition("/")[0]


def _prefixes(reference: Reference) -> Iterator[str]:
    """Yield REGISTRY/A/B/C, then REGISTRY/A/B, and finally REGISTRY, in each spelling."""
    parts = reference.repository.split("/")
    for count in range(len(parts), -1, -1):
        for registry in _spellings(reference.registry):
            yield "/".join((registry, *parts[:count]))


def _decoded(value: dict[str, Any], source: str) -> Credential | None:
    token, auth = value.get("identitytoken"), value.get("auth")
    if isinstance(token, str) and token:
        return Credential("", token, source)
    if not isinstance(auth, str) or not auth:
        return None
    try:
        user, colon, secret = base64.b64decode(auth, validate=True).decode().partition(":")
    except (binascii.Error, ValueError):
        colon = ""
    if not colon:
        raise UserError(f"{source}: the credential cannot be decoded; log in again")
    return Credential(user, secret.rstrip("\0"), source)


def _ask_helper(name: str, registry: str, path: str) -> Credential | None:
    """Run a credential helper, which reads a registry and writes JSON (docker/docker-credential-helpers)."""
    program = f"docker-credential-{name}"
    if not _HELPER_NAME.fullmatch(name):
        raise UserError(f"{path}: {name!r} is not the name of a credential helper")
    try:
        done = subprocess.run(
            [program, "get"], input=registry.encode(), capture_output=True, timeout=HELPER_TIMEOUT, check=False
        )
    except FileNotFoundError:
        raise UserError(f"{path} names the credential helper {program}, which is not on the PATH") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"the credential helper {program} does not answer: {type(error).__name__}") from None
    if done.returncode:
        if NOT_FOUND in done.stdout.decode(errors="replace"):
            return None
        raise UserError(f"the credential helper {program} failed with exit code {done.returncode}; run it by hand")
    return _helper_answer(done.stdout, program)


def _helper_answer(data: bytes, program: str) -> Credential:
    try:
        answer = json.loads(data)
        user, secret = answer["Username"], answer["Secret"]
    except (ValueError, TypeError, KeyError, RecursionError):
        user = secret = None
    if not isinstance(user, str) or not isinstance(secret, str):
        raise UserError(f"the credential helper {program} does not answer with a credential")
    return Credential("" if user == TOKEN_USER else user, secret, program)
