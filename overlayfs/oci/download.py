"""Blobs on their way in: on the disk, whole and checked, before anything reads them.

The file is named after the digest, so that a pull that was cut short is gone on with by the next one, and so that two
pulls at once do not load the same blob twice. What an earlier run has left is hashed again before it is believed.
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

Report = Callable[[int], None]
"""Told how many bytes of a blob are here."""


class _Partial:
    """The beginning of a blob in a file, and the hash of just that."""

    def __init__(self, fd: int, size: int, report: Report) -> None:
        self._fd = fd
        self._size = size
        self._report = report
        self.have = 0
        self._hash: Any = hashlib.sha256()

    def take_up(self) -> None:
        """Hash what an earlier run has left; more than the whole is worth nothing."""
        if sysio.stat_at(self._fd, b"").st_size > self._size:
            self.drop()
        while piece := sysio.read_at(self._fd, self.have, PIECE):
            self._count(piece)

    def add(self, piece: bytes) -> None:
        """Put one more piece behind the others."""
        sysio.write_at(self._fd, self.have, piece)
        self._count(piece)

    def _count(self, piece: bytes) -> None:
        self._hash.update(piece)
        self.have += len(piece)
        self._report(self.have)

    def drop(self) -> None:
        """Begin again."""
        sysio.truncate_fd(self._fd, 0)
        self.have = 0
        self._hash = hashlib.sha256()
        self._report(0)

    @property
    def digest(self) -> str:
        """The digest of what is here."""
        return "sha256:" + str(self._hash.hexdigest())


def fetch(repository: Repository, blob: Descriptor, fd: int, retry: RetryPolicy, report: Report) -> None:
    """Make a file the whole blob, whatever of it is there already. Raises `UserError` when that cannot be done.

    A broken connection is taken up where it broke. A blob that is whole and wrong is loaded once more: the beginning
    may have been damaged on the disk, or the bytes on their way.
    """
    partial = _Partial(fd, blob.size, report)
    partial.take_up()
    for _ in range(2):
        _complete(repository, blob, partial, retry)
        if partial.digest == blob.digest:
            return
        partial.drop()
    raise UserError(
        f"what the registry sends for blob {blob.digest} does not match this digest; nothing of it was stored"
    )


def _complete(repository: Repository, blob: Descriptor, partial: _Partial, retry: RetryPolicy) -> None:
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
                    "run the same pull again, it goes on from there"
                ) from None
            retry.pause(failures - 1)


def _receive(repository: Repository, blob: Descriptor, partial: _Partial) -> None:
    """Load what is missing, as far as one connection brings it."""
    with contextlib.closing(repository.blob(blob.digest, partial.have)) as reply:
        start = _start_of(reply, partial.have)
        if start != partial.have:
            partial.drop()
        if start is None:
            raise BrokenConnectionError("the registry does not send the part that was asked for")
        _check_announced(reply, blob, partial.have)
        for piece in reply.pieces():
            if partial.have + len(piece) > blob.size:
                partial.drop()
                raise UserError(
                    f"the registry sends more than the {blob.size} bytes that blob {blob.digest} should have"
                )
            partial.add(piece)
    if partial.have < blob.size:
        raise BrokenConnectionError("it ended early")


def _start_of(reply: Response, wanted: int) -> int | None:
    """Return at which byte the answer begins: 0 for a server that does not know ranges, None where it is of no use."""
    if reply.status == 200:
        return 0
    found = _CONTENT_RANGE.fullmatch(reply.headers.get("Content-Range", "").strip())
    return wanted if found is not None and int(found[1]) == wanted else None


def _check_announced(reply: Response, blob: Descriptor, have: int) -> None:
    announced = reply.headers.get("Content-Length", "")
    if announced.isascii() and announced.isdigit() and int(announced[:18]) != blob.size - have:
        raise UserError(
            f"the registry announces {have + int(announced[:18])} bytes for blob {blob.digest}, "
            f"which should have {blob.size}; nothing of it was stored"
        )
