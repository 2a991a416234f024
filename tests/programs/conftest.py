"""A real mount for real programs: two lower layers that a test fills, an upper, and the checks of every stack."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.programs.sources import python_files, write_tar
from tests.support.drivers import FuseMount, Stack
from tests.support.requirements import need, need_root

LIMIT = 120.0


def sh(*words: str | os.PathLike[str], cwd: Path | None = None, **environment: str) -> str:
    """Run a program in the C locale and return what it prints; it must succeed."""
    done = subprocess.run(
        [os.fspath(word) for word in words],
        cwd=cwd,
        env={**os.environ, "LC_ALL": "C", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, f"{words}: exit {done.returncode}: {done.stderr[-2000:]}"
    return done.stdout


class Layers(Stack):
    """Empty lower layers that real programs fill before the first mount."""

    def __init__(self, base: Path, count: int = 2) -> None:
        super().__init__(base, [{} for _ in range(count)], {})


class Bench:
    """One stack and its mount. `low` is below `top`; both may be filled until `mount`."""

    def __init__(self, base: Path, count: int = 2) -> None:
        self.layers = Layers(base, count)
        self.top, *_, self.low = self.layers.lower
        self.point = self.layers.mountpoint
        self.tree: FuseMount | None = None

    def mount(self, **options: str | None) -> Path:
        """Mount our program over the layers and return the mount point."""
        self.layers.freeze_layers()
        self.tree = FuseMount(self.layers, options)
        return self.point

    def remount(self) -> None:
        """Unmount and mount again, so that nothing comes from a cache."""
        assert self.tree is not None
        self.tree.remount()

    def finish(self) -> None:
        """Unmount, and check that the layers are as they were."""
        if self.tree is not None:
            self.tree.close()
            self.layers.check()
        self.layers.remove()


@pytest.fixture
def make_bench(place: Path) -> Iterator[Callable[[int], Bench]]:
    """Factory of benches with that many lower layers."""
    need_root()
    need(os.path.exists("/dev/fuse"), "needs /dev/fuse")
    made: list[Bench] = []

    def make(count: int) -> Bench:
        made.append(Bench(place / f"s{len(made)}", count))
        return made[-1]

    yield make
    for bench in made:
        bench.finish()


@pytest.fixture
def bench(make_bench: Callable[[int], Bench]) -> Bench:
    """Two lower layers."""
    return make_bench(2)


@pytest.fixture(scope="session")
def python_tar(scratch: Path) -> Path:
    """A tar of more than 5,000 files below `tree/`: the standard library of this Python."""
    path = scratch / "python.tar"
    write_tar(path, python_files(5200))
    return path
