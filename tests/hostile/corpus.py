"""The hostile corpus: 44 objects that a layer's author might send, by their numbers in docs/reliability.md.

Each has forms: archives that are imported, and the same object, as far as a disk can hold it, in layers made by hand;
where a disk cannot hold it, what comes nearest, for there is no other way to stack, read, copy up and commit it.
"""

import functools
import gzip
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from overlayfs.format import origin
from tests.hostile import forms
from tests.hostile.forms import (
    METACOPY,
    REDIRECT,
    Archive,
    Directory,
    Form,
    Outside,
    Stack,
    archive,
    each_refused,
    files,
    linked,
    put,
    redirected,
    taken,
    whiteout,
)
from tests.oci.archives import device, directory, file, hardlink, header, pax, symlink
from tests.oci.images import saved

Objects = Callable[[Outside], Iterator[Form]]
CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")
_XATTR = b"SCHILY.xattr."


class Hostile(NamedTuple):
    """One entry of the corpus. seconds: the CPU time that each action may take."""

    number: int
    what: str
    objects: Objects
    seconds: float = 10.0


CORPUS: dict[int, Hostile] = {}


def entry(number: int, what: str, seconds: float = 10.0) -> Callable[[Objects], Objects]:
    """Register the forms that a function yields under a number of the corpus."""

    def enter(objects: Objects) -> Objects:
        CORPUS[number] = Hostile(number, what, objects, seconds)
        return objects

    return enter


# --- paths: on a disk, the only paths in a layer are redirects and the targets of links --------------------


@entry(1, "../x")
def _above(at: Outside) -> Iterator[Form]:
    yield archive("file", file(b"../x"), refused="leads out")
    yield redirected(b"../" + at.canary.rpartition(b"/")[2])


@entry(2, "a/../../x")
def _above_later(at: Outside) -> Iterator[Form]:
    yield archive("file", file(b"a/../../x"), refused="leads out")
    yield redirected(b"/a/../../x")


@entry(3, "/etc/x, which counts from the root of the layer")
def _absolute(at: Outside) -> Iterator[Form]:
    yield taken("file", file(at.canary + b"/etc/shadow", b"mine"))
    yield redirected(at.canary + b"/etc")


@entry(4, "./././x")
def _dots(at: Outside) -> Iterator[Form]:
    yield taken("file", file(b"./././x", b"x"))
    yield redirected(b"./t")


@entry(5, "the root itself: a link in its place, or a directory")
def _root(at: Outside) -> Iterator[Form]:
    yield from each_refused(
        "replace the root", dot=symlink(b".", at.canary), slash=symlink(b"/", at.canary), nothing=symlink(b"", b"/")
    )
    yield archive("file", file(b"./", b"x"), refused="replace the root")
    yield taken("directory", directory(b"./", mode=0o1777), directory(b"/", uid=7), file(b"./f", b"f"))
    yield Stack((lambda root: root.chmod(0o1777), files(f=b"f")), shows={"f": b"f"})


@entry(6, "an empty name")
def _empty_name(at: Outside) -> Iterator[Form]:
    yield from each_refused("replace the root", file=file(b""), directory=directory(b""), link=hardlink(b"", b"x"))
    yield redirected(b"")


@entry(7, "a//b/")
def _slashes(at: Outside) -> Iterator[Form]:
    yield taken("file", file(b"a//b/", b"b"), directory(b"c///"), file(b"//c//d", b"d"))
    yield redirected(b"/t//f")


@entry(8, "NUL in a path")
def _nul(at: Outside) -> Iterator[Form]:
    yield archive("path", pax({b"path": b"x\0y"}) + file(b"z"), refused="NUL")
    yield archive("link", pax({b"linkpath": at.canary + b"\0y"}) + symlink(b"z", b"x"), refused="impossible target")
    yield redirected(b"t\0" + at.canary)


def _long_names(root: Path) -> None:
    put(root, {"n" * 255: b"255", "w" * 251: b"251"})
    for length in (252, 253, 254, 255):
        whiteout(root / ("o" * length))
    (root / (".wh." + "p" * 251)).touch()


