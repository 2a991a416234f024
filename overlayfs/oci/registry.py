"""One repository of a registry, through the OCI distribution protocol (distribution-spec 1.1, docker-registry 2.8).

What comes is checked before it is given on: manifests and configurations against their digest, blobs of layers by who
writes them down (`overlayfs.oci.download`).
"""

import contextlib
import hashlib
import json
import urllib.parse
from collections.abc import Callable, Iterator
from typing import NamedTuple

from overlayfs.errors import UserError
from overlayfs.oci.auth_challenge import Authorizer, Scopes
from overlayfs.oci.credentials import Credential
from overlayfs.oci.http_client import (
    RETRY_STATUSES,
    Body,
    BrokenConnectionError,
    HttpClient,
    Response,
    origin,
    printable,
)
from overlayfs.oci.image_spec import INDEXES, LARGEST_DOCUMENT, MANIFESTS, Descriptor
from overlayfs.oci.reference import Reference, is_digest

ACCEPT = ", ".join((*MANIFESTS, *INDEXES))
"""All four: asked for OCI types alone, a registry turns Docker's images into those of schema 1."""

MAX_AUTH_ROUNDS = 3  # answers to a 401 for one request: a first login, an expired token, and no more


class FetchedManifest(NamedTuple):
    """A manifest or an index as the registry sent it; `digest` is that of `data`."""

    media_type: str
    digest: str
    data: bytes


class BlobSource(NamedTuple):
    """A blob to upload, which may be read several times, each time from its beginning."""

    digest: str
    size: int
    pieces: Callable[[], Iterator[bytes]]


