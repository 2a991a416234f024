"""The control socket: access, replies, and that no client can harm the mount."""

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

from overlayfs import __version__
from overlayfs.errors import UserError
from overlayfs.mount.control_client import Client
from tests.mounted.conftest import Mount
from tests.support import engines, syscalls
from tests.support.polling import until
from tests.support.users import ALICE, run_as

RUN = Path("/run/overlayfs")


def _socket(mount: Mount) -> Path:
    return RUN / f"{mount.pid}.sock"


def _client(mount: Mount) -> Client:
    return Client.at(os.fsencode(mount.point))


def _ask(mount: Mount, command: object, **fields: object) -> Any:
    """Send a command as a client of another version might; return the result, or the error."""
    line = json.dumps({"command": command, **fields}).encode() + b"\n"
    answer = json.loads(_exchange(_socket(mount), line))
    return answer["result"] if "result" in answer else answer["error"]


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
    handle = os.open(_socket(mount), os.O_PATH)  # Alice cannot search the directory
    path = Path(f"/proc/self/fd/{handle}")
    answer = json.loads(run_as(ALICE, lambda: _exchange(path, b'{"command": "stats"}\n')))
    os.close(handle)
    assert answer == {"error": "only root and the user who mounted may control a mount", "exit_code": 1}
    mount.unmount()


def test_status_and_counters(mount: Mount) -> None:
    mount.start()
    client = _client(mount)
    status = client.status()
    assert status.mountpoint == str(mount.point)
    assert status.pid == mount.pid
    assert status.upper == str(mount.stack.upper)
    before = client.stats().requests.get("MKDIR", 0)
    (mount.point / "new").mkdir()
    stats = client.stats()
    assert stats.requests["MKDIR"] == before + 1
    assert stats.engine == engines.current()
    mount.unmount()


def test_changes_and_reasons(mount: Mount) -> None:
    mount.start()
    (mount.point / "new").mkdir()
    (mount.point / "t").unlink()
    (mount.point / "d" / "f").write_bytes(b"changed")
    (mount.point / os.fsdecode(b"\xff\n")).touch()
    assert [(kind, path.lstrip(b"/")) for kind, path in _client(mount).diff()] == [
        ("C", b"d"),
        ("C", b"d/f"),
        ("A", b"new"),
        ("D", b"t"),
        ("A", b"\xff\n"),
    ]
    (shown, hidden) = _client(mount).why(b"d/f")
    assert (shown.layer, shown.role) == (str(mount.stack.upper), "shown")
    assert (hidden.layer, hidden.role) == (f"{mount.stack.base}/low", "hidden")
    mount.unmount()


def test_an_error_has_a_message(mount: Mount) -> None:
    mount.start()
    with pytest.raises(UserError, match="No such file or directory"):
        _client(mount).why(b"no/such")
    with pytest.raises(UserError, match="has nothing in a store"):
        _client(mount).hashing("none")
    mount.unmount()


_REPLIES = {
    "status": {"pid", "started", "mountpoint", "device", "source", "lower", "upper", "work", "engine", "notices",
               "image", "workspace", "store", "written"},
    "stats": {"engine", "uptime", "requests"},
    "sync": set(),
    "diff": {"changes"},
    "report": {"version", "python", "kernel", "engine", "protocol", "options", "layers", "upper_type", "lower_types",
               "image_mount", "notices", "requests", "uptime", "log"},
}  # fmt: skip
"""The keys that each reply has had since the first version that knew the command."""


def test_the_keys_on_the_wire_do_not_change(mount: Mount) -> None:
    mount.start()
    assert {command: set(_ask(mount, command)) for command in _REPLIES} == _REPLIES
    assert set(_ask(mount, "why", path="d")["layers"][0]) == {"layer", "kind", "role"}
    made = _ask(mount, "commit", destination=str(mount.stack.base / "layer"))
    assert made == {"layer": str(mount.stack.base / "layer"), "entries": 1, "size": 0}
    mount.unmount()


_NOT_UNDERSTOOD: list[tuple[tuple[object, dict[str, object]], str]] = [
    (("dance", {}), "the daemon does not know this command; is it of another version?"),
    ((7, {}), "the daemon does not know this command; is it of another version?"),
    (("commit", {}), "the daemon does not understand the request commit: Object missing required field `destination`"),
    (("why", {"path": 7}), "the daemon does not understand the request why: Expected `str`, got `int` - at `$.path`"),
    (("why", {"path": ""}), "the request has a path that cannot be"),
    (("why", {"path": "a\0b"}), "the request has a path that cannot be"),
    (("why", {"path": "\ud800"}), "the request has a path that cannot be"),
    (
        ("sync", {"all": 1}),
        "the daemon does not understand the request sync: Object contains unknown field `all`",
    ),
    (
        ("commit-image", {"allow_empty": "no"}),
        "the daemon does not understand the request commit-image: Expected `bool`, got `str` - at `$.allow_empty`",
    ),
]