@entry(9, "names of 255 and 256 bytes, and of 252 to 255 that are deleted")
def _long(at: Outside) -> Iterator[Form]:
    yield archive("256", pax({b"path": b"n" * 256}) + file(b""), refused="too long")
    yield archive("a deletion of 256", pax({b"path": b".wh." + b"n" * 256}) + file(b""), refused="too long")
    gone = b"".join(pax({b"path": b".wh." + b"o" * length}) + file(b"") for length in (252, 253, 254, 255))
    yield taken("255", pax({b"path": b"n" * 255}) + file(b"", b"255"), gone)
    below = {"o" * length: b"gone" for length in (252, 253, 254, 255)} | {"p" * 251: b"gone"}
    shows = dict.fromkeys(below) | {"n" * 255: b"255"}
    yield Stack((_long_names, lambda root: put(root, below)), shows=shows)


@entry(10, "paths over 4096 bytes, 3,000 directories inside each other")
def _deep(at: Outside) -> Iterator[Form]:
    depth = at.size(300, 3000)
    deep = b"/".join([b"d"] * 3000)
    for name, part in (("file", file(b"")), ("directory", directory(b"")), ("link", symlink(b"", b"x"))):
        yield archive(name, pax({b"path": deep}) + part, refused="too long")
    yield archive("long", pax({b"path": b"/".join([b"n" * 250] * 17)}) + file(b""), refused="too long")
    yield taken("2047", pax({b"path": b"/".join([b"d"] * 2047)}) + file(b"", b"deep"))
    yield Stack((lambda root: forms.deep(root, depth, b"d"), lambda root: forms.deep(root, depth, b"d")))


STRANGE = [b"\xff\xfe", b"a\nb", b"\x1b[31mred", "\u202eabc".encode(), b" ", b"-rf", b"\\", b"\t\r", b"a,b:c"]


@entry(11, "names that are no text, or change the terminal")
def _strange(at: Outside) -> Iterator[Form]:
    yield taken("names", *(file(name, b"x") for name in STRANGE))
    yield archive("in a sentence", file(STRANGE[2] + b"\n") + file(STRANGE[2] + b"\n/x"), refused="leads through")
    yield Stack((lambda root: put(root, {os.fsdecode(name): b"x" for name in STRANGE}),))


def _symlink(name: bytes, target: bytes) -> bytes:
    """A symbolic link whose target may be too long for a header."""
    return pax({b"linkpath": target}) + symlink(name, b"x")


# --- links -------------------------------------------------------------------------------------------------


def _under_a_link(target: bytes) -> Stack:
    """A directory over a symbolic link of the same name: the content of the link's target is not part of it."""
    shows = {"s/etc/mine": b"mine", "s/etc/shadow": None}
    return Stack((files(s__etc__mine=b"mine"), linked("s", target)), shows=shows)


@entry(12, "an absolute symbolic link, then a file through it")
def _through_absolute(at: Outside) -> Iterator[Form]:
    for name, part in _reaching(b"s/etc"):
        yield archive(name, symlink(b"s", at.canary), part, refused="s")
    yield _under_a_link(at.canary)


def _reaching(path: bytes) -> Iterator[tuple[str, bytes]]:
    """Every kind of entry that would change a directory, or link to it."""
    yield "file", file(path + b"/new", b"x")
    yield "over a file", file(path + b"/shadow", b"overwritten")
    yield "directory", directory(path + b"/d/e", mode=0o777)
    yield "its attributes", directory(path, mode=0o777, uid=7)
    yield "symbolic link", symlink(path + b"/l", b"x")
    yield "hard link", hardlink(b"h", path + b"/shadow")
    yield "device", device(path + b"/dev", 1, 3)


@entry(13, "a symbolic link with .., then a file through it")
def _through_relative(at: Outside) -> Iterator[Form]:
    for name, part in _reaching(b"s/etc"):
        yield archive(name, _symlink(b"s", at.climbing), part, refused="s")
    yield _under_a_link(at.climbing)


