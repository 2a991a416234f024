"""Mounts of an image of a store, and commits of them, as users type them."""

import json
import os
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from overlayfs.store.records import ImageRecord, now
from overlayfs.store.store import LayerStore
from tests.mounted.conftest import DETACH, PROGRAM
from tests.support import engines, processes, syscalls

IMAGE, WORKSPACE = "site:1", "w"


def adopt_image(store: Path, name: str, *layers: Path) -> None:
    """Put directories, top first, into a store as the layers of an image."""
    with LayerStore(os.fsencode(store)) as opened:
        ids = tuple(opened.commit_directory(os.fsencode(layer)).id for layer in layers)
        opened.images.put(ImageRecord(name=name, layers=ids, created=now()))


class ImageMount:
    """A store with one image, a mount point, and the daemons that were started."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.store, self.point = place / "store", place / "m"
        self.point.mkdir(parents=True)
        self._fill(place / "base")
        adopt_image(self.store, IMAGE, place / "base")
        self.pids: list[int] = []

    @staticmethod
    def _fill(base: Path) -> None:
        (base / "d" / "inner").mkdir(parents=True)
        (base / "d" / "f").write_bytes(b"low" * 1000)
        (base / "d" / "inner" / "leaf").write_bytes(b"leaf")
        (base / "one").write_bytes(b"two names")
        os.link(base / "one", base / "d" / "two")
        (base / "doomed").write_bytes(b"doomed")

    @property
    def pid(self) -> int:
        """The newest daemon."""
        return self.pids[-1]

    @property
    def workspace(self) -> Path:
        """The directory of the workspace."""
        return self.store / "workspaces" / WORKSPACE

    def start(self, image: str = IMAGE) -> None:
        """Mount in the background."""
        before = processes.children()
        options = engines.option()
        words = ("mount", image, str(self.point), "--name", WORKSPACE, "--store", str(self.store))
        self._run(*words, *(("-o", options) if options else ()))
        self.pids += sorted(processes.children() - before)

    def commit(self, *words: str) -> dict[str, Any]:
        """Commit, wait for the hash, and return the JSON document."""
        before = processes.children()
        printed = self._run("commit", str(self.point), "--wait", "--json", *words)
        processes.reap_since(before)
        found: dict[str, Any] = json.loads(printed)
        assert found["state"] == "complete"
        return found

    @staticmethod
    def _run(*words: str) -> str:
        done = subprocess.run(
            [PROGRAM, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def tree(self, layer: Mapping[str, Any]) -> Path:
        """The tree of a committed layer."""
        return self.store / "layers" / str(layer["layer"]) / "tree"

    def unmount(self) -> None:
        """Unmount as umount(8) does; the daemon must end well."""
        syscalls.umount(os.fsencode(self.point))
        assert processes.reap(self.pids.pop()) == 0

    def kill(self) -> None:
        """Kill the daemon and remove the dead mount."""
        pid = self.pids.pop()
        os.kill(pid, 9)
        processes.reap(pid)
        with suppress(OSError):
            syscalls.umount(os.fsencode(self.point), DETACH)

    def finish(self) -> None:
        """End the daemons and mounts that a failed test has left."""
        with suppress(OSError):
            while True:
                syscalls.umount(os.fsencode(self.point), DETACH)
        while self.pids:
            with suppress(ProcessLookupError, ChildProcessError):
                self.kill()
