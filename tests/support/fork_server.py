"""A fork server: runs functions in processes of their own and measures their memory and processor time.

A process starts with the memory of the one it was forked from, and pytest uses much memory. So each function runs
in a child of a small server that has loaded only the program. Functions and arguments must be picklable. A daemon that
a function starts becomes a child of the tests (`processes.adopt`).
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
_PROGRAM = "from tests.support import fork_server; fork_server.serve()"
_LENGTH = struct.Struct("<Q")
_GRACE = 5.0  # seconds that a killed child may take to end


class HungError(Exception):
    """A function exceeded its time limit and was killed."""


class DiedError(Exception):
    """The process of a function ended without a result."""


class Done(NamedTuple, Generic[T]):
    """The value that a function returned, its processor time in seconds, and its peak memory in bytes.

    Elapsed time would depend on what else the machine does.
    """

    value: T
    seconds: float
    peak: int


class _Answer(NamedTuple):
    """The pickled outcome of a function (whether it returned, and the value or exception), and its cost."""

    answer: bytes
    seconds: float = 0.0
    peak: int = 0


class ForkServer:
    """The server, a context manager. `modules` are loaded once, so that no call pays for them."""

    def __init__(self, *modules: str) -> None:
        words = [sys.executable, "-c", _PROGRAM, *modules]
        self._server = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()

    def run(self, act: Callable[..., T], *args: Any, limit: float = 60.0, mutant: str | None = None) -> Done[T]:
        """Call `act` in a process of its own, with a planted bug (`mutant`) if one is named; raise what it raises.

        `HungError` when it takes longer than `limit` seconds, `DiedError` when its process ends without a result.
        """
        assert self._server.stdin is not None and self._server.stdout is not None
        _send(self._server.stdin, pickle.dumps((limit, act if mutant is None else partial(mutated, mutant, act), args)))
        answer, seconds, peak = pickle.loads(_receive(self._server.stdout))
        worked, result = pickle.loads(answer)
        if not worked:
            raise result
        return Done(result, seconds, peak)


def mutated(mutant: str, act: Callable[..., T], *args: Any) -> T:
    """Call `act` with a planted bug."""
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
    """Forks a child for each call and passes on its result."""

    def __init__(self) -> None:
        self._requests = io.BufferedReader(io.FileIO(os.dup(0)))
        self._replies = io.BufferedWriter(io.FileIO(os.dup(1), "w"))
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(2, 1)  # output of a function must not mix with results

    def serve(self) -> None:
        """Serve until the other end of the pipe is closed."""
        gc.freeze()
        while True:
            try:
                limit, act, args = pickle.loads(_receive(self._requests))
            except EOFError:
                return
            _send(self._replies, pickle.dumps(self._act(limit, partial(act, *args))))

    def _act(self, limit: float, act: Callable[[], object]) -> _Answer:
        """Call `act` in a child, which is killed after `limit` seconds."""
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            self._run_child(writer, act)
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

    def _run_child(self, writer: int, act: Callable[[], object]) -> NoReturn:
        """Call, send the result, exit. The server's streams are closed first: a daemon would inherit them."""
        self._requests.close()
        os.close(self._replies.fileno())
        answer = answer_of(act)
        used = resource.getrusage(resource.RUSAGE_SELF)
        with open(writer, "wb") as stream:
            _send(stream, pickle.dumps(_Answer(answer, used.ru_utime + used.ru_stime, used.ru_maxrss << 10)))
        os._exit(0)


def _reap(child: int) -> int:
    """Wait for a child that has ended or been killed, but not for one that hangs in the kernel."""
    handle = os.pidfd_open(child)
    ended, _, _ = select.select([handle], [], [], _GRACE)
    os.close(handle)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if ended else -signal.SIGKILL


def serve() -> None:
    """Import the modules of the command line, and serve."""
    for each in sys.argv[1:]:
        importlib.import_module(each)
    _Server().serve()
