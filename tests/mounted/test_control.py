"""The control socket: who may ask, what it answers, and that no client harms the mount."""

import json
import mmap
import os
import socket
import stat
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from overlayfs.errors import UserError
from overlayfs.mount import control
from tests.mounted.conftest import Mount
from tests.support import engines, syscalls
from tests.support.polling import until
from tests.support.users import ALICE, run_as

RUN = Path("/run/overlayfs")


def _socket(mount: Mount) -> Path:
    return RUN / f"{mount.pid}.sock"


def _ask(mount: Mount, command: str, **arguments: Any) -> Any:
    return control.request(os.fsencode(mount.point), command, **arguments)


def _exchange(path: Path, data: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(20)
        client.connect(str(path))
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        with client.makefile("rb") as stream:
            return stream.read()


def test_directory_record_and_socket_are_private(mount: Mount) -> None:
    mount.start()
    assert stat.S_IMODE(RUN.stat().st_mode) == 0o700
    assert stat.S_IMODE(_socket(mount).stat().st_mode) == 0o600
    assert stat.S_IMODE((RUN / f"{mount.pid}.json").stat().st_mode) == 0o600
    mount.unmount()


def test_another_user_is_refused_even_at_the_socket(mount: Mount) -> None:
    mount.start()
    _socket(mount).chmod(0o666)
    handle = os.open(_socket(mount), os.O_PATH)  # the directory would not let her pass
    path = Path(f"/proc/self/fd/{handle}")
    answer = json.loads(run_as(ALICE, lambda: _exchange(path, b'{"command": "stats"}\n')))
    os.close(handle)
    assert answer == {"error": "only root and the user who mounted may control a mount", "exit_code": 1}
    mount.unmount()


def test_status_and_counters(mount: Mount) -> None:
    mount.start()
    status = _ask(mount, "status")
    assert status["mountpoint"] == str(mount.point)
    assert status["pid"] == mount.pid
    assert status["upper"] == str(mount.stack.upper)
    before = _ask(mount, "stats")["requests"].get("MKDIR", 0)
    (mount.point / "new").mkdir()
    stats = _ask(mount, "stats")
    assert stats["requests"]["MKDIR"] == before + 1
    assert stats["engine"] == engines.current()
    mount.unmount()


def test_changes_and_reasons(mount: Mount) -> None:
    mount.start()
    (mount.point / "new").mkdir()
    (mount.point / "t").unlink()
    (mount.point / "d" / "f").write_bytes(b"changed")
    (mount.point / os.fsdecode(b"\xff\n")).touch()
    changes = [(kind, os.fsencode(path)) for kind, path in _ask(mount, "diff")["changes"]]
    assert [(kind, path.lstrip(b"/")) for kind, path in changes] == [
        ("C", b"d"),
        ("C", b"d/f"),
        ("A", b"new"),
        ("D", b"t"),
        ("A", b"\xff\n"),
    ]
    (shown, hidden) = _ask(mount, "why", path="d/f")["layers"]
    assert (shown["layer"], shown["role"]) == (str(mount.stack.upper), "shown")
    assert (hidden["layer"], hidden["role"]) == (f"{mount.stack.base}/low", "hidden")
    mount.unmount()


def test_an_error_is_a_sentence(mount: Mount) -> None:
    mount.start()
    with pytest.raises(UserError, match="No such file or directory"):
        _ask(mount, "why", path="no/such")
    with pytest.raises(UserError, match="the request lacks destination"):
        _ask(mount, "commit")
    with pytest.raises(UserError, match="does not know this command"):
        _ask(mount, "dance")
    mount.unmount()


@pytest.mark.parametrize(
    "data",
    [b"", b"\n", b"{", b"[]\n", b"null\n", b"\xff\xfe\n", b"{}\n", b'{"command": 7}\n', b'{"command": ["x"]}\n'],
)
def test_nonsense_is_answered(mount: Mount, data: bytes) -> None:
    mount.start()
    answer = json.loads(_exchange(_socket(mount), data))
    assert answer["exit_code"] == 1
    assert "defect" not in answer["error"]
    assert _ask(mount, "stats")
    mount.unmount()


def test_too_much_is_refused(mount: Mount) -> None:
    mount.start()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(_socket(mount)))
        with pytest.raises(ConnectionError):
            client.sendall(b"x" * (1 << 24))
    assert _ask(mount, "stats")
    mount.unmount()


