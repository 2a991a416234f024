"""Fresh uppers: empty directories that look like the root they are laid over."""

import os

from overlayfs import sysio
from overlayfs.format import xattrs
from overlayfs.store import layout
from overlayfs.tree.workdir import drop_inherited_acls, remove_tree

_PATH = os.O_PATH | os.O_DIRECTORY


def make_upper(dirfd: int, name: bytes, like: int) -> None:
    """Make an empty directory with owner, mode, times and attributes of the open directory `like`.

    The root of a mount has the attributes of its topmost directory, so a new upper must not change them. Marks stay
    behind: nothing is below an opaque root, and an origin belongs to what was copied up.
    """
    sysio.mkdir_at(dirfd, name, 0o700)
    found = sysio.stat_at(like, b"")
    kept = [attribute for attribute in sysio.listxattr_at(like, b"") if not xattrs.is_private(attribute)]
    made = sysio.open_child(dirfd, name, _PATH)
    try:
        sysio.chown_at(made, b"", found.st_uid, found.st_gid)
        drop_inherited_acls(made, b"", kept)
        for attribute in kept:
            sysio.setxattr_at(made, b"", attribute, sysio.getxattr_at(like, b"", attribute))
        sysio.chmod_at(made, b"", found.st_mode & 0o7777)
        sysio.utimens_at(made, b"", found.st_atime_ns, found.st_mtime_ns)
    finally:
        sysio.close(made)


def make_pair(directory: int, upper: bytes, work: bytes, like: int) -> None:
    """Make an upper and its work directory in a workspace, durable; what has the names already is removed."""
    for name in (upper, work):
        remove_tree(directory, name)
    make_upper(directory, upper, like)
    sysio.mkdir_at(directory, work, 0o700)
    sysio.fsync(directory)


def renew(directory: int, like: int) -> None:
    """Give a workspace whose upper was taken the next one, made by `make_pair` or now. May be done again."""
    if not sysio.exists_at(directory, layout.UPPER):
        if not sysio.exists_at(directory, layout.NEXT_UPPER):
            make_pair(directory, layout.NEXT_UPPER, layout.NEXT_WORK, like)
        sysio.rename_at(directory, layout.NEXT_UPPER, directory, layout.UPPER)
    if sysio.exists_at(directory, layout.NEXT_WORK):
        remove_tree(directory, layout.WORK)
        sysio.rename_at(directory, layout.NEXT_WORK, directory, layout.WORK)
    sysio.fsync(directory)


def drop_next(directory: int) -> None:
    """Remove a next upper that is not needed; the present one is where it was."""
    for name in (layout.NEXT_UPPER, layout.NEXT_WORK):
        remove_tree(directory, name)
