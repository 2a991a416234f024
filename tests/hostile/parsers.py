"""Every parser of untrusted input, with valid inputs, a way to change them, and the errors that it may raise.

`fuzz` is run by `tests.support.fork_server`, with limits for its memory and for the time of each input.
"""

import io
import json
import os
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any

from overlayfs.errors import UsageError, UserError
from overlayfs.format import metacopy, nlink, opaque, origin, override, redirect, whiteout, xattrs
from overlayfs.mount.options import Draft
from overlayfs.oci import compression, image, image_layouts, image_spec, platforms, reference
from overlayfs.oci.compression import Compression, DecompressingReader
from overlayfs.oci.tar_entry import ArchiveError, shown
from overlayfs.oci.tar_reader import TarReader
from overlayfs.store import layout, records
from overlayfs.store.entries import Entry, Type
from overlayfs.store.manifest import DamagedError, Manifest
from tests.hostile import mutate
from tests.oci import archives

MEMORY = 192 << 20
"""Bytes of address space that a parser may allocate for inputs of a few KiB."""
SLOWEST = 2.0
"""Seconds of CPU time for one input, which may include a garbage collection."""

Make = Callable[[Random], Any]
Parse = Callable[[Any], object]


@dataclass(frozen=True)
class Parser:
    """make: gives an input. parse: takes it, or raises one of `refusals`, a sentence of so many characters at most."""

    make: Make
    parse: Parse
    refusals: tuple[type[BaseException], ...]
    longest: int = 1000


@dataclass
class Found:
    """How many inputs were accepted and refused, and what went wrong."""

    answers: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def fuzz(name: str, seed: int, count: int) -> Found:
    """Run a parser on `count` inputs made from a seed."""
    return run(PARSERS[name], name, seed, count)


def run(parser: Parser, name: str, seed: int, count: int) -> Found:
    """Run a parser that is not in the table."""
    random, found = Random(f"{name} {seed}"), Found()
    _bound_memory()
    for number in range(count):
        given = parser.make(random)
        began = time.thread_time()
        try:
            parser.parse(given)
            found.answers["taken"] += 1
        except parser.refusals as error:
            found.answers["refused"] += 1
            if isinstance(error, UserError) and not 0 < len(str(error)) <= parser.longest:
                found.wrong.append(f"seed {seed}, input {number}: no sentence: {str(error)[:200]!r}")
        except BaseException as error:
            found.wrong.append(f"seed {seed}, input {number}: {error!r:.300} for {given!r:.600}")
        if time.thread_time() - began > SLOWEST:
            found.wrong.append(f"seed {seed}, input {number}: more than {SLOWEST} s for {given!r:.600}")
    return found


def _bound_memory() -> None:
    with open("/proc/self/statm", encoding="ascii") as stream:
        now = int(stream.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))


# --- archives ----------------------------------------------------------------------------------------------


