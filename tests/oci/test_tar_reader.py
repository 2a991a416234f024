"""Reading tar archives: every format in use, and damage, which is always noticed and never takes memory."""

import io
import os
import random
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overlayfs.oci import tar_reader, tar_writer
from overlayfs.oci.tar_entry import ArchiveError, Kind, TarEntry, safe_path, shown
from overlayfs.oci.tar_reader import TarReader
from tests.oci import archives
from tests.oci.archives import END, directory, file, header, pax


def read(archive: bytes) -> list[tuple[TarEntry, bytes]]:
    """All entries with their data."""
    reader = TarReader(io.BytesIO(archive).read)
    return [(entry, b"".join(map(bytes, reader.pieces()))) for entry in reader]


def entries(archive: bytes) -> list[TarEntry]:
    return [entry for entry, _ in read(archive)]


def refusal(archive: bytes) -> str:
    """The message with which an archive is refused."""
    with pytest.raises(ArchiveError) as caught:
        read(archive)
    return str(caught.value)


# --- names


@pytest.mark.parametrize(
    ("name", "path"),
    [
        (b"a", b"a"),
        (b"./././x", b"x"),
        (b"/etc/x", b"etc/x"),
        (b"a//b/", b"a/b"),
        (b"a/../b", b"b"),
        (b"a/b/../../c", b"c"),
        (b"./", b""),
        (b"x" * 255, b"x" * 255),
        (b".wh." + b"x" * 255, b".wh." + b"x" * 255),
        (b"\xff\n\x1b", b"\xff\n\x1b"),
    ],
)
def test_names_are_counted_from_the_root(name: bytes, path: bytes) -> None:
    assert safe_path(name) == path


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (b"../x", "leads out"),
        (b"a/../../x", "leads out"),
        (b"/..", "leads out"),
        (b"a\0b", "NUL"),
        (b"x" * 256, "too long"),
        (b".wh." + b"x" * 256, "too long"),
        (b"a/" * 2048 + b"b", "too long"),
    ],
)
def test_names_that_are_refused(name: bytes, reason: str) -> None:
    with pytest.raises(ArchiveError, match=reason):
        safe_path(name)


@given(st.binary(max_size=600))
def test_a_shown_name_fits_a_line(name: bytes) -> None:
    assert shown(name).isprintable()
    assert len(shown(name)) < 170


# --- archives of other programs


FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
LONG = "d/" * 60 + "n" * 150


def _members(form: str) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    for name, kind, data in (
        ("dir", tarfile.DIRTYPE, b""),
        ("dir/file", tarfile.REGTYPE, b"content" * 1000),
        ("empty", tarfile.REGTYPE, b""),
        ("link", tarfile.SYMTYPE, b""),
        ("hard", tarfile.LNKTYPE, b""),
        ("fifo", tarfile.FIFOTYPE, b""),
        ("char", tarfile.CHRTYPE, b""),
        ("block", tarfile.BLKTYPE, b""),
        *((("ä" * 40, tarfile.REGTYPE, b"x"), (LONG, tarfile.REGTYPE, b"long")) if form != "ustar" else ()),
    ):
        member = tarfile.TarInfo(name)
        member.type, member.size = kind, len(data)
        member.mode, member.uid, member.gid, member.mtime = 0o4755, 1000, 100, archives.EPOCH
        if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            member.linkname = "dir/file" if form == "ustar" else LONG
        if kind in (tarfile.CHRTYPE, tarfile.BLKTYPE):
            member.devmajor, member.devminor = 8, 3
        if form == "gnu" and name == "dir/file":
            member.uid, member.mtime = 2**31, -5
        if form == "pax" and name == "dir/file":
            member.pax_headers = {"SCHILY.xattr.user.x": "v\n=", "mtime": "12.000000345", "uid": str(2**32 - 2)}
        yield member, data


@pytest.mark.parametrize("form", FORMATS)
def test_what_the_standard_library_writes(form: str) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=FORMATS[form]) as archive:
        for member, data in _members(form):
            archive.addfile(member, io.BytesIO(data))
    found = read(stream.getvalue())
    expected = list(_members(form))
    assert [entry.path for entry, _ in found] == [os.fsencode(member.name) for member, _ in expected]
    assert [data for _, data in found] == [data for _, data in expected]
    by_path = {entry.path: entry for entry, _ in found}
    assert [entry.kind for entry, _ in found][:8] == [
        Kind.DIRECTORY, Kind.FILE, Kind.FILE, Kind.SYMLINK, Kind.HARDLINK, Kind.FIFO, Kind.CHARACTER, Kind.BLOCK,
    ]  # fmt: skip
    assert by_path[b"link"].target == by_path[b"hard"].target == (b"dir/file" if form == "ustar" else LONG.encode())
    assert by_path[b"char"].device == by_path[b"block"].device == (8, 3)
    plain = by_path[b"empty"]
    assert (plain.mode, plain.uid, plain.gid, plain.mtime_ns) == (0o4755, 1000, 100, archives.EPOCH * 10**9)
    special = by_path[b"dir/file"]
    if form == "gnu":
        assert (special.uid, special.mtime_ns) == (2**31, -5 * 10**9)
    if form == "pax":
        assert (special.uid, special.mtime_ns) == (2**32 - 2, 12_000_000_345)
        assert special.xattrs == {b"user.x": b"v\n="}


