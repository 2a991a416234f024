"""Programs that move whole trees: tar, rm, cp, rsync, git, dpkg."""

import os
import stat
from pathlib import Path

import pytest

from tests.programs.conftest import Bench, sh
from tests.programs.sources import write_package
from tests.support.drivers.posix import PosixRaw
from tests.support.dump import Dump, dump, same
from tests.support.requirements import need_program


def picture(path: Path, times_before: int | None = None) -> Dump:
    """Everything that a copy must keep; holes count as zeros, since FUSE does not report them."""
    raw = PosixRaw(os.fsencode(path))
    try:
        found = dump(raw, times_before=times_before)
        return {name: entry._replace(sparse=False) for name, entry in found.items()}
    finally:
        raw.close()


def count(path: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(path))


def test_untar_and_remove_5000_files(bench: Bench, python_tar: Path) -> None:
    point = bench.mount()
    sh("tar", "-xf", python_tar, "-C", point)
    sh("tar", "-df", python_tar, "-C", point)
    assert count(point / "tree") == 5200
    assert bench.layers.upper is not None
    assert count(bench.layers.upper / "tree") == 5200
    sh("rm", "-rf", point / "tree")
    assert os.listdir(point) == []
    assert os.listdir(bench.layers.upper) == []


def test_remove_5000_files_of_a_layer_and_untar_over_it(bench: Bench, python_tar: Path) -> None:
    sh("tar", "-xf", python_tar, "-C", bench.low)
    point = bench.mount()
    (point / "tree/0/kept").write_text("new\n")
    sh("rm", "-r", *(point / "tree/0" / name for name in os.listdir(point / "tree/0") if name != "kept"))
    bench.remount()
    assert os.listdir(point / "tree/0") == ["kept"]
    sh("rm", "-rf", point / "tree")
    assert os.listdir(point) == []
    assert bench.layers.upper is not None
    assert stat.S_ISCHR(os.lstat(bench.layers.upper / "tree").st_mode)
    part = "tree/0/email"
    sh("tar", "-xf", python_tar, "-C", point, part)
    bench.remount()
    sh("tar", "-df", python_tar, "-C", point, part)
    assert count(point) == count(bench.low / part)


def make_tree(path: Path) -> Path:
    """A tree with what archivers keep: types, links, holes, attributes, ACLs, owners, modes, odd names, times."""
    tree = path / "source"
    for name in ("d/e/f", "empty", "n\new\\li ne"):
        (tree / name).mkdir(parents=True)
    for number in range(300):
        (tree / "d/e" / f"file {number}").write_bytes(b"%d\n" % number * number)
    with open(tree / "d/sparse", "wb") as file:
        os.pwrite(file.fileno(), b"begin", 0)
        os.pwrite(file.fileno(), b"end", 3 << 20)
    os.link(tree / "d/sparse", tree / "d/e/f/link")
    os.symlink("../nowhere", tree / "d/dangling")
    os.mkfifo(tree / "fifo", 0o640)
    os.mknod(tree / "device", 0o600 | stat.S_IFBLK, os.makedev(7, 200))
    os.setxattr(tree / "d/e/file 7", "user.mark", b"\0binary\xff")
    os.setxattr(tree / "d", "trusted.mark", b"of a directory")
    sh("setfacl", "-m", "u:1000:rw,m::rwx", tree / "d/e/file 8")
    sh("setfacl", "-d", "-m", "g:1001:rx", tree / "empty")
    (tree / "d/e/file 9").chmod(0o6711)
    os.chown(tree / "d/e/file 10", 1000, 1001)
    os.utime(tree / "d/e/file 11", ns=(1, 2_345_678_901_234_567_890))
    os.utime(tree / "d/e/f", ns=(5, 1_111_111_111_222_222_222))
    return tree


def _pipe(point: Path, source: Path, target: Path) -> None:
    keep = ["--xattrs", "--xattrs-include=*", "--acls", "--numeric-owner", "--sparse"]
    archive = point / "archive.tar"
    sh("tar", "-C", source, *keep, "--format=posix", "-cf", archive, ".")
    target.mkdir()
    sh("tar", "-C", target, *keep, "-p", "-xf", archive)


def _rsync(point: Path, source: Path, target: Path) -> None:
    # a window of -1 compares nanoseconds; else what is of the same second is left as it is
    sh("rsync", "-aHAXS", "--numeric-ids", "--modify-window=-1", f"{source}/", f"{target}/")


def _copy(point: Path, source: Path, target: Path) -> None:
    sh("cp", "-a", source, target)


@pytest.mark.parametrize("copy", [_pipe, _rsync, _copy], ids=["tar", "rsync", "cp"])
def test_round_trip(bench: Bench, copy: object, place: Path) -> None:
    """From a layer into the mount, within it after a change, and out of it: the tree stays the same."""
    assert callable(copy)
    need_program("rsync", "setfacl")
    source = make_tree(bench.low)
    wanted = picture(source)
    point = bench.mount()
    same(wanted, picture(point / "source"))
    copy(point, point / "source", point / "copy")
    bench.remount()
    same(wanted, picture(point / "copy"))
    copy(point, point / "copy", place / "out")
    same(wanted, picture(place / "out"))


