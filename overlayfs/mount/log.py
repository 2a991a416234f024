"""The log of the daemon.

In the foreground it goes to standard error: with the level prefixes of sd-daemon(3) if the journal reads it, as plain
text otherwise. In the background it goes to syslog(3) or, on a system without it, to the file `log` beside the records
of the mounts, which is created with the first message.
"""

import contextlib
import logging
import os
import socket
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path

SYSLOG = "/dev/log"
RECENT = 50  # messages that are kept for a bug report
DAEMON = 3 << 3  # the facility of system daemons
LEVELS = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}


class JournalFormatter(logging.Formatter):
    """Prefixes every line with `<N>`, so that the journal gives all lines of a traceback the same level."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as lines for the journal."""
        prefix = f"<{LEVELS.get(record.levelno, 6)}>"
        return "\n".join(prefix + line for line in super().format(record).splitlines())


class Syslog(logging.Handler):
    """Sends messages to syslog(3). They are dropped if the log daemon is busy: the file system must not wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self._socket = _connected()

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record, over a new connection if the log daemon was restarted."""
        level = LEVELS.get(record.levelno, 6)
        message = f"<{DAEMON | level}>overlayfs[{os.getpid()}]: {self.format(record)}".encode(errors="backslashreplace")
        try:
            self._socket.send(message)
        except BlockingIOError:
            return
        except OSError:
            self._reconnect_and_send(message)

    def close(self) -> None:
        """Close the connection to the log daemon."""
        self._socket.close()
        super().close()

    def _reconnect_and_send(self, message: bytes) -> None:
        with contextlib.suppress(OSError):
            connected = _connected()
            self._socket.close()
            self._socket = connected
            self._socket.send(message)


class LogFile(logging.FileHandler):
    """A file that is opened with the first message. Messages that cannot be written are dropped."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record, if the file can be opened."""
        with contextlib.suppress(OSError):
            super().emit(record)


@dataclass(frozen=True)
class Message:
    """A message of the log without its arguments, which name files.

    time: seconds since 1970. text: the template that the arguments were for. error: the class of the exception that
    was logged with it.
    """

    time: float
    level: str
    logger: str
    text: str
    error: str | None


class _Recent(logging.Handler):
    """Keeps the latest messages for a bug report."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.messages: deque[Message] = deque(maxlen=RECENT)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep what a message has that names no file."""
        error = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] is not None else None
        text = record.msg if isinstance(record.msg, str) else type(record.msg).__name__
        self.messages.append(Message(record.created, record.levelname, record.name, text, error))


_recent = _Recent()


def recent() -> list[Message]:
    """Return the latest messages of this process that are at least of level INFO, oldest first."""
    return list(_recent.messages)


def _connected() -> socket.socket:
    sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sender.connect(SYSLOG)
    except OSError:
        sender.close()
        raise
    return sender


def set_up(foreground: bool, debug: bool, fallback: Path | None) -> None:
    """Set up the log of this process; `fallback` is the file for a system without syslog, if there is any."""
    logging.raiseExceptions = False  # a full disk or a closed pipe must not be reported on standard error
    handler = _to_stderr() if foreground else _to_system(fallback)
    root = logging.getLogger()
    root.handlers.clear()  # not closed: they and their descriptors belong to the process that forked this one
    root.addHandler(handler)
    root.addHandler(_recent)
    root.setLevel(logging.DEBUG if debug else logging.INFO)


def _to_stderr() -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    if _is_journal(2):
        handler.setFormatter(JournalFormatter("%(message)s"))
    else:
        handler.setFormatter(logging.Formatter("overlayfs: %(levelname)s: %(message)s"))
    return handler


def _is_journal(descriptor: int) -> bool:
    """Return whether a descriptor is the stream to the journal (JOURNAL_STREAM of systemd.exec(5))."""
    try:
        found = os.fstat(descriptor)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def _to_system(fallback: Path | None) -> logging.Handler:
    handler: logging.Handler
    try:
        handler = Syslog()
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    except OSError:
        if fallback is None:
            return logging.NullHandler()
        handler = LogFile(fallback, delay=True, errors="backslashreplace")
        handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(levelname)s %(message)s"))
    return handler