def _blocks() -> tuple[bytes, ...]:
    sparse = {b"GNU.sparse.map": b"0,4,8,4", b"GNU.sparse.size": b"100"}
    newest = {b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0", b"GNU.sparse.realsize": b"100"}
    old = archives.header(b"old", b"S", size=4)
    old = archives.sealed(old[:386] + b"%011o\0%011o\0" % (0, 4) + old[410:483] + b"%011o\0" % 4 + old[495:])
    return (
        archives.directory(b"d"), archives.file(b"d/f", b"data" * 300), archives.file(b"g"),
        archives.symlink(b"s", b"/etc"), archives.hardlink(b"h", b"g"), archives.device(b"c", 1, 3),
        archives.header(b"p", b"6"), archives.file(b".wh.x"), archives.file(b"d/.wh..wh..opq"),
        archives.pax({b"SCHILY.xattr.user.x": b"v", b"mtime": b"5.5"}) + archives.file(b"x", b"x"),
        archives.pax(sparse) + archives.file(b"sparse", b"8 bytes!"),
        archives.pax(newest) + archives.file(b"newest", archives.padded(b"1\n0\n4\n") + b"data"),
        old + archives.padded(b"data"),
        archives.header(b"././@LongLink", b"L", size=200) + archives.padded(b"n" * 200) + archives.file(b"short"),
    )  # fmt: skip


BLOCKS = _blocks()


def _read_tar(archive: bytes) -> None:
    reader = TarReader(io.BytesIO(archive).read)
    for entry in reader:
        shown(entry.path)
        for _ in reader.pieces():
            pass
    reader.finish()


def _streams() -> list[tuple[Compression, bytes]]:
    found = []
    for kind in (Compression.GZIP, Compression.ZSTD):
        for data in (b"", b"x" * 5000, bytes(3 << 20), os.urandom(3000)):
            squeeze = compression.compressor(kind)
            try:
                found.append((kind, b"".join([*squeeze.feed(data), *squeeze.finish()])))
            finally:
                squeeze.close()
    return found


def _make_stream(streams: list[tuple[Compression, bytes]], random: Random) -> tuple[Compression, bytes]:
    kind, data = random.choice(streams)
    return kind, mutate.spoil(random, data, [other for _, other in streams])


def _expand(given: tuple[Compression, bytes]) -> None:
    kind, data = given
    compression.detect(data)
    expanded = DecompressingReader(io.BytesIO(data).read, kind)
    for _ in range(200):  # a compression bomb is read in pieces; the reader decides when to stop
        if not expanded.read(1 << 16):
            return


# --- documents of images -----------------------------------------------------------------------------------

DIGEST = "sha256:" + "ab" * 32
DESCRIPTOR = {"mediaType": image_spec.OCI_LAYER_GZIP, "digest": DIGEST, "size": 100, "annotations": {"a": "b"},
              "platform": {"architecture": "amd64", "os": "linux", "variant": "v8"}}  # fmt: skip
MANIFEST = {"schemaVersion": 2, "mediaType": image_spec.OCI_MANIFEST,
            "config": {**DESCRIPTOR, "mediaType": image_spec.OCI_CONFIG}, "layers": [DESCRIPTOR, DESCRIPTOR],
            "annotations": {"x": "y"}}  # fmt: skip
INDEX = {"schemaVersion": 2, "mediaType": image_spec.OCI_INDEX,
         "manifests": [{**DESCRIPTOR, "mediaType": image_spec.OCI_MANIFEST}]}  # fmt: skip
CONFIG = {"architecture": "amd64", "os": "linux", "created": "2020-01-01T00:00:00Z", "config": {"Env": ["A=b"]},
          "rootfs": {"type": "layers", "diff_ids": [DIGEST]},
          "history": [{"created_by": "x", "empty_layer": True}, {"comment": "y"}]}  # fmt: skip
SAVED = [{"Config": "config.json", "RepoTags": ["a:1"], "Layers": ["layer.tar"]}]


class _Files:
    """A layout in memory."""

    def __init__(self, members: dict[bytes, bytes]) -> None:
        self._members = members

    def __contains__(self, name: bytes) -> bool:
        return name in self._members

    def size(self, name: bytes) -> int:
        return len(self._of(name))

    def stream(self, name: bytes) -> Callable[[int], bytes]:
        return io.BytesIO(self._of(name)).read

    def _of(self, name: bytes) -> bytes:
        if name not in self._members:
            raise ArchiveError("it is not there")
        return self._members[name]


def _make_layout(random: Random) -> dict[bytes, bytes]:
    """A layout in which one document is changed and all digests are corrected; or a docker-archive."""
    spoilt = random.choice(("layout", "index", "manifest", "config"))
    if random.random() < 0.3:
        saved = mutate.document(random, SAVED) if spoilt in ("index", "manifest") else json.dumps(SAVED).encode()
        about = mutate.document(random, CONFIG) if spoilt in ("layout", "config") else json.dumps(CONFIG).encode()
        return {b"manifest.json": saved, b"config.json": about, b"layer.tar": b""}
    members: dict[bytes, bytes] = {}

    def put(kind: str, valid: object) -> dict[str, object]:
        data = mutate.document(random, valid) if spoilt == kind else json.dumps(valid).encode()
        digest = image_spec.digest_of(data)
        members[b"blobs/sha256/" + digest[7:].encode()] = data
        return {"digest": digest, "size": len(data)}

    config = {**DESCRIPTOR, "mediaType": image_spec.OCI_CONFIG, **put("config", CONFIG)}
    manifest = put("manifest", {**MANIFEST, "config": config, "layers": [DESCRIPTOR]})
    index = {**INDEX, "manifests": [{"mediaType": image_spec.OCI_MANIFEST, **manifest}]}
    members[b"index.json"] = mutate.document(random, index) if spoilt == "index" else json.dumps(index).encode()
    version = {"imageLayoutVersion": "1.0.0"}
    members[b"oci-layout"] = mutate.document(random, version) if spoilt == "layout" else json.dumps(version).encode()
    return members


def _find_image(members: dict[bytes, bytes]) -> None:
    found = image_layouts.find_image(_Files(members), None, None, "it")
    image.image_record("x:1", found.config, ())


def _make_manifest(random: Random) -> tuple[bytes, str]:
    kind, valid = random.choice(((image_spec.OCI_MANIFEST, MANIFEST), (image_spec.OCI_INDEX, INDEX)))
    announced = (
        kind if random.random() < 0.9 else random.choice((*image_spec.MANIFESTS, *image_spec.INDEXES, "text/plain"))
    )
    return mutate.document(random, valid), announced


def _make_config(random: Random) -> bytes:
    return mutate.document(random, CONFIG)


# --- records of the store ----------------------------------------------------------------------------------

ID = "ab" * 16
RECORDS: dict[type, Any] = {
    records.LayerRecord: {"id": ID, "state": "complete", "created": "2020-01-01T00:00:00Z", "digest": DIGEST, "size": 7,
                          "flags": ["redirect"], "below": [ID]},
    records.ImageRecord: {"name": "a:1", "layers": [ID], "created": "2020-01-01T00:00:00Z", "config": {"Env": ["A=b"]},
                          "history": [{"created": "x", "empty_layer": True}], "annotations": {"a": "b"}},
    records.WorkspaceRecord: {"name": "w", "image": "a:1", "layers": [ID], "ephemeral": False, "created": "x"},
    records.Intent: {"layer": ID, "workspace": "w"},
}  # fmt: skip


def _make_record(random: Random) -> tuple[type, bytes]:
    kind = random.choice(list(RECORDS))
    data = mutate.document(random, RECORDS[kind])
    return kind, records.with_checksum(data) if random.random() < 0.8 else data


def _read_record(given: tuple[Any, bytes]) -> None:
    kind, data = given
    records.decode(data, kind, "the record")


def _layer_entries() -> Iterator[Entry]:
    yield Entry(path=b"", type=Type.DIR, mode=0o755)
    yield Entry(path=b"d", type=Type.DIR, mode=0o755, xattrs=((b"user.x", b"v"), (b"trusted.overlay.redirect", b"/x")))
    yield Entry(path=b"d/f", type=Type.FILE, size=5, mtime_ns=-5, xxh3="ab" * 16)
    yield Entry(path=b"d/l", type=Type.SYMLINK, target=b"/etc")
    yield Entry(path=b"e", type=Type.FILE, link=b"d/f")
    yield Entry(path=b"w", type=Type.WHITEOUT)


def _manifest_bytes() -> bytes:
    with Manifest.of(_layer_entries()) as manifest:
        fd = os.memfd_create("manifest")
        manifest.write(fd)
        data = os.pread(fd, 1 << 20, 0)
        os.close(fd)
    return data


def _make_layer_manifest(valid: bytes, random: Random) -> bytes:
    """Mostly changed within the block, with its length corrected."""
    head, start = 21, 25
    if random.random() < 0.2:
        return mutate.spoil(random, valid)
    block = mutate.spoil(random, valid[start:])
    return valid[:head] + len(block).to_bytes(4, "little") + block


def _read_layer_manifest(data: bytes) -> None:
    fd = os.memfd_create("manifest")
    os.write(fd, data)
    with Manifest.open(fd) as manifest:
        for _ in manifest.entries:
            pass
        len(manifest.entries)


# --- attributes of layers ----------------------------------------------------------------------------------

MARKS: dict[str, tuple[Parse, tuple[bytes, ...]]] = {
    "redirect": (redirect.parse, (b"/a/b", b"name", b"/" + b"x" * 255, b"..", b"/a/../b")),
    "metacopy": (metacopy.check, (b"", b"\0\4\0\0", b"\0\x24\0\1" + b"d" * 32)),
    "origin": (origin.decode, (b"\0\xfb\x1d\0\1" + b"u" * 16 + b"inodeGEN", b"")),
    "nlink": (nlink.decode, (b"U+1", b"L-2", b"U+9999999999")),
    "opaque": (opaque.is_opaque, (b"y", b"x", b"")),
    "override": (override.parse, (b"0:0:0755", b"1:2:4755:char-1-3", b"5:6:0600:file:x", b"7:8:0644:pipe")),
    "name": (xattrs.shown_name, (b"trusted.overlay.overlay.opaque", b"user.fuseoverlayfs.x", b"user.x")),
    "stored": (xattrs.stored_name, (b"trusted.overlay.opaque", b"user.overlay.x" + b"y" * 240)),
    "whiteout": (whiteout.target, (b".wh.x", b".wh..wh..opq", b".wh..", b".wh...")),
}


def _make_mark(random: Random) -> tuple[str, bytes]:
    name = random.choice(list(MARKS))
    return name, mutate.spoil(random, random.choice(MARKS[name][1]), MARKS[name][1])


def _read_mark(given: tuple[str, bytes]) -> None:
    name, value = given
    found = MARKS[name][0](value)
    if isinstance(found, origin.Origin):
        origin.inode(found)
        assert origin.decode(origin.encode(found)) is not None
    if name == "redirect" and isinstance(found, bytes):
        assert not {b"", b".", b".."} & set(found.removeprefix(b"/").split(b"/"))


# --- arguments of the user -------------------------------------------------------------------------------------

OPTIONS = (b"lowerdir=/a:/b,upperdir=/u,workdir=/w", b"lowerdir=/a\\:b,ro", b"lowerdir+=/a,lowerdir+=/b,timeout=1.5",
           b"lowerdir=/a,uidmapping=:0:1000:1,squash_to_uid=7", b'context="a,b",lowerdir=/x', b"lowerdir=/a,spin=auto",
           b"lowerdir=/a,engine=kernel,io=passthrough,metacopy=off,redirect_dir=on,xino=auto,index=off,volatile",
           b"lowerdir=/a,xattr_permissions=2,fsname=\\,,suid,dev,noexec,noatime,sync,dirsync,writeback=1")  # fmt: skip
_WORDS = (b",", b"=", b":", b"\\", b'"', b"lowerdir=", b"::", b"remount", b"squash_to_root=", b"1e309", b"nan", b"inf",
          b"timeout=", b"gidmapping=", b"4294967296", b"\xff", b"\0", b"x-y=z", b"spin=1001")  # fmt: skip


def _make_options(random: Random) -> bytes:
    text = random.choice(OPTIONS)
    at = random.randrange(len(text) + 1)
    text = text[:at] + random.choice(_WORDS) + text[at:]
    return mutate.spoil(random, text, OPTIONS) if random.random() < 0.5 else text


def _read_options(text: bytes) -> None:
    draft = Draft()
    draft.read(text)
    draft.build()


REFERENCES = ("docker.io/library/debian:12", "localhost:5000/a/b_c__d-e.f:Tag-1_x", "[::1]:5000/x@" + DIGEST,
              "registry.example:443/a:1@" + DIGEST, "docker://quay.io/x/y", "127.0.0.1/x")  # fmt: skip
_SIGNS = (
    *"/:@.-_[]%",
    "..",
    "//",
    "sha256:",
    "A",
    "é",
    "\0",
    "\n",
    "\ud800",
    "a" * 300,
    "-" * 5000,
    "a-" * 3000,
    "_" * 99,
)


def _make_reference(random: Random) -> str:
    text = random.choice(REFERENCES)
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(text) + 1)
        text = text[:at] + random.choice(_SIGNS) + text[at + random.randrange(3) :]
    return text