@entry(14, "two steps: s/p -> .., s/p/e -> ..")
def _two_steps(at: Outside) -> Iterator[Form]:
    steps = directory(b"s") + symlink(b"s/p", b"..")
    yield archive("links", steps, symlink(b"s/p/e", b".."), refused="leads through s/p")
    yield archive("file", steps, file(b"s/p/e/x"), refused="leads through s/p")
    yield Stack((files(s__p__e__x=b"mine"), files(s__f=b"f"), linked("e", b"..")), shows={"s/p/e/x": b"mine"})


@entry(15, "a loop of links as a parent")
def _loop(at: Outside) -> Iterator[Form]:
    yield archive("two", symlink(b"a", b"b") + symlink(b"b", b"a") + file(b"a/x"), refused="leads through a")
    yield archive("itself", symlink(b"a", b"a") + file(b"a/x"), refused="leads through a")
    yield Stack((files(a__x=b"mine"), linked("a", b"b"), linked("b", b"a")), shows={"a/x": b"mine"})


@entry(16, "a link in one layer, a directory in another, both orders")
def _link_and_directory(at: Outside) -> Iterator[Form]:
    inside = directory(b"s") + directory(b"s/etc") + file(b"s/etc/mine", b"mine")
    link = symlink(b"s", at.canary)
    yield Archive("over a directory", lambda: (saved(inside, link),))
    yield Archive("over a link", lambda: (saved(link, inside),))

    def both(root: Path) -> None:
        put(root, {"over/etc/mine": b"mine"})
        os.symlink(at.canary, os.fsencode(root / "under"))

    def neither(root: Path) -> None:
        put(root, {"under/etc/hidden": b"hidden"})
        os.symlink(at.canary, os.fsencode(root / "over"))

    yield Stack((both, neither), shows={"over/etc/mine": b"mine", "over/etc/shadow": None, "under/etc/hidden": None})


def _member(name: str, target: bytes) -> Callable[[Path], None]:
    return lambda root: os.link(target, os.fsencode(root / name), follow_symlinks=False)


@entry(17, "a hard link to ../../etc/shadow")
def _hard_above(at: Outside) -> Iterator[Form]:
    yield archive("..", hardlink(b"a", b"../../etc/shadow"), refused="leads out")
    yield archive("further", file(b"d/f"), hardlink(b"d/a", b"d/../../etc/shadow"), refused="leads out")
    yield Stack((_member("a", at.canary + b"/etc/shadow"),), reaches=True)


@entry(18, "an absolute hard link")
def _hard_absolute(at: Outside) -> Iterator[Form]:
    yield archive("absolute", hardlink(b"a", at.canary + b"/etc/shadow"), refused="does not come before")
    yield Stack((_member("a", at.canary + b"/bin/su"), _member("b", at.canary + b"/etc/shadow")), reaches=True)


@entry(19, "a hard link to a symbolic link")
def _hard_to_link(at: Outside) -> Iterator[Form]:
    yield taken("link", symlink(b"s", at.canary + b"/etc/shadow"), hardlink(b"h", b"s"))
    yield archive("then through it", symlink(b"s", at.canary), hardlink(b"h", b"s"), file(b"h/x"), refused="through h")

    def build(root: Path) -> None:
        os.symlink(at.canary + b"/etc/shadow", os.fsencode(root / "s"))
        os.link(root / "s", root / "h", follow_symlinks=False)

    yield Stack((build,))


@entry(20, "a hard link through a linked directory")
def _hard_through(at: Outside) -> Iterator[Form]:
    link = symlink(b"s", at.canary)
    yield archive("from", link, hardlink(b"a", b"s/etc/shadow"), refused="does not come before")
    yield archive("to", link, file(b"f"), hardlink(b"s/etc/a", b"f"), refused="leads through s")
    top = files(s__etc__one=b"1")

    def build(root: Path) -> None:
        top(root)
        os.link(root / "s/etc/one", root / "s/etc/two")

    yield Stack((build, linked("s", at.canary)), shows={"s/etc/two": b"1", "s/etc/shadow": None})


def _without_data(target: bytes) -> Callable[[Path], None]:
    """A metacopy whose data is at `target`."""

    def build(root: Path) -> None:
        with open(root / "f", "wb") as stream:
            stream.truncate(100)
        os.setxattr(root / "f", METACOPY, b"")
        os.setxattr(root / "f", REDIRECT, target)

    return build


