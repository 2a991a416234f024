"""One repository of a registry, through the OCI distribution protocol (distribution-spec 1.1, docker-registry 2.8).

Manifests and configurations are checked against their digests before they are returned. Blobs of layers are returned
unchecked, as a stream: `overlayfs.oci.download` checks them.
"""

import contextlib
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
from overlayfs.oci.image_spec import INDEXES, LARGEST_DOCUMENT, MANIFESTS, Descriptor, digest_of, is_digest
from overlayfs.oci.reference import Reference

ACCEPT = ", ".join((*MANIFESTS, *INDEXES))
"""All four types: if only OCI types are accepted, docker-registry converts Docker images to schema 1."""

MAX_AUTH_ROUNDS = 3  # attempts of one request after a 401: a first login, an expired token, and no more


class FetchedManifest(NamedTuple):
    """The bytes of a manifest or an index as the registry sent them, with their digest."""

    media_type: str
    digest: str
    data: bytes


class BlobSource(NamedTuple):
    """A blob to upload: `size` bytes that `pieces()` yields from the beginning, once for each attempt."""

    digest: str
    size: int
    pieces: Callable[[], Iterator[bytes]]


class Repository:
    """One repository of a registry, shared by threads.

    `find` returns the credential for it and is called only when the registry asks for one. `push`: ask for tokens that
    allow writing. All methods raise `UserError` when the registry refuses or cannot be reached.
    """

    def __init__(
        self, client: HttpClient, reference: Reference, find: Callable[[], Credential | None], *, push: bool = False
    ) -> None:
        self._client = client
        self._reference = reference
        self._server = f"{client.scheme}://{reference.host}"
        self._base = f"{self._server}/v2/{reference.repository}"
        self._authorizer = Authorizer(client, reference.registry, find)
        self._scopes: Scopes = (f"repository:{reference.repository}:{'pull,push' if push else 'pull'}",)

    # --- reading ---------------------------------------------------------------------------------------

    def manifest(self, target: str) -> FetchedManifest:
        """Return the manifest or index of a tag or digest, checked against the digest where one is known."""
        url = f"{self._base}/manifests/{target}"
        what = f"{self._reference.name}{'@' if is_digest(target) else ':'}{target}"
        response, data = self._get_whole(url, what, {"Accept": ACCEPT}, LARGEST_DOCUMENT)
        digest = digest_of(data)
        header = response.headers.get("Docker-Content-Digest", "")
        expected = next(filter(is_digest, (target, header)), digest)
        if digest != expected:
            raise UserError(f"{what}: what the registry sent is not {printable(expected)}; nothing was stored")
        return FetchedManifest(response.headers.get("Content-Type", "").partition(";")[0].strip(), digest, data)

    def document(self, descriptor: Descriptor, what: str) -> bytes:
        """Return a small blob, such as a configuration, after checking its size and digest.

        `what` it is, for messages, such as "the configuration".
        """
        if descriptor.size > LARGEST_DOCUMENT:
            raise UserError(f"{what} of {self._reference} is larger than {LARGEST_DOCUMENT >> 20} MiB")
        for _ in range(2):  # damage in transit is gone at the second attempt
            data = self._get_whole(self._blob_url(descriptor.digest), what, {}, LARGEST_DOCUMENT)[1]
            if digest_of(data) == descriptor.digest and len(data) == descriptor.size:
                return data
        raise UserError(
            f"{what} of {self._reference} does not match its digest {descriptor.digest}; nothing was stored"
        )

    def blob(self, digest: str, start: int = 0) -> Response:
        """Request a blob from byte `start` on.

        Return a response of status 206 (it begins there), 200 (the registry ignores ranges: it begins at 0) or 416.
        """
        headers = {"Range": f"bytes={start}-"} if start else {}
        response = self._request("GET", self._blob_url(digest), headers=headers)
        if response.status not in (200, 206, 416):
            raise self._failure(response, f"blob {digest}")
        return response

    def has_blob(self, digest: str) -> bool:
        """Return whether the repository has a blob."""
        with contextlib.closing(self._request("HEAD", self._blob_url(digest))) as response:
            if response.status == 404:
                return False
            if response.status != 200:
                raise self._failure(response, f"blob {digest}")
            return True

    # --- writing ---------------------------------------------------------------------------------------

    def mount_blob(self, digest: str, other: str) -> bool:
        """Mount a blob from another repository of the same registry; return False where that is not possible.

        Source: distribution-spec, "Mounting a blob from another repository".
        """
        query = urllib.parse.urlencode({"mount": digest, "from": other})
        scopes = (*self._scopes, f"repository:{other}:pull")
        try:
            response = self._request("POST", f"{self._base}/blobs/uploads/?{query}", scopes=scopes)
        except UserError:  # no access to the other repository
            return False
        with contextlib.closing(response):
            if response.status == 202:
                self._abandon(response)
            return response.status == 201

    def upload(self, source: BlobSource) -> None:
        """Upload a blob; after a broken connection, start again from its beginning."""
        for attempt in range(self._client.retry.attempts):
            try:
                return self._upload(source)
            except BrokenConnectionError as error:
                last = error
            self._client.retry.backoff(attempt)
        raise UserError(f"cannot upload blob {source.digest} to {self._reference.name}: {last}; try again later")

    def _upload(self, source: BlobSource) -> None:
        """Upload with POST, then PUT, which every registry supports; chunked uploads differ between registries.

        The Location of the upload may be on another host, and may have a query already.
        """
        what = f"blob {source.digest}"
        with contextlib.closing(self._request("POST", f"{self._base}/blobs/uploads/")) as response:
            if response.status != 202:
                raise self._failure(response, what)
            location = self._upload_location(response)
        joint = "&" if urllib.parse.urlsplit(location).query else "?"
        url = f"{location}{joint}{urllib.parse.urlencode({'digest': source.digest})}"
        kind = {"Content-Type": "application/octet-stream"}
        body = Body(source.size, source.pieces)
        with contextlib.closing(self._request("PUT", url, headers=kind, body=body, retry_failures=False)) as response:
            if response.status in RETRY_STATUSES:
                raise BrokenConnectionError(f"status {response.status}")
            if response.status != 201:
                raise self._failure(response, what)

    def _upload_location(self, response: Response) -> str:
        location = response.headers.get("Location")
        if location is None:
            raise UserError(f"{self._reference.registry} accepts an upload but sends no Location for it")
        return self._client.resolve_location(response.url, location)

    def _abandon(self, response: Response) -> None:
        """Cancel an upload that the registry began instead of mounting; it would keep it for days."""
        with contextlib.suppress(UserError, BrokenConnectionError):
            self._request("DELETE", self._upload_location(response), retry_failures=False).close()

    def put_manifest(self, target: str, media_type: str, data: bytes) -> str:
        """Upload a manifest under a tag or its digest; return the digest, on which the registry must agree."""
        what = f"the manifest of {self._reference.name}:{target}"
        headers = {"Content-Type": media_type}
        response = self._request("PUT", f"{self._base}/manifests/{target}", headers=headers, body=data)
        with contextlib.closing(response):
            if response.status not in (200, 201, 202):
                raise self._failure(response, what)
            digest = digest_of(data)
            if (arrived := response.headers.get("Docker-Content-Digest", digest)) != digest:
                raise UserError(f"{what} has arrived as {printable(arrived)} instead of {digest}; push it again")
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
        retry_failures: bool = True,
    ) -> Response:
        """Send a request, authorized if it goes to the registry itself; only the registry may ask for a login."""
        to_registry = origin(url) == origin(self._server)
        wanted = scopes or self._scopes
        for _ in range(MAX_AUTH_ROUNDS):
            secret = self._authorizer.header(wanted) if to_registry else None
            response = self._client.request(
                method, url, headers=headers, body=body, secret=secret, retry_failures=retry_failures
            )
            if response.status != 401 or origin(response.url) != origin(self._server):
                return response
            response.close()
            self._authorizer.respond(response, secret, wanted)
        raise UserError(f"{self._reference.registry} does not accept the login that it asked for; log in again")

    def _get_whole(self, url: str, what: str, headers: dict[str, str], limit: int) -> tuple[Response, bytes]:
        for attempt in range(self._client.retry.attempts):
            response = self._request("GET", url, headers=headers)
            if response.status != 200:
                raise self._failure(response, what)
            try:
                return response, response.read_body(limit)
            except BrokenConnectionError as error:
                last = error
            self._client.retry.backoff(attempt)
        raise UserError(f"cannot read {what} from {self._reference.registry}: {last}; try again later")

    def _failure(self, response: Response, what: str) -> UserError:
        """Return the error for a response; `errors` in its body has the reason (distribution-spec, "Error Codes")."""
        message = _error_message(response)
        if response.status == 404:
            return UserError(f"{what} is not in {self._reference.registry}{message}")
        if response.status in (401, 403):
            return UserError(
                f"{self._reference.registry} does not allow access to {what}{message}; "
                f"log in as a user with access: 'podman login {self._reference.registry}'"
            )
        return UserError(f"{self._reference.registry} answers status {response.status} for {what}{message}")


def _error_message(response: Response) -> str:
    try:
        errors = json.loads(response.read_body())["errors"]
        text = "; ".join(str(error.get("message") or error.get("code")) for error in errors)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, UserError, BrokenConnectionError):
        return ""
    return f" ({printable(text)})" if text else ""
