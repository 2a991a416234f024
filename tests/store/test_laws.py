"""Properties of layers at rest, on random trees: commit, squash, comparison, damage, export."""

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from overlayfs.library import Store
from overlayfs.store.commit_transaction import NewLayer
from overlayfs.store.compare import compare
from overlayfs.store.manifest import Manifest
from overlayfs.store.records import ImageRecord, now
from overlayfs.store.squash import squash
from overlayfs.store.store import LayerStore
from overlayfs.store.verify import verify
from tests.differential.operations import Generator
from tests.store.lives import apply, live, tree_of, tree_with_upper
from tests.support.builder import build
from tests.support.drivers.mounts import KernelOverlay
from tests.support.drivers.overlay import FsDriver
from tests.support.drivers.stack import Stack
from tests.support.dump import Dump, dump, same

pytestmark = pytest.mark.root

EXAMPLES = int(os.environ.get("OVERLAYFS_LAW_EXAMPLES", "15"))
laws = settings(
    max_examples=EXAMPLES,
    derandomize="OVERLAYFS_LAW_EXAMPLES" not in os.environ,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],  # a smaller seed is not a simpler history
    print_blob=True,
)
seeds = st.integers(0, 2**32)
generations = st.integers(1, 3)


@contextmanager
def scratch(place: Path) -> Iterator[Path]:
    """A directory for one example."""
    path = Path(tempfile.mkdtemp(dir=place))
    umask = os.umask(0)
    try:
        yield path
    finally:
        os.umask(umask)
        shutil.rmtree(path)


def counted(tree: Dump) -> Dump:
    """Without link counts: those of lower files include hidden names. `links` has the visible names."""
    return {path: item._replace(nlink=0) for path, item in tree.items()}


def solid(tree: Dump) -> Dump:
    """The dump without holes, which do not count as a difference."""
    return {path: item._replace(sparse=False) for path, item in counted(tree).items()}


def shown(stack: Stack, lower: list[Path], kind: type[FsDriver | KernelOverlay] = FsDriver) -> Dump:
    """The dump of the layers, without the upper."""
    view = Stack(stack.base / "view", [{}], None)
    view.lower, view.base = lower, stack.base
    tree = kind(view)
    try:
        return counted(dump(tree))
    finally:
        tree.close()
        shutil.rmtree(stack.base / "view")


@laws
@given(seed=seeds, generations=generations)
def test_a_diff_applied_gives_the_other_tree(place: Path, seed: int, generations: int) -> None:
    with scratch(place) as here:
        after = live(here / "life", seed, generations)
        before = FsDriver(Stack(here / "before", [{}], {}))
        before.close()
        before.stack.lower = after.stack.lower[-2:]  # as it was in the beginning
        before.reopen()
        changes = list(compare(tree_of(before.stack.lower), tree_with_upper(after.stack)))
        apply(changes, before, after)
        same(solid(dump(before)), solid(dump(after)))
        assert not list(compare(tree_with_upper(before.stack), tree_with_upper(after.stack)))
        after.close()
        before.close()


@laws
@given(seed=seeds)
def test_a_diff_has_only_what_is_different(place: Path, seed: int) -> None:
    with scratch(place) as here:
        life = live(here / "life", seed, 2)
        old, new = shown(life.stack, life.stack.lower), counted(dump(life))
        changes = compare(tree_of(life.stack.lower), tree_with_upper(life.stack))
        kinds = {change.path: change.kind for change in changes}
        for path, kind in kinds.items():
            if kind == "A":
                assert path not in old and path in new
            elif kind == "D":
                assert path in old and path not in new
            elif old[path].kind != "dir":
                assert old[path] != new[path], path
        life.close()


@laws
@given(seed=seeds, generations=generations, last=st.integers(1, 4))
def test_squashed_layers_show_the_same_tree(place: Path, seed: int, generations: int, last: int) -> None:
    with scratch(place) as here:
        life = live(here / "life", seed, generations)
        life.rotate()
        layers = life.stack.lower
        count = min(last, len(layers))
        life.close()
        expected = shown(life.stack, layers)
        for name in ("squashed", "work", "empty"):
            (here / name).mkdir()
        squash(tree_of(layers).layers, count, os.fsencode(here / "squashed"), os.fsencode(here / "work"))
        fewer = [here / "squashed", *layers[count:]]
        same(shown(life.stack, fewer), expected)
        same(shown(life.stack, [*fewer, here / "empty"], KernelOverlay), expected)
        assert not list(compare(tree_of(layers), tree_of(fewer)))


