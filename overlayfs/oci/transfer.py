"""What push and pull share: transferring several layers at once, and reporting the progress of each."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import NamedTuple, TypeVar

from overlayfs import sysio
from overlayfs.errors import UserError
from overlayfs.oci.blobs import Notice
from overlayfs.oci.http_client import PIECE, CancelledError, HttpClient, RetryPolicy
from overlayfs.oci.reference import Reference
from overlayfs.oci.registry import Repository
from overlayfs.store.store import LayerStore

CONCURRENT_LAYERS = 4  # more connections to one registry gain nothing, and some registries limit them

Result = TypeVar("Result")


class LayerProgress(NamedTuple):
    """The progress of one layer. `key` identifies the layer: the digest of its blob, or its id in the store.

    `doing` is a word or two, such as "uploading". `done` and `total` are bytes; `total` is 0 when it is not known, and
    both are 0 when nothing is transferred.
    """

    key: str
    doing: str
    done: int = 0
    total: int = 0


ProgressCallback = Callable[[LayerProgress], None]
"""`progress(LayerProgress)` is called periodically, from several threads."""


def ignore_progress(_: LayerProgress) -> None:
    """Ignore the progress of a transfer."""


class Transfer(NamedTuple):
    """One push or pull: the image's repository, how it is reached, and the callbacks for its progress."""

    store: LayerStore
    repository: Repository
    reference: Reference
    client: HttpClient
    progress: ProgressCallback
    notice: Notice


def run_all(client: HttpClient, jobs: Sequence[Callable[[], Result]]) -> list[Result]:
    """Run all jobs, `CONCURRENT_LAYERS` at a time, and return their results in order.

    When a job fails, or the user interrupts, the others are cancelled and waited for; then the error is raised.
    """
    with ThreadPoolExecutor(CONCURRENT_LAYERS, thread_name_prefix="layer") as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            if not all(map(_succeeded, futures)):
                client.cancel()
                pool.shutdown(wait=False, cancel_futures=True)
    _raise_first_failure(futures)
    return [future.result() for future in futures]


def _succeeded(future: Future[Result]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def _raise_first_failure(futures: Sequence[Future[Result]]) -> None:
    """Raise the error of the job that failed; jobs that were cancelled because of it do not count."""
    for future in futures:
        error = None if future.cancelled() else future.exception()
        if error is not None and not isinstance(error, CancelledError):
            raise error


@contextlib.contextmanager
def disk_errors(store: LayerStore) -> Iterator[None]:
    """Raise errors of the store's disk as `UserError`; those of connections are `UserError` already."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the store {os.fsdecode(store.path)} fails: {error.strerror or error}; repair it and run the same again, "
            "or delete what is there of it with 'overlayfs gc'"
        ) from error


def file_pieces(fd: int, size: int, retry: RetryPolicy, progress: Callable[[int], None]) -> Iterator[bytes]:
    """Yield the first `size` bytes of a file; `progress(bytes)` is called after each piece."""
    done = 0
    while done < size:
        retry.raise_if_cancelled()
        piece = sysio.read_at(fd, done, min(PIECE, size - done))
        if not piece:
            raise EOFError(f"a file of {size} bytes ends at {done}")
        done += len(piece)
        yield piece
        progress(done)
