"""Random access to the files in a tar archive, such as an image in one file, by an index of their offsets."""

import os
from typing import NamedTuple

from overlayfs import sysio
from overlayfs.oci.streams import PIECE, Read
from overlayfs.oci.tar_entry import ArchiveError, Kind, shown
from overlayfs.oci.tar_reader import TarReader

_MAX_FILES = 100_000  # an image has a few for each layer
_MAX_LINKS = 8


class _Extent(NamedTuple):
    offset: int
    size: int


class TarIndex:
    """The regular files in an uncompressed tar archive: implements `image_layouts.LayoutFiles`.

    `fd` must be seekable and stays the caller's. Raises `ArchiveError` for a damaged or incomplete archive.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._extents: dict[bytes, _Extent] = {}
        self._links: dict[bytes, bytes] = {}
        self._scan()

    def __contains__(self, name: bytes) -> bool:
        return self._resolve(name) in self._extents

    def size(self, name: bytes) -> int:
        """Return the size of a file in bytes. Raises `ArchiveError` if there is none with this name."""
        return self._extent(name).size

    def stream(self, name: bytes) -> Read:
        """Return a stream of a file. Raises `ArchiveError` if there is none with this name."""
        extent = self._extent(name)
        return extent_stream(self._fd, extent.offset, extent.size)

    def _extent(self, name: bytes) -> _Extent:
        extent = self._extents.get(self._resolve(name))
        if extent is None:
            raise ArchiveError(f"it has no {shown(name)}")
        return extent

    def _resolve(self, name: bytes) -> bytes:
        """Follow links between files: docker saves equal layers once."""
        for _ in range(_MAX_LINKS):
            target = self._links.get(name)
            if target is None:
                break
            name = target
        return name

    def _scan(self) -> None:
        at = 0
        size = sysio.stat_at(self._fd, b"").st_size

        def read(limit: int) -> bytes:
            nonlocal at
            data = sysio.read_at(self._fd, at, min(limit, 1 << 16))
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
                self._extents[entry.path] = _Extent(reader.position, entry.size)
            elif entry.kind is Kind.HARDLINK:
                self._links[entry.path] = entry.target
            elif entry.kind is Kind.SYMLINK:
                self._links[entry.path] = os.path.normpath(os.path.join(os.path.dirname(entry.path), entry.target))
            if len(self._extents) + len(self._links) > _MAX_FILES:
                raise ArchiveError("the archive has too many files for an image")


def extent_stream(fd: int, offset: int, size: int) -> Read:
    """Return a stream of `size` bytes of a file from an offset on."""
    at, end = offset, offset + size

    def read(limit: int) -> bytes:
        nonlocal at
        data = sysio.read_at(fd, at, min(limit, end - at, PIECE))
        at += len(data)
        return data

    return read
