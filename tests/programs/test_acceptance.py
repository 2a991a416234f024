"""The main job at full size: three layers with thousands of files, changed by real programs, committed, mounted again.

What the first mount shows, our mount of the committed layer and the kernel's are compared by rsync in both directions,
contents included, and by a dump that also has link counts, nanoseconds and which paths share an inode.
"""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.programs.conftest import Bench, sh
from tests.programs.sources import write_project
from tests.support.drivers import CommandMount, KernelOverlay, Stack
from tests.support.drivers.mounts import COMMAND
from tests.support.drivers.posix import PosixRaw
from tests.support.dump import Dump, dump, same
from tests.support.requirements import need_filesystem, need_program


class Finished(Stack):
    """The committed layer over the lower ones, read-only, at a mount point of its own."""

    def __init__(self, base: Path, layers: list[Path]) -> None:
        super().__init__(base, [], None)
        self.lower = layers


def fill(bench: Bench, archive: Path) -> None:
    """The lowest layer is big, the next two merge with it, hide parts of it, and hold what programs will change."""
    top, middle, low = bench.layers.lower
    sh("tar", "-xf", archive, "-C", low)
    sh("sqlite3", low / "base.db", "create table t (n, text); insert into t values (1, 'of the lowest layer')")
    write_project(low / "project")
    with open(low / "sparse", "wb") as file:
        os.pwrite(file.fileno(), b"data", 5 << 20)
        os.truncate(file.fileno(), 8 << 20)
    (low / "links").mkdir()
    (low / "links/first").write_text("linked\n")
    (low / "links/second").hardlink_to(low / "links/first")
    (low / "links/third").hardlink_to(low / "base.db")
    _fill_middle(middle, low)
    (top / "project").mkdir()
    (top / "project/main.c").write_text((low / "project/main.c").read_text().replace("%d", "sum %d"))
    (top / "etc").mkdir()
    os.setxattr(top / "etc", "trusted.overlay.opaque", b"y")
    (top / "etc/only").write_text("the rest is hidden\n")


def _fill_middle(middle: Path, low: Path) -> None:
    tree = middle / "tree/0"
    (tree / "json").mkdir(parents=True)
    (tree / "json/added").write_text("by the middle layer\n")
    victim = next(name for name in sorted(os.listdir(low / "tree/0")) if (low / "tree/0" / name).is_file())
    os.mknod(tree / victim, stat.S_IFCHR, os.makedev(0, 0))
    (middle / "etc").mkdir()
    (middle / "etc/hidden").write_text("hidden by a layer above\n")
    for number in range(50):
        (middle / f"etc/m{number}").write_text("x" * number)


def change(point: Path) -> None:
    """Work of each kind: builds, a database, moves of directories, links, attributes, owners, holes, deletions."""
    tree = point / "tree/0"
    sh("make", "-s", cwd=point / "project")
    assert sh(point / "project/program").startswith("sum ")
    sh("sqlite3", point / "base.db", "update t set n = 2; create index i on t (n); pragma wal_checkpoint")
    sh("mv", tree / "json", point / "moved")
    sh("mv", tree / "email", tree / "asyncio/mail")
    sh("mv", tree / "asyncio", point / "moved/asyncio")
    sh("mkdir", tree / "json")
    sh("cp", "-a", tree / "unittest", tree / "json/unittest")
    sh("rm", "-rf", tree / "html", tree / "ctypes", point / "moved/asyncio/mail/mime")
    sh(
        "sh",
        "-c",
        "chmod -R go-w,u+s logging; chown -R 1000:1001 xml; chmod 1777 sqlite3; find . -name 'a*.py' -delete",
        cwd=tree,
    )
    sh(
        "sh",
        "-c",
        "touch -d 2001-02-03T04:05:06.789 sched.py; truncate -s 100 shlex.py; echo tail >>socket.py",
        cwd=tree,
    )
    sh("sed", "-i", "s/the/THE/g", tree / "shutil.py", tree / "struct.py")
    sh("ln", tree / "tokenize.py", point / "moved/tokenize.py")
    sh("ln", "-s", "../moved", point / "etc/link")
    sh("sh", "-c", "echo more >>first; ln second fourth; chmod 640 third", cwd=point / "links")
    sh("setfattr", "-n", "user.note", "-v", "changed", tree / "textwrap.py")
    sh("setfattr", "-n", "trusted.note", "-v", "dir", tree / "concurrent")
    sh("setfacl", "-R", "-m", "u:1000:rwX", tree / "importlib")
    sh("setfacl", "-d", "-m", "g:1001:rx", point / "moved")
    sh("dd", "if=/dev/urandom", f"of={point}/sparse", "bs=4096", "seek=100", "count=3", "conv=notrunc", "status=none")
    sh("cp", "--sparse=always", point / "sparse", point / "sparse.copy")
    sh("rsync", "-a", f"{tree}/wsgiref/", f"{point}/etc/wsgiref/")
    sh("mkfifo", point / "etc/fifo")
    sh("mknod", point / "etc/device", "b", "7", "201")
    sh("sh", "-c", "tar -cf - urllib | tar -xf - -C ../../etc", cwd=tree)


