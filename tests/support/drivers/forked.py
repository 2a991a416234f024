"""Mounts whose daemon is forked from the test process: ready in milliseconds, otherwise like any mount."""

import importlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from unittest import mock

from overlayfs.mount import control_client, image_mount, live_commit, start
from overlayfs.mount.control_protocol import CommitImage
from overlayfs.mount.options import Draft, MountOptions
from overlayfs.store.records import ImageRecord, now
from overlayfs.store.store import LayerStore
from tests.support import processes, syscalls
from tests.support.drivers.base import Options, Tree
from tests.support.drivers.mounts import DETACH, option_string, unmount
from tests.support.drivers.posix import PosixRaw
from tests.support.drivers.raw import Raw
from tests.support.drivers.stack import Stack

IMAGE, WORKSPACE = "forked:1", "w"


def load() -> None:
    """Import the modules that daemons need before they are forked."""
    for name in ("mount.daemon", "mount.live_commit", "fuse.pyfuse3.engine", "fuse.kernel.engine"):
        importlib.import_module(f"overlayfs.{name}")


class ForkedMount(Tree):
    """A mount of directories. Its daemon inherits the patches of the test."""

    name = "forked"

    def _start(self) -> Raw:
        self._mount(self._options())
        return PosixRaw(self._point)

    def _options(self) -> MountOptions:
        draft = Draft()
        draft.read(os.fsencode(option_string(self, self.options)))
        return draft.build()

    @property
    def _point(self) -> bytes:
        return os.fsencode(self.stack.mountpoint)

    def _mount(self, options: MountOptions) -> None:
        start.mount(options, self._point)
        self.daemon = control_client.Client.at(self._point).status().pid

    def _stop(self) -> None:
        unmount(self.stack.mountpoint)
        status = processes.reap(self.daemon)
        assert status == 0, f"the daemon ended with {status}"

    def kill(self) -> None:
        """End the mount if it has not ended, whatever its daemon is doing."""
        if self.in_use:
            self.in_use = False
            os.kill(self.daemon, signal.SIGKILL)
            processes.reap(self.daemon)
            with suppress(OSError):  # the mount may have ended, and then open files fail
                syscalls.umount(self._point, DETACH)
                self.raw.close()

    def commit(self, layer: os.PathLike[str]) -> None:
        """Copy the upper to a new layer."""
        control_client.Client.at(self._point).commit(os.fsencode(layer))


class ForkedImage(ForkedMount):
    """A mount of an image: the stack's layers are put into a store, which has the upper and work directories."""

    name = "forked-image"
    can_rotate = True

    def __init__(self, stack: Stack, options: Options | None = None) -> None:
        assert stack.upper is None
        self.store = os.fsencode(stack.base / "store")
        with LayerStore(self.store) as store:
            ids = tuple(store.commit_directory(os.fsencode(layer)).id for layer in stack.lower)
            store.images.put(ImageRecord(name=IMAGE, layers=ids, created=now()))
            stack.lower = [Path(os.fsdecode(layer.tree_path)) for layer in store.stack_of(IMAGE)]
        stack.freeze_layers()
        super().__init__(stack, options)

    def _mount(self, options: MountOptions) -> None:
        with image_mount.lease_workspace(self.store, IMAGE, WORKSPACE, False, False) as lease:
            stack = replace(options.stack, lower=lease.lower, upper=lease.upper, work=lease.work)
            super()._mount(replace(options, stack=stack, image_mount=lease.image_mount))

    def rotate(self) -> None:
        """Commit the upper as a layer of the store, and mount the result."""
        self.rotation()
        self.remount()

    def rotation(self) -> None:
        """Commit into the store."""
        control_client.Client.at(self._point).commit_image(CommitImage(allow_empty=True))
        with LayerStore(self.store) as store:
            made, *_ = store.stack_of(WORKSPACE)
        self.stack.add_layer(Path(os.fsdecode(made.tree_path)))


@contextmanager
def unhashed() -> Iterator[None]:
    """Committed layers are not hashed, which would take a process for each."""

    async def begin(self: live_commit.LiveCommits, store: bytes, layer_id: str) -> None:
        """Keep the layer."""

    with mock.patch.object(live_commit.LiveCommits, "_start_hashing", begin):
        yield
