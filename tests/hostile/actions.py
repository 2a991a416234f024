"""The five actions on each entry of the corpus, run by a fork server: import, stack, read, copy-up, commit.

An action walks the tree like a program that does not know what it will find: by descriptors, without following
links, opening only regular files. An error for one object is counted, and the walk continues.
"""

import errno
import os
import resource
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from overlayfs import Store
from overlayfs.errors import UserError
from overlayfs.mount import control_client
from overlayfs.mount.control_protocol import CommitImage
from overlayfs.store import commit, hashing
from overlayfs.store.commit import CommitRequest
from overlayfs.store.commit_transaction import NewLayer
from overlayfs.store.layers import Layer
from overlayfs.store.records import ImageRecord, now
from tests.support.polling import until

_ENDS = 1 << 20  # bytes of a large file that are read at either end
_MOST = 4 << 20  # bytes of a file that is read whole
_MOST_CHANGED = 5000  # objects: each takes eight requests
_NOWAIT = os.O_NONBLOCK | os.O_NOFOLLOW
ANSWERS = frozenset({
    "EACCES", "EIO", "EINVAL", "ENAMETOOLONG", "ENODATA", "ENOENT", "ENOSPC", "ENOTSUP", "ENXIO", "EPERM", "E2BIG",
    "ESTALE", "EROFS", "EBUSY", "ENODEV", "EFBIG", "EOVERFLOW",
})  # fmt: skip
"""Errors that a program may get for an object. Others, such as ELOOP or EXDEV, would expose our implementation."""


class Seen:
    """How many objects a walk found, how many errors of each kind, and what is wrong."""

    def __init__(self, secret: bytes) -> None:
        self.secret = secret
        self.objects = 0
        self.errors: Counter[str] = Counter()
        self.wrong: list[str] = []

    def note(self, error: OSError, what: str, name: bytes) -> None:
        """Count an error."""
        code = errno.errorcode.get(error.errno or 0, "?").replace("EOPNOTSUPP", "ENOTSUP")
        self.errors[code] += 1
        if code not in ANSWERS:
            self.wrong.append(f"{what} {name!r}: {code}")

    def check(self, data: bytes, what: str, name: bytes) -> None:
        """Look for the secret."""
        if self.secret in data:
            self.wrong.append(f"{what} {name!r} shows content from outside")

    @contextmanager
    def counted(self, what: str, name: bytes) -> Iterator[None]:
        """Count an error in this context."""
        try:
            yield
        except OSError as error:
            self.note(error, what, name)


Visit = Callable[[int, bytes, os.stat_result], None]