@entry(21, "a hard link to what is missing, or comes later")
def _hard_to_nothing(at: Outside) -> Iterator[Form]:
    yield archive("missing", hardlink(b"a", b"b"), refused="does not come before")
    yield archive("later", hardlink(b"a", b"b"), file(b"b"), refused="does not come before")
    yield archive("itself", hardlink(b"a", b"a"), refused="does not come before")
    yield Stack((_without_data(b"/no/such"), files(t__f=b"below")), thin=True)


@entry(22, "a hard link to a deletion")
def _hard_to_deletion(at: Outside) -> Iterator[Form]:
    yield archive("deletion", file(b".wh.b"), hardlink(b"a", b"b"), refused="does not come before")
    yield archive("mark", file(b".wh.b"), hardlink(b"a", b".wh.b"), refused="does not come before")

    def build(root: Path) -> None:
        whiteout(root / "a")
        os.link(root / "a", root / "b")
        (root / "mark").touch()
        os.link(root / "mark", root / ".wh.c")

    yield Stack((build, files(a=b"a", b=b"b", c=b"c")), shows={"a": None, "b": None, "c": None, "mark": b""})


@entry(23, "symbolic links with targets of 0, 4095 and 10,000 bytes")
def _targets(at: Outside) -> Iterator[Form]:
    longest = b"/" + b"t" * 4094
    yield archive("0", symlink(b"a", b""), refused="impossible target")
    yield archive("10,000", _symlink(b"a", b"t" * 10_000), refused="impossible target")
    yield taken("4095", _symlink(b"a", longest))
    yield Stack((linked("a", longest),))


@entry(24, "file, link and file under one name")
def _in_turn(at: Outside) -> Iterator[Form]:
    link = symlink(b"a", at.canary + b"/etc/shadow")
    yield taken("file last", file(b"a", b"old"), link, file(b"a", b"new"))
    yield taken("link last", file(b"a", b"old"), link)
    yield Stack((files(a=b"new"), linked("a", at.canary + b"/etc/shadow"), files(a=b"old")), shows={"a": b"new"})


@entry(25, "a directory replaced by a file, with children after it")
def _replaced(at: Outside) -> Iterator[Form]:
    yield archive("children", directory(b"a"), file(b"a/x"), file(b"a", b"f"), file(b"a/y"), refused="leads through a")
    yield taken("a directory again", directory(b"a"), file(b"a/x"), file(b"a"), directory(b"a"), file(b"a/y", b"y"))
    yield Stack((files(a__y=b"y"), files(a=b"file"), files(a__x=b"x")), shows={"a/y": b"y", "a/x": None})


# --- deletions ---------------------------------------------------------------------------------------------


def _named(*names: str) -> Callable[[Path], None]:
    """A layer with a file of each name in `f`, and a directory of each name in `d`."""

    def build(root: Path) -> None:
        put(root, {"f/here": b"here", "d/here": b"here"} | {f"f/{name}": b"content" for name in names})
        for name in names:
            (root / "d" / name).mkdir()
            (root / "d" / name / "x").touch()

    return build


def _with_below(*names: str, **shows: bytes | None) -> Stack:
    below = files(f__below=b"below", d__below=b"below")
    return Stack((_named(*names), below), shows={"f/here": b"here", "f/below": b"below", "d/below": b"below", **shows})


@entry(26, "a bare .wh.")
def _bare(at: Outside) -> Iterator[Form]:
    yield archive("bare", file(b".wh."), refused="whiteout without a name")
    yield archive("below", file(b".wh./x"), refused="inside a whiteout")
    yield _with_below(".wh.")


@entry(27, ".wh.. and .wh...")
def _dotted(at: Outside) -> Iterator[Form]:
    yield from each_refused(
        "whiteout without a name", here=file(b".wh.."), above=file(b".wh..."), deeper=file(b"d/.wh...")
    )
    yield _with_below(".wh..", ".wh...")


