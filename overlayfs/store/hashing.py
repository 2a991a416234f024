"""Hashing adopted layers in a process of its own, so that the mount that was committed goes on undisturbed.

    python -m overlayfs.store.hashing STORE [ID]

hashes the layer ID, then whatever else a killed process has left unhashed. Who hashes a layer holds the flock of its
tree. Progress goes to standard output, one line each: `ID ENTRIES BYTES`, at the end `ID done DIGEST` or `ID failed
WHY`; lines that nobody reads are dropped, and nothing waits for a reader.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

from overlayfs import sysio
from overlayfs.errors import UserError
from overlayfs.store import commit
from overlayfs.store.commit import Progress
from overlayfs.store.layers import Layer
from overlayfs.store.store import LayerStore


class HashingStatus(NamedTuple):
    """How far a layer is: `state` is "hashing", "done" or "failed", `told` the digest or the reason."""

    state: str
    entries: int = 0
    size: int = 0
    told: str = ""


class HashingProcess:
    """A process that hashes one layer, seen from the one that began it."""

    def __init__(self, store: bytes, layer_id: str) -> None:
        self.layer_id = layer_id
        self._rest = b""
        self._last = HashingStatus("hashing")
        self._fd, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            words = [*_nicely(), sys.executable, "-m", "overlayfs.store.hashing", os.fsdecode(store), layer_id]
            # It leaves a child behind that does the work and ends itself: none of ours is left to be waited for.
            subprocess.run(words, stdin=subprocess.DEVNULL, stdout=writing, stderr=subprocess.DEVNULL, check=True)
        except BaseException:
            sysio.close(self._fd)
            raise
        finally:
            sysio.close(writing)

    def look(self) -> HashingStatus:
        """Return how far it is; never waits."""
        while self._fd >= 0:
            try:
                piece = os.read(self._fd, 1 << 16)
            except BlockingIOError:
                break
            if not piece:
                self._end()
            *lines, self._rest = (self._rest + piece).split(b"\n")
            for line in lines:
                self._take(line.decode().split(" ", 2))
        return self._last

    def _end(self) -> None:
        sysio.close(self._fd)
        self._fd = -1
        if self._last.state == "hashing":
            self._last = HashingStatus("failed", told="the process that hashed it has ended")

    def _take(self, words: list[str]) -> None:
        if words[0] != self.layer_id or len(words) < 3:
            return
        if words[1] in ("done", "failed"):
            self._last = HashingStatus(words[1], self._last.entries, self._last.size, words[2])
        else:
            self._last = HashingStatus("hashing", int(words[1]), int(words[2]))


def _nicely() -> tuple[str, ...]:
    """Return the words before a command that must not be in the way of a mount, from its first moment on."""
    return ("nice", "-n", "19") if shutil.which("nice") else ()


def hash_layer(store: LayerStore, layer: Layer, progress: Progress | None = None, wait: bool = False) -> Layer | None:
    """Make an adopted layer complete; `progress` is told entries and bytes.

    When another process is at it: None, or what it made if `wait`.
    """
    with contextlib.ExitStack() as held:
        tree = layer.tree_fd()
        held.callback(sysio.close, tree)
        if wait:
            sysio.wait_lock(tree, shared=False)
        elif not sysio.try_lock(tree):
            return None
        found = store.layer(layer.id)
        return commit.hash_layer(store, layer, progress) if found.record.state == "hashing" else found


def hash_unfinished(store: LayerStore, progress: Progress | None = None) -> None:
    """Make the layers complete whose hashing somebody began and nobody finished."""
    for layer in list(store.unfinished()):
        hash_layer(store, layer, progress)


def _hash_aloud(store: LayerStore, layer: Layer, wait: bool) -> None:
    finished = hash_layer(store, layer, lambda entries, size: _tell(layer.id, entries, size), wait)
    if finished is not None:
        _tell(layer.id, finished.record.entries, finished.record.size)
        _tell(layer.id, "done", finished.record.digest)


def _tell(*words: object) -> None:
    with contextlib.suppress(BlockingIOError, BrokenPipeError):
        os.write(sys.stdout.fileno(), " ".join(map(str, words)).encode() + b"\n")


def _in_turn(store: LayerStore, first: str | None) -> Iterator[Layer]:
    if first is not None:
        yield store.layer(first)
    yield from store.unfinished()


def hash_all(store: LayerStore, first: str | None = None) -> int:
    """Hash one layer, then all others that need it; return how many could not be."""
    failed = 0
    for layer in _in_turn(store, first):
        try:
            _hash_aloud(store, layer, wait=layer.id == first)
        except (OSError, UserError) as error:
            failed += 1
            _tell(layer.id, "failed", " ".join(str(error).split()))
    return failed


def main(words: list[str]) -> int:
    """Begin the work in a child that outlives its parent, and return in the parent at once."""
    if os.fork():
        return 0
    os.setsid()
    with LayerStore(os.fsencode(words[0]), create=False) as store:
        return min(hash_all(store, words[1] if len(words) > 1 else None), 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
