"""The stand-in: only while a call of the loop hangs, never beside the loop, and nobody else's calls count."""

import os
import threading
from collections.abc import Iterator

import pytest

from overlayfs.fuse.kernel import standby as standby_module
from overlayfs.fuse.kernel.standby import Standby

LIMIT = 10.0


class Requests:
    """Work on a pipe: each byte is a request."""

    def __init__(self) -> None:
        self.source, self._send = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.answered: list[bytes] = []
        self.began, self.took, self.ended = (threading.Event() for _ in range(3))

    def ask(self, request: bytes) -> None:
        """Send a request of one byte."""
        self.took.clear()
        os.write(self._send, request)

    def begin(self) -> None:
        """Somebody stands in."""
        self.ended.clear()
        self.began.set()

    def take(self) -> None:
        """Read one request; nothing more is an error, as after an unmount."""
        found = os.read(self.source, 1)
        if not found:
            raise ConnectionAbortedError
        self.answered.append(found)
        self.took.set()

    def end(self) -> None:
        """Nobody does any more."""
        self.began.clear()
        self.ended.set()

    def hang_up(self) -> None:
        """There are no more requests."""
        os.close(self._send)
        self._send = -1

    def close(self) -> None:
        """Give the descriptors back."""
        os.close(self.source)
        if self._send >= 0:
            self.hang_up()


@pytest.fixture
def requests() -> Iterator[Requests]:
    """Requests that nobody has sent."""
    made = Requests()
    yield made
    made.close()


@pytest.fixture
def standby(requests: Requests, monkeypatch: pytest.MonkeyPatch) -> Iterator[Standby]:
    """A stand-in for the thread of the test."""
    monkeypatch.setattr(standby_module, "TICK", 0.001)
    made = Standby(requests)
    yield made
    made.close()


def test_a_call_that_hangs_is_stood_in_for(standby: Standby, requests: Requests) -> None:
    standby.begin()
    assert requests.began.wait(LIMIT)
    for request in (b"1", b"2"):
        requests.ask(request)
        assert requests.took.wait(LIMIT)
    standby.end()
    assert requests.ended.is_set(), "the loop goes on beside the stand-in"
    assert requests.answered == [b"1", b"2"]


def test_each_call_that_hangs(standby: Standby, requests: Requests) -> None:
    for _ in range(3):
        standby.begin()
        assert requests.began.wait(LIMIT)
        standby.end()
        assert requests.ended.is_set()


def test_calls_that_come_back_are_left_alone(standby: Standby, requests: Requests) -> None:
    requests.ask(b"1")
    for _ in range(100_000):
        standby.begin()
        standby.end()
    assert not requests.answered


def test_calls_of_other_threads_are_left_alone(standby: Standby, requests: Requests) -> None:
    standby.begin()
    standby.end()
    threads = [threading.Thread(target=standby.begin) for _ in range(3)]
    for thread in threads:
        thread.start()
        thread.join()
    assert not requests.began.wait(0.1)


def test_nobody_looks_before_the_first_change(standby: Standby) -> None:
    assert "stand-in" not in {thread.name for thread in threading.enumerate()}
    standby.begin()
    standby.end()
    assert "stand-in" in {thread.name for thread in threading.enumerate()}


def test_a_call_after_a_rest(standby: Standby, requests: Requests) -> None:
    """Nobody looks while nothing changes; the next change is looked at again."""
    standby.begin()
    standby.end()
    while not standby._resting:
        assert not requests.began.is_set()
    standby.begin()
    assert requests.began.wait(LIMIT)
    standby.end()


def test_an_end_while_a_call_hangs(standby: Standby, requests: Requests) -> None:
    """The mount has gone meanwhile: whoever stands in goes, and the loop goes on when it can."""
    requests.hang_up()
    standby.begin()
    assert requests.ended.wait(LIMIT)
    standby.end()
