"""Writers of sequence numbers: four processes that write while something else is measured, and log each write.

`python -m bench.writers DIRECTORY LOG` is one of them. The wait of a write is measured around one write(2) or open(2),
by the writer itself.
"""

import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

COUNT = 4
RECORD = 512  # bytes of one write
PER_FILE = 100  # writes into one file, then the next is made
PAUSE = 0.0005  # seconds between two writes, so that the wait for a commit is measured and not that for a full disk
STEP = struct.Struct("=ddQ")  # one write: when it began, how long it took (seconds), the number of writes so far
Steps = list[tuple[float, float, int]]


def write_on(directory: Path, log: Path) -> None:
    """Write one number after the other until the process is killed; acknowledged writes are noted in `log`."""
    directory.mkdir()
    count = 0
    with log.open("ab", buffering=0) as notes:
        while True:
            start = time.monotonic()
            with (directory / f"{count:09}").open("ab", buffering=0) as file:
                for _ in range(PER_FILE):
                    file.write(b"%0*d\n" % (RECORD - 1, count))
                    count += 1
                    notes.write(STEP.pack(start, time.monotonic() - start, count))
                    time.sleep(PAUSE)
                    start = time.monotonic()


class Writers:
    """Four writers, each a process with a directory of its own below `root`."""

    def __init__(self, root: Path, logs: Path) -> None:
        logs.mkdir(parents=True)
        self.directories = [root / f"w{number}" for number in range(COUNT)]
        self._logs = [logs / f"w{number}" for number in range(COUNT)]
        self._running: list[subprocess.Popen[bytes]] = []
        self._seen: list[int] = []

    def __enter__(self) -> Self:
        scripts = Path(__file__).resolve().parents[1]
        for directory, log in zip(self.directories, self._logs, strict=True):
            log.touch()
            command: list[str | Path] = [sys.executable, "-m", "bench.writers", directory, log]
            self._running.append(subprocess.Popen(command, cwd=scripts))
        wait_for(lambda: all(count > PER_FILE for count in self.acknowledged()))
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self._running:
            writer.send_signal(signal.SIGTERM)
            writer.wait()

    def steps(self) -> list[Steps]:
        """Return the writes of each writer so far."""
        return [list(STEP.iter_unpack(_whole(log.read_bytes()))) for log in self._logs]

    def has_progressed(self) -> bool:
        """Return whether any write was acknowledged since the last call."""
        before, self._seen = self._seen, self.acknowledged()
        return before != self._seen

    def acknowledged(self) -> list[int]:
        """Return the number of acknowledged writes of each writer."""
        return [_last_count(log) for log in self._logs]


def _whole(data: bytes) -> bytes:
    return data[: len(data) // STEP.size * STEP.size]


def _last_count(log: Path) -> int:
    size = log.stat().st_size // STEP.size * STEP.size
    if not size:
        return 0
    with log.open("rb") as file:
        file.seek(size - STEP.size)
        return int(STEP.unpack(file.read(STEP.size))[2])


def waits(steps: list[Steps], begin: float, end: float) -> list[float]:
    """Return the seconds of each write that was in progress between two moments."""
    return [took for each in steps for start, took, _ in each if start < end and start + took > begin]


def wait_for(condition: Callable[[], object], limit: float = 60.0) -> None:
    """Wait until a condition holds; end the program after `limit` seconds."""
    until = time.monotonic() + limit
    while not condition():
        if time.monotonic() > until:
            raise SystemExit("the writers make no progress")
        time.sleep(0.01)


if __name__ == "__main__":
    write_on(Path(sys.argv[1]), Path(sys.argv[2]))
