"""The oracle: a union tree is a tree of dicts, and a file is an object that several names may share."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from errno import EEXIST, EINVAL, EISDIR, ELOOP, ENODATA, ENOENT, ENOTDIR, ENOTEMPTY, EPERM
from typing import NamedTuple, NoReturn

from tests.support.spec import Dir, File, Link, Special, Symlink, entry
from tests.support.spec import Tree as Spec
from tests.support.syscalls import EXCHANGE, NOREPLACE


@dataclass(eq=False)
class Item:
    """Anything but a directory: `kind` is "file", "symlink" or "fifo"; a symlink's data is its target."""

    kind: str
    data: bytes = b""
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime_ns: int | None = None
    xattrs: dict[str, bytes] = field(default_factory=dict)


@dataclass(eq=False)
class Folder:
    """A directory."""

    entries: dict[str, "Item | Folder"] = field(default_factory=dict)
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    mtime_ns: int | None = None
    xattrs: dict[str, bytes] = field(default_factory=dict)


Thing = Item | Folder


class Shown(NamedTuple):
    """What a tree shows of a thing; `kind` is "dir" or that of the item, `data` None for directories."""

    kind: str
    mode: int
    uid: int
    gid: int
    data: bytes | None
    mtime_ns: int | None
    xattrs: tuple[tuple[str, bytes], ...]


def fail(errno: int) -> NoReturn:
    """Raise the error that the tree must raise."""
    raise OSError(errno, os.strerror(errno))


def parts(path: str) -> list[str]:
    """The names of a path; none for the root."""
    return [name for name in path.split("/") if name]


class Model:
    """The operations of a tree, on dicts. Files that were changed have no known mtime (None)."""

    def __init__(self, spec: Spec) -> None:
        self.root = Folder(mode=0o755)
        links: list[tuple[Folder, str, str]] = []
        _fill(self.root, spec, links)
        for folder, name, target in links:
            folder.entries[name] = self.find(target)

    # Walking

    def find(self, path: str) -> Thing:
        thing: Thing = self.root
        for name in parts(path):
            thing = self._child(thing, name)
        return thing

    def _child(self, thing: Thing, name: str) -> Thing:
        if isinstance(thing, Item):
            fail(ELOOP if thing.kind == "symlink" else ENOTDIR)
        if name not in thing.entries:
            fail(ENOENT)
        return thing.entries[name]

    def _parent(self, path: str) -> tuple[Folder, str]:
        *above, name = parts(path)
        folder = self.find("/".join(above))
        if isinstance(folder, Item):
            fail(ELOOP if folder.kind == "symlink" else ENOTDIR)
        return folder, name

    def _file(self, path: str) -> Item:
        item = self.find(path)
        if isinstance(item, Folder):
            fail(EISDIR)
        return item

    # Making

    def _make(self, path: str, thing: Thing) -> None:
        """Add something new: a setgid directory passes on its group, and to directories the bit as well."""
        folder = self._add(path, thing)
        if folder.mode & 0o2000:
            thing.gid = folder.gid
            thing.mode |= 0o2000 if isinstance(thing, Folder) else 0

    def _add(self, path: str, thing: Thing) -> Folder:
        folder, name = self._parent(path)
        if name in folder.entries:
            fail(EEXIST)
        folder.entries[name] = thing
        folder.mtime_ns = None
        return folder

    def create(self, path: str, data: bytes, mode: int) -> Item:
        item = Item("file", data, mode)
        self._make(path, item)
        return item

    def mkdir(self, path: str, mode: int) -> None:
        self._make(path, Folder(mode=mode))

    def symlink(self, target: str, path: str) -> None:
        self._make(path, Item("symlink", target.encode(), 0o777))

    def mkfifo(self, path: str, mode: int) -> None:
        self._make(path, Item("fifo", b"", mode))

    def link(self, old: str, new: str) -> None:
        item = self.find(old)
        folder, name = self._parent(new)
        if name in folder.entries:
            fail(EEXIST)
        if isinstance(item, Folder):
            fail(EPERM)
        self._add(new, item)

    # Removing and moving

    def unlink(self, path: str) -> None:
        folder, name = self._parent(path)
        self._file(path)
        del folder.entries[name]
        folder.mtime_ns = None

    def rmdir(self, path: str) -> None:
        folder, name = self._parent(path)
        victim = self.find(path)
        if isinstance(victim, Item):
            fail(ENOTDIR)
        if victim.entries:
            fail(ENOTEMPTY)
        del folder.entries[name]
        folder.mtime_ns = None

    def remove_tree(self, path: str) -> None:
        folder, name = self._parent(path)
        self.find(path)
        del folder.entries[name]
        folder.mtime_ns = None

    def rename(self, old: str, new: str, flags: int) -> None:
        """The checks in the order of the kernel's do_renameat2."""
        source_dir, source_name = self._parent(old)
        target_dir, target_name = self._parent(new)
        source = self._child(source_dir, source_name)
        target = target_dir.entries.get(target_name)
        if target is None and flags == EXCHANGE:
            fail(ENOENT)
        if target is not None and flags == NOREPLACE:
            fail(EEXIST)
        if new.startswith(old + "/") or (flags == EXCHANGE and old.startswith(new + "/")):
            fail(EINVAL)
        if flags != EXCHANGE:
            self._check_replace(old, source, new, target)
        if source is not target:
            _move(source_dir, source_name, target_dir, target_name, flags)

    @staticmethod
    def _check_replace(old: str, source: Thing, new: str, target: Thing | None) -> None:
        if old.startswith(new + "/"):
            fail(ENOTEMPTY)
        if isinstance(source, Item) and isinstance(target, Folder):
            fail(EISDIR)
        if isinstance(source, Folder) and isinstance(target, Item):
            fail(ENOTDIR)
        if isinstance(target, Folder) and target.entries and target is not source:
            fail(ENOTEMPTY)

    # Data and attributes

    def read(self, path: str) -> bytes:
        return self.regular(path).data

    def regular(self, path: str) -> Item:
        """The regular file; other types are never opened."""
        item = self._file(path)
        assert item.kind == "file"
        return item

    def write(self, path: str, data: bytes, offset: int) -> None:
        put(self.regular(path), data, offset)

    def truncate(self, path: str, size: int) -> None:
        item = self.regular(path)
        item.data = item.data[:size].ljust(size, b"\0")
        item.mtime_ns = None

    def replace(self, path: str, data: bytes) -> None:
        item = self.regular(path)
        item.data, item.mtime_ns = data, None

    def chmod(self, path: str, mode: int) -> None:
        self.find(path).mode = mode

    def chown(self, path: str, uid: int, gid: int) -> None:
        """A chown by root clears suid of files, and sgid of those that the group may execute; -1 keeps an id."""
        thing = self.find(path)
        thing.uid, thing.gid = thing.uid if uid < 0 else uid, thing.gid if gid < 0 else gid
        if isinstance(thing, Item):
            thing.mode &= ~0o4000 if not thing.mode & 0o010 else ~0o6000

    def utime(self, path: str, mtime_ns: int) -> None:
        self.find(path).mtime_ns = mtime_ns

    def setxattr(self, path: str, name: str, value: bytes, flags: int) -> None:
        xattrs = self.find(path).xattrs
        if flags == os.XATTR_CREATE and name in xattrs:
            fail(EEXIST)
        if flags == os.XATTR_REPLACE and name not in xattrs:
            fail(ENODATA)
        xattrs[name] = value

    def removexattr(self, path: str, name: str) -> None:
        xattrs = self.find(path).xattrs
        if name not in xattrs:
            fail(ENODATA)
        del xattrs[name]

    # Showing

    def paths(self) -> Iterator[tuple[str, Thing]]:
        """Every path below the root with the object there."""
        waiting = [("", self.root)]
        while waiting:
            where, folder = waiting.pop()
            for name, thing in folder.entries.items():
                path = f"{where}/{name}" if where else name
                yield path, thing
                if isinstance(thing, Folder):
                    waiting.append((path, thing))