@entry(28, ".wh..wh.x")
def _of_aufs(at: Outside) -> Iterator[Form]:
    yield taken("file", file(b".wh..wh.x", b"hidden"), file(b"f", b"f"))
    yield taken("directory", directory(b".wh..wh.plnk"), file(b".wh..wh.plnk/1.2", b"hidden"), file(b"f", b"f"))
    yield _with_below(".wh..wh.x", ".wh..wh.plnk")


@entry(29, "an opaque mark in the root, 100,000 times")
def _opaque_again(at: Outside) -> Iterator[Form]:
    many = at.size(20_000, 100_000)
    yield Archive("root", lambda: [file(b"f", b"f"), *[file(b".wh..wh..opq") * 1000] * (many // 1000), bytes(1024)])

    def build(root: Path) -> None:
        (root / ".wh..wh..opq").touch()
        for number in range(at.size(200, 2000)):
            (root / f"d{number}").mkdir()
            (root / f"d{number}" / ".wh..wh..opq").touch()

    below = {f"d{number}/hidden": b"x" for number in range(200)} | {"hidden": b"x"}
    yield Stack((build, lambda root: put(root, below)), shows={"hidden": None, "d7/hidden": None})


@entry(30, "a deletion that is a directory, a link, or has content")
def _odd_deletions(at: Outside) -> Iterator[Form]:
    yield taken(
        "all", directory(b".wh.a"), symlink(b".wh.b", at.canary), file(b".wh.c", b"content"), header(b".wh.d", b"6")
    )
    yield archive("in a directory", directory(b".wh.a"), file(b".wh.a/x"), refused="inside a whiteout")

    def build(root: Path) -> None:
        put(root, {".wh.a/x": b"x", ".wh.c": b"content"})
        os.symlink(at.canary, os.fsencode(root / ".wh.b"))
        os.mkfifo(root / ".wh.d")

    shows = {"a": b"a", "b": b"b", "c": None, "d": b"d"}  # only a regular file is a whiteout
    yield Stack((build, files(a=b"a", b=b"b", c=b"c", d=b"d")), shows=shows)


@entry(31, "a deletion and its name in one layer")
def _both(at: Outside) -> Iterator[Form]:
    yield taken("file", file(b".wh.f"), file(b"f", b"here"), file(b"g", b"here"), file(b".wh.g"))
    yield taken("directory", file(b".wh.d"), file(b"d/x", b"here"))
    top = files(**{".wh.f": b"", "f": b"here", ".wh.d": b"", "d__x": b"here"})
    yield Stack((top, files(f=b"below", d__y=b"below")), shows={"f": b"here", "d/x": b"here", "d/y": None})


@entry(32, "a deletion through a linked directory")
def _deletion_through(at: Outside) -> Iterator[Form]:
    yield taken("link", symlink(b"s", at.canary), file(b"s/etc/.wh.shadow"), file(b"s/.wh.etc"))
    yield archive("opaque", symlink(b"s", at.canary), file(b"s/etc/.wh..wh..opq"), refused="leads through s")
    yield Stack((files(**{"s__.wh.etc": b""}), linked("s", at.canary)), shows={"s/etc": None})


@entry(33, "a device 0:0")
def _device(at: Outside) -> Iterator[Form]:
    yield archive("character", device(b"x", 0, 0), refused="is a whiteout")
    yield taken("block", device(b"x", 0, 0, b"4"))

    def build(root: Path) -> None:
        whiteout(root / "a")
        os.chown(root / "a", 7, 7)
        os.setxattr(root / "a", REDIRECT, b"/b")
        os.mknod(root / "b", stat.S_IFBLK | 0o644, 0)

    yield Stack((build, files(a=b"a", b=b"b")), shows={"a": None})


MARKS: dict[str, tuple[bytes, ...]] = {
    "opaque": (b"", b"y", b"x", b"yes", b"\0"),
    "redirect": (b"/", b"..", b"/..", b"a/b", b"x" * 300, b"/" + b"x/" * 2000 + b"x", b"/hidden", b"hidden"),
    "metacopy": (b"", b"\0", b"\0\4\0\0", b"\1\4\0\0", b"\0\x24\0\1" + b"d" * 32, b"\0\xff\0\0"),
    "nlink": (b"U+1", b"L-2147483648", b"U+9999999999", b"garbage"),
    "impure": (b"y", b""),
    "uuid": (b"u" * 16,),
    "whiteout": (b"", b"y"),
    "protattr": (b"garbage",),
}


def forge_marks(root: Path, canary: bytes, prefix: str) -> None:
    """Make a directory and a file with every mark and value, some of them with the file handle of an object outside."""
    values = {**MARKS, "origin": (b"", b"\0\xfb", b"\0\xfb\x15" + bytes(18), _handle(canary), b"\0" * 150)}
    for mark, each in values.items():
        for number, value in enumerate(each):
            for path in (root / f"{mark}{number}.d", root / f"{mark}{number}.f"):
                path.mkdir() if path.suffix == ".d" else path.write_bytes(b"" if mark == "whiteout" else b"content")
                os.setxattr(path, f"{prefix}overlay.{mark}", value)
    for name in ("user.fuseoverlayfs.opaque", "user.containers.override_stat", "trusted.overlaypy.lazy"):
        (root / name).mkdir()
        os.setxattr(root / name, name, b"y")


def _handle(canary: bytes) -> bytes:
    """The origin mark of a file of the canary."""
    from overlayfs import sysio

    fd = os.open(canary + b"/etc", os.O_RDONLY)
    try:
        found, uuid = sysio.file_handle(fd, b"shadow"), sysio.fs_uuid(fd)
    finally:
        os.close(fd)
    kind, handle = found or (1, bytes(8))
    return origin.encode(origin.Origin(uuid or bytes(16), kind, handle))


@entry(34, "attributes of an overlay: every mark, every value, file handles of objects outside")
def _forged(at: Outside) -> Iterator[Form]:
    names = ("trusted.overlay.opaque", "trusted.overlay.redirect", "user.overlay.metacopy", "trusted.overlaypy.lazy",
             "user.fuseoverlayfs.opaque", "user.containers.override_stat")  # fmt: skip
    forged = {_XATTR + name.encode(): at.canary for name in names}
    yield taken("escaped", pax(forged) + directory(b"d"), pax(forged) + file(b"f", b"f"))
    below = files(hidden__f=b"below", f=b"below")
    yield Stack(
        (
            lambda root: forge_marks(root, at.canary, "trusted."),
            lambda root: forge_marks(root, at.canary, "user."),
            below,
        )
    )


# --- special objects ---------------------------------------------------------------------------------------


def _specials(root: Path) -> None:
    for name, kind, number in (
        ("null", stat.S_IFCHR, os.makedev(1, 3)), ("mem", stat.S_IFCHR, os.makedev(1, 1)),
        ("disk", stat.S_IFBLK, os.makedev(254, 0)), ("fifo", stat.S_IFIFO, 0), ("socket", stat.S_IFSOCK, 0),
    ):  # fmt: skip
        os.mknod(root / name, kind | 0o666, number)


@entry(35, "devices, a FIFO, a socket: never opened")
def _special(at: Outside) -> Iterator[Form]:
    yield taken("all", device(b"null", 1, 3), device(b"disk", 254, 0, b"4"), header(b"fifo", b"6"))
    yield archive("a huge number", device(b"x", 1 << 20, 3), refused="impossible number")
    yield Stack((_specials,))


def _fifo_layout(name: str) -> Directory:
    def build(root: Path) -> None:
        put(root, {"oci-layout": b'{"imageLayoutVersion": "1.0.0"}', "index.json": b"{}"})
        (root / name).unlink()
        os.mkfifo(root / name)

    return Directory(f"{name} is a FIFO", build, refused="")


@entry(36, "a FIFO where a file is expected")
def _fifo(at: Outside) -> Iterator[Form]:
    for name in ("oci-layout", "index.json"):
        yield _fifo_layout(name)

    def build(root: Path) -> None:
        (root / "etc").mkdir()
        for name in ("etc/passwd", "etc/.wh..wh..opq", "etc/.wh.gone", ".wh..wh..opq"):
            os.mkfifo(root / name)

    yield Stack((build, files(etc__gone=b"still here")), shows={"etc/gone": b"still here"})


@entry(37, "suid with capabilities")
def _suid(at: Outside) -> Iterator[Form]:
    capable = pax({_XATTR + b"security.capability": CAPABILITY})
    yield taken("all", capable + file(b"su", b"su", uid=7, mode=0o6755), capable + directory(b"d", mode=0o3777))

    def build(root: Path) -> None:
        put(root, {"su": b"su", "ping": b"ping"})
        for name, owner in (("su", 0), ("ping", 7)):
            os.chown(root / name, owner, owner)
            os.chmod(root / name, 0o6755)
            os.setxattr(root / name, "security.capability", CAPABILITY)

    yield Stack((build,))


@entry(38, "ids of 2^31, 2^32 - 1, negative ones")
def _ids(at: Outside) -> Iterator[Form]:
    impossible = {"most": b"\x80\0\0\0\xff\xff\xff\xff", "negative": b"\xff" * 8}
    for name, field in impossible.items():
        yield archive(name, file(b"f", uid=field), refused="impossible user")
        yield archive(f"{name} group", file(b"f", gid=field), refused="impossible user")
    yield archive("in text", pax({b"uid": b"-1"}) + file(b"f"), refused="damaged number")
    yield taken("half", pax({b"uid": b"2147483648", b"gid": b"4294967294"}) + file(b"f", b"f"))

    def build(root: Path) -> None:
        put(root, {"f": b"f", "g": b"g"})
        os.chown(root / "f", 1 << 31, (1 << 32) - 2)
        os.chown(root / "g", (1 << 32) - 2, 1 << 31)

    yield Stack((build,))


@entry(39, "times before 1970, of 2^63, and no number")
def _times(at: Outside) -> Iterator[Form]:
    for name in ("9223372036854775808", "NaN", "inf", "1e9", "-"):
        yield archive(name, pax({b"mtime": name.encode()}) + file(b"f"), refused="impossible time")
    yield archive("most", file(b"f", mtime=b"\x80" + b"\xff" * 11), refused="impossible time")
    yield archive("least", file(b"f", mtime=b"\xff" + b"\x80" + bytes(10)), refused="impossible time")
    yield taken("early", pax({b"mtime": b"-5.5"}) + file(b"f", b"f"), file(b"g", mtime=b"\xff" * 12))

    def build(root: Path) -> None:
        for number, seconds in enumerate((-(1 << 31), -1, 1 << 33, (1 << 40))):
            (root / str(number)).touch()
            os.utime(root / str(number), ns=(seconds * 10**9, seconds * 10**9))

    yield Stack((build,))


@entry(40, "attributes without a name, with too long ones, too large, too many")
def _attributes(at: Outside) -> Iterator[Form]:
    for name, key, value in (
        ("no name", b"", b"v"), ("256", b"user." + b"n" * 251, b"v"), ("64 KiB + 1", b"user.n", bytes(65537)),
        ("a NUL value", b"user.n\0m", b"v"),
    ):  # fmt: skip
        yield archive(name, pax({_XATTR + key: value or b"v"}) + file(b"f"), refused="")
    many = {_XATTR + b"user.n%d" % number: b"v" * 20 for number in range(10_000)}
    yield archive("10,000", pax(many) + file(b"f"), refused="cannot be kept")
    yield taken("255", pax({_XATTR + b"user." + b"n" * 250: b"v"}) + file(b"f", b"f"))

    def build(root: Path) -> None:
        put(root, {"names": b"", "values": b"", "long": b""})
        forms.widest(root / "names", b"")
        forms.widest(root / "values", b"v" * 1000)
        os.setxattr(root / "long", "user." + "n" * 250, b"v" * 2000)

    yield Stack((build,))


# --- size --------------------------------------------------------------------------------------------------


def _zeros(size: int) -> Iterator[bytes]:
    """A gzip stream of a file of zeros, a thousandth of its size."""
    packer = zlib.compressobj(9, wbits=31)
    yield packer.compress(header(b"zeros", size=b"\x80" + size.to_bytes(11, "big")))
    for _ in range(size >> 20):
        yield packer.compress(bytes(1 << 20))
    yield packer.compress(bytes(1024)) + packer.flush()


@entry(41, "a bomb of 1:1000")
def _bomb(at: Outside) -> Iterator[Form]:
    yield Archive("zeros", lambda: _zeros(at.size(100 << 20, 2 << 30)))
    crowd = b"".join(directory(b"d%d" % number) for number in range(at.size(500, 3_000)))
    yield Archive("entries", lambda: (gzip.compress(crowd + bytes(1024)),))
    within = gzip.compress(gzip.compress(crowd))
    yield Archive("twice", lambda: (within,), refused="")

    def build(root: Path) -> None:
        with open(root / "zeros", "wb") as stream:
            stream.writelines(bytes(1 << 20) for _ in range(16))
            stream.truncate(at.size(64 << 20, 1 << 30))

    yield Stack((build,))


def _sparse(size: bytes, numbers: bytes, data: bytes = b"aaaa") -> bytes:
    return pax({b"GNU.sparse.map": numbers, b"GNU.sparse.size": size}) + file(b"s", data)


@entry(42, "a sparse file of 8 EiB; maps that overlap or run backwards")
def _holes(at: Outside) -> Iterator[Form]:
    most = b"9223372036854775807"
    yield archive("8 EiB", _sparse(most, b"0,2,9223372036854775805,2"), refused="")
    yield archive("as large as can be", _sparse(b"17592186040320", b"0,4"), refused="with their holes")
    several = (_sparse(b"1099511627776", b"0,4") + file(b"f%d" % number) for number in range(30))
    yield archive("many of them", *several, refused="with their holes")
    for name, numbers in (("overlap", b"0,3,2,1"), ("backwards", b"8,2,0,2"), ("negative", b"0,-4"), ("odd", b"0,2,4")):
        yield archive(name, _sparse(b"100", numbers), refused="map")
    yield archive("past the end", _sparse(b"10", b"8,4"), refused="map")
    places = b",".join(b"%d,1" % (number << 20) for number in range(1000))
    yield taken("a thousand holes", _sparse(b"%d" % (1 << 30), places, b"x" * 1000))
    yield Stack((lambda root: forms.largest(root / "s"),), hashed=False)


@entry(43, "sizes that are negative or past the end, a wrong sum, a cut, something behind")
def _damaged(at: Outside) -> Iterator[Form]:
    whole = file(b"f", b"content" * 100) + bytes(1024)
    yield archive("negative", header(b"f", size=b"\xff" * 12), refused="impossible size")
    yield Archive("past the end", lambda: (header(b"f", size=1 << 20), b"short"), "too early")
    yield archive("most", header(b"f", size=b"\x80" + b"\x7f" + b"\xff" * 10), refused="")
    yield archive("sum", bytes([whole[0] ^ 1]) + whole[1:], refused="sum of a header")
    yield Archive("cut", lambda: (whole[:700],), "too early")
    yield taken("something behind", whole, b"behind" * 1000)
    yield Archive("image with something behind", lambda: (saved(file(b"f", b"f"), wrong_sum=True),), "")

    def build(root: Path) -> None:
        with open(root / "f", "wb") as stream:
            stream.truncate(1 << 20)
        os.setxattr(root / "f", METACOPY, b"")

    yield Stack((build, files(f=b"much shorter than the size above it")))


def crowd(files_: int, directories: int) -> Iterator[bytes]:
    """An archive of empty files, 1,000 in each directory, and of `count` directories in one."""
    for number in range(files_ // 1000):
        yield b"".join(file(b"f%d/%d" % (number, each)) for each in range(1000))
    for number in range(directories // 1000):
        yield b"".join(directory(b"d/%d" % each) for each in range(1000 * number, 1000 * number + 1000))
    yield bytes(1024)


@entry(44, "very many empty files, very many directories in one", seconds=60.0)
def _many(at: Outside) -> Iterator[Form]:
    count, wide = at.size(1_000, 100_000), at.size(300, 20_000)
    yield Archive("crowd", functools.partial(crowd, count, wide))
