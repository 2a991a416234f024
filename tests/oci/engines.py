"""Podman, buildah, skopeo and umoci with a storage of their own."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.oci import samples
from tests.support import syscalls
from tests.support.builder import build
from tests.support.dump import Dump
from tests.support.requirements import need_program, need_root

_CONTAINERS = """
[containers]
default_ulimits = ["nofile=1024:20000", "nproc=1024:32768"]
[engine]
runtime = "{runtime}"
cgroup_manager = "cgroupfs"
events_logger = "none"
tmp_dir = "{base}/libpod"
"""
_STORAGE = """
[storage]
driver = "overlay"
runroot = "{base}/run"
graphroot = "{base}/graph"
"""
_RUNTIMES = ("runc", "crun")
_LIMIT = 120


class Engines:
    """Runs the programs on a storage below `base`, which is used by nothing else and removed at the end."""

    def __init__(self, base: Path) -> None:
        self.base = base
        runtime = next((each for each in _RUNTIMES if Path(f"/usr/bin/{each}").exists()), _RUNTIMES[0])
        self._write("containers.conf", _CONTAINERS.format(runtime=runtime, base=base))
        self._write("storage.conf", _STORAGE.format(base=base))
        self._write("policy.json", '{"default": [{"type": "insecureAcceptAnything"}]}')

    def _write(self, name: str, text: str) -> None:
        (self.base / name).write_text(text)

    @property
    def environment(self) -> Mapping[str, str]:
        """The environment with which the programs find their settings."""
        own = {"CONTAINERS_CONF": "containers.conf", "CONTAINERS_STORAGE_CONF": "storage.conf"}
        return {**os.environ, **{name: str(self.base / file) for name, file in own.items()}}

    def run(self, *words: str | Path) -> str:
        """Run a program, which must succeed; return what it prints."""
        done = subprocess.run(
            list(map(str, words)), env=self.environment, capture_output=True, text=True, timeout=_LIMIT, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, f"{words}: exit {done.returncode}: {done.stderr}"
        return done.stdout.strip()

    def skopeo(self, source: str, destination: str) -> None:
        """Copy an image from one format to another."""
        self.run("skopeo", "copy", "-q", "--policy", self.base / "policy.json", source, destination)

    @contextmanager
    def container(self, image: str) -> Iterator[tuple[str, Path]]:
        """Yield a working container of buildah and the directory where it is mounted."""
        name = self.run("buildah", "from", "--pull-never", image)
        try:
            yield name, Path(self.run("buildah", "mount", name))
        finally:
            self.run("buildah", "umount", name)
            self.run("buildah", "rm", name)

    @contextmanager
    def mounted(self, image: str) -> Iterator[Path]:
        """Yield the directory where podman, with the kernel's overlayfs, mounts an image."""
        point = Path(self.run("podman", "image", "mount", image))
        try:
            yield point
        finally:
            self.run("podman", "image", "umount", image)

    def close(self) -> None:
        """Remove all images and podman's bind mounts."""
        self.run("podman", "rmi", "-a", "-f")
        for point in (self.base / "graph" / "overlay", self.base / "graph"):
            if os.path.ismount(point):
                syscalls.umount(os.fsencode(point))


@contextmanager
def engines(base: Path) -> Iterator[Engines]:
    """Yield the programs, or skip the test with a message if one is missing."""
    need_root()
    need_program("podman", "buildah", "skopeo", "umoci")
    base.mkdir()
    found = Engines(base)
    try:
        yield found
    finally:
        found.close()


def build_two(peers: Engines) -> None:
    """Make localhost/two:1 of two layers: whiteouts, opaque directories, hard links, setuid, capabilities."""
    _build_base(peers)
    _build_top(peers)


def _build_base(peers: Engines) -> None:
    with peers.container("scratch") as (name, root):
        build(root, samples.BASE)
        (root / "opq").mkdir()
        (root / "opq" / "below").write_text("below")
        (root / "several").mkdir()
        for number in range(3):
            os.link(root / "etc" / "motd", root / "several" / f"link{number}")
        os.mkdir(root / ("n" * 200), 0o2711)
        peers.run(
            "buildah", "config", "--env", "A=b c", "--label", "l=1", "--entrypoint", '["/bin/su"]', "--cmd", "x",
            "--user", "7:8", "--workingdir", "/etc", "--port", "80", name,
        )  # fmt: skip
        peers.run("buildah", "commit", "-q", name, "localhost/base:1")


def _build_top(peers: Engines) -> None:
    with peers.container("localhost/base:1") as (name, root):
        (root / "bin" / "ping").unlink()
        for directory in ("opq", "lib"):
            shutil.rmtree(root / directory)
            (root / directory).mkdir()
        (root / "opq" / "new").write_text("new")
        shutil.rmtree(root / "old")
        (root / "pipe").unlink()
        (root / "pipe").mkdir()
        (root / "etc" / "motd").chmod(0o4711)
        (root / "several" / "link0").unlink()
        os.setxattr(root / "bin" / "su", "security.capability", samples.CAPABILITY)
        peers.run("buildah", "commit", "-q", name, "localhost/two:1")


def filled(found: Dump) -> Dump:
    """Ignore the blocks of a tree whose holes were filled in transit; the import makes them again."""
    return {path: entry._replace(sparse=False) for path, entry in samples.unlinked(found).items()}


def like_podman(found: Dump) -> Dump:
    """Ignore fractions of seconds and holes, which podman does not unpack."""
    return {
        path: entry._replace(mtime_ns=entry.mtime_ns // 10**9, sparse=False)
        for path, entry in samples.unlinked(found).items()
    }


def plain(found: Dump) -> Dump:
    """Ignore link counts of directories, which differ in a merged tree, and holes, which umoci fills."""
    return {path: entry._replace(nlink=0, sparse=False) for path, entry in samples.unlinked(found).items()}