def _walk(top: bytes, seen: Seen, visit: Visit) -> None:
    """Visit every object below a directory, however deep, before what is in it."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    pending = [_opened(os.open(top, os.O_RDONLY | os.O_DIRECTORY))]
    while pending:
        fd, names = pending[-1]
        if not names:
            os.close(fd)
            pending.pop()
            continue
        name = names.pop()
        seen.objects += 1
        with seen.counted("stat", name):
            found = os.stat(name, dir_fd=fd, follow_symlinks=False)
            visit(fd, name, found)
            if stat.S_ISDIR(found.st_mode):
                pending.append(_opened(os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)))


def _opened(fd: int) -> tuple[int, list[bytes]]:
    try:
        return fd, [os.fsencode(name) for name in os.listdir(fd)]
    except BaseException:
        os.close(fd)
        raise


# --- the five ----------------------------------------------------------------------------------------------


def import_(store: bytes, source: bytes, name: str) -> str:
    """Import; return the message of a refusal, empty for none."""
    try:
        with Store(store) as opened:
            opened.import_image(source, name)
    except UserError as error:
        return str(error)
    return ""


def place(store: bytes, trees: Sequence[bytes], name: str, hashed: bool) -> bool:
    """Make an image whose layers are these directories, top first."""
    with Store(store) as opened:
        layers: list[Layer] = []
        for tree in reversed(trees):
            below = tuple(layer.id for layer in reversed(layers))
            layers.append(opened.commit_directory(tree, NewLayer(flags=("redirect", "metacopy"), below=below)))
        ids = tuple(layer.id for layer in reversed(layers))
        opened.images.put(ImageRecord(name=name, layers=ids, created=now()))
        if hashed:
            for layer in layers:
                hashing.hash_layer(opened, layer)
    return True


def read(point: bytes, secret: bytes, shows: Mapping[str, bytes | None]) -> Seen:
    """Read everything in a mount: attributes, targets, names and content."""
    seen = Seen(secret)
    _walk(point, seen, partial(_read_one, seen))
    for path, content in shows.items():
        found = _content(point + b"/" + path.encode())
        if found != content:
            seen.wrong.append(f"{path}: {found!r} instead of {content!r}")
    return seen


def _content(path: bytes) -> bytes | None:
    try:
        with open(path, "rb") as stream:
            return stream.read()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _read_one(seen: Seen, dirfd: int, name: bytes, found: os.stat_result) -> None:
    path = b"/proc/self/fd/%d/%b" % (dirfd, name)
    if stat.S_ISLNK(found.st_mode):
        os.readlink(name, dir_fd=dirfd)
    for attribute in os.listxattr(path, follow_symlinks=False):
        with seen.counted("getxattr", name):
            seen.check(os.getxattr(path, attribute, follow_symlinks=False), attribute, name)
    if stat.S_ISREG(found.st_mode):
        with seen.counted("read", name):
            _read_file(seen, dirfd, name, found.st_size)
    elif stat.S_ISCHR(found.st_mode) or stat.S_ISBLK(found.st_mode):
        _refused_to_open(seen, dirfd, name)


def _read_file(seen: Seen, dirfd: int, name: bytes, size: int) -> None:
    fd = os.open(name, os.O_RDONLY | _NOWAIT, dir_fd=dirfd)
    try:
        starts = (0,) if size <= _MOST else (0, max(size - _ENDS, 0))
        for start in starts:
            seen.check(os.pread(fd, _MOST if size <= _MOST else _ENDS, start), "the content of", name)
    finally:
        os.close(fd)


def _refused_to_open(seen: Seen, dirfd: int, name: bytes) -> None:
    """Opening a device of a layer must fail: mounts are nodev."""
    try:
        os.close(os.open(name, os.O_RDONLY | _NOWAIT, dir_fd=dirfd))
    except OSError as error:
        seen.note(error, "open", name)
    else:
        seen.wrong.append(f"the device {name!r} opens")


def copy_up(point: bytes, secret: bytes) -> Seen:
    """Change as many objects as `_MOST_CHANGED`: mode, owner, times, xattrs, content, names."""
    seen = Seen(secret)
    _walk(point, seen, partial(_change_one, seen))
    for name in os.listdir(point)[:_MOST_CHANGED]:
        with seen.counted("rename", name):
            os.rename(point + b"/" + name, point + b"/" + name[:200] + b".moved")
    return seen


def _change_one(seen: Seen, dirfd: int, name: bytes, found: os.stat_result) -> None:
    if seen.objects > _MOST_CHANGED:
        return
    path = b"/proc/self/fd/%d/%b" % (dirfd, name)
    link = stat.S_ISLNK(found.st_mode)
    steps: dict[str, Callable[[], object]] = {
        "chown": partial(os.chown, name, 1, 1, dir_fd=dirfd, follow_symlinks=False),
        "utime": partial(os.utime, name, ns=(1, 1), dir_fd=dirfd, follow_symlinks=False),
    }
    if not link:
        steps["chmod"] = partial(os.chmod, name, 0o777, dir_fd=dirfd)
        steps["setxattr"] = partial(os.setxattr, path, "user.changed", b"1", follow_symlinks=False)
    if stat.S_ISREG(found.st_mode):
        steps["write"] = partial(_write, dirfd, name)
        steps["link"] = partial(os.link, name, name[:200] + b".linked", src_dir_fd=dirfd, dst_dir_fd=dirfd)
    elif not stat.S_ISDIR(found.st_mode):
        steps["unlink"] = partial(os.unlink, name, dir_fd=dirfd)
    for what, step in steps.items():
        with seen.counted(what, name):
            step()


def _write(dirfd: int, name: bytes) -> None:
    fd = os.open(name, os.O_WRONLY | _NOWAIT, dir_fd=dirfd)
    try:
        os.pwrite(fd, b"changed", 0)
    finally:
        os.close(fd)


def commit_copy(point: bytes, destination: bytes) -> str:
    """Commit a mount to a directory; return the message of a refusal, empty for none."""
    try:
        control_client.Client.at(point).commit(destination)
    except UserError as error:
        return str(error)
    return ""


def commit_live(point: bytes, image: str) -> None:
    """Commit a mounted image, and wait until the layer is hashed."""
    client = control_client.Client.at(point)
    layer = client.commit_image(CommitImage(image=image, allow_empty=True)).layer
    until(lambda: client.hashing(layer).state != "hashing")
    found = client.hashing(layer)
    if found.state != "done":
        raise UserError(f"hashing failed: {found.told}")


def commit_workspace(store: bytes, workspace: str, image: str, hashed: bool) -> bool:
    """Commit an unmounted workspace; hashed False: do not hash it, which would take too long."""
    with Store(store) as opened:
        if hashed:
            opened.commit_workspace(workspace, image=image, allow_empty=True)
        else:
            commit.commit_workspace(opened, workspace, CommitRequest(image=image, allow_empty=True))
    return True


def export(store: bytes, image: str, target: bytes) -> str:
    """Export an image; return the message of a refusal (archives cannot hold every layer), empty for none."""
    try:
        with Store(store) as opened:
            opened.export_image(image, target, form="oci-archive")
    except UserError as error:
        return str(error)
    return ""


def verify(store: bytes) -> list[str]:
    """Verify a store; return the problems."""
    with Store(store) as opened:
        return [f"{found.path!r} is {found.kind}: {found.differs}" for found in opened.verify().problems]


def time_of(pid: int) -> float:
    """Return the seconds of CPU time that a process has used; 0 for one that has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stream:
            fields = stream.read().rpartition(b")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_of(pid: int) -> int:
    """Return the peak of a process's resident memory, in bytes."""
    with open(f"/proc/{pid}/status", encoding="ascii") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))