SPARSE = [
    ["--format=gnu"],
    ["--format=posix", "--sparse-version=0.0"],
    ["--format=posix", "--sparse-version=0.1"],
    ["--format=posix", "--sparse-version=1.0"],
]


@pytest.mark.parametrize("options", SPARSE, ids=lambda words: words[-1])
@pytest.mark.parametrize("pieces", [1, 3, 60])
def test_sparse_files_of_gnu_tar(place: Path, options: list[str], pieces: int) -> None:
    with open(place / "sparse", "wb") as stream:
        for number in range(pieces):
            os.pwrite(stream.fileno(), b"%05d" % number * 1000, (2 * number + 1) << 20)
        stream.truncate((2 * pieces + 3) << 20)
    made = subprocess.run(["tar", "-C", place, "-S", *options, "-cf", "-", "sparse"], capture_output=True, check=True)
    assert len(made.stdout) < 1 << 20
    ((entry, data),) = read(made.stdout)
    content = (place / "sparse").read_bytes()
    assert entry.size == len(content)
    assert entry.extents is not None
    assert len(entry.extents) == pieces
    rebuilt, at = bytearray(entry.size), 0
    for offset, length in entry.extents:
        rebuilt[offset : offset + length] = data[at : at + length]
        at += length
    assert bytes(rebuilt) == content


def test_old_archives_have_directories_by_their_slash() -> None:
    (entry,) = entries(header(b"d/", b"\0", magic=bytes(8)) + END)
    assert entry.kind is Kind.DIRECTORY


def test_only_ustar_has_a_prefix() -> None:
    for magic, path in ((b"ustar\x0000", b"p/n"), (b"ustar  \0", b"n"), (bytes(8), b"n")):
        assert [entry.path for entry in entries(header(b"n", prefix=b"p", magic=magic) + END)] == [path]


def test_a_global_header_is_ignored() -> None:
    """As in Go's archive/tar, which other programs use for layers."""
    (entry,) = entries(pax({b"path": b"elsewhere", b"mtime": b"1"}, b"g") + file(b"here") + END)
    assert entry.path == b"here"
    assert entry.mtime_ns == archives.EPOCH * 10**9


def test_only_files_have_data() -> None:
    """The size of a directory or link is ignored, as Go does: with two interpretations, one would miss entries."""
    found = entries(header(b"d", b"5", size=512) + file(b"hidden?") + END)
    assert [entry.path for entry in found] == [b"d", b"hidden?"]


def test_a_record_without_a_value_removes_an_earlier_one() -> None:
    assert [entry.path for entry in entries(pax(archives.record(b"path", b"x") + b"8 path=\n") + file(b"y") + END)] == [
        b"y"
    ]


def test_trailing_bytes_are_read_for_the_digest() -> None:
    stream = io.BytesIO(file(b"a") + END + b"junk" * 1000)
    reader = TarReader(stream.read)
    assert [entry.path for entry in reader] == [b"a"]
    reader.finish()
    assert stream.read() == b""


def test_an_archive_may_end_without_its_mark() -> None:
    assert [entry.path for entry in entries(file(b"a", b"data"))] == [b"a"]
    assert entries(b"") == []


# --- invalid archives


NUMBERS = [
    (header(b"n", size=b"\x80" + bytes(3) + b"\xff" * 8), "impossible size"),
    (header(b"n", size=b"\xff" * 12), "impossible size -1"),
    (header(b"n", size=b"12x4"), "damaged size"),
    (header(b"n", uid=b"\xff" * 8), "impossible user or group -1"),
    (pax({b"uid": b"4294967295"}) + header(b"n"), "impossible user or group"),
    (pax({b"gid": b"-1"}) + header(b"n"), "damaged number"),
    (pax({b"size": b"9" * 19}) + header(b"n"), "impossible size"),
    (pax({b"mtime": b"9223372036854775808"}) + header(b"n"), "impossible time"),
    (pax({b"mtime": b"nan"}) + header(b"n"), "impossible time"),
    (header(b"n", mtime=b"\x80" + b"\xff" * 11), "impossible time"),
    (header(b"n", mtime=b"\xff\x80" + bytes(10)), "impossible time"),
    (pax({b"path": b"a\0b"}) + header(b"n"), "NUL"),
    (header(b"d", b"3", major=b"7777777\0"), "impossible number"),
]


