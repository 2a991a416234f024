"""An archive of files, such as an image as one file, in which any member is read at once: where each one lies."""

import os
from typing import NamedTuple

from overlayfs import sysio
from overlayfs.oci.streams import PIECE, Read
from overlayfs.oci.tar_entry import ArchiveError, Kind, shown
from overlayfs.oci.tar_reader import TarReader

_MOST = 100_000  # members: an image has a few for each layer
_MOST_LINKS = 8


class _Place(NamedTuple):
    offset: int
    size: int


class TarIndex:
    """The regular files in the plain tar archive behind `fd`, which stays the caller's and can be read anywhere."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._places: dict[bytes, _Place] = {}
        self._links: dict[bytes, bytes] = {}
        self._scan()

    def __contains__(self, name: bytes) -> bool:
        return self._resolve(name) in self._places

    def size(self, name: bytes) -> int:
        """Return the size of a member; ArchiveError when there is none."""
        return self._place(name).size

    def stream(self, name: bytes) -> Read:
        """Return a member as a stream; ArchiveError when there is none."""
        place = self._place(name)
        return stream_of(self._fd, place.offset, place.size)

    def _place(self, name: bytes) -> _Place:
        place = self._places.get(self._resolve(name))
        if place is None:
            raise ArchiveError(f"it has no {shown(name)}")
        return place

    def _resolve(self, name: bytes) -> bytes:
        """Follow links among the members: docker saves equal layers once."""
        for _ in range(_MOST_LINKS):
            target = self._links.get(name)
            if target is None:
                break
            name = target
        return name

    def _scan(self) -> None:
        at = 0
        size = sysio.stat_at(self._fd, b"").st_size

        def read(most: int) -> bytes:
            nonlocal at
            data = sysio.read_at(self._fd, at, min(most, 1 << 16))
            at += len(data)
            return data

        def skip(length: int) -> None:
            nonlocal at
            at += length

        reader = TarReader(read, skip)
        for entry in reader:
            if entry.kind is Kind.FILE and entry.extents is None:
                if reader.position + entry.size > size:
                    raise ArchiveError("the archive ends too early: it is not complete")
                self._places[entry.path] = _Place(reader.position, entry.size)
            elif entry.kind is Kind.HARDLINK:
                self._links[entry.path] = entry.target
            elif entry.kind is Kind.SYMLINK:
                self._links[entry.path] = os.path.normpath(os.path.join(os.path.dirname(entry.path), entry.target))
            if len(self._places) + len(self._links) > _MOST:
                raise ArchiveError("the archive has too many members for an image")


def stream_of(fd: int, offset: int, size: int) -> Read:
    """Return a part of an open file as a stream."""
    at, end = offset, offset + size

    def read(most: int) -> bytes:
        nonlocal at
        data = sysio.read_at(fd, at, min(most, end - at, PIECE))
        at += len(data)
        return data

    return read
