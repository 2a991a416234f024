"""What the store writes down: one small JSON document per layer, image and workspace.

Values are frozen; a change is a new value that replaces the file in one step. Times are RFC 3339 in UTC. Members that
a later version of this format adds are skipped by this one; a change that would mislead it gets another format number
(`layout.FORMAT`). Each document ends with the member "check", the xxh3-128 of the bytes before it.
"""

import re
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

import msgspec
import xxhash

from overlayfs.errors import UserError

_SURROGATE = re.compile("[\ud800-\udfff]")

State = Literal["hashing", "complete"]


class LayerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One layer. While `state` is "hashing" it is usable, but `digest`, `size` and `entries` are not known yet.

    `digest` is ``sha256:HEX`` of the manifest, `diff_id` that of the canonical layer tar where known. `size` counts the
    bytes of regular files, hard links once. `flags` may hold "redirect" and "metacopy": marks that mean something only
    over the layers `below`, top first. `same_as` names the equal layer that images use instead of this one.
    """

    id: str
    state: State
    created: str
    author: str = ""
    message: str = ""
    digest: str | None = None
    diff_id: str | None = None
    size: int = 0
    entries: int = 0
    flags: tuple[str, ...] = ()
    below: tuple[str, ...] = ()
    same_as: str | None = None


class History(msgspec.Struct, frozen=True, kw_only=True):
    """One step of an image's making, as in the OCI image configuration; an `empty_layer` changed no file."""

    created: str = ""
    author: str = ""
    created_by: str = ""
    comment: str = ""
    empty_layer: bool = False


class ImageRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A name for a stack: `layers` are ids, top first; `history` is oldest first, as OCI writes it.

    `config` is the "config" object of the OCI image configuration, kept as it came.
    """

    name: str
    layers: tuple[str, ...]
    created: str
    author: str = ""
    architecture: str = ""
    os: str = "linux"
    variant: str = ""
    config: dict[str, Any] = msgspec.field(default_factory=dict)
    history: tuple[History, ...] = ()
    annotations: dict[str, str] = msgspec.field(default_factory=dict)


class WorkspaceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An upper kept for a mount of `image`, over `layers` (ids, top first) as they were when it was made.

    An `ephemeral` one goes with its mount.
    """

    name: str
    image: str
    layers: tuple[str, ...]
    ephemeral: bool
    created: str


class Intent(msgspec.Struct, frozen=True, kw_only=True):
    """What follows once a tree has become the tree of `layer`; whoever finds it finishes it.

    `workspace` gets a fresh upper over the longer stack, `image` is put.
    """

    layer: str
    workspace: str | None = None
    image: ImageRecord | None = None


AnyRecord = TypeVar("AnyRecord", LayerRecord, ImageRecord, WorkspaceRecord, Intent)


def encode(record: LayerRecord | ImageRecord | WorkspaceRecord | Intent) -> bytes:
    """Return the document of a record, ready to be a file; its last member is the check of all that stands before."""
    return with_checksum(msgspec.json.encode(record))


def decode(document: bytes, kind: type[AnyRecord], where: str) -> AnyRecord:
    """Return the record in a document; UserError, which names `where`, for one that is damaged."""
    try:
        if not has_valid_checksum(document):
            raise msgspec.DecodeError("its check does not fit")
        return msgspec.json.decode(document, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{where} is damaged: {str(error)[:200]}; restore it from a copy, or remove it") from None


_CHECK = b',"check":"'


def with_checksum(document: bytes) -> bytes:
    """Return a JSON object, which is not empty, as a line that ends with its check."""
    return _append_checksum(document.removesuffix(b"}"))


def _append_checksum(members: bytes) -> bytes:
    return members + _CHECK + xxhash.xxh3_128_hexdigest(members).encode() + b'"}\n'


def has_valid_checksum(line: bytes) -> bool:
    """Return whether not a bit of what `sealed` has returned is another one: what is left may be good JSON."""
    return line == _append_checksum(line.rpartition(_CHECK)[0])


def now() -> str:
    """Return the time as records hold it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def printable(text: str) -> str:
    """Return text that a JSON document can hold: bytes of the command line that are not UTF-8 become U+FFFD."""
    return _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)
