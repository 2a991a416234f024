"""Unpacking entries into a layer; nothing outside the layer can be reached."""

import errno
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from overlayfs import sysio
from overlayfs.errors import UserError
from overlayfs.oci import unpack as unpacking
from overlayfs.oci.layer_tar import unpack_tar
from overlayfs.oci.tar_entry import ArchiveError, Kind, TarEntry
from overlayfs.oci.unpack import Unpacker
from tests.oci import archives
from tests.oci.archives import END, device, directory, file, hardlink, header, pax, symlink, unpack
from tests.support.builder import fingerprint
from tests.support.disks import disk

pytestmark = pytest.mark.root

OPAQUE = "trusted.overlay.opaque"


@pytest.fixture
def root(place: Path) -> Iterator[Path]:
    """An empty directory for a layer, beside trees that must not change."""
    canary = place / "canary"
    (canary / "etc").mkdir(parents=True)
    (canary / "etc" / "shadow").write_text("secret")
    before = fingerprint(canary)
    descriptors = set(os.listdir("/proc/self/fd"))
    yield place / "layer"
    assert fingerprint(canary) == before
    assert set(os.listdir("/proc/self/fd")) == descriptors
    assert sorted(os.listdir(place)) in (["canary", "layer"], ["canary"])


def made(root: Path, *parts: bytes) -> Path:
    unpack(b"".join(parts) + END, root)
    return root


def refused(root: Path, *parts: bytes) -> str:
    with pytest.raises(UserError) as caught:
        unpack(b"".join(parts) + END, root)
    assert str(caught.value).isprintable()
    return str(caught.value)


def is_whiteout(path: Path) -> bool:
    found = path.lstat()
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == 0


def is_opaque(path: Path) -> bool:
    try:
        return os.getxattr(path, OPAQUE) == b"y"
    except OSError:
        return False