@pytest.mark.parametrize(("archive", "reason"), NUMBERS, ids=[reason for _, reason in NUMBERS])
def test_impossible_numbers(archive: bytes, reason: str) -> None:
    assert reason in refusal(archive + END)


DAMAGED = [
    (b"x" * 512, "sum of a header"),
    (file(b"n", b"data")[:-600], "ends too early"),
    (file(b"n", b"d" * 5000)[:2000], "ends too early"),
    (bytes(512) + file(b"n"), "end mark"),
    (pax({b"path": b"n"}) + END, "announces another entry"),
    (pax(b"12 path=x\n") + file(b"n"), "damaged extended header"),
    (pax(b"99999999999999999999999 path=x\n") + file(b"n"), "damaged extended header"),
    (pax(b"-5 path=x\n") + file(b"n"), "damaged extended header"),
    (pax(b"5 =x\n") + file(b"n"), "damaged key"),
    (pax({b"a": b"b"}) * 100 + file(b"n"), "too many extended headers"),
    (header(b"n", b"x", size=1 << 30), "extended header of"),
    (header(b"n", b"L", size=1 << 30), "extended header of"),
    (header(b"n", b"Z"), "unknown type"),
    (header(b"n", b"M"), "unknown type"),
    (header(b".", b"0"), "replace the root"),
    (header(b"/", b"2", target=b"x"), "replace the root"),
    (header(b"", b"5"), "replace the root"),
    (archives.hardlink(b"a", b"../../etc/shadow"), "leads out"),
    (archives.symlink(b"a", b""), "impossible target"),
    (pax({b"linkpath": b"t" * 5000}) + archives.symlink(b"a", b"x"), "impossible target"),
    (pax({b"linkpath": b"a\0b"}) + archives.symlink(b"a", b"x"), "impossible target"),
]


@pytest.mark.parametrize(("archive", "reason"), DAMAGED, ids=[reason for _, reason in DAMAGED])
def test_damage_is_refused(archive: bytes, reason: str) -> None:
    assert reason in refusal(archive + END if reason not in ("ends too early", "end mark") else archive)


def _sparse(records: dict[bytes, bytes], data: bytes) -> bytes:
    return pax(records) + file(b"s", data) + END


