"""Run-time records: written whole, read back with any path, dropped when their process is gone."""

import dataclasses
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from overlayfs.mount import runtime_state
from overlayfs.mount.runtime_state import Record
from tests.support.polling import until


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(runtime_state, "run_directory", lambda: tmp_path / "run")
    return tmp_path / "run"


def _record(pid: int, started: int) -> Record:
    strange = os.fsdecode(b"/a b\xff\n")
    return Record(pid, started, strange, "0:7", "source", (strange, "/b"), strange, "/w", "pyfuse3", ("a notice",))


def _own() -> Record:
    started = runtime_state.start_time(os.getpid())
    assert started is not None
    return _record(os.getpid(), started)


def test_a_record_is_read_as_written(directory: Path) -> None:
    runtime_state.write(_own())
    assert runtime_state.read_all() == [_own()]
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert [path.suffix for path in directory.iterdir()] == [".json"]


def test_there_are_no_records_before_the_first_mount() -> None:
    assert runtime_state.read_all() == []


def test_the_record_of_a_dead_daemon_is_removed(directory: Path) -> None:
    with subprocess.Popen(["true"]) as process:
        pass
    runtime_state.write(_record(process.pid, 1))
    assert runtime_state.read_all() == []
    assert list(directory.iterdir()) == []


def test_a_process_whose_first_thread_has_ended_exists() -> None:
    """As a daemon that was killed while another thread of it waits uninterruptibly."""
    with subprocess.Popen([sys.executable, "-c", _HALF_ENDED], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        until(lambda: runtime_state.is_dying(process.pid))
        assert runtime_state.start_time(process.pid) is not None
        process.stdin.close()
        process.wait()
        assert not runtime_state.is_dying(process.pid)
        assert runtime_state.start_time(process.pid) is None


_HALF_ENDED = """
import ctypes, sys, threading
threading.Thread(target=sys.stdin.read).start()
ctypes.CDLL(None).syscall(60, 0)
"""


def test_a_zombie_does_not_exist() -> None:
    with subprocess.Popen(["true"]) as process:
        until(lambda: b") Z " in Path(f"/proc/{process.pid}/stat").read_bytes())
        assert not runtime_state.is_dying(process.pid)
        assert runtime_state.start_time(process.pid) is None
    assert not runtime_state.is_dying(os.getpid())


def test_a_reused_pid_is_not_the_daemon() -> None:
    runtime_state.write(dataclasses.replace(_own(), started=1))
    assert runtime_state.read_all() == []


def test_malformed_records_are_skipped(directory: Path) -> None:
    runtime_state.make_run_directory()
    (directory / "1.json").write_text("{")
    (directory / "2.json").write_text("[]")
    (directory / "3.json").write_text('{"lower": []}')
    assert runtime_state.read_all() == []


def test_a_directory_of_other_users_is_not_read(directory: Path) -> None:
    runtime_state.write(_own())
    directory.chmod(0o777)
    assert runtime_state.read_all() == []
    directory.rename(directory.with_name("elsewhere"))
    directory.symlink_to("elsewhere")
    (directory / ".").resolve().chmod(0o700)
    assert runtime_state.read_all() == []


def test_a_directory_with_access_for_others_is_refused(directory: Path) -> None:
    directory.mkdir()
    directory.chmod(0o755)
    with pytest.raises(PermissionError, match="0700"):
        runtime_state.write(_own())
