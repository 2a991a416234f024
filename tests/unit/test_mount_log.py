"""Where the log goes, and how it looks there."""

import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from overlayfs.mount import log as logs


@pytest.fixture(autouse=True)
def logging_restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, raising = root.handlers[:], root.level, logging.raiseExceptions
    yield
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:], logging.raiseExceptions = handlers, raising
    root.setLevel(level)


def test_every_line_for_the_journal_carries_its_level() -> None:
    record = logging.LogRecord("name", logging.ERROR, "file", 1, "one\ntwo %s", ("x",), None)
    assert logs.JournalFormatter("%(message)s").format(record) == "<3>one\n<3>two x"


def test_the_journal_is_recognised_by_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    found = os.fstat(0)
    monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
    assert logs._is_journal(0)
    monkeypatch.setenv("JOURNAL_STREAM", "1:1")
    assert not logs._is_journal(0)
    monkeypatch.delenv("JOURNAL_STREAM")
    assert not logs._is_journal(0)


def test_without_syslog_a_file_is_created_with_the_first_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "SYSLOG", str(tmp_path / "absent"))
    file = tmp_path / "x.log"
    logs.set_up(foreground=False, debug=False, fallback=file)
    logging.debug("too fine")
    assert not file.exists()
    logging.info("requests: %s", "LOOKUP=1")
    assert "INFO requests: LOOKUP=1" in file.read_text()


def test_a_file_that_cannot_be_created_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "SYSLOG", str(tmp_path / "absent"))
    for fallback in (tmp_path / "missing" / "x.log", None):
        logs.set_up(foreground=False, debug=False, fallback=fallback)
        logging.error("into the void")


def test_syslog_gets_the_message_with_its_level(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = str(tmp_path / "log")
    monkeypatch.setattr(logs, "SYSLOG", address)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(address)
        logs.set_up(foreground=False, debug=False, fallback=tmp_path / "unused")
        logging.error("something")
        received = listener.recv(4096)
    daemon, error = 3, 3
    assert received.startswith(b"<%d>overlayfs[%d]: ERROR: something" % (daemon * 8 + error, os.getpid()))
    assert not (tmp_path / "unused").exists()


def test_a_busy_log_daemon_does_not_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = str(tmp_path / "log")
    monkeypatch.setattr(logs, "SYSLOG", address)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(address)
        logs.set_up(foreground=False, debug=False, fallback=tmp_path / "unused")
        for number in range(5000):  # more than the kernel queues
            logging.info("message %d", number)


def test_recent_messages_are_kept_without_their_arguments() -> None:
    logs.set_up(foreground=True, debug=True, fallback=None)
    logging.getLogger("overlayfs.x").debug("too fine")
    try:
        raise KeyError("/secret")
    except KeyError:
        logging.getLogger("overlayfs.x").exception("cannot read %s", "/secret")
    for number in range(logs.RECENT - 1):
        logging.info("number %d", number)
    first, *rest = logs.recent()
    assert (first.level, first.logger, first.text, first.error) == (
        "ERROR",
        "overlayfs.x",
        "cannot read %s",
        "KeyError",
    )
    assert "secret" not in repr(first)
    assert {each.text for each in rest} == {"number %d"}
    logging.info("one more")
    assert len(logs.recent()) == logs.RECENT
