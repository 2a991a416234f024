"""The control protocol: what a client may ask the daemon of a mount, and what the daemon replies.

One exchange per connection, one line of JSON each way:

    {"command": "why", "path": "etc/hosts"}
    {"result": {"layers": [{"layer": "/layers/top", "kind": "file", "role": "shown"}]}}

or, when the command fails,

    {"error": "etc/hosts: No such file or directory", "exit_code": 1}

`command` selects the request, `exit_code` is the one the command line ends with. Paths are text in the surrogateescape
form of `os.fsdecode`, so that any byte survives JSON. JSON itself is read and written by the standard library, because
msgspec refuses lone surrogates.

Compatibility: a daemon serves clients of other versions. A field that is added to a request needs a default; a client
ignores fields of a reply that it does not know; a daemon refuses commands and fields that it does not know, since
leaving one out could mean doing something else than was asked for.
"""

import json
from typing import Any, TypeVar

import msgspec

from overlayfs.errors import MountError, UsageError, UserError
from overlayfs.mount.log import Message

_ERRORS = {kind.exit_code: kind for kind in (UserError, UsageError, MountError)}


class Request(msgspec.Struct, kw_only=True, tag_field="command", tag=str.lower, forbid_unknown_fields=True):
    """A command for a daemon; the class stands for the value of `command`."""


class Status(Request, tag="status"):
    """Ask for the record of the mount (`runtime_state.Record`)."""


class Stats(Request, tag="stats"):
    """Ask for the counters of the engine."""


class Sync(Request, tag="sync"):
    """Make what was written through the mount durable, dirty pages of memory maps included."""


class Diff(Request, tag="diff"):
    """Ask for the changes that the upper makes, all of one moment."""


class Why(Request, tag="why"):
    """Ask what each layer holds at `path`, which counts from the root of the mount."""

    path: str


class Commit(Request, tag="commit"):
    """Copy the upper to `destination`, an absolute path where nothing exists, while the mount goes on."""

    destination: str


class CommitImage(Request, tag="commit-image"):
    """Make the upper of a mounted image a layer of its store; `image` is put on top of it if given."""

    image: str | None = None
    message: str = ""
    author: str = ""
    allow_empty: bool = False


class Hashing(Request, tag="hashing"):
    """Ask how far the hashing of a layer is that this mount has committed."""

    layer: str


class Report(Request, tag="report"):
    """Ask for the facts that help to find a defect; neither names nor contents of files are among them."""


AnyRequest = Status | Stats | Sync | Diff | Why | Commit | CommitImage | Hashing | Report


class Reply(msgspec.Struct, kw_only=True):
    """What a command results in."""


class StatsReply(Reply):
    """`uptime` is in seconds, `requests` counts the requests of the kernel by kind."""

    engine: str
    uptime: float
    requests: dict[str, int]


class SyncReply(Reply):
    """Nothing but success."""


class DiffReply(Reply):
    """`changes` are pairs of a kind (A added, C changed, D deleted) and a path from the root of the mount."""

    changes: list[tuple[str, str]]


class LayerEntry(msgspec.Struct):
    """What one layer holds at a path: `kind` and `role` are those of `overlayfs.fs.explain.Holder`."""

    layer: str
    kind: str
    role: str


class WhyReply(Reply):
    """What the layers hold, top first."""

    layers: list[LayerEntry]


class CommitReply(Reply):
    """`layer` is the destination, `entries` counts what it holds, `size` the bytes of file content."""

    layer: str
    entries: int
    size: int


class CommitImageReply(Reply):
    """The id of the new layer, the name of the image that was put on top of it, the seconds that changes waited."""

    layer: str
    image: str | None
    held: float


class HashingReply(Reply):
    """`state` is hashing, done or failed; `told` is the digest once it is done, or why it failed."""

    state: str
    entries: int = 0
    size: int = 0
    told: str = ""


class Negotiated(msgspec.Struct):
    """The FUSE protocol 7.`minor` and the flags of FUSE_INIT in effect; None where libfuse does not say."""

    minor: int | None
    features: list[str]


class ReportReply(Reply):
    """The facts of a mount for a bug report.

    options: those that differ from their defaults. layers: how many lower layers there are. upper_type: the type of
    the upper's file system, None without an upper. lower_types: how many lower layers are on file systems of each type.
    uptime: in seconds. log: the latest messages, oldest first.
    """

    version: str
    python: str
    kernel: str
    engine: str
    protocol: Negotiated
    options: dict[str, Any]
    layers: int
    upper_type: str | None
    lower_types: dict[str, int]
    image_mount: bool
    notices: list[str]
    requests: dict[str, int]
    uptime: float
    log: list[Message]


R = TypeVar("R")


def encode_request(request: Request) -> bytes:
    """Return a request as a line."""
    return _line(msgspec.to_builtins(request))


def decode_request(line: bytes) -> AnyRequest:
    """Return the request in a line. UserError with a sentence for anything else."""
    message = _object(line, "request")
    command = message.get("command")
    if not isinstance(command, str) or command not in _COMMANDS:
        raise UserError("the daemon does not know this command; is it of another version?")
    try:
        request: AnyRequest = msgspec.convert(message, AnyRequest)
    except (msgspec.ValidationError, UnicodeEncodeError) as error:  # the latter: a surrogate where no text belongs
        raise UserError(f"the daemon does not understand the request {command}: {error}") from None
    return request


_COMMANDS = {each.__struct_config__.tag for each in AnyRequest.__args__}


def encode_result(result: Any) -> bytes:
    """Return the result of a command, a `Reply` or a record, as a line."""
    return _line({"result": msgspec.to_builtins(result)})


def encode_error(error: UserError) -> bytes:
    """Return the failure of a command as a line."""
    return _line({"error": str(error), "exit_code": error.exit_code})


def decode_reply(line: bytes, kind: type[R]) -> R:
    """Return the result in a line, or raise the error in it. ValueError if the line is neither."""
    try:
        message = _object(line, "reply")
    except UserError as error:
        raise ValueError(str(error)) from None
    if "error" in message:
        raise _ERRORS.get(message.get("exit_code", 1), UserError)(message["error"])
    return msgspec.convert(message.get("result"), kind)  # ValidationError is a ValueError


def _line(message: object) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _object(line: bytes, what: str) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"the {what} is not JSON") from None
    if not isinstance(message, dict):
        raise UserError(f"the {what} is not an object")
    return message
