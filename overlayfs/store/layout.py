"""Names of the files of a store, and which names images and workspaces can have (docs/on-disk-format.md, "A store").

    store, lock, layers/ID/{tree,manifest,record,lock}, digests/HEX, diffs/HEX, images/NAME, workspaces/NAME/
    {record,upper,work,lock}, intents/ID, staging/, trash/

Pure: nothing here looks at a disk.
"""

import re
import secrets

from overlayfs.errors import UserError

FORMAT = 1

FORMAT_FILE = b"store"
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
_NAME_MAX = 255  # bytes of a file name, as in limits.h(0p)


def format_document() -> bytes:
    """Return the content of `FORMAT_FILE`, which makes a directory a store."""
    return b'{"format": %d}\n' % FORMAT


def new_id() -> str:
    """Return a new, random layer id: 32 hex digits."""
    return secrets.token_hex(16)


def is_id(text: str) -> bool:
    """Return whether `text` is a complete layer id."""
    return _ID.fullmatch(text) is not None


def digest_file(digest: str) -> bytes | None:
    """Return the name of the index file of a digest ``sha256:HEX``, or None if `digest` is not of that form."""
    return digest.removeprefix("sha256:").encode() if _DIGEST.fullmatch(digest) else None


def image_name(given: str) -> str:
    """Return the full name NAME:TAG of an image; the tag is `latest` if left out. Raises UserError for other texts.

    Source of the rule: the OCI distribution specification, "Pulling manifests". A host with a port may stand in front.
    """
    found = _IMAGE.fullmatch(given)
    if found is None:
        raise UserError(
            f"{given!r} is not an image name; write NAME[:TAG] with lower-case letters, digits and . _ - / in NAME"
        )
    name = f"{found['path']}:{found['tag'] or 'latest'}"
    if len(file_name(name)) > _NAME_MAX:
        raise UserError(f"the image name {given!r} is too long; use at most 200 characters")
    return name


def is_workspace_name(text: str) -> bool:
    """Return whether a workspace can have the name `text`."""
    return _WORKSPACE.fullmatch(text) is not None


def workspace_name(given: str) -> str:
    """Return `given`; raises UserError if no workspace can have this name."""
    if not is_workspace_name(given):
        raise UserError(f"{given!r} is not a workspace name; use up to 128 letters, digits and . _ -")
    return given


def file_name(name: str) -> bytes:
    """Return the file name of an image or workspace: all bytes but letters, digits and ``._-:`` become %XX."""
    escaped = b"".join(bytes((byte,)) if byte in _PLAIN else b"%%%02X" % byte for byte in name.encode())
    return b"%2E" + escaped[1:] if escaped.startswith(b".") else escaped
