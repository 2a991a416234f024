"""The console examples of README.md and docs/, and how they are run: each session in an environment of its own.

A session is a series of `console` blocks of one page with the same prompt, `#` for root or `$` for an ordinary user.
Lines that begin with `> ` continue a command; `...` stands for any text or lines. Comments before a block direct it:

    <!-- setup: COMMANDS -->       runs first, and is not shown
    <!-- new session -->           begins a new one
    <!-- transcript: REASON -->    the block is not run
"""

import os
import re
import shlex
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import processes, requirements
from tests.support.users import ALICE

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 150.0  # seconds for a session

_BLOCK = re.compile(
    r"(?:<!-- (setup|new session|transcript)(?:: *(.*?))? ?-->\s*)?^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
# What differs from run to run: ids and digests, times, how long something took; and the width of columns.
_VARIES = (
    (r"\b[0-9a-f]{12,64}\b", "ID"),
    (r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d", "TIME"),
    (r"[ \t]+", " "),
    (r" $", ""),
)


@dataclass
class Session:
    """The commands of one page, and what they print; `text` shows both."""

    page: str
    prompt: str
    setup: str = ""
    text: str = ""

    @property
    def commands(self) -> list[str]:
        """Every command, with its further lines."""
        found: list[str] = []
        for line in self.text.splitlines():
            if line.startswith(self.prompt):
                found.append(line.removeprefix(self.prompt))
            elif line.startswith("> ") or line == ">":
                found[-1] += "\n" + line[2:]
        return found

    def script(self) -> str:
        """Return a shell script that shows each command as the page does, and ends where one fails."""
        lines = ["exec 2>&1", self.setup]
        for command in self.commands:
            shown = self.prompt + command.replace("\n", "\n> ")
            lines += [f"printf '%s\\n' {shlex.quote(shown)}", f"{{ {command}\n}} || exit"]
        return "\n".join(lines)


@dataclass
class Page:
    """The examples of one page: sessions to run, and the reason for each block that is not run."""

    name: str
    sessions: list[Session] = field(default_factory=list)
    transcripts: list[str] = field(default_factory=list)


def read(path: Path) -> Page:
    """Find the examples of a page."""
    page = Page(str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name)
    for word, said, text in _BLOCK.findall(path.read_text()):
        prompt = text[:2]
        assert prompt in ("# ", "$ "), f"{page.name}: an example begins with a command: {text!r}"
        if word == "transcript":
            assert said, f"{page.name}: why is this not run? {text!r}"
            page.transcripts.append(" ".join(said.split()))
            continue
        if not page.sessions or word or page.sessions[-1].prompt != prompt:
            page.sessions.append(Session(page.name, prompt, said if word == "setup" else ""))
        page.sessions[-1].text += text
    return page


def pages() -> list[Page]:
    """Return the pages that have examples."""
    found = (read(path) for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))])
    return [page for page in found if page.sessions or page.transcripts]


def without_varying(text: str) -> str:
    """Return a text without the parts that differ from run to run."""
    for pattern, name in _VARIES:
        text = re.sub(pattern, name, text, flags=re.MULTILINE)
    return text


def matches(shown: str, printed: str) -> bool:
    """Whether what was printed is what the page shows; `...` is any text, and any lines if it has one for itself."""
    lines = (re.escape(line).replace(r"\.\.\.", ".*") + "\n" for line in without_varying(shown).splitlines())
    pattern = "".join("(?:.*\n)*" if line == ".*\n" else line for line in lines)
    return re.fullmatch(pattern, without_varying(printed)) is not None


def run(session: Session, place: Path, inside: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Run a session with its own /tmp, /var/tmp, /run and stores; what it leaves mounted or running ends with it.

    `place` is an empty directory; `inside` is the command prefix that runs a program in a network.
    """
    requirements.need_root()
    requirements.need_program("unshare", "setpriv", "bash")
    user = session.prompt == "$ "
    for name in ("tmp", "var", "containers"):
        (place / name).mkdir()
        os.chmod(place / name, 0o1777 if name != "containers" else 0o700)
    (place / "session").write_text(session.script())
    become = ["setpriv", f"--reuid={ALICE.uid}", f"--regid={ALICE.gid}", "--clear-groups"] if user else []

    def quoted(name: str) -> str:
        return shlex.quote(str(place / name))

    # The mounts of tests that run beside this one: a copy of one here would keep its directories in use.
    script = f"""
        set -e
        for point in $(awk '{{print $2}}' /proc/self/mounts | grep -F {shlex.quote(tempfile.gettempdir())}/ | tac); do
            case {shlex.quote(str(place))}/ in "$point"/*) ;; *) umount -l "$point" 2>/dev/null || true ;; esac
        done
        mount -t tmpfs -o mode=755 none /run
        cp {quoted("session")} /run/session
        mknod -m 666 /run/fuse c 10 229; mount --bind /run/fuse /dev/fuse
        install -d -o {ALICE.uid} -g {ALICE.gid} /run/user/{ALICE.uid}
        {"; ".join(_open_ways([ROOT, Path(sys.prefix), Path(sys.base_prefix)])) if user else ""}
        if [ -d /var/lib/containers ]; then mount --bind {quoted("containers")} /var/lib/containers; fi
        mount --bind {quoted("var")} /var/tmp
        mount --bind {quoted("tmp")} /tmp
        cd /tmp
        exec {shlex.join([*become, "bash", "/run/session"])}
        """
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "OVERLAYFS_"))},
        "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}",
        "HOME": "/tmp",
        "TZ": "UTC",
        "LC_ALL": "C.UTF-8",
        **({"XDG_RUNTIME_DIR": f"/run/user/{ALICE.uid}"} if user else {"OVERLAYFS_STORE": "/var/tmp/.store"}),
    }
    isolated = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    return subprocess.run(
        [*inside, *isolated, "bash", "-c", script], env=environment, capture_output=True, text=True, timeout=LIMIT,
        stdin=subprocess.DEVNULL, cwd="/",
    )  # fmt: skip


def _open_ways(paths: Sequence[Path]) -> Iterator[str]:
    """Yield commands after which every user can reach these directories, though a parent is closed to others."""
    closed: dict[Path, list[Path]] = {}
    for path in paths:
        for parent in reversed(path.parents):
            if not stat.S_IMODE(parent.stat().st_mode) & 0o001:
                closed.setdefault(parent, []).append(path)
                break
    for number, (parent, below) in enumerate(closed.items()):
        behind = f"/run/closed/{number}"
        yield f"mkdir -p -m 700 /run/closed {behind}"
        yield f"mount --rbind {shlex.quote(str(parent))} {behind}"
        yield f"mount -t tmpfs -o mode=755 none {shlex.quote(str(parent))}"
        for path in below:
            there = shlex.quote(str(path))
            yield f"mkdir -p {there} && mount --bind {behind}/{shlex.quote(str(path.relative_to(parent)))} {there}"


@contextmanager
def network() -> Iterator[tuple[str, ...]]:
    """A network of this machine only, where every port is free; yields the command prefix that runs a program in it."""
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
