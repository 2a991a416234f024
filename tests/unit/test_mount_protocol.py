"""The control protocol: requests and replies as lines, of this version and of others."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlayfs.errors import MountError, UserError
from overlayfs.mount import protocol
from overlayfs.mount.runtime_state import Record, WrittenDirectory

REQUESTS = [
    (protocol.Status(), b'{"command": "status"}\n'),
    (protocol.Stats(), b'{"command": "stats"}\n'),
    (protocol.Sync(), b'{"command": "sync"}\n'),
    (protocol.Diff(), b'{"command": "diff"}\n'),
    (protocol.Why(path="d/\udcff"), b'{"command": "why", "path": "d/\\udcff"}\n'),
    (protocol.Commit(destination="/new"), b'{"command": "commit", "destination": "/new"}\n'),
    (
        protocol.CommitImage(image="a:1", message="m", author="ann", allow_empty=True),
        b'{"command": "commit-image", "image": "a:1", "message": "m", "author": "ann", "allow_empty": true}\n',
    ),
    (protocol.Hashing(layer="id"), b'{"command": "hashing", "layer": "id"}\n'),
    (protocol.Report(), b'{"command": "report"}\n'),
]
"""Each request with its line, which must never change: daemons and clients of different versions talk."""


@pytest.mark.parametrize(("request_", "line"), REQUESTS)
def test_a_request_is_a_line(request_: protocol.Request, line: bytes) -> None:
    assert protocol.encode_request(request_) == line
    assert protocol.decode_request(line) == request_


def test_fields_with_defaults_may_be_absent() -> None:
    assert protocol.decode_request(b'{"command": "commit-image"}\n') == protocol.CommitImage()


def test_a_record_survives() -> None:
    written = (WrittenDirectory("upper", "/u\udcff", "0:7", "/u"),)
    record = Record(1, 2, "/m\udcff", "0:7", "s", ("/a", "/b"), "/u", "/w", "kernel", ("one",), written=written)
    assert protocol.decode_reply(protocol.encode_result(record), Record) == record


def test_a_newer_daemon_may_send_more_fields() -> None:
    line = b'{"result": {"engine": "kernel", "uptime": 1.5, "requests": {"READ": 2}, "new": 7}, "new": 7}\n'
    stats = protocol.decode_reply(line, protocol.StatsReply)
    assert (stats.engine, stats.uptime, stats.requests) == ("kernel", 1.5, {"READ": 2})


def test_an_error_is_raised_with_its_exit_code() -> None:
    for error in (UserError("a sentence"), MountError("a sentence")):
        with pytest.raises(type(error), match=r"^a sentence$"):
            protocol.decode_reply(protocol.encode_error(error), protocol.SyncReply)


@pytest.mark.parametrize(
    "line", [b"", b"{", b"[]\n", b"{}\n", b'{"result": 7}\n', b'{"result": {"engine": 7}}\n', b"[" * 100_000]
)
def test_a_malformed_reply_is_a_value_error(line: bytes) -> None:
    with pytest.raises(ValueError):
        protocol.decode_reply(line, protocol.StatsReply)


@given(st.binary())
def test_any_bytes_are_a_request_or_an_error(line: bytes) -> None:
    _decodes_or_refuses(line)


VALUES = st.sampled_from([None, True, 0, -1, 1.5, 10**400, "", "x", "\0", "\udcff", "\ud800", [], ["x"], {}, {"a": 1}])


@given(
    st.sampled_from([json.loads(line)["command"] for _, line in REQUESTS]),
    st.dictionaries(st.sampled_from(["path", "destination", "image", "message", "allow_empty", "layer"]), VALUES),
)
def test_any_fields_are_a_request_or_an_error(command: str, fields: dict[str, object]) -> None:
    _decodes_or_refuses(json.dumps({"command": command, **fields}).encode())


def _decodes_or_refuses(line: bytes) -> None:
    with contextlib.suppress(UserError):
        assert isinstance(protocol.decode_request(line), protocol.Request)