class Repository:
    """One repository, shared by threads; `push` says whether logins must allow to write."""

    def __init__(
        self, client: HttpClient, reference: Reference, find: Callable[[], Credential | None], *, push: bool = False
    ) -> None:
        self._client = client
        self._reference = reference
        self._server = f"{client.scheme}://{reference.host}"
        self._base = f"{self._server}/v2/{reference.repository}"
        self._login = Authorizer(client, reference.registry, find)
        self._scopes: Scopes = (f"repository:{reference.repository}:{'pull,push' if push else 'pull'}",)

    # --- reading ---------------------------------------------------------------------------------------

    def manifest(self, target: str) -> FetchedManifest:
        """Return the manifest or index behind a tag or digest. Raises `UserError` where there is none."""
        url = f"{self._base}/manifests/{target}"
        what = f"{self._reference.name}{'@' if is_digest(target) else ':'}{target}"
        reply, data = self._whole(url, what, {"Accept": ACCEPT}, LARGEST_DOCUMENT)
        digest = sha256(data)
        header = reply.headers.get("Docker-Content-Digest", "")
        told = next(filter(is_digest, (target, header)), digest)
        if digest != told:
            raise UserError(f"{what}: the registry sent something else than {printable(told)}; nothing was stored")
        return FetchedManifest(reply.headers.get("Content-Type", "").partition(";")[0].strip(), digest, data)

    def document(self, descriptor: Descriptor, what: str) -> bytes:
        """Return a small blob, such as a configuration, after checking its size and digest."""
        if descriptor.size > LARGEST_DOCUMENT:
            raise UserError(f"{what} of {self._reference} is larger than {LARGEST_DOCUMENT >> 20} MiB")
        for _ in range(2):  # what was damaged on the way is whole the second time
            data = self._whole(self._blob_url(descriptor.digest), what, {}, LARGEST_DOCUMENT)[1]
            if sha256(data) == descriptor.digest and len(data) == descriptor.size:
                return data
        raise UserError(
            f"{what} of {self._reference} does not match its digest {descriptor.digest}; nothing was stored"
        )

    def blob(self, digest: str, start: int = 0) -> Response:
        """Ask for a blob from byte `start`; the answer may begin there (206) or, if it pleases, at 0 (200)."""
        headers = {"Range": f"bytes={start}-"} if start else {}
        reply = self._request("GET", self._blob_url(digest), headers=headers)
        if reply.status not in (200, 206, 416):
            raise self._failure(reply, f"blob {digest}")
        return reply

    def has(self, digest: str) -> bool:
        """Whether the repository has a blob."""
        with contextlib.closing(self._request("HEAD", self._blob_url(digest))) as reply:
            if reply.status == 404:
                return False
            if reply.status != 200:
                raise self._failure(reply, f"blob {digest}")
            return True

    # --- writing ---------------------------------------------------------------------------------------

    def mount(self, digest: str, other: str) -> bool:
        """Take a blob over from another repository of the same registry; False where that is not possible."""
        query = urllib.parse.urlencode({"mount": digest, "from": other})
        scopes = (*self._scopes, f"repository:{other}:pull")
        try:
            reply = self._request("POST", f"{self._base}/blobs/uploads/?{query}", scopes=scopes)
        except UserError:  # no login for the other repository
            return False
        with contextlib.closing(reply):
            if reply.status == 202:
                self._abandon(reply)
            return reply.status == 201

    def upload(self, source: BlobSource) -> None:
        """Send a blob; a broken connection makes it start again."""
        for attempt in range(self._client.retry.attempts):
            try:
                return self._upload(source)
            except BrokenConnectionError as error:
                last = error
            self._client.retry.pause(attempt)
        raise UserError(f"cannot upload blob {source.digest} to {self._reference.name}: {last}; try again later")

    def _upload(self, source: BlobSource) -> None:
        """POST for a place, PUT the whole: what every registry takes. A Location may be anywhere and have a query."""
        what = f"blob {source.digest}"
        with contextlib.closing(self._request("POST", f"{self._base}/blobs/uploads/")) as reply:
            if reply.status != 202:
                raise self._failure(reply, what)
            place = self._place(reply)
        joint = "&" if urllib.parse.urlsplit(place).query else "?"
        url = f"{place}{joint}{urllib.parse.urlencode({'digest': source.digest})}"
        kind = {"Content-Type": "application/octet-stream"}
        body = Body(source.size, source.pieces)
        with contextlib.closing(self._request("PUT", url, headers=kind, body=body, again=False)) as reply:
            if reply.status in RETRY_STATUSES:
                raise BrokenConnectionError(f"status {reply.status}")
            if reply.status != 201:
                raise self._failure(reply, what)

    def _place(self, reply: Response) -> str:
        location = reply.headers.get("Location")
        if location is None:
            raise UserError(f"{self._reference.registry} takes an upload but does not say where")
        return self._client.joined(reply.url, location)

    def _abandon(self, reply: Response) -> None:
        """The registry began an upload instead of mounting; unfinished uploads would stay with it for days."""
        with contextlib.suppress(UserError, BrokenConnectionError):
            self._request("DELETE", self._place(reply), again=False).close()

    def put_manifest(self, target: str, media_type: str, data: bytes) -> str:
        """Put a manifest under a tag or its digest; returns the digest, which the registry must have found too."""
        what = f"the manifest of {self._reference.name}:{target}"
        headers = {"Content-Type": media_type}
        reply = self._request("PUT", f"{self._base}/manifests/{target}", headers=headers, body=data)
        with contextlib.closing(reply):
            if reply.status not in (200, 201, 202):
                raise self._failure(reply, what)
            digest = sha256(data)
            if (told := reply.headers.get("Docker-Content-Digest", digest)) != digest:
                raise UserError(f"{what} has arrived as {printable(told)} instead of {digest}; push it again")
            return digest

    # --- requests --------------------------------------------------------------------------------------

    def _blob_url(self, digest: str) -> str:
        return f"{self._base}/blobs/{digest}"

    def _request(
        self,
        method: str,
        url: str,
        *,
        headers: dict[str, str] | None = None,
        body: Body | bytes = b"",
        scopes: Scopes | None = None,
        again: bool = True,
    ) -> Response:
        """Send a request with what the registry wants to see; only the registry itself sees it, and may ask for it."""
        ours = origin(url) == origin(self._server)
        wanted = scopes or self._scopes
        for _ in range(MAX_AUTH_ROUNDS):
            secret = self._login.header(wanted) if ours else None
            reply = self._client.request(method, url, headers=headers, body=body, secret=secret, again=again)
            if reply.status != 401 or origin(reply.url) != origin(self._server):
                return reply
            reply.close()
            self._login.answer(reply, secret, wanted)
        raise UserError(f"{self._reference.registry} does not accept the login it has asked for; log in again")

    def _whole(self, url: str, what: str, headers: dict[str, str], limit: int) -> tuple[Response, bytes]:
        for attempt in range(self._client.retry.attempts):
            reply = self._request("GET", url, headers=headers)
            if reply.status != 200:
                raise self._failure(reply, what)
            try:
                return reply, reply.text(limit)
            except BrokenConnectionError as error:
                last = error
            self._client.retry.pause(attempt)
        raise UserError(f"cannot read {what} from {self._reference.registry}: {last}; try again later")

    def _failure(self, reply: Response, what: str) -> UserError:
        """The sentence for a refusal; `errors` in its body say why (distribution-spec, "Error Codes")."""
        message = _message(reply)
        if reply.status == 404:
            return UserError(f"{what} is not in {self._reference.registry}{message}")
        if reply.status in (401, 403):
            return UserError(
                f"{self._reference.registry} does not allow access to {what}{message}; "
                f"log in as somebody who may: 'podman login {self._reference.registry}'"
            )
        return UserError(f"{self._reference.registry} answers status {reply.status} for {what}{message}")


def sha256(data: bytes) -> str:
    """Return the digest of data as descriptors spell it."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _message(reply: Response) -> str:
    try:
        errors = json.loads(reply.text())["errors"]
        text = "; ".join(str(error.get("message") or error.get("code")) for error in errors)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, UserError, BrokenConnectionError):
        return ""
    return f" ({printable(text)})" if text else ""
