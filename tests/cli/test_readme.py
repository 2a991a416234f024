"""The README's session of an image's life, run word for word."""

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.conftest import program
from tests.oci import registries
from tests.support import leftovers, processes, requirements

README = Path(__file__).parents[2] / "README.md"
HEADING = "## The life of an image"
PROMPT = "# "
LIMIT = 120.0

# What no two runs have in common: ids and digests, and the time.
VARIES = ((r"\b[0-9a-f]{12,64}\b", "ID"), (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "TIME"))


def session() -> str:
    section = README.read_text().split(f"{HEADING}\n")[1].split("\n## ")[0]
    found = re.findall(r"^```console\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert len(found) == 1
    return str(found[0])


def commands(text: str) -> list[str]:
    return [line.removeprefix(PROMPT) for line in text.splitlines() if line.startswith(PROMPT)]


def script(text: str) -> str:
    """A shell script that shows each command as the README does, and ends where one fails."""
    lines = []
    for number, command in enumerate(commands(text)):
        lines += [f"cat <<'SHOWN{number}'\n{PROMPT}{command}\nSHOWN{number}", f"{{ {command}\n}} || exit"]
    return "exec 2>&1\n" + "\n".join(lines)


def settled(text: str) -> str:
    for pattern, name in VARIES:
        text = re.sub(pattern, name, text)
    return text


@contextmanager
def network() -> Iterator[tuple[str, ...]]:
    """A network of this machine alone, where every port is free; gives the words that run a program in it."""
    requirements.need_program("unshare", "nsenter", "ip")
    holder = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "ip link set lo up && echo up && exec cat"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdin is not None and holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"up\n"
        yield "nsenter", f"--net=/proc/{holder.pid}/ns/net"
    finally:
        holder.stdin.close()
        holder.wait(processes.LIMIT)
        holder.stdout.close()


@pytest.mark.mounted
@pytest.mark.root
def test_the_life_of_an_image(place: Path) -> None:
    requirements.need_root()
    home = place / "home"
    home.mkdir()
    environment = {
        **os.environ, "PATH": f"{Path(program('overlayfs')).parent}:{os.environ['PATH']}",
        "OVERLAYFS_STORE": str(place / "store"), "HOME": str(home), "TZ": "UTC",
    }  # fmt: skip
    at = {"addr": "127.0.0.1:5000"}
    with network() as inside, registries.registry(place / "registry", inside, http=at):
        done = subprocess.run(
            [*inside, "bash", "-c", script(session())], cwd=home, env=environment, capture_output=True, text=True,
            timeout=LIMIT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    for point in leftovers.mounts_below(place):  # of a session that ended in the middle
        subprocess.run(["umount", "-l", point], check=True)
    assert settled(done.stdout) == settled(session())
    assert done.returncode == 0


def test_the_session_has_every_step() -> None:
    named = [words[1] for words in map(str.split, commands(session())) if words[0] == "overlayfs"]
    wanted = {
        "import",
        "mount",
        "commit",
        "log",
        "diff",
        "squash",
        "export",
        "push",
        "pull",
        "rm",
        "gc",
        "verify",
        "umount",
    }
    assert set(named) == wanted
