"""Copy-ups in a daemon forked from here that stop between the last byte and the name until a test releases them."""

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from overlayfs.tree import staging
from overlayfs.tree.staging import Content, Source, Staged
from overlayfs.tree.upper import Upper

LIMIT = 10.0  # seconds; a longer wait is a hang
MANY = 64


class Hold:
    """Copies of data are counted, and wait until `release`. The daemon must be forked within `applied`."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        # Not pipes: a daemon closes the descriptors that it was forked with.
        self._begun, self._go = context.Semaphore(0), context.Semaphore(0)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Daemons that are forked within this context hold their copies."""
        build = staging.build

        def held(upper: Upper, source: Source) -> Staged:
            made = build(upper, source)
            if source.content is Content.COPY:
                self._begun.release()
                assert self._go.acquire(timeout=LIMIT), "the copy was not released"
            return made

        with mock.patch.object(staging, "build", held):
            yield

    def wait(self) -> None:
        """Return when a copy is held."""
        assert self._begun.acquire(timeout=LIMIT), "no copy-up has begun"

    def release(self) -> None:
        """Release the held copy, and all that follow."""
        for _ in range(MANY):
            self._go.release()

    def count(self) -> int:
        """Return how many copies began that `wait` has not seen; from now on copies are held again."""
        while self._go.acquire(block=False):
            pass
        found = 0
        while self._begun.acquire(block=False):
            found += 1
        return found
