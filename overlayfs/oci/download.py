"""Downloading a blob to a file, where it is complete and verified before anything reads it.

The file is named after the digest (`overlayfs.oci.staging`), so that a pull continues where an interrupted one stopped,
and two concurrent pulls download a blob once. What an earlier pull has left is hashed again, not trusted.
"""

import contextlib
import hashlib
import re
from collections.abc import Callable
from typing import Any

from overlayfs import sysio
from overlayfs.errors import UserError
from overlayfs.oci.http_client import PIECE, BrokenConnectionError, Response, RetryPolicy
from overlayfs.oci.image_spec import Descriptor
from overlayfs.oci.registry import Repository

_CONTENT_RANGE = re.compile(r"bytes ([0-9]+)-([0-9]+)/([0-9]+|\*)", re.ASCII)

Progress = Callable[[int], None]
"""`progress(bytes)` is called with how many bytes of the blob are in the file."""


class _PartialBlob:
    """The beginning of a blob in a file: `have` bytes, and their digest."""

    def __init__(self, fd: int, size: int, progress: Progress) -> None:
        self._fd = fd
        self._size = size
        self._progress = progress
        self.have = 0
        self._hash: Any = hashlib.sha256()

    def resume(self) -> None:
        """Hash what an earlier pull has left; a file that is larger than the blob is discarded."""
        if sysio.stat_at(self._fd, b"").st_size > self._size:
            self.restart()
        while piece := sysio.read_at(self._fd, self.have, PIECE):
            self._count(piece)

    def add(self, piece: bytes) -> None:
        """Append a piece."""
        sysio.write_at(self._fd, self.have, piece)
        self._count(piece)

    def _count(self, piece: bytes) -> None:
        self._hash.update(piece)
        self.have += len(piece)
        self._progress(self.have)

    def restart(self) -> None:
        """Discard the content of the file."""
        sysio.truncate_fd(self._fd, 0)
        self.have = 0
        self._hash = hashlib.sha256()
        self._progress(0)

    @property
    def digest(self) -> str:
        """The digest of what is in the file."""
        return "sha256:" + str(self._hash.hexdigest())


def fetch(repository: Repository, blob: Descriptor, fd: int, retry: RetryPolicy, progress: Progress) -> None:
    """Complete a file, which may hold the beginning of a blob already, and verify it. Raises `UserError`.

    After a broken connection the download continues where it stopped. A complete blob with the wrong digest is
    downloaded once more: its beginning may have been damaged on the disk, or the bytes in transit.
    """
    partial = _PartialBlob(fd, blob.size, progress)
    partial.resume()
    for _ in range(2):
        _complete(repository, blob, partial, retry)
        if partial.digest == blob.digest:
            return
        partial.restart()
    raise UserError(
        f"what the registry sends for blob {blob.digest} does not match this digest; nothing of it was stored"
    )


def _complete(repository: Repository, blob: Descriptor, partial: _PartialBlob, retry: RetryPolicy) -> None:
    failures = 0
    while partial.have < blob.size:
        before = partial.have
        try:
            _receive(repository, blob, partial)
        except BrokenConnectionError as error:
            failures = 1 if partial.have - before >= PIECE else failures + 1
            if failures >= retry.attempts:
                raise UserError(
                    f"the connection broke {failures} times at byte {partial.have} of blob {blob.digest} ({error}); "
                    "run the same pull again to continue from there"
                ) from None
            retry.backoff(failures - 1)


def _receive(repository: Repository, blob: Descriptor, partial: _PartialBlob) -> None:
    """Download what is missing, as far as one connection gets."""
    with contextlib.closing(repository.blob(blob.digest, partial.have)) as response:
        start = _start_of(response, partial.have)
        if start != partial.have:
            partial.restart()
        if start is None:
            raise BrokenConnectionError("the registry does not send the range that was requested")
        _check_announced(response, blob, partial.have)
        for piece in response.pieces():
            if partial.have + len(piece) > blob.size:
                partial.restart()
                raise UserError(
                    f"the registry sends more than the {blob.size} bytes that blob {blob.digest} should have"
                )
            partial.add(piece)
    if partial.have < blob.size:
        raise BrokenConnectionError("the response ended early")


def _start_of(response: Response, wanted: int) -> int | None:
    """Return the offset at which a response begins: 0 if the server ignores ranges, None if it is another range."""
    if response.status == 200:
        return 0
    found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
    return wanted if found is not None and int(found[1]) == wanted else None


def _check_announced(response: Response, blob: Descriptor, have: int) -> None:
    announced = response.headers.get("Content-Length", "")
    if announced.isascii() and announced.isdigit() and int(announced[:18]) != blob.size - have:
        raise UserError(
            f"the registry announces {have + int(announced[:18])} bytes for blob {blob.digest}, "
            f"which should have {blob.size}; nothing of it was stored"
        )
