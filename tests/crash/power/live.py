"""A commit of a mounted image while a program writes, with a power cut at any moment."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Self

from overlayfs import Overlay, StackConfig
from overlayfs.library import Store
from overlayfs.store.store import LayerStore
from tests.crash.harness import View, view
from tests.crash.power.session import Verdict
from tests.mounted.images import IMAGE, WORKSPACE, ImageMount
from tests.support.watched import Recording, WatchedDisk
from tests.support.writelog import State as Moment

NEW = "site:2"
RECORD = 16  # bytes of each record that the writer appends and makes durable
PAUSE = 0.02  # seconds between two of them
AFTER = 3  # records that must be durable after the commit

LOG = b"/log"


class Writer:
    """Appends numbered records to a file in the mount and calls `report(count)` after each that is durable."""

    def __init__(self, path: Path, report: Callable[[int], None]) -> None:
        self._path = path
        self._report = report
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._write)
        self.count = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    def _write(self) -> None:
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            while not self._ending.wait(PAUSE):
                os.write(fd, records(self.count, self.count + 1))
                os.fsync(fd)
                self.count += 1
                self._report(self.count)
        finally:
            os.close(fd)

    def wait(self, more: int) -> None:
        """Return when some more records are durable."""
        goal = self.count + more
        while self.count < goal and self._thread.is_alive():
            self._thread.join(PAUSE)


def records(first: int, end: int) -> bytes:
    """The records with these numbers."""
    return b"".join(b"%0*d\n" % (RECORD - 1, number) for number in range(first, end))


class LiveCommit:
    """One commit of a mounted image whose store is on a watched disk."""

    def __init__(self, disk: WatchedDisk) -> None:
        self._disk = disk
        image = ImageMount(disk.point / "live")
        try:
            image.start()
            self._change(image.point)
            disk.sync()
            self._commit(image)
            image.unmount()
        finally:
            image.finish()
        disk.sync()
        disk.mark("end")

    @staticmethod
    def _change(point: Path) -> None:
        """Change something of each kind."""
        (point / "d" / "f").write_bytes(b"changed")
        (point / "one").chmod(0o600)
        (point / "d" / "inner").rename(point / "moved")
        (point / "doomed").unlink()

    def _commit(self, image: ImageMount) -> None:
        disk = self._disk
        with Writer(image.point / "log", lambda count: disk.mark(f"durable {count}")) as writer:
            writer.wait(1)
            disk.mark("start")
            image.commit("-t", NEW)
            disk.mark("done")
            writer.wait(AFTER)
        self._count = writer.count

    def judge(self, recording: Recording, every: int) -> Verdict:
        """Try every n-th moment from before the commit on."""
        verdict = Verdict()
        first, end = recording.marked("start"), recording.marked("end")
        self._tree: View | None = None
        for number, moment in enumerate(recording.states(first, end, Random(1))):
            if number % every == 0:
                verdict.states += 1
                verdict.violations += self._wrong(recording, moment)
        return verdict

    def _wrong(self, recording: Recording, moment: Moment) -> list[str]:
        marks = (recording.marked(f"durable {count}") for count in range(1, self._count + 1))
        durable = sum(at < moment.position for at in marks)
        try:
            with recording.after(moment) as point, Store(os.fsencode(point / "live" / "store")) as store:
                self._check(store, durable, recording.marked("done") < moment.position)
        except Exception as error:  # whatever prevents the use of the store
            return [f"{recording.kind} live commit, {durable} durable: {error!r}, with {moment}"]
        return []

    def _check(self, store: Store, durable: int, done: bool) -> None:
        committed = store.images.get(NEW)
        layers = store.workspaces.find(WORKSPACE).record.layers
        base = store.images.find(IMAGE).layers
        assert layers == (base if committed is None else committed.layers)
        assert committed is not None or not done, "the commit is undone"
        assert sorted(layers) == [layer.id for layer in store.layers()]
        self._check_tree(store, durable)
        store.commit_workspace(WORKSPACE, image="site:3", allow_empty=True)
        self._check_tree(store, durable)
        assert not store.verify().problems, store.verify().problems

    def _check_tree(self, store: LayerStore, durable: int) -> None:
        found = _shown(store)
        log = found.pop(LOG)[-1]
        assert isinstance(log, bytes)
        count = len(log) // RECORD + 1
        assert log[: durable * RECORD] == records(0, durable), "what was durable is lost"
        assert _is_of(log, records(0, count)), f"{log!r} was never written"
        if self._tree is None:
            self._tree = found
        assert found == self._tree, "the tree is another one"


def _is_of(log: bytes, written: bytes) -> bool:
    """Whether a file has the bytes that were appended; ext4 may show zeros at its end."""
    return all(byte in (0, wanted) for byte, wanted in zip(log, written, strict=False))


def _shown(store: LayerStore) -> View:
    workspace = store.workspaces.find(WORKSPACE)
    lower = tuple(layer.tree_path for layer in store.present(workspace.record.layers))
    overlay = Overlay(StackConfig(lower=lower, upper=workspace.upper_path, work=workspace.work_path))
    try:
        return view(overlay)
    finally:
        overlay.close()