def test_rsync_brings_a_layer_up_to_date(bench: Bench, place: Path) -> None:
    """Replaces, deletes and keeps as the other side says, and finds nothing to do the second time."""
    need_program("rsync", "setfacl")
    make_tree(bench.low)
    other = make_tree(place)
    sh("rm", "-r", other / "d/e/f", other / "fifo")
    (other / "d/e/file 20").write_text("changed\n")
    (other / "empty").rmdir()
    (other / "empty").write_text("now a file\n")
    point = bench.mount()
    sh("rsync", "-aHAXc", "--delete", "--modify-window=-1", f"{other}/", f"{point}/source/")
    assert sh("rsync", "-aHAXnc", "--delete", "-i", "--modify-window=-1", f"{other}/", f"{point}/source/") == ""
    bench.remount()
    same(picture(other), picture(point / "source"))


GIT = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}


def git(where: Path, *words: str | Path) -> str:
    """Run git with its own author, without this machine's settings."""
    identity = (
        "-c",
        "user.name=Some Body",
        "-c",
        "user.email=body@example.org",
        "-c",
        "safe.directory=*",
        "-c",
        "gc.auto=0",
    )
    return sh("git", *identity, *words, cwd=where, **GIT)


def make_repository(path: Path) -> None:
    """A repository with some history."""
    path.mkdir()
    git(path, "init", "-q", "-b", "main")
    for turn in range(3):
        for number in range(150):
            file = path / f"dir{number % 7}" / f"file{number}"
            file.parent.mkdir(exist_ok=True)
            file.write_text(f"{number} of turn {turn}\n" * (number + 1))
        git(path, "add", "-A")
        git(path, "commit", "-q", "-m", f"turn {turn}")


def test_git_clone_and_commit(bench: Bench) -> None:
    need_program("git")
    make_repository(bench.low / "origin")
    point = bench.mount()
    git(point, "clone", "-q", "--no-hardlinks", "origin", "clone")
    clone = point / "clone"
    assert git(clone, "status", "--porcelain") == ""
    (clone / "dir1/file1").write_text("edited\n")
    (clone / "dir2").rename(clone / "moved")
    assert " M dir1/file1" in git(clone, "status", "--porcelain").splitlines()
    git(clone, "add", "-A")
    git(clone, "commit", "-q", "-m", "changed in the mount")
    git(clone, "checkout", "-q", "HEAD~2")
    git(clone, "checkout", "-q", "main")
    git(clone, "gc", "-q", "--prune=now")
    bench.remount()
    assert git(clone, "status", "--porcelain") == ""
    git(clone, "fsck", "--strict")
    assert git(clone, "log", "--format=%s") == "changed in the mount\nturn 2\nturn 1\nturn 0\n"


def test_git_in_a_repository_of_a_layer(bench: Bench) -> None:
    """Status, commit, branches and a repack of a repository in a lower layer."""
    need_program("git")
    make_repository(bench.low / "work")
    work = bench.mount() / "work"
    assert git(work, "status", "--porcelain") == ""
    (work / "dir0/file0").write_text("edited\n")
    git(work, "commit", "-q", "-a", "-m", "changed in the mount")
    git(work, "checkout", "-q", "-b", "old", "HEAD~2")
    git(work, "merge", "-q", "main")
    git(work, "stash", "list")
    git(work, "repack", "-a", "-d", "-q")
    bench.remount()
    assert git(work, "status", "--porcelain") == ""
    git(work, "fsck", "--strict")
    assert git(work, "rev-list", "--count", "old") == "4\n"


def test_dpkg_unpacks_over_a_system(bench: Bench, place: Path) -> None:
    """A package is unpacked into directories of a layer, and replaces existing files."""
    need_program("dpkg-deb", "chroot")
    package = write_package(place)
    deb = place / "deb_1.0_all.deb"
    sh("dpkg-deb", "-b", "-Znone", "--root-owner-group", package, deb)
    (bench.low / "usr/lib/deb").mkdir(parents=True)
    (bench.low / "usr/lib/deb/part3").write_text("old\n")
    (bench.low / "usr/lib/deb/other").write_text("stays\n")
    point = bench.mount()
    begun = (point / "usr/lib/deb").stat().st_mtime_ns + 1
    sh("dpkg", "-x", deb, point)
    sh("dpkg", "-x", deb, place / "plain")
    bench.remount()
    assert (point / "usr/lib/deb/other").read_text() == "stays\n"
    unpacked = {name: found for name, found in picture(point, begun).items() if name != b"usr/lib/deb/other"}
    same(picture(place / "plain", begun), unpacked)
    assert sh(point / "usr/bin/also") == "deb runs\n"


def test_a_chroot_runs_in_the_mount(bench: Bench) -> None:
    """Programs and libraries of a layer run with the mount as their root, and change it."""
    need_program("chroot", "ldd")
    for program in ("/bin/sh", "/bin/mv", "/bin/cat", "/bin/mkdir"):
        found = [word for line in sh("ldd", program).splitlines() for word in line.split() if word.startswith("/")]
        for path in [program, *found]:
            target = bench.low / path.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            sh("cp", "-L", path, target)
    (bench.low / "etc").mkdir()
    (bench.low / "etc/motd").write_text("hello from below\n")
    point = bench.mount()
    script = "mkdir /new && mv /etc/motd /new/motd && echo more >>/new/motd && cat /new/motd"
    assert sh("chroot", point, "/bin/sh", "-c", script) == "hello from below\nmore\n"
    assert os.listdir(point / "etc") == []
