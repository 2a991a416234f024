"""A stack in directories of its own, mounts of it by forked daemons, and attempts of a second use."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from overlayfs.errors import MountError, UserError
from overlayfs.mount.mounts import kernel_mounts
from overlayfs.store.store import LayerStore
from tests.store.samples import add_image
from tests.support import processes, serving, syscalls
from tests.support.fork_server import ForkServer
from tests.support.mutants import seeded
from tests.support.serving import MountSpec

MODULES = ("tests.support.serving", "overlayfs.mount.daemon", "overlayfs.mount.live_commit",
           "overlayfs.fuse.kernel.engine", "overlayfs.fuse.pyfuse3.engine")  # fmt: skip
"""What a server of daemons has loaded."""
PATIENCE = 0.1  # seconds that a second mount waits for the first one to end
_BIND, _DETACH = 4096, 2

Serve = Callable[[MountSpec], int]


class Scene:
    """The directories low, u, w, m and some others below `base`. mutant: the bug planted for all of it."""

    def __init__(self, base: Path, fork_server: ForkServer, engine: str, mutant: str | None = None) -> None:
        self.base = base
        self.point = base / "m"
        self.fork_server = fork_server
        self.engine = engine
        self._mutant = mutant
        for name in ("low", "u", "w", "m", "m2", "other", "other.w"):
            (base / name).mkdir(parents=True)
        (base / "low" / "f").write_bytes(b"f")

    def words(self, upper: str = "u", work: str = "w") -> str:
        """Options by names in the base, or absolute paths."""
        return f"lowerdir={self.base}/low,upperdir={self.base / upper},workdir={self.base / work}"

    def spec(self, words: str | None = None, point: str = "m", **more: Any) -> MountSpec:
        """A mount at a point by its name; of the usual directories if `words` are left out."""
        options = f"engine={self.engine},{self.words() if words is None else words}".encode()
        spec = MountSpec(os.fsencode(self.base / point), os.fsencode(self.base / "log"), options, mutant=self._mutant)
        return spec._replace(**{"lock_wait": PATIENCE, **more})

    def start(self, spec: MountSpec, serve: Serve = serving.serve) -> int:
        """Mount; return the pid of the daemon. UserError when it refuses."""
        return self.fork_server.run(serve, spec).value

    @contextmanager
    def mounted(self, words: str | None = None, point: str = "m", **more: Any) -> Iterator[int]:
        """A mount and the pid of its daemon, which may be killed meanwhile."""
        pid = self.start(self.spec(words, point, **more))
        try:
            yield pid
        finally:
            if more.get("own_namespace"):
                os.kill(pid, signal.SIGTERM)
            self.clear(point)
            processes.reap(pid)

    def clear(self, point: str = "m") -> None:
        """Remove all mounts at a point."""
        with suppress(OSError):
            while True:
                syscalls.umount(os.fsencode(self.base / point), _DETACH)

    def mounts(self, point: str = "m") -> int:
        """Return how many mounts are stacked at a point."""
        return sum(each.mountpoint == os.fsencode(self.base / point) for each in kernel_mounts())

    def second(self, words: str, **more: Any) -> str:
        """Try a second mount; return the message of its refusal, empty if it succeeds."""

        def mount() -> None:
            with self.mounted(words, "m2", **more):
                pass

        return self.refusal(mount, MountError)

    def refusal(self, act: Callable[[], object], kind: type[UserError] = UserError) -> str:
        """Call `act`; return the message of its refusal, empty for none, or a remark where the exit code is wrong."""
        with nullcontext() if self._mutant is None else seeded(self._mutant):
            try:
                act()
            except UserError as error:
                wrong = "" if isinstance(error, kind) else f"[exit code {error.exit_code}] "
                return wrong + str(error)
        return ""

    @contextmanager
    def bound(self, source: str, alias: str) -> Iterator[None]:
        """A directory, bind-mounted at another path."""
        (self.base / alias).mkdir()
        syscalls.mount(os.fsencode(self.base / source), os.fsencode(self.base / alias), b"none", _BIND, b"")
        try:
            yield
        finally:
            syscalls.umount(os.fsencode(self.base / alias))

    def image(self) -> dict[str, Any]:
        """Make an image in a store; return what mounts a workspace of it."""
        store = os.fsencode(self.base / "store")
        with LayerStore(store) as opened:
            add_image(opened, "site", {"f": "f"})
        return {"store": store, "image": "site", "workspace": "draft"}
