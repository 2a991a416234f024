"""Manifests: equal layers have equal manifests, every difference shows, and no hostile tree leads outside."""

import errno
import os
import random
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import xxhash

from overlayfs.store import scan
from overlayfs.store.entries import Entry, Type, order
from overlayfs.store.manifest import DamagedError, Manifest
from tests.support.builder import build, write_file
from tests.support.disks import disk
from tests.support.spec import Dir, File, Link, Special, Symlink, Tree, Whiteout

pytestmark = pytest.mark.root

EVERYTHING: Tree = {
    "file": File(b"data", mode=0o4755, uid=3, gid=4, xattrs={"user.a": b"\0value"}),
    "empty": "",
    "sparse": File(pieces=((1 << 20, b"end"),)),
    "dir": Dir({"sub": {"deep": "x"}, "hard": Link("file")}, opaque="trusted", mode=0o1777),
    "dir-neighbour": "sorts before dir/ as bytes and after it in a walk",
    "sym": Symlink(target="/etc/passwd", uid=5),
    "fifo": Special(kind="p"),
    "socket": Special(kind="s"),
    "null": Special(kind="c", major=1, minor=3),
    "disk": Special(kind="b", major=7, minor=9),
    "gone": Whiteout("device"),
    "dotted": Whiteout("file"),
    "marked": Whiteout("xattr"),
    "moved": Dir(xattrs={"trusted.overlay.redirect": b"/dir"}),
    "thin": File(size=9, xattrs={"trusted.overlay.metacopy": b""}),
}


@pytest.fixture
def opened() -> Iterator[Callable[[Path], int]]:
    """Opens directories and closes them at the end."""
    fds: list[int] = []

    def open_directory(path: Path) -> int:
        fds.append(os.open(path, os.O_RDONLY | os.O_DIRECTORY))
        return fds[-1]

    yield open_directory
    for fd in fds:
        os.close(fd)


def _made(path: Path, tree: Tree | Dir) -> Path:
    path.mkdir()
    build(path, tree)
    os.utime(path, ns=(1, 1))
    return path


def _entries(root: int, threads: int | None = None) -> list[Entry]:
    with Manifest.build(root, threads) as manifest:
        return list(manifest.entries)


def _write(manifest: Manifest, here: Path) -> None:
    with open(here / "manifest", "xb") as stream:
        manifest.write(stream.fileno())


def _read(here: Path) -> Manifest:
    return Manifest.open(os.open(here / "manifest", os.O_RDONLY))


HOLES = [
    (((0, b"a" * 5000),), 9 << 20),
    (((3 << 20, b"middle"), ((8 << 20) + 17, b"end")), None),
    (((1 << 20, b"x" * (2 << 20)),), (1 << 20) + (2 << 20) + 1),
    ((), 3 << 20),
    (((0, b"all of it" * 200_000),), None),
]


@pytest.mark.parametrize(("pieces", "size"), HOLES)
def test_a_hole_is_hashed_as_the_zeros_that_it_reads_as(
    place: Path, pieces: tuple[tuple[int, bytes], ...], size: int | None
) -> None:
    write_file(place / "f", File(pieces=pieces, size=size))
    content = (place / "f").read_bytes()
    with open(place / "f", "rb") as stream:
        assert scan.hash_file(stream.fileno()) == (xxhash.xxh3_128_hexdigest(content), len(content))


@pytest.mark.timeout(60)
def test_a_hole_is_not_read(place: Path) -> None:
    """Otherwise hashing a file that takes no space could last for hours."""
    write_file(place / "f", File(pieces=((40 << 30, b"end"),)))
    with open(place / "f", "rb") as stream:
        assert scan.hash_file(stream.fileno())[1] == (40 << 30) + 3


def test_every_kind_of_entry(place: Path, opened: Callable[[Path], int]) -> None:
    found = {entry.path: entry for entry in _entries(opened(_made(place / "l", EVERYTHING)))}
    file = found[b"dir/hard"]
    assert (file.type, file.mode, file.uid, file.gid, file.size) == (Type.FILE, 0o4755, 3, 4, 4)
    assert file.xattrs == ((b"user.a", b"\0value"),) and file.xxh3 == xxhash.xxh3_128_hexdigest(b"data")
    assert file.link is None and found[b"file"].link == b"dir/hard" and found[b"file"].xxh3 is None
    assert found[b"sparse"].xxh3 == xxhash.xxh3_128_hexdigest(bytes(1 << 20) + b"end")
    assert found[b"dir"].xattrs == ((b"trusted.overlay.opaque", b"y"),) and found[b"dir"].mode == 0o1777
    assert found[b"sym"].target == b"/etc/passwd" and found[b"sym"].uid == 5
    assert [found[name].type.value for name in (b"fifo", b"socket", b"null", b"disk")] == ["p", "s", "c", "b"]
    assert found[b"null"].rdev == os.makedev(1, 3) and found[b"disk"].rdev == os.makedev(7, 9)
    assert found[b"gone"] == Entry(path=b"gone", type=Type.WHITEOUT)
    assert found[b".wh.dotted"].type is Type.FILE and found[b"marked"].xattrs[0][0] == b"trusted.overlay.whiteout"
    assert found[b"thin"].xxh3 is None and found[b"thin"].size == 9


