"""Acts in processes of their own, measured: what one takes in memory and time counts for it alone.

A process starts with the memory of the one that it was forked from, and that of pytest is large. So each act is forked
from a small server, which has loaded the program and nothing else. An act is a function of a module with arguments
that can be pickled; what it starts and leaves behind, a daemon, becomes a child of the tests (`processes.adopt`).
"""

import gc
import importlib
import io
import os
import pickle
import resource
import select
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Generic, NamedTuple, NoReturn, Self, TypeVar

from tests.support.mutants import seeded
from tests.support.users import answer_of

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
_PROGRAM = "from tests.support import apart; apart.serve()"
_LENGTH = struct.Struct("<Q")
_GRACE = 5.0  # seconds for a child that was killed to be gone


class HungError(Exception):
    """An act took longer than it may; it was killed."""


class DiedError(Exception):
    """An act ended without an answer."""


class Done(NamedTuple, Generic[T]):
    """What an act returned, how many seconds of the processors it took, and the peak of its memory in bytes.

    Seconds of a clock would tell how busy the machine is with other things.
    """

    value: T
    seconds: float
    peak: int


class _Answer(NamedTuple):
    """Whether an act worked and what it gave, pickled, and what it took."""

    answer: bytes
    seconds: float = 0.0
    peak: int = 0


class Apart:
    """The server, a context. `modules` are loaded once, so that no act pays for them."""

    def __init__(self, *modules: str) -> None:
        words = [sys.executable, "-c", _PROGRAM, *modules]
        self._server = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()

    def run(self, act: Callable[..., T], *args: Any, limit: float = 60.0, mutant: str | None = None) -> Done[T]:
        """Call `act`, with a bug if one is wanted; raises what it raised.

        `HungError` when it takes longer than `limit` seconds, `DiedError` when it ends without an answer.
        """
        assert self._server.stdin is not None and self._server.stdout is not None
        _send(self._server.stdin, pickle.dumps((limit, act if mutant is None else partial(mutated, mutant, act), args)))
        answer, seconds, peak = pickle.loads(_receive(self._server.stdout))
        worked, result = pickle.loads(answer)
        if not worked:
            raise result
        return Done(result, seconds, peak)


def mutated(mutant: str, act: Callable[..., T], *args: Any) -> T:
    """Call `act` with a bug."""
    with seeded(mutant):
        return act(*args)


def _send(stream: BinaryIO | Any, data: bytes) -> None:
    stream.write(_LENGTH.pack(len(data)) + data)
    stream.flush()


def _receive(stream: BinaryIO | Any) -> bytes:
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError
    data = stream.read(_LENGTH.unpack(head)[0])
    assert isinstance(data, bytes)
    return data


# --- the server ----------------------------------------------------------------------------------------------


class _Server:
    """Forks a child for each act that is asked for, and hands on what it answers."""

    def __init__(self) -> None:
        self._asked = io.BufferedReader(io.FileIO(os.dup(0)))
        self._told = io.BufferedWriter(io.FileIO(os.dup(1), "w"))
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(2, 1)  # what an act prints is no answer

    def serve(self) -> None:
        """Serve until there is nobody to ask."""
        gc.freeze()
        while True:
            try:
                limit, act, args = pickle.loads(_receive(self._asked))
            except EOFError:
                return
            _send(self._told, pickle.dumps(self._act(limit, partial(act, *args))))

    def _act(self, limit: float, act: Callable[[], object]) -> _Answer:
        """Have a child act, for so many seconds at most."""
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            self._live(writer, act)
        os.close(writer)
        with open(reader, "rb") as stream:
            if not select.select([stream], [], [], limit)[0]:
                os.kill(child, signal.SIGKILL)
                _reap(child)
                return _Answer(pickle.dumps((False, HungError(f"it took longer than {limit:g} s"))))
            try:
                found: _Answer = pickle.loads(_receive(stream))
            except EOFError:
                return _Answer(pickle.dumps((False, DiedError(f"it ended with {_reap(child)}"))))
        _reap(child)
        return found

    def _live(self, writer: int, act: Callable[[], object]) -> NoReturn:
        """Act, answer, end; without the server's streams, which what it starts would keep."""
        self._asked.close()
        os.close(self._told.fileno())
        answer = answer_of(act)
        used = resource.getrusage(resource.RUSAGE_SELF)
        with open(writer, "wb") as stream:
            _send(stream, pickle.dumps(_Answer(answer, used.ru_utime + used.ru_stime, used.ru_maxrss << 10)))
        os._exit(0)


def _reap(child: int) -> int:
    """Wait for a child that has ended or been killed; one that hangs in the kernel is left to it."""
    handle = os.pidfd_open(child)
    ended, _, _ = select.select([handle], [], [], _GRACE)
    os.close(handle)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if ended else -signal.SIGKILL


def serve() -> None:
    """Load the modules that the command line names, and serve."""
    for each in sys.argv[1:]:
        importlib.import_module(each)
    _Server().serve()
