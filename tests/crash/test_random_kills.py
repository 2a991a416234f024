"""kill -9 at random moments under four clients that write: campaign T2, a supplement to the aimed kills."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

import pytest

from tests.crash import worker
from tests.support import engines, launcher, processes
from tests.support.campaign import Campaign
from tests.support.launcher import Launcher
from tests.support.points import Points

CLIENTS = 4
ROUNDS = 4  # kills before the clients go on to the next directory of the layer
MOST_ACKS = 60  # changes that may return before a kill
SEED = 5
LONGEST = 240.0  # seconds of a full run

ROOT = Path(__file__).parents[2]


class Client:
    """A process that changes directories of its own."""

    def __init__(self, point: Path, number: int, acks: int) -> None:
        self.number = number
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.worker", str(point), str(SEED + number), str(acks)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[acks],
        )  # fmt: skip

    def say(self, word: str) -> None:
        """Send it a command."""
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()

    def hear(self) -> str:
        """Wait for its answer."""
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def wrong(self, word: str) -> list[str]:
        """Let it check its directories, and return what is wrong."""
        self.say(word)
        found: list[str] = json.loads(self.hear())
        return found

    def end(self) -> None:
        """End it."""
        self._process.communicate(timeout=30)


class Ground:
    """A stack with directories for each client, the clients, and the current daemon."""

    def __init__(self, place: Path, launch: Launcher, kills: int) -> None:
        self.place = place
        self.point = place / "m"
        for name in ("low", "u", "w", "m"):
            (place / name).mkdir()
        for client in range(CLIENTS):
            for turn in range(kills // ROUNDS + 1):
                _fill(place / "low" / _room(client, turn))
        self._launch = launch
        self._chance = random.Random(SEED)
        self._reading, writing = os.pipe()
        os.set_blocking(self._reading, False)
        self.clients = [Client(self.point, number, writing) for number in range(CLIENTS)]
        os.close(writing)
        self.acks = 0
        self.start()

    def start(self) -> None:
        """Mount by one engine or the other."""
        layers = f"lowerdir={self.place}/low,upperdir={self.place}/u,workdir={self.place}/w"
        self.pid = self._launch.mount(self.point, "-o", f"{layers},engine={self._chance.choice(engines.NAMES)}")

    def kill(self, turn: int) -> list[str]:
        """Let the clients work, kill the daemon at some moment, mount again; return what is wrong then."""
        until = self.acks + self._chance.randrange(MOST_ACKS)
        for client in self.clients:
            client.say(_room(client.number, turn))
        while self.acks < until:
            os.set_blocking(self._reading, True)
            self.acks += len(os.read(self._reading, 1))
        os.kill(self.pid, signal.SIGKILL)
        processes.reap(self.pid)
        assert {client.hear() for client in self.clients} == {"stopped\n"}
        os.set_blocking(self._reading, False)
        with suppress(BlockingIOError):
            self.acks += len(os.read(self._reading, 1 << 16))
        self.start()
        left = [f"{name} is left in the work directory" for name in os.listdir(self.place / "w" / "work")]
        return left + [line for client in self.clients for line in client.wrong("check")]

    def everything(self) -> list[str]:
        """Return what is wrong in any directory."""
        layer = self.place / "low"
        changed = [
            room.name for room in layer.iterdir() if worker.seen(str(room)) != worker.as_in_the_layer().picture()
        ]
        return [f"the layer has changed: {name}" for name in changed] + [
            line for client in self.clients for line in client.wrong("check-all")
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for client in self.clients:
            client.end()
        os.close(self._reading)
        launcher.clear(self.point, self.pid)


def _room(client: int, turn: int) -> str:
    return f"client{client}.{turn}"


def _fill(room: Path) -> None:
    room.mkdir()
    for number in range(worker.FILES):
        (room / f"old{number}").write_bytes(worker.CONTENT)


@pytest.mark.campaign("T2")
@pytest.mark.timeout(900)
def test_killed_under_load(campaign: Campaign, place: Path, launch: Launcher) -> None:
    kills = campaign.size(6, 1000)
    points, end = Points(), time.monotonic() + LONGEST
    with Ground(place, launch, kills) as ground:
        for kill in range(kills):
            if time.monotonic() > end:
                break
            with points.at(f"kill {kill}"):
                wrong = ground.kill(kill // ROUNDS)
                assert wrong == [], "\n".join(wrong)
        with points.at("at the end"):
            assert ground.everything() == []
    campaign.held("kill -9 at random moments under load", points.tried, points.violations, seed=SEED)
    campaign.held("changes acknowledged before a random kill", ground.acks, points.violations, seed=SEED)