def test_order_is_that_of_a_walk(place: Path, opened: Callable[[Path], int]) -> None:
    paths = [entry.path for entry in _entries(opened(_made(place / "l", EVERYTHING)))]
    assert paths == sorted(paths, key=order)
    assert paths.index(b"dir/sub/deep") < paths.index(b"dir-neighbour")


def test_sums(place: Path, opened: Callable[[Path], int]) -> None:
    with Manifest.build(opened(_made(place / "l", EVERYTHING))) as manifest:
        _write(manifest, place)
        kept = manifest.totals
    with _read(place) as again:
        assert again.totals == kept
        assert (len(again.entries), again.flags) == (len(list(again.entries)), ("metacopy", "redirect"))
        assert again.size == 4 + (1 << 20) + 3 + len(EVERYTHING["dir-neighbour"]) + 1 + 9  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", [1, 3])
def test_the_same_layer_gives_the_same_bytes(place: Path, opened: Callable[[Path], int], threads: int) -> None:
    digests = set()
    for name in ("one", "two"):
        root = opened(_made(place / name, EVERYTHING))
        os.setxattr(place / name, "trusted.overlay.impure", b"y")
        os.setxattr(place / name / "file", "trusted.overlay.origin", name.encode())
        os.chmod(place / name / "gone", 0o666 if name == "one" else 0)
        for path in ("marked", ".wh.dotted"):  # the builder leaves these as new
            os.utime(place / name / path, ns=(1, 1))
        with Manifest.build(root, threads) as manifest:
            digests.add(manifest.digest)
    assert len(digests) == 1 and digests.pop().startswith("sha256:")


def test_a_manifest_survives_its_file(place: Path, opened: Callable[[Path], int]) -> None:
    here = opened(place)
    with Manifest.build(opened(_made(place / "l", EVERYTHING)), temp_dir=here) as manifest:
        _write(manifest, place)
        with _read(place) as again:
            assert again.digest == manifest.digest
            assert list(again.entries) == list(manifest.entries)
    assert sorted(os.listdir(place)) == ["l", "manifest"]


def test_blocks_hold_many_entries(place: Path, opened: Callable[[Path], int]) -> None:
    entries = [Entry(path=b"", type=Type.DIR)]
    entries += [Entry(path=b"%06d" % number, type=Type.FILE, mtime_ns=-number) for number in range(3000)]
    entries.append(Entry(path=b"x", type=Type.FILE, mtime_ns=10**20 + 5, xattrs=((b"user.big", bytes(300_000)),)))
    with Manifest.of(entries, opened(place)) as manifest:
        assert list(manifest.entries) == entries


def test_hostile_trees(place: Path, opened: Callable[[Path], int]) -> None:
    root = opened(place)
    here = os.open(place, os.O_PATH)
    for _ in range(1200):  # deeper than the interpreter's stack, longer than a path may be
        os.mkdir(b"d\n" * 20, dir_fd=here)
        inside = os.open(b"d\n" * 20, os.O_PATH, dir_fd=here)
        os.close(here)
        here = inside
    os.symlink("/etc", b"\xff\xfe", dir_fd=here)
    os.mknod(b"fifo", stat.S_IFIFO | 0o600, dir_fd=here)
    os.close(here)
    found = _entries(root)
    subprocess.run(["rm", "-rf", b"d\n" * 20], cwd=place, check=True)  # pytest's own way is recursive
    assert len(found) == 1203
    assert found[-1].path.endswith(b"\xff\xfe") and found[-1].target == b"/etc"


