"""The control protocol: requests and replies as lines, of this version and of others."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlayfs.errors import MountError, UserError
from overlayfs.mount import control_protocol
from overlayfs.mount.runtime_state import Record, WrittenDirectory

REQUESTS = [
    (control_protocol.Status(), b'{"command": "status"}\n'),
    (control_protocol.Stats(), b'{"command": "stats"}\n'),
    (control_protocol.Sync(), b'{"command": "sync"}\n'),
    (control_protocol.Diff(), b'{"command": "diff"}\n'),
    (control_protocol.Why(path="d/\udcff"), b'{"command": "why", "path": "d/\\udcff"}\n'),
    (control_protocol.Commit(destination="/new"), b'{"command": "commit", "destination": "/new"}\n'),
    (
        control_protocol.CommitImage(image="a:1", message="m", author="ann", allow_empty=True),
        b'{"command": "commit-image", "image": "a:1", "message": "m", "author": "ann", "allow_empty": true}\n',
    ),
    (control_protocol.Hashing(layer="id"), b'{"command": "hashing", "layer": "id"}\n'),
    (control_protocol.Report(), b'{"command": "report"}\n'),
]
"""Each request with its line, which must never change: daemons and clients of different versions talk."""


@pytest.mark.parametrize(("request_", "line"), REQUESTS)
def test_a_request_is_a_line(request_: control_protocol.Request, line: bytes) -> None:
    assert control_protocol.encode_request(request_) == line
    assert control_protocol.decode_request(line) == request_


def test_fields_with_defaults_may_be_absent() -> None:
    assert control_protocol.decode_request(b'{"command": "commit-image"}\n') == control_protocol.CommitImage()


def test_a_record_survives() -> None:
    written = (WrittenDirectory("upper", "/u\udcff", "0:7", "/u"),)
    record = Record(1, 2, "/m\udcff", "0:7", "s", ("/a", "/b"), "/u", "/w", "kernel", ("one",), written=written)
    assert control_protocol.decode_reply(control_protocol.encode_result(record), Record) == record


def test_a_newer_daemon_may_send_more_fields() -> None:
    line = b'{"result": {"engine": "kernel", "uptime": 1.5, "requests": {"READ": 2}, "new": 7}, "new": 7}\n'
    stats = control_protocol.decode_reply(line, control_protocol.StatsReply)
    assert (stats.engine, stats.uptime, stats.requests) == ("kernel", 1.5, {"READ": 2})


def test_an_error_is_raised_with_its_exit_code() -> None:
    for error in (UserError("a sentence"), MountError("a sentence")):
        with pytest.raises(type(error), match=r"^a sentence$"):
            control_protocol.decode_reply(control_protocol.encode_error(error), control_protocol.SyncReply)


@pytest.mark.parametrize(
    "line", [b"", b"{", b"[]\n", b"{}\n", b'{"result": 7}\n', b'{"result": {"engine": 7}}\n', b"[" * 100_000]
)
def test_a_malformed_reply_is_a_value_error(line: bytes) -> None:
    with pytest.raises(ValueError):
        control_protocol.decode_reply(line, control_protocol.StatsReply)


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
        assert isinstance(control_protocol.decode_request(line), control_protocol.Request)
