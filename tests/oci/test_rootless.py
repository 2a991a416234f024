"""Import and export without root: owners and devices are kept in override xattrs, and exported unchanged."""

import io
import os
from pathlib import Path

import pytest

from overlayfs.oci.blobs import read_blob, write_blob
from overlayfs.oci.image_export import ExportOptions, Format, export_image
from overlayfs.oci.image_import import ImportOptions, import_image
from overlayfs.store.store import LayerStore
from tests.oci import samples
from tests.oci.archives import END, device, directory, file, header, pax, picture, symlink
from tests.support.dump import Dump
from tests.support.users import ALICE, run_as

pytestmark = pytest.mark.root

LAYER = (
    directory(b"d", uid=5, gid=6, mode=0o3750)
    + pax({b"SCHILY.xattr.security.capability": samples.CAPABILITY, b"SCHILY.xattr.user.x": b"v"})
    + file(b"d/f", b"content", mode=0o4755, uid=7)
    + file(b"closed", b"secret", mode=0)
    + file(b"d/.wh.gone")
    + directory(b"o")
    + file(b"o/.wh..wh..opq")
    + symlink(b"l", b"d/f")
    + device(b"null", 1, 3)
    + header(b"pipe", b"6", mode=0o620, gid=9)
    + pax({b"SCHILY.xattr.trusted.x": b"only root"})
    + file(b"t")
    + END
)


@pytest.fixture
def archive(place: Path, store: LayerStore) -> Path:
    """The layer in a file, in a directory of the user; the modules are loaded before."""
    read_blob(store, io.BytesIO(LAYER).read)
    home = place / "home"
    home.mkdir()
    os.chown(home, ALICE.uid, ALICE.gid)
    (home / "layer.tar").write_bytes(LAYER)
    return home / "layer.tar"


def _there_and_back(archive: Path) -> tuple[Dump, list[str]]:
    """Import as the user, and export in every format; return the tree that the user sees, and the notices."""
    notices: list[str] = []
    with LayerStore(os.fsencode(archive.parent / "store")) as own:
        import_image(own, os.fsencode(archive), "mine", ImportOptions(notice=notices.append))
        for kind in (Format.OCI, Format.DIRECTORY):
            target = os.fsencode(archive.parent / kind.value)
            export_image(own, "mine", target, ExportOptions(kind, notice=notices.append))
        return samples.view(own, "mine"), notices


def test_owners_come_out_as_they_went_in(archive: Path, store: LayerStore) -> None:
    seen, notices = run_as(ALICE, lambda: _there_and_back(archive))
    import_image(store, os.fsencode(archive), "direct")
    import_image(store, os.fsencode(archive.parent / "oci"), "around")
    direct, around = samples.view(store, "direct"), samples.view(store, "around")
    # Two things are lost: the owner of a symbolic link, and xattrs that only root may set.
    assert direct.pop(b"l")._replace(uid=ALICE.uid, gid=ALICE.gid) == around.pop(b"l")
    assert direct.pop(b"t")._replace(xattrs=()) == around.pop(b"t")
    assert direct == around
    assert notices[0] == "1 extended attributes were left out: only root can set them"
    # A mount by the user shows the same, except for capabilities, which it hides.
    for path, entry in direct.items():
        kept = tuple(each for each in entry.xattrs if each[0] != "security.capability")
        assert seen[path]._replace(links=(), nlink=0) == entry._replace(xattrs=kept, links=(), nlink=0), path


def test_a_directory_of_the_users_own(archive: Path) -> None:
    _, notices = run_as(ALICE, lambda: _there_and_back(archive))
    found = picture(archive.parent / "dir")
    assert {path: (entry.kind, entry.mode, entry.uid) for path, entry in found.items() if path} == {
        b"d": ("dir", 0o750, ALICE.uid), b"d/f": ("file", 0o755, ALICE.uid), b"closed": ("file", 0, ALICE.uid),
        b"o": ("dir", 0o755, ALICE.uid), b"l": ("symlink", 0o777, ALICE.uid), b"pipe": ("fifo", 0o620, ALICE.uid),
        b"t": ("file", 0o644, ALICE.uid),
    }  # fmt: skip
    assert "1 devices were left out: only root can make them" in notices


def test_blobs_do_not_depend_on_the_user_who_writes_them(archive: Path, store: LayerStore) -> None:
    plain = directory(b"d", uid=5) + file(b"d/f", b"x", mode=0o4711, uid=6) + device(b"null", 1, 3) + END

    def own() -> str:
        with LayerStore(os.fsencode(archive.parent / "store")) as mine:
            return write_blob(mine, read_blob(mine, io.BytesIO(plain).read), lambda piece: None).diff_id

    assert run_as(ALICE, own) == write_blob(store, read_blob(store, io.BytesIO(plain).read), lambda piece: None).diff_id