SPARSE_DAMAGE = [
    {b"GNU.sparse.map": b"0,4,2,4", b"GNU.sparse.size": b"100"},  # they overlap
    {b"GNU.sparse.map": b"50,4,0,4", b"GNU.sparse.size": b"100"},  # they descend
    {b"GNU.sparse.map": b"99,8", b"GNU.sparse.size": b"100"},  # beyond the end
    {b"GNU.sparse.map": b"0,4", b"GNU.sparse.size": b"100"},  # less than there is
    {b"GNU.sparse.map": b"0,400", b"GNU.sparse.size": b"1000"},  # more than there is
    {b"GNU.sparse.map": b"0,-8", b"GNU.sparse.size": b"100"},
    {b"GNU.sparse.map": b"0", b"GNU.sparse.size": b"100"},
    {b"GNU.sparse.map": b"9223372036854775807,8", b"GNU.sparse.size": b"9223372036854775807"},
    {b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0", b"GNU.sparse.realsize": b"9"},  # the map is 8 bytes of data
]


@pytest.mark.parametrize("records", SPARSE_DAMAGE)
def test_damaged_maps_are_refused(records: dict[bytes, bytes]) -> None:
    assert "map" in refusal(_sparse(records, b"8 bytes!"))


def test_an_endless_sparse_map_is_refused() -> None:
    records = {b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0", b"GNU.sparse.realsize": b"9"}
    assert "too many pieces" in refusal(_sparse(records, padded_map(1 << 40)))
    assert "map" in refusal(_sparse(records, b"3" * 5000))


def padded_map(count: int) -> bytes:
    return archives.padded(b"%d\n" % count)


def test_empty_extents_are_dropped() -> None:
    ((entry, data),) = read(_sparse({b"GNU.sparse.map": b"0,0,4,8,100,0", b"GNU.sparse.size": b"100"}, b"8 bytes!"))
    assert entry.extents == ((4, 8),)
    assert data == b"8 bytes!"


# --- properties


SAMPLE = (
    directory(b"d/")
    + pax({b"SCHILY.xattr.user.x": b"v", b"mtime": b"5.5"})
    + file(b"d/f", b"data" * 300)
    + archives.symlink(b"l", b"d/f")
    + header(b"././@LongLink", b"L", size=200)
    + archives.padded(b"n" * 200)
    + file(b"short")
    + _sparse({b"GNU.sparse.map": b"0,4,8,4", b"GNU.sparse.size": b"100"}, b"8 bytes!")
)


def test_every_cut_is_noticed_or_between_entries() -> None:
    whole = [entry.path[:50] for entry in entries(SAMPLE) if len(entry.path) < 200]
    for cut in range(0, len(SAMPLE), 97):
        try:
            found = [entry.path[:50] for entry in entries(SAMPLE[:cut]) if len(entry.path) < 200]
        except ArchiveError:
            continue
        assert found == whole[: len(found)]


def test_random_damage_raises_nothing_else() -> None:
    source = random.Random(7)
    refused = []
    for _ in range(3000):
        broken = bytearray(SAMPLE)
        for _ in range(source.randint(1, 6)):
            at = source.randrange(len(broken))
            broken[at] = source.randrange(256)
        block = 512 * source.randrange(len(broken) // 512)
        broken[block : block + 512] = archives.sealed(bytes(broken[block : block + 512]))
        try:
            read(bytes(broken))
        except ArchiveError as error:
            refused.append(str(error))
    assert len(refused) > 1000
    assert all(sentence.isprintable() for sentence in refused)


NAMES = st.lists(
    st.binary(min_size=1, max_size=120).filter(lambda n: b"/" not in n and b"\0" not in n and n not in (b".", b"..")),
    min_size=1,
    max_size=4,
).map(b"/".join)
KINDS = st.sampled_from(list(Kind))
IDS = st.one_of(st.integers(0, 3000), st.integers(0, 2**32 - 2))
TIMES = st.one_of(st.integers(-(10**19), 10**20), st.integers(0, 10**10).map(lambda s: s * 10**9))
XATTRS = st.dictionaries(
    st.binary(min_size=1, max_size=40).filter(lambda n: b"=" not in n and b"\0" not in n),
    st.binary(min_size=1, max_size=300),
    max_size=3,
)


@st.composite
def written_entries(draw: st.DrawFn) -> TarEntry:
    kind = draw(KINDS)
    links = kind in (Kind.HARDLINK, Kind.SYMLINK)
    return TarEntry(
        draw(NAMES),
        kind,
        draw(st.integers(0, 0o7777)),
        draw(IDS),
        draw(IDS),
        draw(TIMES),
        draw(st.integers(0, 2000)) if kind is Kind.FILE else 0,
        draw(NAMES) if links else b"",
        (draw(st.integers(0, 4095)), draw(st.integers(0, 2**20 - 1)))
        if kind in (Kind.BLOCK, Kind.CHARACTER)
        else (0, 0),
        draw(XATTRS),
    )


@settings(deadline=None)
@given(st.lists(written_entries(), max_size=5))
def test_reading_inverts_writing(made: list[TarEntry]) -> None:
    archive = b"".join(tar_writer.header(e) + b"z" * e.size + tar_writer.padding(e.size) for e in made) + tar_writer.END
    found = read(archive)
    assert [entry for entry, _ in found] == made
    assert [data for _, data in found] == [b"z" * entry.size for entry in made]


@settings(deadline=None)
@given(st.lists(written_entries(), max_size=4))
def test_the_standard_library_reads_what_we_write(made: list[TarEntry]) -> None:
    made = [entry for entry in made if abs(entry.mtime_ns) < 10**18]
    archive = b"".join(tar_writer.header(e) + b"z" * e.size + tar_writer.padding(e.size) for e in made) + tar_writer.END
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        found = opened.getmembers()
    # tarfile strips trailing slashes, and decodes PAX names that are not UTF-8 as Latin-1.
    assert [os.fsencode(member.name) for member in found if member.name.isascii()] == [
        entry.path for entry, member in zip(made, found, strict=True) if member.name.isascii()
    ]
    assert [(m.mode, m.uid, m.gid, m.size) for m in found] == [(e.mode, e.uid, e.gid, e.size) for e in made]


@pytest.mark.parametrize("size", [0, 5, 8**11 - 1, 8**11, 2**40])
def test_a_file_header_is_always_one_block(size: int) -> None:
    block = tar_writer.file_header(b"blobs/x", size)
    assert len(block) == tar_reader.BLOCK
    reader = TarReader(io.BytesIO(block).read)
    entry = reader.next()
    assert entry is not None
    assert (entry.path, entry.size) == (b"blobs/x", size)


def test_gnu_tar_lists_what_we_write() -> None:
    made = [
        TarEntry(b"d" * 90 + b"/" + b"n" * 90, Kind.FILE, size=3),
        TarEntry("ä".encode(), Kind.DIRECTORY, mtime_ns=15 * 10**8),
    ]
    archive = b"".join(tar_writer.header(e) + b"z" * e.size + tar_writer.padding(e.size) for e in made) + tar_writer.END
    listed = subprocess.run(
        ["tar", "-tf", "-"], input=archive, capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"}
    )
    assert listed.stdout.split(b"\n")[:1] == [made[0].path]
    assert listed.stderr == b""
