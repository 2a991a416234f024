"""Hashes committed layers in a separate process, so that the mount is not slowed down by it.

    python -m overlayfs.store.hashing STORE [ID]

hashes the layer ID, then all other layers that killed processes have left unhashed. A process that hashes a layer holds
the flock of its tree. Progress goes to standard output, one line each: `ID ENTRIES BYTES`, and at the end `ID done
DIGEST` or `ID failed REASON`. Lines that do not fit into the pipe are dropped; the process never waits for a reader.
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
from overlayfs.store.layers import Layer
from overlayfs.store.scan import Progress
from overlayfs.store.store import LayerStore


class HashingStatus(NamedTuple):
    """How far a layer is hashed. state: "hashing", "done" or "failed". detail: the digest, or the reason of a failure.

    entries, size: the entries and the bytes of content that are hashed so far.
    """

    state: str
    entries: int = 0
    size: int = 0
    detail: str = ""


class HashingProcess:
    """A process that hashes one layer; started by the constructor, which raises OSError or SubprocessError."""

    def __init__(self, store: bytes, layer_id: str) -> None:
        self.layer_id = layer_id
        self._partial_line = b""
        self._status = HashingStatus("hashing")
        self._fd, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            command = [*_nice(), sys.executable, "-m", "overlayfs.store.hashing", os.fsdecode(store), layer_id]
            # The command forks a child that does the work, and exits: no child of ours is left to wait for.
            subprocess.run(command, stdin=subprocess.DEVNULL, stdout=writing, stderr=subprocess.DEVNULL, check=True)
        except BaseException:
            sysio.close(self._fd)
            raise
        finally:
            sysio.close(writing)

    def poll(self) -> HashingStatus:
        """Return how far it is; does not block."""
        while self._fd >= 0:
            try:
                piece = os.read(self._fd, 1 << 16)
            except BlockingIOError:
                break
            if not piece:
                self._end()
            *lines, self._partial_line = (self._partial_line + piece).split(b"\n")
            for line in lines:
                self._parse(line.decode().split(" ", 2))
        return self._status

    def _end(self) -> None:
        sysio.close(self._fd)
        self._fd = -1
        if self._status.state == "hashing":
            self._status = HashingStatus("failed", detail="the process that hashed it has ended")

    def _parse(self, words: list[str]) -> None:
        if words[0] != self.layer_id or len(words) < 3:
            return
        if words[1] in ("done", "failed"):
            self._status = HashingStatus(words[1], self._status.entries, self._status.size, words[2])
        else:
            self._status = HashingStatus("hashing", int(words[1]), int(words[2]))


def _nice() -> tuple[str, ...]:
    """Return a command prefix that lowers the priority from the first moment on."""
    return ("nice", "-n", "19") if shutil.which("nice") else ()


def hash_layer(store: LayerStore, layer: Layer, progress: Progress | None = None, wait: bool = False) -> Layer | None:
    """Complete a layer whose state is "hashing", and return the layer that images use from now on.

    `progress(entries, bytes)` is called periodically. If another process is hashing it: None, or if `wait` the layer as
    that process has left it.
    """
    with contextlib.ExitStack() as closing:
        tree = layer.tree_fd()
        closing.callback(sysio.close, tree)
        if wait:
            sysio.wait_lock(tree, shared=False)
        elif not sysio.try_lock(tree):
            return None
        found = store.layers.find(layer.id)
        return commit.hash_layer(store, layer, progress) if found.record.state == "hashing" else found


def hash_unfinished(store: LayerStore, progress: Progress | None = None) -> None:
    """Complete the layers that killed processes have left unhashed; `progress` as in `hash_layer`."""
    for layer in list(store.layers.unfinished()):
        hash_layer(store, layer, progress)


# --- the process -------------------------------------------------------------------------------------------


def main(words: list[str]) -> int:
    """Fork a child that outlives its parent and does the work; return in the parent at once."""
    if os.fork():
        return 0
    os.setsid()
    with LayerStore(os.fsencode(words[0]), create=False) as store:
        return min(hash_all(store, words[1] if len(words) > 1 else None), 1)


def hash_all(store: LayerStore, first: str | None = None) -> int:
    """Hash one layer, then all others that need it; return the number of failures."""
    failed = 0
    for layer in _in_turn(store, first):
        try:
            _hash_with_output(store, layer, wait=layer.id == first)
        except (OSError, UserError) as error:
            failed += 1
            _write_line(layer.id, "failed", " ".join(str(error).split()))
    return failed


def _in_turn(store: LayerStore, first: str | None) -> Iterator[Layer]:
    if first is not None:
        yield store.layers.find(first)
    yield from store.layers.unfinished()


def _hash_with_output(store: LayerStore, layer: Layer, wait: bool) -> None:
    completed = hash_layer(store, layer, lambda entries, size: _write_line(layer.id, entries, size), wait)
    if completed is not None:
        _write_line(layer.id, completed.record.entries, completed.record.size)
        _write_line(layer.id, "done", completed.record.digest)


def _write_line(*words: object) -> None:
    with contextlib.suppress(BlockingIOError, BrokenPipeError):
        os.write(sys.stdout.fileno(), " ".join(map(str, words)).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
