"""The options of a mount: parsing `-o` into one frozen value.

There are three families: the options of kernel overlayfs, those of fuse-overlayfs, and those that mount(8) and libfuse
give every file system. A `Draft` collects them in the order they were given (the last one wins), and `Draft.build`
checks their combination. Unknown names are kept for the caller, since `overlayfs mount` refuses them and
`overlayfs-mount` ignores them.

A backslash escapes the character after it, as in the kernel's overlayfs (`ovl_unescape` of
`fs/overlayfs/params.c`): `\\,` is a comma, `\\:` a colon, `\\\\` a backslash. A comma between double quotes does not
end an option whose name is in `QUOTED_OPTIONS`; in other options a quote is an ordinary character.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from overlayfs.errors import UsageError
from overlayfs.format.xattrs import Mode
from overlayfs.fs.config import IdRange, StackConfig

LONGEST_BUSY_POLL = 1000  # microseconds; a sleep and a wake-up cost a tenth of that
HIGHEST_ID = 2**32 - 2  # (uid_t) -1 means "no change" in chown(2) and can own nothing
QUOTED_OPTIONS = (b"context", b"fscontext", b"defcontext", b"rootcontext")

_QUOTED_OPTION = re.compile(rb"(?:" + b"|".join(QUOTED_OPTIONS) + rb')="[^"]*"')
_PLAIN_OPTION = re.compile(rb"(?:\\.|[^,\\]|\\$)*", re.DOTALL)
_PLAIN_LAYER = re.compile(rb"(?:\\.|[^:\\]|\\$)*", re.DOTALL)


@dataclass(frozen=True)
class ImageMount:
    """What a mount of an image uses in the store.

    store: the store's directory. layers: ids, top first. lock: an open descriptor that holds the workspace's lock.
    """

    store: bytes
    image: str
    workspace: str
    ephemeral: bool
    layers: tuple[str, ...]
    lock: int


@dataclass(frozen=True)
class MountOptions:
    """One mount: the stack, the options for the kernel, and how the daemon runs.

    source: the first column of /proc/self/mounts.
    context: SELinux options as `name=value`, unquoted.
    timeout: for how many seconds the kernel may cache names and attributes; None: the engine decides.
    engine: auto, kernel or pyfuse3. io: auto, passthrough or cached.
    busy_poll: for how many seconds to poll for the next request before sleeping; None: as long as it pays.
    xattrs: False answers every request about extended attributes with EOPNOTSUPP.
    image_mount: set for a mount of an image, whose stack is in a store.
    """

    stack: StackConfig
    source: bytes = b"overlayfs"
    read_only: bool = False
    allow_other: bool = False
    allow_root: bool = False
    suid: bool = False
    dev: bool = False
    exec: bool = True
    atime: bool = True
    diratime: bool = True
    sync: bool = False
    dirsync: bool = False
    context: tuple[bytes, ...] = ()
    timeout: float | None = None
    writeback: bool = False
    engine: str = "auto"
    io: str = "auto"
    busy_poll: float | None = None
    xattrs: bool = True
    foreground: bool = False
    debug: bool = False
    image_mount: ImageMount | None = None


@dataclass
class Draft:
    """Options while they are being read. unknown: names that no family has. ignored: names without effect here."""

    lower: list[bytes] = field(default_factory=list)
    upper: bytes | None = None
    work: bytes | None = None
    stack: dict[str, Any] = field(default_factory=dict)
    mount: dict[str, Any] = field(default_factory=dict)
    squash_to_root: bool = False
    unknown: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def read(self, text: bytes) -> None:
        """Add the options of one `-o` string. UsageError for a known name with an invalid value."""
        for option in split_options(text):
            name, given, value = option.partition(b"=")
            self._add(_shown(name), value if given else None)

    def _add(self, name: str, value: bytes | None) -> None:
        if name in _SPECIAL:
            _SPECIAL[name](self, name, value)
        elif name in _STACK:
            self.stack.update(_STACK[name](name, value))
        elif name in _MOUNT:
            self.mount.update(_MOUNT[name](name, value))
        elif name in _IGNORED:
            self.ignored.append(name)
        elif name not in _FOR_MOUNT_COMMAND and not name.lower().startswith("x-"):
            self.unknown.append(name)

    def build(self) -> MountOptions:
        """Return the options as one value. UsageError if the combination is not a mount."""
        if not self.lower:
            raise UsageError("no layer is given; name at least one with lowerdir=DIR or --lower DIR")
        if self.upper is not None and self.work is None:
            advice = "add workdir=DIR, an empty directory on the same file system"
            raise UsageError(f"upperdir {_shown(self.upper)} has no workdir; {advice}")
        if self.work is not None and self.upper is None:
            raise UsageError(f"workdir {_shown(self.work)} has no upperdir; add upperdir=DIR or leave workdir out")
        return MountOptions(stack=self._config(), **self.mount)

    def _config(self) -> StackConfig:
        return StackConfig(
            tuple(map(_absolute, self.lower)),
            None if self.upper is None else _absolute(self.upper),
            None if self.work is None else _absolute(self.work),
            **{**self._squashed(), **self.stack},
        )

    def _squashed(self) -> dict[str, Any]:
        """Return what `squash_to_root` sets; `squash_to_uid` and `squash_to_gid` take precedence."""
        return {"squash_uid": 0, "squash_gid": 0} if self.squash_to_root else {}


def _absolute(path: bytes) -> bytes:
    """Return the absolute path, not normalised: `a/../b` through a symbolic link `a` is not `b`."""
    return os.path.join(os.getcwdb(), path)


def _shown(raw: bytes) -> str:
    return raw.decode("utf-8", "backslashreplace")


# Readers of options that set fields. They return the fields; UsageError names the option.

_Fields = dict[str, object]
_Reader = Callable[[str, bytes | None], _Fields]


def _wrong(name: str, value: bytes | None, expected: str) -> UsageError:
    if value is None:
        return UsageError(f"option {name} needs a value: {expected}")
    return UsageError(f"option {name}={_shown(value)} is not {expected}")


_ON = {None, b"", b"1", b"on", b"yes", b"true"}
_OFF = {b"0", b"off", b"no", b"false"}


def _truth(name: str, value: bytes | None) -> bool:
    if value not in _ON | _OFF:
        raise _wrong(name, value, "on or off")
    return value in _ON


def _switch(key: str, *, inverted: bool = False) -> _Reader:
    return lambda name, value: {key: _truth(name, value) != inverted}


def _fixed(**fields: object) -> _Reader:
    def read(name: str, value: bytes | None) -> _Fields:
        if value is not None:
            raise UsageError(f"option {name} takes no value, but {_shown(value)} is given")
        return dict(fields)

    return read


def _choice(key: str, choices: Mapping[bytes, object]) -> _Reader:
    def read(name: str, value: bytes | None) -> _Fields:
        if value is None or value not in choices:
            raise _wrong(name, value, "one of " + ", ".join(map(_shown, choices)))
        return {key: choices[value]}

    return read


def _user_id(key: str) -> _Reader:
    return lambda name, value: {key: _number(name, value, 0, HIGHEST_ID)}


def _number(name: str, value: bytes | None, lowest: int, highest: int) -> int:
    if value is None or not value.isdigit() or not lowest <= int(value) <= highest:
        raise _wrong(name, value, f"a number from {lowest} to {highest}")
    return int(value)


def _seconds(name: str, value: bytes | None) -> _Fields:
    try:
        seconds = float(value or b"")
    except ValueError:
        raise _wrong(name, value, "a number of seconds") from None
    if not 0 <= seconds <= 1e9:
        raise _wrong(name, value, "a number of seconds")
    return {"timeout": seconds}


def _busy_poll(name: str, value: bytes | None) -> _Fields:
    if value == b"auto":
        return {"busy_poll": None}
    if value is None or not value.isdigit() or int(value) > LONGEST_BUSY_POLL:
        raise _wrong(name, value, f"auto or a number of microseconds up to {LONGEST_BUSY_POLL}")
    return {"busy_poll": int(value) / 1e6}


def _id_map(key: str) -> _Reader:
    return lambda name, value: {key: _id_ranges(name, value)}


def _id_ranges(name: str, value: bytes | None) -> tuple[IdRange, ...]:
    """Read `[:]INSIDE:OUTSIDE:COUNT[:INSIDE:OUTSIDE:COUNT…]`; containers/storage writes the leading colon."""
    fields = (value or b"").removeprefix(b":").split(b":")
    if len(fields) % 3 or not all(part.isdigit() for part in fields):
        raise _wrong(name, value, "a list of CONTAINER:HOST:COUNT triples")
    numbers = [int(part) for part in fields]
    ranges = tuple(IdRange(*numbers[at : at + 3]) for at in range(0, len(numbers), 3))
    for inside, outside, size in ranges:
        if not size or max(inside, outside) + size > HIGHEST_ID + 1:
            raise UsageError(f"option {name} has an impossible range {inside}:{outside}:{size}")
    return ranges


def _context(name: str, value: bytes | None) -> _Fields:
    if not value:
        raise _wrong(name, value, "an SELinux context")
    return {"context": (name.encode("ascii") + b"=" + unquote(value),)}


def _source(name: str, value: bytes | None) -> _Fields:
    if not value:
        raise _wrong(name, value, "a name to show as the source")
    return {"source": unescape(value)}


# Readers of options that need the draft.

_Special = Callable[[Draft, str, bytes | None], None]


def _layers(draft: Draft, name: str, value: bytes | None) -> None:
    paths = split_layers(value or b"")
    if value and b"::" in value and not all(paths):
        raise UsageError("lowerdir has '::', but data-only layers are not supported; separate layers by one colon")
    if not all(paths):
        raise UsageError(f"{name} has an empty entry; write lowerdir=DIR or lowerdir=TOP:NEXT")
    draft.lower = paths


def _one_more_layer(draft: Draft, name: str, value: bytes | None) -> None:
    draft.lower = [*draft.lower, _path(name, value)]


def _upper(draft: Draft, name: str, value: bytes | None) -> None:
    draft.upper = _path(name, value)


def _work(draft: Draft, name: str, value: bytes | None) -> None:
    draft.work = _path(name, value)


def _path(name: str, value: bytes | None) -> bytes:
    if not value:
        raise _wrong(name, None, "a directory")
    return unescape(value)


def _remount(draft: Draft, name: str, value: bytes | None) -> None:
    # Ignored as an unknown option, it would mount a second time over the first mount.
    raise UsageError("a mount cannot be changed by remount; unmount it and mount it with the new options")


def _squash_to_root(draft: Draft, name: str, value: bytes | None) -> None:
    draft.squash_to_root = _truth(name, value)


_SPECIAL: dict[str, _Special] = {
    "lowerdir": _layers,
    "lowerdir+": _one_more_layer,
    "upperdir": _upper,
    "workdir": _work,
    "remount": _remount,
    "squash_to_root": _squash_to_root,
}

_REDIRECTS = {b"on": True, b"follow": False, b"off": False}

_STACK: dict[str, _Reader] = {
    "redirect_dir": _choice("redirect_dir", _REDIRECTS),
    "metacopy": _switch("metacopy"),
    "index": _switch("index"),
    "xino": _choice("xino", {b"on": True, b"auto": True, b"off": False}),
    "userxattr": _fixed(xattr_mode=Mode.USER),
    "volatile": _switch("volatile"),
    "fsync": _switch("volatile", inverted=True),
    "noacl": _switch("noacl"),
    "static_nlink": _switch("static_nlink"),
    "ino32_t": _switch("ino32"),
    "uidmapping": _id_map("uid_map"),
    "gidmapping": _id_map("gid_map"),
    "squash_to_uid": _user_id("squash_uid"),
    "squash_to_gid": _user_id("squash_gid"),
    "xattr_permissions": lambda name, value: {"xattr_permissions": _number(name, value, 0, 2)},
}

_MOUNT: dict[str, _Reader] = {
    "ro": _fixed(read_only=True),
    "rw": _fixed(read_only=False),
    "allow_other": _fixed(allow_other=True),
    "allow_root": _fixed(allow_root=True),
    "suid": _fixed(suid=True),
    "nosuid": _fixed(suid=False),
    "dev": _fixed(dev=True),
    "nodev": _fixed(dev=False),
    "exec": _fixed(exec=True),
    "noexec": _fixed(exec=False),
    "atime": _fixed(atime=True),
    "noatime": _fixed(atime=False),
    "diratime": _fixed(diratime=True),
    "nodiratime": _fixed(diratime=False),
    "sync": _fixed(sync=True),
    "async": _fixed(sync=False),
    "dirsync": _fixed(dirsync=True),
    "fsname": _source,
    "timeout": _seconds,
    "engine": _choice("engine", {name.encode(): name for name in ("auto", "kernel", "pyfuse3")}),
    "io": _choice("io", {name.encode(): name for name in ("auto", "passthrough", "cached")}),
    "spin": _busy_poll,
    "writeback": _switch("writeback"),
    "noxattrs": _switch("xattrs", inverted=True),
    "debug": _fixed(debug=True, foreground=True),
    **{name.decode(): _context for name in QUOTED_OPTIONS},
}

# Options of other programs for what has only one behaviour here.
_IGNORED = frozenset(
    {
        *("auto_cache", "noauto_cache", "kernel_cache"),
        *("auto_unmount", "clone_fd", "max_idle_threads", "max_threads", "threaded"),
        *("big_writes", "max_background", "max_read", "max_write"),
        *("fast_ino", "plugins"),
        *("relatime", "norelatime", "strictatime", "nostrictatime", "lazytime", "nolazytime"),
        *("splice_move", "splice_read", "splice_write", "no_splice_move", "no_splice_read", "no_splice_write"),
    }
)

# Options that mount(8) acts on and may pass on; `default_permissions` is always on.
_FOR_MOUNT_COMMAND = frozenset(
    {
        *("_netdev", "auto", "noauto", "comment", "defaults", "default_permissions", "loud", "silent", "nofail"),
        *("group", "nogroup", "owner", "noowner", "user", "nouser", "users", "nousers"),
    }
)


# --- the text of -o: options between commas, layers between colons, escapes, quotes ------------------------------


def split_options(text: bytes) -> list[bytes]:
    """Return the options of one `-o` string, still escaped, without empty ones (`a,,b,`)."""
    return [option for option in _options(text) if option]


def _options(text: bytes) -> Iterator[bytes]:
    start = 0
    while start <= len(text):
        found = _QUOTED_OPTION.match(text, start) or _PLAIN_OPTION.match(text, start)
        assert found is not None  # _PLAIN_OPTION matches the empty string
        yield found.group()
        start = found.end() + 1


def split_layers(value: bytes) -> list[bytes]:
    """Return the paths of a `lowerdir` value, top first, unescaped. An empty path is left to the caller to refuse."""
    paths, start = [], 0
    while start <= len(value):
        found = _PLAIN_LAYER.match(value, start)
        assert found is not None
        paths.append(unescape(found.group()))
        start = found.end() + 1
    return paths


def unescape(value: bytes) -> bytes:
    """Return the value with every `\\x` replaced by `x`; a single backslash at the end stays."""
    return re.sub(rb"\\(.)", rb"\1", value, flags=re.DOTALL)


def escape_layer(path: bytes) -> bytes:
    """Return the path as one entry of `lowerdir=`: `split_layers(escape_layer(path)) == [path]`."""
    return re.sub(rb"([\\:,])", rb"\\\1", path)


def unquote(value: bytes) -> bytes:
    """Return the value without the double quotes around it, if there are any."""
    return value[1:-1] if len(value) >= 2 and value[:1] == value[-1:] == b'"' else value