def paths(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


# --- ordinary objects


def test_every_kind_with_its_attributes(root: Path) -> None:
    made(
        root,
        directory(b"d", mode=0o3775, uid=1, gid=2),
        file(b"d/f", b"content", mode=0o4750, uid=3, gid=4),
        pax({b"mtime": b"5.000000007", b"SCHILY.xattr.user.x": b"v"}) + file(b"g"),
        symlink(b"l", b"/nowhere/../x"),
        hardlink(b"h", b"d/f"),
        header(b"p", b"6", mode=0o620),
        device(b"c", 1, 3),
        device(b"b", 7, 200, b"4"),
    )
    found = {name: (root / name).lstat() for name in ("d", "d/f", "g", "l", "h", "p", "c", "b")}
    assert [stat.filemode(each.st_mode) for each in found.values()] == [
        "drwxrwsr-t", "-rwsr-x---", "-rw-r--r--", "lrwxrwxrwx", "-rwsr-x---", "prw--w----", "crw-------", "brw-------",
    ]  # fmt: skip
    assert [(each.st_uid, each.st_gid) for each in found.values()][:2] == [(1, 2), (3, 4)]
    assert (root / "d" / "f").samefile(root / "h")
    assert os.readlink(root / "l") == "/nowhere/../x"
    assert (found["c"].st_rdev, found["b"].st_rdev) == (os.makedev(1, 3), os.makedev(7, 200))
    assert found["g"].st_mtime_ns == 5_000_000_007
    assert os.getxattr(root / "g", "user.x") == b"v"
    assert all(found[name].st_mtime_ns == archives.EPOCH * 10**9 for name in ("d", "d/f", "l", "p", "c"))


def test_capabilities_survive_chown_and_chmod(root: Path) -> None:
    capability = bytes.fromhex("0100000200040000000000000000000000000000")
    made(root, pax({b"SCHILY.xattr.security.capability": capability}) + file(b"f", b"x", uid=7, mode=0o6755))
    assert os.getxattr(root / "f", "security.capability") == capability
    assert (root / "f").stat().st_mode & 0o7777 == 0o6755


def test_later_entries_do_not_change_times_of_directories(root: Path) -> None:
    many = b"".join(directory(b"d%d" % n, mtime=1000 + n) for n in range(200))
    later = b"".join(file(b"d%d/f%d" % (n, turn), mtime=5) for turn in range(3) for n in range(200))
    made(root, directory(b"./", mtime=77), many, later)
    assert [(root / f"d{n}").stat().st_mtime for n in range(200)] == [1000 + n for n in range(200)]
    assert root.stat().st_mtime == 77


def test_missing_parents_are_readable_by_all(root: Path) -> None:
    made(root, file(b"a/b/c", mtime=5), directory(b"a", mode=0o700, uid=9, mtime=6))
    assert (root / "a").stat().st_mode & 0o7777 == 0o700
    found = (root / "a" / "b").stat()
    assert (found.st_mode & 0o7777, found.st_uid, found.st_mtime) == (0o755, 0, 5)
    assert ((root / "a").stat().st_uid, (root / "a").stat().st_mtime) == (9, 6)


def test_the_root_is_an_entry_like_others(root: Path) -> None:
    made(root, pax({b"SCHILY.xattr.user.x": b"v"}) + directory(b"./", mode=0o1777, uid=5, mtime=9), file(b"./f"))
    found = root.stat()
    assert (found.st_mode & 0o7777, found.st_uid, found.st_mtime) == (0o1777, 5, 9)
    assert os.getxattr(root, "user.x") == b"v"


def test_default_acls_are_not_inherited(root: Path) -> None:
    acl = bytes.fromhex("0200000001000700ffffffff04000700ffffffff20000700ffffffff")
    made(
        root, pax({b"SCHILY.xattr.system.posix_acl_default": acl}) + directory(b"d"), directory(b"d/e"), file(b"d/e/f")
    )
    assert os.listxattr(root / "d") == ["system.posix_acl_default"]
    assert os.listxattr(root / "d" / "e") == []


def test_zeros_become_holes(root: Path) -> None:
    content = b"a" * 70_000 + bytes(8 << 20) + b"z"
    made(root, file(b"f", content), file(b"empty", bytes(4 << 20)))
    assert (root / "f").read_bytes() == content
    assert (root / "f").stat().st_blocks * 512 < 1 << 20
    assert ((root / "empty").stat().st_size, (root / "empty").stat().st_blocks) == (4 << 20, 0)


def test_sparse_files_keep_their_holes(root: Path) -> None:
    records = {b"GNU.sparse.map": b"1048576,4,8589934592,4", b"GNU.sparse.size": b"17179869184"}
    made(root, pax(records) + file(b"s", b"aaaabbbb"))
    assert (root / "s").stat().st_size == 16 << 30
    with open(root / "s", "rb") as stream:
        assert (os.pread(stream.fileno(), 6, 1048575), os.pread(stream.fileno(), 5, 8 << 30)) == (
            b"\0aaaa\0",
            b"bbbb\0",
        )


# --- entries with the same name


def test_the_last_of_equal_names_counts(root: Path) -> None:
    made(
        root,
        file(b"one", b"old"), symlink(b"one", b"/etc/shadow"), file(b"one", b"new"),
        directory(b"two"), file(b"two/inside"), file(b"two", b"file"),
        file(b"three"), directory(b"three"), file(b"three/inside"),
    )  # fmt: skip
    assert (root / "one").read_bytes() == b"new"
    assert (root / "two").read_bytes() == b"file"
    assert paths(root) == ["one", "three", "three/inside", "two"]


def test_a_directory_over_a_directory_changes_its_attributes(root: Path) -> None:
    xattr = {b"SCHILY.xattr.user.old": b"v"}
    made(root, pax(xattr) + directory(b"d"), file(b"d/f"), directory(b"d", mode=0o700, uid=4), file(b"d/g"))
    assert paths(root) == ["d", "d/f", "d/g"]
    assert ((root / "d").stat().st_mode & 0o7777, (root / "d").stat().st_uid) == (0o700, 4)
    assert os.listxattr(root / "d") == []


def test_links_to_a_file_that_is_replaced_later(root: Path) -> None:
    made(root, file(b"a", b"first"), hardlink(b"b", b"a"), file(b"a", b"second"), hardlink(b"c", b"a"))
    assert [(root / name).read_text() for name in "abc"] == ["second", "first", "second"]
    assert not (root / "a").samefile(root / "b")


def test_links_of_every_shape(root: Path) -> None:
    made(
        root, file(b"a"), hardlink(b"a", b"a"), symlink(b"s", b"a"), hardlink(b"t", b"s"), hardlink(b"./d/e", b"/./a"),
        file(b"f"), hardlink(b"f", b"a"),
    )  # fmt: skip
    assert (root / "t").is_symlink()
    assert (root / "t").lstat().st_ino == (root / "s").lstat().st_ino
    assert (root / "a").stat().st_nlink == 3


def test_a_link_over_the_directory_of_its_target(root: Path) -> None:
    assert "does not come before it" in refused(root, file(b"d/x"), hardlink(b"d", b"d/x"))


# --- whiteouts


def test_whiteouts_become_devices(root: Path) -> None:
    made(root, directory(b"d"), file(b"d/.wh.gone"), pax({b"path": b".wh." + b"n" * 255}) + file(b""), file(b".wh..x"))
    assert is_whiteout(root / "d" / "gone")
    assert is_whiteout(root / ("n" * 255))
    assert is_whiteout(root / ".x")
    assert len(paths(root)) == 4


def test_whiteouts_are_links_to_one_device(root: Path) -> None:
    made(root, file(b".wh.a"), file(b"d/x"), file(b"d/.wh.b"), file(b".wh.c"))
    assert (root / "a").lstat().st_ino == (root / "d" / "b").lstat().st_ino == (root / "c").lstat().st_ino


def test_a_whiteout_device_without_links_is_replaced(root: Path) -> None:
    made(root, file(b".wh.a"), file(b"a"), file(b".wh.b"))
    assert is_whiteout(root / "b")
    assert not is_whiteout(root / "a")


def test_a_whiteout_device_with_the_most_links_is_replaced(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source_fd: int, source: bytes, dirfd: int, name: bytes) -> None:
        raise OSError(errno.EMLINK, "Too many links")

    monkeypatch.setattr(sysio, "link_at", link)
    made(root, file(b".wh.a"), file(b".wh.b"))
    assert (root / "a").lstat().st_ino != (root / "b").lstat().st_ino


@pytest.mark.parametrize("order", [0, 1])
def test_a_whiteout_applies_only_to_lower_layers(root: Path, order: int) -> None:
    parts = [file(b".wh.f") + file(b".wh.d"), file(b"f", b"here") + directory(b"d") + file(b"d/x")]
    made(root, *(parts if order == 0 else reversed(parts)))
    assert paths(root) == ["d", "d/x", "f"]
    assert is_opaque(root / "d")
    assert (root / "f").read_text() == "here"


def test_entries_below_a_whiteout_make_an_opaque_directory(root: Path) -> None:
    made(root, file(b".wh.d"), file(b"d/e/f"))
    assert is_opaque(root / "d")
    assert not is_opaque(root / "d" / "e")
    assert paths(root) == ["d", "d/e", "d/e/f"]


@pytest.mark.parametrize("order", [1, -1])
def test_a_whiteout_below_a_whiteout_means_nothing(root: Path, order: int) -> None:
    made(root, *[file(b".wh.d"), file(b"d/.wh.x"), file(b"d/e/.wh.y")][::order])
    assert paths(root) == ["d"]
    assert is_whiteout(root / "d")


def test_whiteouts_in_directories_that_come_later_or_never(root: Path) -> None:
    made(root, file(b"d/.wh.x"), file(b"e/f/.wh.y"), directory(b"d", mode=0o700, mtime=8))
    assert is_whiteout(root / "d" / "x")
    assert is_whiteout(root / "e" / "f" / "y")
    assert ((root / "d").stat().st_mode & 0o777, (root / "d").stat().st_mtime) == (0o700, 8)
    assert paths(root) == ["d", "d/x", "e", "e/f", "e/f/y"]


def test_more_whiteouts_than_are_deferred(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "_MAX_DEFERRED", 3)
    made(root, *(file(b"d/.wh.%d" % number) for number in range(6)), file(b".wh.e"), file(b"e/.wh.x"), file(b"f/g"))
    assert all(is_whiteout(root / "d" / str(number)) for number in range(6))
    assert is_whiteout(root / "e")
    assert len(paths(root)) == 10


@pytest.mark.parametrize("order", [1, -1])
def test_opaque_directories_have_no_whiteouts(root: Path, order: int) -> None:
    made(root, directory(b"d"), *[file(b"d/.wh..wh..opq"), file(b"d/.wh.x"), file(b"d/y")][::order])
    assert is_opaque(root / "d")
    assert paths(root) == ["d", "d/y"]


def test_a_root_can_be_opaque(root: Path) -> None:
    assert is_opaque(made(root, file(b".wh..wh..opq"), file(b"f")))


def test_repeated_opaque_marks_cost_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    archive = directory(b"d") + b"".join(file(b"d/f%d" % n) for n in range(50)) + file(b"d/.wh..wh..opq") * 2000
    monkeypatch.setattr(sysio, "fault_hook", calls.append)
    made(root, archive)
    assert len(calls) < 50 * 10


@pytest.mark.parametrize(
    "mark", [header(b".wh.x", b"5"), symlink(b".wh.x", b"/etc"), file(b".wh.x", b"content"), hardlink(b".wh.x", b"y")]
)
def test_an_entry_of_any_type_is_a_whiteout(root: Path, mark: bytes) -> None:
    assert is_whiteout(made(root, mark) / "x")
    assert paths(root) == ["x"]


def test_aufs_metadata_is_left_out(root: Path) -> None:
    made(root, directory(b".wh..wh.plnk"), file(b".wh..wh.plnk/1.2"), file(b".wh..wh.aufs"), file(b"f"))
    assert paths(root) == ["f"]


def test_overlay_xattrs_in_archives_are_escaped(root: Path) -> None:
    names = ("trusted.overlay.opaque", "trusted.overlay.redirect", "user.overlay.metacopy", "trusted.overlaypy.lazy",
             "user.fuseoverlayfs.opaque", "user.containers.override_stat", "security.selinux", "user.kept")  # fmt: skip
    made(root, pax({f"SCHILY.xattr.{name}".encode(): b"y" for name in names}) + directory(b"d"))
    assert sorted(os.listxattr(root / "d")) == [
        "trusted.overlay.overlay.opaque", "trusted.overlay.overlay.redirect", "user.kept",
        "user.overlay.overlay.metacopy",
    ]  # fmt: skip


# --- what is refused


REFUSED = {
    "out": (file(b"../x"), "../x"),
    "out, later": (file(b"a/../../x"), "leads out"),
    "a symlink as the root": (symlink(b".", b"/etc"), "replace the root"),
    "through an absolute symlink": (symlink(b"s", b"/etc") + file(b"s/shadow"), "s/shadow leads through s"),
    "through a relative symlink": (symlink(b"s", b"../canary") + file(b"s/etc/shadow"), "leads through s"),
    "two steps": (directory(b"s") + symlink(b"s/p", b"..") + symlink(b"s/p/e", b".."), "leads through s/p"),
    "a loop": (symlink(b"a", b"b") + symlink(b"b", b"a") + file(b"a/x"), "leads through a"),
    "a symlink to be deleted in": (symlink(b"s", b"/etc") + directory(b"s/d/e"), "leads through s"),
    "through a file": (file(b"d") + file(b"d/x"), "leads through d"),
    "a link to outside": (hardlink(b"a", b"../canary/etc/shadow"), "leads out"),
    "a link through a symlink": (symlink(b"s", b"../canary/etc") + hardlink(b"a", b"s/shadow"), "come before"),
    "a link to an absolute path": (hardlink(b"a", b"/canary/etc/shadow"), "does not come before"),
    "a link to nothing": (hardlink(b"a", b"b"), "does not come before"),
    "a link to what comes later": (hardlink(b"a", b"b") + file(b"b"), "does not come before"),
    "a link to a deletion": (file(b".wh.b") + hardlink(b"a", b"b"), "does not come before"),
    "a link to a mark": (file(b".wh.b") + hardlink(b"a", b".wh.b"), "does not come before"),
    "a link to a directory": (directory(b"d") + hardlink(b"a", b"d"), "which is a directory"),
    "a link to the root": (hardlink(b"a", b"."), "does not come before"),
    "a device 0:0": (device(b"x", 0, 0), "is a whiteout"),
    "no name to delete": (file(b".wh."), "whiteout without a name"),
    "itself": (file(b"d/.wh.."), "whiteout without a name"),
    "its parent": (file(b"d/.wh..."), "whiteout without a name"),
    "in a deletion": (file(b".wh.d/x"), "is inside a whiteout"),
    "an attribute without a name": (pax({b"SCHILY.xattr.": b"v"}) + file(b"f"), "impossible attribute"),
    "an attribute of 256": (pax({b"SCHILY.xattr.user." + b"n" * 251: b"v"}) + file(b"f"), "impossible attribute"),
    "an attribute of 64 KiB": (pax({b"SCHILY.xattr.user.n": bytes(65537)}) + file(b"f"), "impossible attribute"),
    "an attribute of no kind": (pax({b"SCHILY.xattr.strange": b"v"}) + file(b"f"), "cannot be kept"),
    "8 EiB": (pax({b"GNU.sparse.map": b"0,4", b"GNU.sparse.size": str(2**63 - 1).encode()}) + file(b"f", b"data"), "f"),
    "more than there is room": (header(b"f", size=b"\x80" + (1 << 60).to_bytes(11, "big")), "are free"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_the_archive_is_refused_with_the_name_of_the_entry(root: Path, name: str) -> None:
    archive, reason = REFUSED[name]
    assert reason in refused(root, file(b"good"), archive, file(b"after"))


def test_ten_thousand_xattrs_are_a_user_error(root: Path) -> None:
    many = {b"SCHILY.xattr.user.n%d" % n: b"v" * 20 for n in range(10_000)}
    assert "cannot be kept" in refused(root, pax(many) + file(b"f"))


def _hole(name: bytes, size: int) -> bytes:
    return pax({b"GNU.sparse.map": b"0,1", b"GNU.sparse.size": b"%d" % size}) + file(name, b"x")


@pytest.mark.parametrize("sizes", [[2**63 - 1], [5 << 20], [1 << 20] * 5])
def test_excessive_holes_are_refused(place: Path, sizes: list[int]) -> None:
    """A file system may accept sparse files of any size, but hashing them would take forever."""
    archive = b"".join(_hole(b"f%d" % number, size) for number, size in enumerate(sizes))
    with disk("tmpfs", place / "disk", 1 << 20) as point:
        message = refused(point / "layer", archive)
    assert "the files of the layer have" in message
    assert message.endswith("at most 4 MiB are allowed")


def test_a_moderate_hole_is_accepted(place: Path) -> None:
    with disk("tmpfs", place / "disk", 1 << 20) as point:
        assert (made(point / "layer", _hole(b"f", 4 << 20)) / "f").stat().st_size == 4 << 20


def test_the_longest_path(root: Path) -> None:
    path = b"/".join([b"d"] * 2047)
    made(root, pax({b"path": path}) + file(b""), pax({b"path": path}) + directory(b""), file(b"d"))
    assert paths(root) == ["d"]


def test_strange_names_are_kept(root: Path) -> None:
    names = [b"\xff\xfe", b"a\nb", b"\x1b[31m", "\u202eabc".encode(), b" ", b"-rf", b"\\"]
    made(root, *(file(name) for name in names))
    assert sorted(os.listdir(os.fsencode(root))) == sorted(names)
    assert "\\n" in refused(root / "x", file(b"a\nb") + file(b"a\nb/c"))
    for name in names:
        os.unlink(os.fsencode(root) + b"/" + name)
    for path in sorted(root.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def test_many_entries_in_little_memory(root: Path) -> None:
    class Endless(io.RawIOBase):
        """An archive of many empty files in many directories; a million files would be too slow here."""

        def __init__(self) -> None:
            self.number = 0

        def read(self, size: int = -1) -> bytes:
            if self.number == 200:
                return b""
            self.number += 1
            return b"".join(file(b"d%d/f%d" % (self.number, n)) for n in range(20))

    root.mkdir()
    fd = os.open(root, os.O_RDONLY)
    before = len(os.listdir("/proc/self/fd"))
    unpacker = Unpacker(fd)
    unpack_tar(Endless().read, fd)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    unpacker.close()
    os.close(fd)
    assert sum(len(files) for _, _, files in os.walk(root)) == 4000


# --- other file systems


def test_without_the_right_to_make_devices(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mknod(dirfd: int, name: bytes, mode: int, rdev: int) -> None:
        if stat.S_ISCHR(mode):
            raise PermissionError(1, "Operation not permitted")
        os.mknod(name, mode, rdev, dir_fd=dirfd)

    monkeypatch.setattr(sysio, "mknod_at", mknod)
    made(root, file(b".wh.x"), file(b"d/.wh.y"), file(b"d/.wh..wh..opq"), file(b".wh.z"), directory(b"z"))
    assert paths(root) == [".wh.x", ".wh.z", "d", "z"]
    assert is_opaque(root / "d")


def test_without_extended_attributes(place: Path) -> None:
    with disk("ramfs", place / "disk") as point:
        made(point / "layer", directory(b"d"), file(b"d/.wh..wh..opq"), file(b"d/f"))
        assert paths(point / "layer") == ["d", "d/.wh..wh..opq", "d/f"]


def test_errors_name_the_entry(place: Path) -> None:
    with disk("tmpfs", place / "disk", 1 << 20) as point:
        sentence = refused(point / "layer", file(b"d/large", b"x" * (2 << 20)))
    assert sentence == "cannot unpack d/large: No space left on device"


def test_a_merged_tree_has_ordinary_names(root: Path) -> None:
    root.mkdir()
    fd = os.open(root, os.O_RDONLY)
    unpacker = Unpacker(fd, merged=True)
    unpacker.add(TarEntry(b".wh.x", Kind.FILE))
    unpacker.finish()
    os.close(fd)
    assert paths(root) == [".wh.x"]


def test_a_hole_is_recognised_from_its_edges() -> None:
    zero = bytes(unpacking._HOLE_CHECK)
    assert unpacking._is_zero(memoryview(zero))
    for at in (0, 1, len(zero) // 2, len(zero) - 1):
        assert not unpacking._is_zero(memoryview(zero[:at] + b"x" + zero[at + 1 :]))
    assert not unpacking._is_zero(memoryview(zero[:4095]))
    assert unpacking._is_zero(memoryview(zero[:4096]))


def test_a_damaged_archive_is_a_user_error() -> None:
    assert issubclass(ArchiveError, UserError)
