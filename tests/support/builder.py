"""Builds the layers that tests specify, and fingerprints that show whether they were changed."""

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from tests.support.spec import Dir, Entry, File, Link, Meta, Special, Symlink, Tree, Whiteout, entry

OPAQUE_XATTR = {"trusted": "trusted.overlay.opaque", "user": "user.overlay.opaque", "fuse": "user.fuseoverlayfs.opaque"}
OPAQUE_FILE = ".wh..wh..opq"
SPECIAL_TYPES = {"p": stat.S_IFIFO, "s": stat.S_IFSOCK, "c": stat.S_IFCHR, "b": stat.S_IFBLK}


def build(root: Path, tree: Tree | Dir) -> None:
    """Make the tree in the existing directory `root`; links last, times of directories after their content."""
    links: list[tuple[Path, str]] = []
    top = tree if isinstance(tree, Dir) else Dir(tree, mode=0o755)
    _fill(root, top, links)
    for path, target in links:
        times = os.lstat(path.parent)
        os.link(root / target, path, follow_symlinks=False)
        os.utime(path.parent, ns=(times.st_atime_ns, times.st_mtime_ns))


def _fill(path: Path, directory: Dir, links: list[tuple[Path, str]]) -> None:
    if directory.opaque == "file":
        (path / OPAQUE_FILE).touch()
    elif directory.opaque is not None:
        os.setxattr(path, OPAQUE_XATTR[directory.opaque], b"y")
    for name, short in directory.children.items():
        _make(path / name, entry(short), links)
    _finish(path, directory, 0o755)


def _make(path: Path, found: Entry, links: list[tuple[Path, str]]) -> None:
    match found:
        case Dir():
            path.mkdir()
            _fill(path, found, links)
        case File():
            write_file(path, found)
            _finish(path, found, 0o644)
        case Symlink():
            os.symlink(found.target, path)
            _finish(path, found, None)
        case Special():
            _make_special(path, found)
            _finish(path, found, 0o644)
        case Link():
            links.append((path, found.to))
        case Whiteout():
            make_whiteout(path, found)


def write_file(path: Path, file: File) -> None:
    """Write data and pieces, leaving holes between them."""
    pieces = file.pieces or ((0, file.data),)
    with open(path, "wb", buffering=0) as stream:
        for offset, data in pieces:
            os.pwrite(stream.fileno(), data, offset)
        if file.size is not None:
            os.truncate(stream.fileno(), file.size)


def _make_special(path: Path, special: Special) -> None:
    os.mknod(path, 0o644 | SPECIAL_TYPES[special.kind], os.makedev(special.major, special.minor))


def make_whiteout(path: Path, whiteout: Whiteout) -> None:
    """Make a whiteout of the given form that hides `path`."""
    if whiteout.form == "device":
        os.mknod(path, stat.S_IFCHR, os.makedev(0, 0))
    elif whiteout.form == "file":
        path.with_name(".wh." + path.name).touch(0o600)
    else:
        path.touch(0o600)
        os.setxattr(path, "trusted.overlay.whiteout", b"")


def _finish(path: Path, meta: Meta, usual_mode: int | None) -> None:
    os.chown(path, meta.uid, meta.gid, follow_symlinks=False)
    mode = usual_mode if meta.mode is None else meta.mode
    if usual_mode is not None and mode is not None:
        os.chmod(path, mode)
    _set_xattrs(path, meta.xattrs)
    os.utime(path, ns=(meta.atime_ns, meta.mtime_ns), follow_symlinks=False)


def _set_xattrs(path: Path, xattrs: Mapping[str, bytes]) -> None:
    for name, value in xattrs.items():
        os.setxattr(path, name, value, follow_symlinks=False)


Print = tuple[int, int, int, int, int, int, int, int]


def fingerprint(root: Path) -> dict[bytes, Print]:
    """Return the attributes of every object that show a change, including access and change times."""
    prints = {b"": _print(os.lstat(root))}
    for where, directories, files, fd in os.fwalk(os.fsencode(root)):
        for name in directories + files:
            prints[os.path.join(where, name)] = _print(os.lstat(name, dir_fd=fd))
    return prints


def _print(found: os.stat_result) -> Print:
    access = 0 if stat.S_ISDIR(found.st_mode) or stat.S_ISLNK(found.st_mode) else found.st_atime_ns
    owner = found.st_uid, found.st_gid
    return found.st_ino, found.st_mode, found.st_nlink, *owner, found.st_size, found.st_ctime_ns, access