def _move(source_dir: Folder, source_name: str, target_dir: Folder, target_name: str, flags: int) -> None:
    source = source_dir.entries.pop(source_name)
    if flags == EXCHANGE:
        source_dir.entries[source_name] = target_dir.entries[target_name]
    target_dir.entries[target_name] = source
    source_dir.mtime_ns = target_dir.mtime_ns = None


def put(item: Item, data: bytes, offset: int) -> None:
    """Write into a file."""
    padded = item.data.ljust(offset, b"\0")
    item.data = padded[:offset] + data + padded[offset + len(data) :]
    item.mtime_ns = None


def shown(thing: Thing) -> Shown:
    """What the tree must show of it; an unknown time is None."""
    xattrs = tuple(sorted(thing.xattrs.items()))
    kind, data = ("dir", None) if isinstance(thing, Folder) else (thing.kind, thing.data)
    return Shown(kind, thing.mode, thing.uid, thing.gid, data, thing.mtime_ns, xattrs)


def _fill(folder: Folder, spec: Spec, links: list[tuple[Folder, str, str]]) -> None:
    for name, short in spec.items():
        match entry(short):
            case Dir() as item:
                child = Folder({}, item.mode or 0o755, item.uid, item.gid, item.mtime_ns, dict(item.xattrs))
                folder.entries[name] = child
                _fill(child, item.children, links)
            case File() as item:
                mode = 0o644 if item.mode is None else item.mode
                folder.entries[name] = Item(
                    "file", item.data, mode, item.uid, item.gid, item.mtime_ns, dict(item.xattrs)
                )
            case Symlink() as item:
                folder.entries[name] = Item("symlink", item.target.encode(), 0o777, item.uid, item.gid, item.mtime_ns)
            case Special() as item:
                mode = 0o644 if item.mode is None else item.mode
                folder.entries[name] = Item("fifo", b"", mode, item.uid, item.gid, item.mtime_ns)
            case Link() as item:
                links.append((folder, name, item.to))
            case _:
                raise AssertionError("a flattened tree holds no whiteouts")
