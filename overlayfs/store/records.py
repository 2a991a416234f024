"""Records of the store: one small JSON document per layer, image, workspace and intent.

Records are frozen values; a change is a new value that replaces the file atomically. Times are RFC 3339 in UTC. Members
added by later versions are ignored by this one; a change that would mislead it gets another format number
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
    """One layer. While `state` is "hashing" it can be used, but `digest`, `size` and `entries` are not known yet.

    `digest` is ``sha256:HEX`` of the manifest, `diff_id` that of the canonical layer tar where known. `size` counts the
    bytes of regular files, hard links once. `flags` may contain "redirect" and "metacopy": the layer has attributes
    that are valid only over the layers `below`, top first. `same_as` is the id of the equal layer that images use
    instead of this one.
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
    """One step of an image's history, as in the OCI image configuration; an `empty_layer` step changed no file."""

    created: str = ""
    author: str = ""
    created_by: str = ""
    comment: str = ""
    empty_layer: bool = False


class ImageRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A name for a stack. `layers` are ids, top first; `history` is oldest first, as in the OCI image configuration.

    `config` is the "config" object of the OCI image configuration, unchanged.
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
    """An upper for mounts of `image`, over `layers`: ids, top first, as of the creation and the commits since.

    An `ephemeral` workspace is removed with its mount.
    """

    name: str
    image: str
    layers: tuple[str, ...]
    ephemeral: bool
    created: str


class Intent(msgspec.Struct, frozen=True, kw_only=True):
    """What must follow once a directory has become the tree of `layer`; `CommitTransactions.recover` completes it.

    `workspace` gets a new upper over the longer stack; `image` is put.
    """

    layer: str
    workspace: str | None = None
    image: ImageRecord | None = None


AnyRecord = TypeVar("AnyRecord", LayerRecord, ImageRecord, WorkspaceRecord, Intent)


def encode(record: LayerRecord | ImageRecord | WorkspaceRecord | Intent) -> bytes:
    """Return the document of a record, one line with its checksum at the end."""
    return with_checksum(msgspec.json.encode(record))


def decode(document: bytes, kind: type[AnyRecord], where: str) -> AnyRecord:
    """Return the record in a document; raises UserError, which names `where`, if it is damaged."""
    try:
        if not has_valid_checksum(document):
            raise msgspec.DecodeError("its checksum does not match")
        return msgspec.json.decode(document, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{where} is damaged: {str(error)[:200]}; restore it from a copy, or remove it") from None


_CHECK = b',"check":"'


def with_checksum(document: bytes) -> bytes:
    """Return a JSON object, which must not be empty, as a line whose last member "check" is its checksum."""
    return _append_checksum(document.removesuffix(b"}"))


def _append_checksum(members: bytes) -> bytes:
    return members + _CHECK + xxhash.xxh3_128_hexdigest(members).encode() + b'"}\n'


def has_valid_checksum(line: bytes) -> bool:
    """Return whether a line is what `with_checksum` has returned: a damaged document may still be valid JSON."""
    return line == _append_checksum(line.rpartition(_CHECK)[0])


def now() -> str:
    """Return the current time in the form of the records."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def printable(text: str) -> str:
    """Return text that JSON can hold: bytes of the command line that are not UTF-8 become U+FFFD."""
    return _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)