def test_progress_and_an_early_end(place: Path, opened: Callable[[Path], int]) -> None:
    root = opened(_made(place / "l", {f"f{i}": "12345" for i in range(300)}))
    calls: list[tuple[int, int]] = []
    Manifest.build(root, progress=lambda entries, size: calls.append((entries, size))).close()
    assert calls[-1] == (301, 1500) and calls == sorted(calls)

    def stop(entries: int, size: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Manifest.build(root, progress=stop, temp_dir=opened(place))
    assert os.listdir(place) == ["l"]


def test_an_early_end_stops_the_threads(place: Path, opened: Callable[[Path], int]) -> None:
    root = opened(_made(place / "l", {f"f{i}": File(pieces=((1 << 24, b"x"),)) for i in range(40)}))
    scanning = scan.scan(root, threads=3)
    next(scanning)
    scanning.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("scan")]


def test_an_unreadable_object_is_named(place: Path, opened: Callable[[Path], int]) -> None:
    root = opened(_made(place / "l", {"dir": {"file": "x"}, "other": "y"}))
    with disk("tmpfs", place / "disk") as mnt:
        (mnt / "inside").touch()
        subprocess.run(["mount", "--bind", mnt, place / "l" / "dir"], check=True)
        try:
            found = {each.entry.path: each.error for each in scan.scan(root)}
            with pytest.raises(OSError) as raised:
                Manifest.build(root)
        finally:
            subprocess.run(["umount", place / "l" / "dir"], check=True)
    error = found.pop(b"dir")
    assert error is not None and error.errno == errno.EXDEV
    assert found == {b"": None, b"other": None}
    assert raised.value.filename == b"dir"


def test_a_file_that_changes_meanwhile_is_named(
    place: Path, opened: Callable[[Path], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = opened(_made(place / "l", {"grows": "12345", "big": bytes(200_000), "stays": "x", "replaced": "old"}))
    opening = scan._open

    def change_before_opening(dirfd: int, name: bytes) -> int:
        if name in (b"grows", b"big"):
            os.truncate(place / "l" / os.fsdecode(name), 150_000)
        if name == b"replaced":
            (place / "new").write_text("new")
            os.replace(place / "new", place / "l" / "replaced")
        return opening(dirfd, name)

    monkeypatch.setattr(scan, "_open", change_before_opening)
    found = {each.entry.path: each.error for each in scan.scan(root)}
    assert {path for path, error in found.items() if error} == {b"grows", b"big", b"replaced"}
    assert "changed while it was read" in str(found[b"grows"])


@pytest.mark.parametrize("at", range(0, 400, 7))
def test_a_damaged_manifest_has_another_digest(place: Path, opened: Callable[[Path], int], at: int) -> None:
    here = opened(place)
    with Manifest.build(opened(_made(place / "l", EVERYTHING)), temp_dir=here) as manifest:
        _write(manifest, place)
        digest = manifest.digest
    bytes_ = bytearray((place / "manifest").read_bytes())
    bytes_[at] ^= 4
    (place / "manifest").write_bytes(bytes_)
    with _read(place) as damaged:
        assert damaged.digest != digest
        with suppress(DamagedError):
            list(damaged.entries)


@pytest.mark.parametrize(
    "paths",
    [[b"a"], [b"", b"b", b"a"], [b"", b"a", b"a"], [b"", b"a/b"], [b"", b"."], [b"", b"a", b"a/.."], [b"", b""]],
    ids=str,
)
def test_entries_that_no_walk_yields_are_refused(
    place: Path, opened: Callable[[Path], int], paths: list[bytes]
) -> None:
    entries = [Entry(path=path, type=Type.DIR) for path in paths]
    with Manifest.of(entries, opened(place)) as manifest, pytest.raises(DamagedError):
        list(manifest.entries)


def test_damage_raises_nothing_but_damaged_error(place: Path, opened: Callable[[Path], int]) -> None:
    with Manifest.build(opened(_made(place / "l", EVERYTHING))) as manifest:
        _write(manifest, place)
    good = (place / "manifest").read_bytes()
    chosen = random.Random(1)
    for _ in range(2000):
        damaged = bytearray(good)
        for _ in range(chosen.choice((1, 1, 3))):
            damaged[chosen.randrange(len(damaged))] = chosen.randrange(256)
        (place / "manifest").write_bytes(damaged[: chosen.choice((len(damaged), chosen.randrange(len(damaged))))])
        with _read(place) as again, suppress(DamagedError):
            list(again.entries)
    for claim in (b"\xdd\xff\xff\xff\xff", b"\x91" * 100_000, b"\xdd\0\0\0\1\xc6\xff\xff\xff\xff"):
        (place / "manifest").write_bytes(b"overlayfs manifest 1\n" + len(claim).to_bytes(4, "little") + claim)
        with _read(place) as again, pytest.raises(DamagedError):
            list(again.entries)