def test_a_request_that_is_not_understood_gets_the_reason(mount: Mount) -> None:
    mount.start()
    for (command, fields), sentence in _NOT_UNDERSTOOD:
        assert _ask(mount, command, **fields) == sentence
    assert _client(mount).stats().requests
    mount.unmount()


def test_a_report_names_no_file(mount: Mount) -> None:
    """Names of files are in options, in notices and in the arguments of log messages."""
    mount.start(options=",fsname=secretsource,timeout=1")
    (mount.point / "secretname").write_bytes(b"secretcontent")
    with pytest.raises(UserError):
        _client(mount).why(b"secretname/below")
    found = _client(mount).report()
    assert (found.engine, found.layers, found.version) == (engines.current(), 2, __version__)
    assert found.options["timeout"] == 1.0
    assert found.upper_type in found.lower_types
    assert found.requests["CREATE"] == 1
    if engines.current() == engines.KERNEL:
        assert found.protocol.minor is not None and found.protocol.minor >= 31
        assert {"ASYNC_READ", "DO_READDIRPLUS"} <= set(found.protocol.features)
    text = repr(_ask(mount, "report"))
    assert "secret" not in text
    assert "/" not in text.replace(found.kernel, "")
    mount.unmount()


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"\n", b"{", b"[]\n", b"null\n", b"\xff\xfe\n", b"{}\n", b'{"command": 7}\n', b'{"command": ["x"]}\n'),
        *(b"[" * 500_000 + b"\n", b'{"command": "why", "path": ' + b"[" * 500_000 + b"}\n", b"7" * 5000 + b"\n"),
    ],
    ids=range(12),
)
def test_malformed_input_gets_an_error(mount: Mount, data: bytes) -> None:
    mount.start()
    answer = json.loads(_exchange(_socket(mount), data))
    assert answer["exit_code"] == 1
    assert "defect" not in answer["error"]
    assert _client(mount).stats().requests
    mount.unmount()


def test_an_overlong_request_is_refused(mount: Mount) -> None:
    mount.start()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(_socket(mount)))
        with pytest.raises(ConnectionError):
            client.sendall(b"x" * (1 << 24))
    assert _client(mount).stats().requests
    mount.unmount()


def test_clients_that_send_nothing_or_disconnect(mount: Mount) -> None:
    mount.start()
    silent = []
    for _ in range(20):
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.connect(str(_socket(mount)))
        silent.append(client)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(_socket(mount)))
        client.sendall(b'{"command": "diff"}\n')
    assert _client(mount).stats().requests
    for client in silent:
        client.close()
    mount.unmount()


def test_a_silent_client_does_not_delay_the_unmount(mount: Mount) -> None:
    mount.start()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(_socket(mount)))
        assert mount.unmount() == 0


def test_without_a_mount_there_is_no_client(mount: Mount) -> None:
    with pytest.raises(UserError, match="is not a mount of overlayfs"):
        _client(mount).stats()


def test_a_commit_pauses_writers_and_has_all_acknowledged_writes(mount: Mount) -> None:
    """Four writers number their lines; the layer has the lines of each up to some moment within the commit."""
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
            made = _client(mount).commit(os.fsencode(layer))
            after = list(counts)
            assert made.layer == str(layer)
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
        _client(mount).commit(os.fsencode(mount.stack.base / "layer"))
        assert (mount.stack.base / "layer" / "d" / "f").read_bytes()[100:107] == b"changed"
    mount.unmount()


def test_a_commit_waits_for_writeback(mount: Mount) -> None:
    """syncfs(2) does not wait for a FUSE daemon."""
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
            _client(mount).commit(os.fsencode(mount.stack.base / "layer"))
            fault.unlink()
        committed = (mount.stack.base / "layer" / "new").read_bytes()
        assert [committed[offset] for offset in changed] == [7] * len(changed)
        syscalls.umount(os.fsencode(mount.point))
        assert daemon.ended()[0] == 0


def test_reading_goes_on_while_a_commit_runs(mount: Mount) -> None:
    mount.start()
    for number in range(300):
        (mount.point / f"f{number}").write_bytes(b"x" * 20_000)
    asker = threading.Thread(target=_client(mount).commit, args=(os.fsencode(mount.stack.base / "layer"),))
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
        _client(mount).commit(os.fsencode(mount.stack.upper))
    (mount.point / "new").mkdir()
    mount.unmount()


def test_sync(mount: Mount) -> None:
    mount.start()
    (mount.point / "new").write_bytes(b"x")
    _client(mount).sync()
    subprocess.run(["sync", "-f", str(mount.point)], check=True, timeout=20)
    mount.unmount()
