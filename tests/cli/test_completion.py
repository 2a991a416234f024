"""`overlayfs completion`: real shells on a terminal, which complete what is typed when TAB is pressed."""

import os
import pty
import select
import subprocess
import time
from pathlib import Path

import pytest

from overlayfs.store.store import LayerStore
from overlayfs_cli.main import COMMANDS
from tests.cli.conftest import Ended, process, program
from tests.store.samples import add_image
from tests.support import requirements

LIMIT = 30.0  # seconds for a shell to do one thing
PROMPT = "ready> "
TAB = "\t"

SHELLS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], 'eval "$(overlayfs completion bash)"'),
    "zsh": (["zsh", "-f", "-i"], 'autoload -U compinit; compinit -u -D; eval "$(overlayfs completion zsh)"'),
}


@pytest.fixture
def shop(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a store of two images, to which OVERLAYFS_STORE is set."""
    monkeypatch.setenv("OVERLAYFS_STORE", str(place / "store"))
    monkeypatch.setenv("PATH", f"{Path(program('overlayfs')).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PS1", PROMPT)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("HOME", str(place))
    with LayerStore(os.fsencode(place / "store"), create=True) as store:
        add_image(store, "site:v1", {"motd": "x\n"})
        add_image(store, "base:latest", {"motd": "y\n"})
    return place


class Terminal:
    """A shell on a terminal of its own."""

    def __init__(self, words: list[str], cwd: Path) -> None:
        self._shown = ""
        ours, theirs = pty.openpty()
        self._fd = ours
        self._shell = subprocess.Popen(
            words, stdin=theirs, stdout=theirs, stderr=theirs, cwd=cwd, start_new_session=True
        )
        os.close(theirs)

    def type(self, text: str) -> None:
        """Type when the shell is ready for it."""
        self.read_until(PROMPT)
        os.write(self._fd, text.encode())

    def read_until(self, wanted: str) -> None:
        """Read until the shell has printed something."""
        end = time.monotonic() + LIMIT
        while wanted not in self._shown:
            readable, _, _ = select.select([self._fd], [], [], max(0.0, end - time.monotonic()))
            assert readable, f"{wanted!r} is not in {self._shown!r}"
            self._shown += os.read(self._fd, 4096).decode(errors="replace")
        self._shown = self._shown.partition(wanted)[2]

    def close(self) -> None:
        self._shell.kill()
        self._shell.wait()
        os.close(self._fd)


def names(shop: Path) -> list[str]:
    listed: Ended = process("overlayfs", "images", "-q", cwd=shop)
    return listed.out.split()


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    "typed",
    [
        f"overlayfs ta{TAB}si{TAB} made:new",
        f"overlayfs tag site:{TAB} made:new",
        f"overlayfs tag site:v{TAB} made:new",
        f"overlayfs tag --sto{TAB}./store ba{TAB} made:new",
    ],
)
def test_a_line_is_completed(shop: Path, shell: str, typed: str) -> None:
    words, setup = SHELLS[shell]
    requirements.need_program(words[0])
    terminal = Terminal(words, shop)
    try:
        terminal.type(f"{setup}\n")
        terminal.type(f"{typed}\n")
        terminal.type("echo end-of-$((40 + 2))\n")
        terminal.read_until("end-of-42")
    finally:
        terminal.close()
    assert "made:new" in names(shop)


def completed_by_fish(shop: Path, line: str) -> list[str]:
    requirements.need_program("fish")
    script = f"overlayfs completion fish | source; complete -C '{line}'"
    done = subprocess.run(
        ["fish", "--no-config", "-c", script], cwd=shop, capture_output=True, text=True, timeout=LIMIT, check=True
    )
    return done.stdout.splitlines()


def test_fish(shop: Path) -> None:
    offered = completed_by_fish(shop, "overlayfs ")
    assert sorted(line.split("\t")[0] for line in offered) == sorted(COMMANDS)
    assert completed_by_fish(shop, "overlayfs log s") == ["site:v1\timage"]
    assert completed_by_fish(shop, "overlayfs log --q") == ["--quiet\tPrint only the ids."]


@pytest.mark.parametrize("typed", ["overlayfs log ", "overlayfs why m", "overlayfs import "])
def test_files_are_offered_where_a_path_is_wanted(shop: Path, typed: str) -> None:
    (shop / "motd").write_text("x")
    found = [line for line in completed_by_fish(shop, typed) if line.startswith("motd")]
    assert bool(found) == ("log" not in typed)


def test_no_store(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Completion prints nothing where there is nothing to offer, and creates no store."""
    monkeypatch.setenv("OVERLAYFS_STORE", str(place / "none"))
    monkeypatch.setenv("_OVERLAYFS_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "overlayfs log ")
    monkeypatch.setenv("COMP_CWORD", "2")
    assert process("overlayfs") == Ended(0, "\n", "")
    assert list(place.iterdir()) == []
