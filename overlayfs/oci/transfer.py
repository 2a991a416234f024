"""What push and pull have in common: several layers at once, and the word on how far each of them is."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import NamedTuple, TypeVar

from overlayfs import sysio
from overlayfs.errors import UserError
from overlayfs.oci.http_client import PIECE, CancelledError, HttpClient, RetryPolicy
from overlayfs.store.store import LayerStore

AT_ONCE = 4  # layers; more connections to one registry gain nothing and annoy it

Result = TypeVar("Result")


class LayerProgress(NamedTuple):
    """How far one layer is. `key` tells layers apart: the digest of the blob, or the id of the layer.

    `done` and `total` are bytes; `total` is 0 where it is not known, both are 0 where nothing moves.
    """

    key: str
    doing: str
    done: int = 0
    total: int = 0


ProgressCallback = Callable[[LayerProgress], None]
"""Called from several threads."""


def ignore_progress(_: LayerProgress) -> None:
    """Take a step and do nothing."""


def run_all(client: HttpClient, jobs: Sequence[Callable[[], Result]]) -> list[Result]:
    """Do all jobs, a few at a time, and return their results in order.

    When one fails, or the user interrupts, the others are stopped, and it is raised when the last one has ended.
    """
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="layer") as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            if not all(map(_succeeded, futures)):
                client.stop()
                pool.shutdown(wait=False, cancel_futures=True)
    _raise_first_failure(futures)
    return [future.result() for future in futures]


def _succeeded(future: Future[Result]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def _raise_first_failure(futures: Sequence[Future[Result]]) -> None:
    """A job that was given up is no reason for anything; some other one is."""
    for future in futures:
        error = None if future.cancelled() else future.exception()
        if error is not None and not isinstance(error, CancelledError):
            raise error


@contextlib.contextmanager
def disk_failures(store: LayerStore) -> Iterator[None]:
    """Tell failures of the disk in a sentence; those of connections have been told already."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the store {os.fsdecode(store.path)} fails: {error.strerror or error}; put that right and run it again, "
            "or let 'overlayfs gc' take what is there of it"
        ) from error


def pieces_of(fd: int, size: int, retry: RetryPolicy, report: Callable[[int], None]) -> Iterator[bytes]:
    """Give the first `size` bytes of a file."""
    done = 0
    while done < size:
        retry.check()
        piece = sysio.read_at(fd, done, min(PIECE, size - done))
        if not piece:
            raise EOFError(f"a file of {size} bytes ends at {done}")
        done += len(piece)
        yield piece
        report(done)
