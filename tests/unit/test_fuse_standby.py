"""The standby thread serves only while a call of the loop hangs, and never at the same time as the loop."""

import os
import threading
from collections.abc import Iterator

import pytest

from overlayfs.fuse.kernel import standby as standby_module
from overlayfs.fuse.kernel.standby import Standby

LIMIT = 10.0


class Requests:
    """A reader of requests from a pipe: each byte is a request."""

    def __init__(self) -> None:
        self.source, self._send = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.answered: list[bytes] = []
        self.began, self.read, self.ended = (threading.Event() for _ in range(3))

    def ask(self, request: bytes) -> None:
        """Send a request of one byte."""
        self.read.clear()
        os.write(self._send, request)

    def begin(self) -> None:
        """The standby thread serves."""
        self.ended.clear()
        self.began.set()

    def read_one(self) -> None:
        """Read one request; the end of the pipe is an error, as after an unmount."""
        found = os.read(self.source, 1)
        if not found:
            raise ConnectionAbortedError
        self.answered.append(found)
        self.read.set()

    def end(self) -> None:
        """The standby thread has stopped."""
        self.began.clear()
        self.ended.set()

    def hang_up(self) -> None:
        """There are no more requests."""
        os.close(self._send)
        self._send = -1

    def close(self) -> None:
        """Close the descriptors."""
        os.close(self.source)
        if self._send >= 0:
            self.hang_up()


@pytest.fixture
def requests() -> Iterator[Requests]:
    """A pipe without requests."""
    made = Requests()
    yield made
    made.close()


@pytest.fixture
def standby(requests: Requests, monkeypatch: pytest.MonkeyPatch) -> Iterator[Standby]:
    """A standby thread that watches the thread of the test."""
    monkeypatch.setattr(standby_module, "TICK", 0.001)
    made = Standby(requests)
    yield made
    made.close()


def test_requests_are_answered_while_a_call_hangs(standby: Standby, requests: Requests) -> None:
    standby.begin()
    assert requests.began.wait(LIMIT)
    for request in (b"1", b"2"):
        requests.ask(request)
        assert requests.read.wait(LIMIT)
    standby.end()
    assert requests.ended.is_set(), "the loop runs at the same time as the standby thread"
    assert requests.answered == [b"1", b"2"]


def test_requests_are_answered_during_each_call_that_hangs(standby: Standby, requests: Requests) -> None:
    for _ in range(3):
        standby.begin()
        assert requests.began.wait(LIMIT)
        standby.end()
        assert requests.ended.is_set()


def test_calls_that_return_change_nothing(standby: Standby, requests: Requests) -> None:
    requests.ask(b"1")
    for _ in range(100_000):
        standby.begin()
        standby.end()
    assert not requests.answered


def test_calls_of_other_threads_change_nothing(standby: Standby, requests: Requests) -> None:
    standby.begin()
    standby.end()
    threads = [threading.Thread(target=standby.begin) for _ in range(3)]
    for thread in threads:
        thread.start()
        thread.join()
    assert not requests.began.wait(0.1)


def test_there_is_no_thread_before_the_first_change(standby: Standby) -> None:
    assert "standby" not in {thread.name for thread in threading.enumerate()}
    standby.begin()
    standby.end()
    assert "standby" in {thread.name for thread in threading.enumerate()}


def test_a_call_that_hangs_after_a_pause(standby: Standby, requests: Requests) -> None:
    """The thread sleeps while nothing changes; the next change wakes it."""
    standby.begin()
    standby.end()
    while not standby._resting:
        assert not requests.began.is_set()
    standby.begin()
    assert requests.began.wait(LIMIT)
    standby.end()


def test_the_end_of_the_mount_while_a_call_hangs(standby: Standby, requests: Requests) -> None:
    """The standby thread stops, and the loop continues when its call returns."""
    requests.hang_up()
    standby.begin()
    assert requests.ended.wait(LIMIT)
    standby.end()
