"""A workspace in use without a mount: a daemon's live commit on an engine without a kernel."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import trio

from overlayfs.fs.config import StackConfig
from overlayfs.fs.overlay import Overlay
from overlayfs.fuse.caching_policy import CachingPolicy
from overlayfs.fuse.engine import Engine, MountSettings
from overlayfs.mount.control_protocol import CommitImage, CommitImageReply
from overlayfs.mount.live_commit import LiveCommits
from overlayfs.mount.options import ImageMount
from overlayfs.store.hashing import HashingStatus
from overlayfs.store.records import ImageRecord, now
from overlayfs.store.store import LayerStore
from overlayfs.store.workspaces import Workspace

NAME, IMAGE = "w", "site:1"


class Idle(Engine):
    """No kernel and no requests: the tests call the overlay themselves."""

    name = "idle"

    def __init__(self, overlay: Overlay) -> None:
        super().__init__(overlay, CachingPolicy())

    def attach(self, mountpoint: bytes, settings: MountSettings) -> None:
        """There is nothing to mount."""

    async def serve(self, ready: Callable[[], None]) -> None:
        """There is nothing to serve."""

    def files_with_pages(self) -> set[int]:
        """There are no pages."""
        return set()

    def drop_pages(self, number: int) -> None:
        """There are none."""

    def stop(self) -> None:
        """It does not run."""

    def detach(self) -> None:
        """It is not mounted."""


class Unhashed:
    """A hashing that never ends."""

    def poll(self) -> HashingStatus:
        """Nothing is known."""
        return HashingStatus("hashing")


class Used:
    """A workspace in use: its overlay, and commits of it."""

    def __init__(self, store: LayerStore, workspace: Workspace, lock: int) -> None:
        lower = tuple(layer.tree_path for layer in store.present(workspace.record.layers))
        self.overlay = Overlay(
            StackConfig(lower=lower, upper=workspace.upper_path, work=workspace.work_path, lock_wait=0.0)
        )
        self.engine = Idle(self.overlay)
        record = workspace.record
        image_mount = ImageMount(store.path, record.image, record.name, record.ephemeral, record.layers, lock)
        self.unhashed: list[str] = []  # layers that a separate process would hash
        self.commits = LiveCommits(self.engine, image_mount, self._note)

    def _note(self, store: bytes, layer_id: str) -> "Unhashed":
        self.unhashed.append(layer_id)
        trio.from_thread.run_sync(self._begun.set)
        return Unhashed()

    def commit(self, image: str | None = None, allow_empty: bool = False, message: str = "") -> CommitImageReply:
        """Commit as a daemon does."""
        return trio.run(self._commit, CommitImage(image=image, allow_empty=allow_empty, message=message))

    async def _commit(self, wanted: CommitImage) -> CommitImageReply:
        self._begun = trio.Event()
        made = await self.commits.commit(wanted)
        await self._begun.wait()
        return made


class Site:
    """A store with an image of some directories."""

    def __init__(self, place: Path, *layers: Path) -> None:
        self.place = place
        with self.open() as store:
            committed = [store.commit_directory(os.fsencode(layer)) for layer in layers]
            ids = tuple(layer.id for layer in committed)
            store.images.put(ImageRecord(name=IMAGE, layers=ids, created=now()))

    def open(self) -> LayerStore:
        """Open the store, which recovers unfinished operations."""
        return LayerStore(os.fsencode(self.place / "store"))

    @contextmanager
    def used(self, image: str = IMAGE) -> Iterator[Used]:
        """Use the workspace, which is created the first time; at the end everything is closed."""
        with ExitStack() as stack:
            store = stack.enter_context(self.open())
            claim = store.workspaces.claim(image, NAME)
            stack.enter_context(claim.lock)
            used = Used(store, claim.workspace, claim.lock.fd)
            stack.callback(used.commits.close)
            stack.callback(used.overlay.close)
            yield used

    def layers(self) -> tuple[str, ...]:
        """Return the stack of the workspace according to its record."""
        with self.open() as store:
            return store.workspaces.find(NAME).record.layers

    @contextmanager
    def image_view(self, image: str) -> Iterator[Overlay]:
        """Show an image, read-only."""
        with self.open() as store:
            overlay = Overlay(StackConfig(lower=tuple(layer.tree_path for layer in store.stack_of(image))))
            try:
                yield overlay
            finally:
                overlay.close()

    def remove(self) -> None:
        """Delete it."""
        shutil.rmtree(self.place)
