"""Property: any layers come back from an archive unchanged, and stacked again they show the same tree."""

import io
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from overlayfs import Overlay, StackConfig
from overlayfs.oci import layer_tar
from overlayfs.oci.layer_entries import Omissions, layer_entries, merged_entries
from tests.oci.archives import unpack
from tests.support.builder import build
from tests.support.drivers.overlay import FsRaw
from tests.support.dump import Dump, dump, same
from tests.support.spec import Dir, Entry, File, Special, Symlink, Whiteout

pytestmark = pytest.mark.root

NAMES = st.sampled_from(["a", "b", "c", "ä", "\udcff", "x" * 130])
TIMES = st.sampled_from([0, 10**9, 1_600_000_000_000_000_001, -1, -(10**9)])
VALUES = st.binary(min_size=1, max_size=9)
XATTRS = st.dictionaries(st.sampled_from(["user.a", "user.b", "trusted.c"]), VALUES, max_size=2)
META = {"uid": st.integers(0, 3), "gid": st.integers(0, 3), "mtime_ns": TIMES}

files = st.builds(File, st.binary(max_size=600), mode=st.sampled_from([0o644, 0o4755, 0]), xattrs=XATTRS, **META)
symlinks = st.builds(Symlink, target=st.sampled_from(["a", "../b", "/" + "t" * 120]), **META)
specials = st.builds(Special, st.sampled_from(["p", "c", "b"]), st.just(1), st.just(3), **META)
whiteouts = st.builds(Whiteout, st.sampled_from(["device", "file", "xattr"]))
entries: st.SearchStrategy[Entry] = st.recursive(
    st.one_of(files, symlinks, specials, whiteouts),
    lambda inner: st.builds(
        Dir,
        st.dictionaries(NAMES, inner, max_size=4),
        opaque=st.sampled_from([None, None, "trusted", "file"]),
        mode=st.sampled_from([0o755, 0o3700]),
        xattrs=XATTRS,
        **META,
    ),
    max_leaves=12,
)
layers = st.dictionaries(NAMES, entries, max_size=5)


def packed(tree: Path, *below: Path) -> bytes:
    with layer_entries(os.fsencode(tree), list(map(os.fsencode, below)), Omissions()) as items:
        return b"".join(layer_tar.tar_pieces(items))


def view(trees: list[Path]) -> Dump:
    overlay = Overlay(StackConfig(lower=tuple(map(os.fsencode, trees))))
    try:
        return dump(FsRaw(overlay))
    finally:
        overlay.close()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(layers, min_size=1, max_size=3))
def test_layers_through_archives(place: Path, stack: list[dict[str, Entry]]) -> None:
    with tempfile.TemporaryDirectory(dir=place) as base:
        originals, copies = [], []
        for number, tree in enumerate(stack):
            original, copy = Path(base, f"o{number}"), Path(base, f"c{number}")
            original.mkdir()
            build(original, tree)
            archive = packed(original)
            unpack(archive, copy)
            assert packed(copy) == archive
            originals.append(original)
            copies.append(copy)
        same(view(copies), view(originals))
        # Lower layers are used only for a layer that depends on them.
        assert packed(*originals) == packed(originals[0])
        _check_merged(originals, Path(base, "merged"))


def _check_merged(stack: list[Path], target: Path) -> None:
    with merged_entries(list(map(os.fsencode, stack)), Omissions()) as items:
        archive = b"".join(layer_tar.tar_pieces(items))
    target.mkdir()
    root = os.open(target, os.O_RDONLY)
    try:
        layer_tar.unpack_tar(io.BytesIO(archive).read, root, merged=True)
    finally:
        os.close(root)
    # Link counts of merged directories differ; their times are those of the topmost layer in both.
    same(_unlinked(view([target])), _unlinked(view(stack)))
    shutil.rmtree(target)


def _unlinked(found: Dump) -> Dump:
    return {path: entry._replace(nlink=0) for path, entry in found.items()}