def test_clients_that_say_nothing_or_go_away(mount: Mount) -> None:
    mount.start()
    silent = []
    for _ in range(20):
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.connect(str(_socket(mount)))
        silent.append(client)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(_socket(mount)))
        client.sendall(b'{"command": "diff"}\n')
    assert _ask(mount, "stats")
    for client in silent:
        client.close()
    mount.unmount()


def test_a_silent_client_does_not_keep_the_daemon(mount: Mount) -> None:
    mount.start()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(_socket(mount)))
        assert mount.unmount() == 0


def test_no_daemon_no_answer(mount: Mount) -> None:
    with pytest.raises(UserError, match="is not a mount of overlayfs"):
        _ask(mount, "stats")


def test_a_commit_holds_writers_and_has_all_that_was_acknowledged(mount: Mount) -> None:
    """Four writers number their lines; the layer has each one's lines up to some moment within the commit."""
    mount.start()
    done = threading.Event()
    counts = [0] * 4

    def write(number: int) -> None:
        with open(mount.point / f"log{number}", "wb", buffering=0) as file:
            while not done.is_set():
                file.write(b"%08d\n" % counts[number])
                counts[number] += 1

    writers = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for writer in writers:
        writer.start()
    try:
        until(lambda: min(counts) > 20)
        for turn in range(3):
            before = list(counts)
            layer = mount.stack.base / f"layer{turn}"
            made = _ask(mount, "commit", destination=str(layer))
            after = list(counts)
            assert made["layer"] == str(layer)
            for number in range(4):
                lines = (layer / f"log{number}").read_bytes()
                assert lines == b"".join(b"%08d\n" % count for count in range(len(lines) // 9))
                assert before[number] <= len(lines) // 9 <= after[number] + 1
        until(lambda: all(now > then for now, then in zip(counts, after, strict=True)))
    finally:
        done.set()
        for writer in writers:
            writer.join(20)
    mount.unmount()


def test_a_commit_has_mapped_pages(mount: Mount) -> None:
    mount.start()
    with open(mount.point / "d" / "f", "r+b") as file, mmap.mmap(file.fileno(), 0) as pages:
        pages[100:107] = b"changed"
        _ask(mount, "commit", destination=str(mount.stack.base / "layer"))
        assert (mount.stack.base / "layer" / "d" / "f").read_bytes()[100:107] == b"changed"
    mount.unmount()


def test_a_commit_waits_for_pages_that_are_on_their_way(mount: Mount) -> None:
    """The kernel's syncfs does not wait for a FUSE daemon to take its pages."""
    fault = mount.stack.base / "fault"
    with open(mount.stack.base / "log", "w") as log:
        daemon = mount.faulty(fault, log)
        until((RUN / f"{daemon.pid}.sock").exists)
        (mount.point / "new").write_bytes(bytes(20 * mmap.PAGESIZE))
        with open(mount.point / "new", "r+b") as file, mmap.mmap(file.fileno(), 0) as pages:
            changed = range(0, len(pages), 4 * mmap.PAGESIZE)  # apart, so that each is a request of its own
            for offset in changed:
                pages[offset] = 7
            fault.write_text("write delay")
            _ask(mount, "commit", destination=str(mount.stack.base / "layer"))
            fault.unlink()
        committed = (mount.stack.base / "layer" / "new").read_bytes()
        assert [committed[offset] for offset in changed] == [7] * len(changed)
        syscalls.umount(os.fsencode(mount.point))
        assert daemon.ended()[0] == 0


def test_reading_goes_on_while_a_commit_runs(mount: Mount) -> None:
    mount.start()
    for number in range(300):
        (mount.point / f"f{number}").write_bytes(b"x" * 20_000)
    asker = threading.Thread(
        target=_ask, args=(mount, "commit"), kwargs={"destination": str(mount.stack.base / "layer")}
    )
    asker.start()
    while asker.is_alive():
        assert (mount.point / "t").read_bytes() == b"top"
        assert len(os.listdir(mount.point)) == 302
    asker.join()
    assert len(os.listdir(mount.stack.base / "layer")) == 300
    mount.unmount()


def test_a_refused_commit_lets_changes_go_on(mount: Mount) -> None:
    mount.start()
    with pytest.raises(UserError, match="exists already"):
        _ask(mount, "commit", destination=str(mount.stack.upper))
    (mount.point / "new").mkdir()
    mount.unmount()


def test_syncing(mount: Mount) -> None:
    mount.start()
    (mount.point / "new").write_bytes(b"x")
    assert _ask(mount, "sync") == {}
    subprocess.run(["sync", "-f", str(mount.point)], check=True, timeout=20)
    mount.unmount()
