"""Import and export when any single modifying call fails: a UserError or an errno, and nothing left behind."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from overlayfs import sysio
from overlayfs.errors import UserError
from overlayfs.oci import streams
from overlayfs.oci.image_export import ExportOptions, Format, export_image
from overlayfs.oci.image_import import import_image
from overlayfs.store.store import LayerStore
from tests.oci import samples
from tests.oci.archives import END, directory, file, pax
from tests.store.samples import there
from tests.support.spec import Link, Tree, Whiteout

pytestmark = pytest.mark.root

LAYER = (
    directory(b"d")
    + pax({b"SCHILY.xattr.user.x": b"v"})
    + file(b"d/f", b"content")
    + file(b"d/.wh.a")
    + file(b".wh.b")
    + file(b"e/.wh..wh..opq")
    + END
)
TREE: Tree = {"d": {"f": b"content"}, "link": Link("d/f"), "gone": Whiteout()}


@contextmanager
def failing(number: int, code: int) -> Iterator[list[str]]:
    """Make the modifying call with this number fail; yield the names of the calls so far."""
    calls: list[str] = []

    def fuse(call: str) -> None:
        calls.append(call)
        if len(calls) == number:
            raise OSError(code, os.strerror(code))

    sysio.fault_hook = fuse
    try:
        yield calls
    finally:
        sysio.fault_hook = None


def each_failure(act: Callable[[], object], after: Callable[[], None], code: int) -> None:
    """Repeat an action, with a later call failing each time, until none fails."""
    number, worked = 0, False
    said: list[str] = []
    while not worked:
        number += 1
        before = sorted(os.listdir("/proc/self/fd"))
        with failing(number, code) as calls:
            try:
                act()
                worked = True
            except (UserError, OSError) as error:
                said.append(str(error))
        assert sorted(os.listdir("/proc/self/fd")) == before, calls
        after()
        worked = worked and len(calls) < number
    assert said
    assert all(os.strerror(code) in sentence for sentence in said), said


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_an_import(place: Path, code: int) -> None:
    (place / "layer.tar").write_bytes(LAYER)

    def act() -> None:
        with LayerStore(os.fsencode(place / "store")) as store:
            import_image(store, os.fsencode(place / "layer.tar"), "x")

    def after() -> None:
        with LayerStore(os.fsencode(place / "store")) as store:
            store.gc()
            found = there(place)
            assert found["staging"] == found["trash"] == []
            assert len(found["layers"]) == len(found["images"]) <= 1
            if found["images"]:
                assert set(samples.view(store, "x")) == {b"", b"d", b"d/f", b"e"}
                store.images.remove("x")
            store.gc()

    act()
    after()
    each_failure(act, after, code)


@pytest.mark.parametrize("kind", Format)
def test_an_export(store: LayerStore, place: Path, kind: Format) -> None:
    samples.add_image(store, "sample:1", TREE)
    export_image(store, "sample:1", os.fsencode(place / "first"), ExportOptions(kind))
    before = sorted(os.listdir(place))

    def after() -> None:
        left = sorted(set(os.listdir(place)) - set(before))
        assert left in ([], ["out"])
        if left and (place / "out").is_dir():
            shutil.rmtree(place / "out")
        elif left:
            (place / "out").unlink()

    each_failure(
        lambda: export_image(store, "sample:1", os.fsencode(place / "out"), ExportOptions(kind)), after, errno.ENOSPC
    )


def test_unnamed_files_on_any_file_system(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = sysio.open_child

    def without_tmpfile(dirfd: int, name: bytes, flags: int, mode: int = 0) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real(dirfd, name, flags, mode)

    root = os.open(place, os.O_RDONLY)
    for _ in range(2):
        fd = streams.unnamed_file(root)
        assert os.fstat(fd).st_nlink == 0
        assert os.pwrite(fd, b"x", 0) == len(os.pread(fd, 5, 0)) == 1
        os.close(fd)
        monkeypatch.setattr(sysio, "open_child", without_tmpfile)
    os.close(root)
    assert os.listdir(place) == []