@laws
@given(seed=seeds, generations=generations)
def test_a_committed_upper_shows_the_same_tree(place: Path, seed: int, generations: int) -> None:
    with scratch(place) as here:
        life = live(here / "life", seed, generations)
        layer = life.stack.next_layer()
        life.commit(layer)
        assert not list(compare(tree_with_upper(life.stack), tree_of([layer, *life.stack.lower])))
        life.close()


@laws
@given(seed=seeds)
def test_equal_trees_have_equal_manifests_and_different_ones_do_not(place: Path, seed: int) -> None:
    with scratch(place) as here:
        digests = []
        tree = Generator(seed).layer()
        for name in ("one", "two"):
            (here / name).mkdir()
            build(here / name, tree)
            os.utime(here / name, ns=(1, 1))
            digests.append(_digest(here / name))
        assert digests[0] == digests[1]
        chosen = random.Random(seed).choice(sorted(here.glob("two/**/*")) or [here / "two"])
        os.chown(chosen, 77, 0, follow_symlinks=False)
        assert _digest(here / "two") != digests[0]


def _digest(path: Path) -> str:
    fd = os.open(path, os.O_RDONLY)
    try:
        with Manifest.build(fd, threads=2) as manifest:
            return manifest.digest
    finally:
        os.close(fd)


@laws
@given(seed=seeds, data=st.data())
def test_every_flipped_bit_is_found(place: Path, seed: int, data: st.DataObject) -> None:
    with scratch(place) as here, LayerStore(os.fsencode(here / "store")) as store:
        with store.layers.stage() as staged:
            build(Path(os.fsdecode(staged.tree_path)), {**Generator(seed).layer(), "some": b"content"})
            with Manifest.build(staged.tree_fd) as manifest:
                staged.publish(manifest=manifest)
        files = [
            path
            for path in sorted((here / "store").rglob("*"))
            if path.is_file() and not path.is_symlink() and path.stat().st_size
        ]
        path = data.draw(st.sampled_from(files))
        bit = data.draw(st.integers(0, 8 * path.stat().st_size - 1))
        content = bytearray(path.read_bytes())
        content[bit // 8] ^= 1 << bit % 8
        times = path.stat()
        with open(path, "r+b") as stream:
            stream.write(content)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert verify(store.directory, None, threads=2).problems


def stored(store: Store, layers: list[Path], name: str) -> ImageRecord:
    """Move directories into a store as layers, and put an image of them."""
    ids: tuple[str, ...] = ()
    for path in reversed(layers):
        committed = store.commit_directory(os.fsencode(path), NewLayer(below=ids))
        fd = committed.tree_fd()
        try:
            with Manifest.build(fd, threads=2) as manifest:
                ids = (store.complete_layer(committed, manifest).id, *ids)
        finally:
            os.close(fd)
    return store.images.put(ImageRecord(name=name, layers=ids, created=now()))


def carried(tree: Dump) -> Dump:
    """The dump without attributes of empty value, which a PAX header cannot represent."""
    kept = {path: tuple(each for each in item.xattrs if each[1]) for path, item in tree.items()}
    return {path: item._replace(xattrs=kept[path]) for path, item in tree.items()}


@laws
@given(seed=seeds, generations=generations, kind=st.sampled_from(["oci-archive", "docker-archive", "tar"]))
def test_an_exported_image_comes_back(place: Path, seed: int, generations: int, kind: str) -> None:
    with scratch(place) as here, Store(os.fsencode(here / "store")) as store:
        life = live(here / "life", seed, generations)
        life.rotate()
        life.close()
        expected = shown(life.stack, life.stack.lower)
        layers = list(life.stack.lower)
        stored(store, layers, "it")
        assert not verify(store.directory, None, threads=2).problems
        store.export_image("it", os.fsencode(here / "archive"), form=kind)
        with Store(os.fsencode(here / "other")) as other:
            back = other.import_image(os.fsencode(here / "archive"), "back")
            assert not verify(other.directory, None, threads=2).problems
            paths = [Path(os.fsdecode(other.layers.find(each).tree_path)) for each in back.layers]
            same(shown(life.stack, paths), carried(expected))
            store.squash("it", "small")
            small = [Path(os.fsdecode(store.layers.find(each).tree_path)) for each in store.images.find("small").layers]
            same(shown(life.stack, small), expected)