def _read_reference(text: str) -> None:
    for parse in (layout.image_name, layout.workspace_name, platforms.parse, image_spec.check_digest):
        try:
            parse(text)
        except UserError:
            pass
    str(reference.parse(text))


def _read_manifest(given: tuple[bytes, str]) -> None:
    image_spec.decode_manifest(given[0], given[1], "it")


def _parsers() -> dict[str, Parser]:
    streams, stored = _streams(), _manifest_bytes()
    return {
        "tar archives": Parser(lambda random: mutate.tar(random, BLOCKS), _read_tar, (ArchiveError,)),
        "compressed streams": Parser(partial(_make_stream, streams), _expand, (ArchiveError,)),
        "manifests and indexes": Parser(_make_manifest, _read_manifest, (image_spec.DocumentError,)),
        "configurations": Parser(
            _make_config, lambda data: image.parse_config(data, "it"), (image_spec.DocumentError,)
        ),
        "image layouts": Parser(_make_layout, _find_image, (UserError,)),
        "records": Parser(_make_record, _read_record, (UserError,)),
        "layer manifests": Parser(partial(_make_layer_manifest, stored), _read_layer_manifest, (DamagedError,)),
        "overlay attributes": Parser(_make_mark, _read_mark, (OSError,)),
        "option strings": Parser(
            _make_options, _read_options, (UsageError,), longest=40_000
        ),  # the message repeats the input
        "references": Parser(_make_reference, _read_reference, (UsageError,), longest=40_000),
    }


PARSERS = _parsers()
