"""A tree that must not change while hostile layers are handled beside it, and must not be seen through them."""

import hashlib
import os
import secrets
import stat
from pathlib import Path

from tests.support.builder import Print, build, fingerprint
from tests.support.spec import Dir, File, Link, Special, Symlink

_CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")


class Canary:
    """The tree at `path`; `secret` is the content of its files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.secret = secrets.token_hex(16).encode()
        path.mkdir()
        build(path, Dir(self._content(), mode=0o1777))

    def _content(self) -> dict[str, Dir | File | Link | Special | Symlink | bytes]:
        shadow = File(self.secret, mode=0o600, xattrs={"user.secret": self.secret, "trusted.overlay.redirect": b"/t"})
        suid = File(b"su" + self.secret, mode=0o4755, xattrs={"security.capability": _CAPABILITY})
        return {
            "etc": Dir({"shadow": shadow, "passwd": File(self.secret, uid=7, gid=8), "empty": {}}, mode=0o2755),
            "bin": Dir({"su": suid, "again": Link("bin/su")}, mode=0o700),
            "fifo": Special("p"),
            "link": Symlink("etc/shadow"),
        }

    def picture(self) -> tuple[dict[bytes, Print], dict[bytes, bytes]]:
        """Return all attributes and a digest of all content, without changing access times."""
        found = fingerprint(self.path)
        return found, {path: _digest(path) for path in found if path and stat.S_ISREG(os.lstat(path).st_mode)}


def _digest(path: bytes) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NOATIME | os.O_NOFOLLOW)
    try:
        return hashlib.sha256(os.read(fd, 1 << 20)).digest()
    finally:
        os.close(fd)