def picture(path: Path, holes: bool = False) -> Dump:
    """What must be equal: holes only on a disk, link counts of directories never."""
    raw = PosixRaw(os.fsencode(path))
    try:
        return {name: entry._replace(sparse=holes and entry.sparse) for name, entry in dump(raw).items()}
    finally:
        raw.close()


def rsync_finds_nothing(one: Path, other: Path) -> None:
    """In either direction: `rsync -aHAXnc --delete -i` prints no line."""
    for source, target in ((one, other), (other, one)):
        assert sh("rsync", "-aHAXnc", "--delete", "-i", f"{source}/", f"{target}/") == ""


@contextmanager
def mounted(kind: type[CommandMount] | type[KernelOverlay], base: Path, layers: list[Path]) -> Iterator[Path]:
    """The layers mounted read-only by our program or by the kernel."""
    tree = kind(Finished(base, layers))
    try:
        yield tree.stack.mountpoint
    finally:
        tree.close()


def test_commit_and_mount_again(make_bench: Callable[[int], Bench], place: Path, python_tar: Path) -> None:
    need_filesystem("overlay")
    need_program("rsync", "sqlite3", "make", "cc", "setfattr", "setfacl")
    bench = make_bench(3)
    fill(bench, python_tar)
    point = bench.mount()
    change(point)
    first = picture(point)
    assert len(first) > 5000
    committed = place / "committed"
    sh(COMMAND, "commit", point, "--to", committed)
    layers = [committed, *bench.layers.lower]
    with (
        mounted(CommandMount, place / "ours", layers) as ours,
        mounted(KernelOverlay, place / "kernel", layers) as theirs,
    ):
        rsync_finds_nothing(ours, theirs)
        rsync_finds_nothing(point, ours)
        same(first, picture(theirs))
        assert os.stat(theirs / "sparse").st_blocks * 512 < 1 << 20
    assert stat.S_ISDIR(os.lstat(committed / "moved").st_mode)
    with pytest.raises(FileNotFoundError):
        os.stat(committed / "tree/0/tabnanny.py")


def test_nothing_is_inherited_from_the_places_where_copies_are_staged(bench: Bench, place: Path) -> None:
    """Default ACLs of the work directory, of the layer's parent, or of a directory in the upper reach no copy."""
    need_program("setfacl", "getfacl")
    (bench.low / "d/e").mkdir(parents=True)
    (bench.low / "d/e/f").write_text("x\n")
    (bench.low / "g").mkdir()
    assert bench.layers.work is not None
    layers = place / "layers"
    layers.mkdir()
    sh("setfacl", "-d", "-m", "u:1000:rwx", bench.layers.work, layers)
    point = bench.mount()
    sh("sh", "-c", "echo more >>d/e/f; chmod 750 g; mv g d/g; setfacl -d -m g:1001:rx d", cwd=point)
    first = picture(point)
    assert [path for path, entry in first.items() if entry.xattrs] == [b"d"]
    sh(COMMAND, "commit", point, "--to", layers / "new")
    with mounted(CommandMount, place / "ours", [layers / "new", *bench.layers.lower]) as ours:
        same(first, picture(ours))
