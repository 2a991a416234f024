"""The contract with container engines, tested by their own storage library, which starts the program as podman does."""

import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import program
from tests.support import leftovers, processes, requirements

Storage = Callable[..., str]


@pytest.fixture
def storage(place: Path) -> Iterator[Storage]:
    """Run `containers-storage` on a store of its own with our mount program; return its output."""
    requirements.need_root()
    requirements.need_program("containers-storage")
    before = processes.children()
    fixed = ["--graph", str(place / "graph"), "--run", str(place / "run"), "--storage-driver", "overlay"]
    chosen = ["--storage-opt", f"overlay.mount_program={program('overlayfs-mount')}"]
    chosen += ["--storage-opt", "overlay.skip_mount_home=true"]

    def run(*words: str) -> str:
        done = subprocess.run(
            ["containers-storage", *fixed, *chosen, *words], capture_output=True, text=True, check=False, timeout=60
        )
        assert (done.returncode, done.stderr) == (0, ""), done
        return done.stdout.strip()

    yield run
    for point in leftovers.mounts_below(place):
        subprocess.run(["umount", point], check=True)
    processes.reap_since(before)


@pytest.fixture
def base(place: Path, storage: Storage) -> str:
    """A layer of the store with two files."""
    for name in ("etc/motd", "etc/hosts"):
        path = place / "base" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"base {name}\n")
    with tarfile.open(place / "base.tar", "w") as archive:
        archive.add(place / "base", ".")
    layer = storage("create-layer")
    storage("apply-diff", "-f", str(place / "base.tar"), layer)
    return layer


def test_a_layer_is_mounted_changed_and_compared(place: Path, storage: Storage, base: str) -> None:
    layer = storage("create-layer", base)
    tree = Path(storage("mount", layer))
    assert (tree / "etc/motd").read_text() == "base etc/motd\n"
    (tree / "new").write_text("new\n")
    (tree / "etc/hosts").unlink()
    storage("unmount", layer)
    assert set(storage("changes", layer).splitlines()) == {'Add "/new"', 'Modify "/etc"', 'Delete "/etc/hosts"'}
    storage("diff", "-u", "-f", str(place / "diff.tar"), layer)
    with tarfile.open(place / "diff.tar") as archive:
        assert sorted(archive.getnames()) == ["etc", "etc/.wh.hosts", "new"]


def test_unmounted_and_mounted_again_at_once(storage: Storage, base: str) -> None:
    layer = storage("create-layer", base)
    for number in range(3):
        tree = Path(storage("mount", layer))
        assert len(list(tree.glob("new*"))) == number
        (tree / f"new{number}").touch()
        storage("unmount", layer)
