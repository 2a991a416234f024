"""Where things lie in a store, and what they are called (docs/on-disk-format.md, "A store").

    store, lock, layers/ID/{tree,manifest,record,lock}, digests/HEX, diffs/HEX, images/NAME, workspaces/NAME/
    {record,upper,work,lock}, intents/ID, staging/, trash/

Pure: names and checks of names, nothing that looks at a disk.
"""

import re
import secrets

from overlayfs.errors import UserError

FORMAT = 1

HEAD = b"store"
LOCK = b"lock"
LAYERS = b"layers"
DIGESTS = b"digests"
DIFFS = b"diffs"
IMAGES = b"images"
WORKSPACES = b"workspaces"
INTENTS = b"intents"
STAGING = b"staging"
TRASH = b"trash"
SUBDIRECTORIES = (LAYERS, DIGESTS, DIFFS, IMAGES, WORKSPACES, INTENTS, STAGING, TRASH)

RECORD = b"record"
TREE = b"tree"
MANIFEST = b"manifest"
REMOTE = b"remote"
UPPER = b"upper"
WORK = b"work"
NEXT_UPPER = b"upper.next"
NEXT_WORK = b"work.next"

_ID = re.compile(r"[0-9a-f]{32}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_PLAIN = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-:")
_HOST = r"[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?(?::[0-9]+)?"
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_IMAGE = re.compile(rf"(?P<path>(?:{_HOST}/)?{_PART}(?:/{_PART})*)(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{{0,127}}))?")
_WORKSPACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_LONGEST = 255  # of a file name, in bytes


def head() -> bytes:
    """Return the content of the file that makes a directory a store."""
    return b'{"format": %d}\n' % FORMAT


def new_id() -> str:
    """Return the id of a layer that is being born: 32 hex digits that nobody else has."""
    return secrets.token_hex(16)


def is_id(text: str) -> bool:
    """Return whether a text is a whole id of a layer."""
    return _ID.fullmatch(text) is not None


def digest_file(digest: str) -> bytes | None:
    """Return the name of the index file of a digest ``sha256:HEX``, or None when it is not one."""
    return digest.removeprefix("sha256:").encode() if _DIGEST.fullmatch(digest) else None


def image_name(given: str) -> str:
    """Return the full name NAME:TAG of an image, tag `latest` if left out; UserError for what cannot be a name.

    Source of the rule: the OCI distribution specification, "Pulling manifests"; a host with a port may stand in front.
    """
    found = _IMAGE.fullmatch(given)
    if found is None:
        raise UserError(
            f"{given!r} is not an image name; write NAME[:TAG] with lower-case letters, digits and . _ - / in NAME"
        )
    name = f"{found['path']}:{found['tag'] or 'latest'}"
    if len(file_name(name)) > _LONGEST:
        raise UserError(f"the image name {given!r} is too long; use at most 200 characters")
    return name


def is_workspace_name(text: str) -> bool:
    """Return whether a workspace can have this name."""
    return _WORKSPACE.fullmatch(text) is not None


def workspace_name(given: str) -> str:
    """Return the name of a workspace as it is; UserError for what cannot be one."""
    if not is_workspace_name(given):
        raise UserError(f"{given!r} is not a workspace name; use up to 128 letters, digits and . _ -")
    return given


def file_name(name: str) -> bytes:
    """Return the file name of an image or workspace: bytes that could mislead become %XX."""
    escaped = b"".join(bytes((byte,)) if byte in _PLAIN else b"%%%02X" % byte for byte in name.encode())
    return b"%2E" + escaped[1:] if escaped.startswith(b".") else escaped
