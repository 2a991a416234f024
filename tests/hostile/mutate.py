"""Seeded changes of valid inputs, on three levels: bytes, JSON documents, tar archives.

A random string fails the first check of any parser. An input with one change, and with its checksums corrected,
is parsed to the end.
"""

import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from tests.oci import archives

NUMBERS = (-(1 << 63), -1, 0, 1, 7, 255, 256, 511, 512, 4096, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32,
           (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, 10**40)  # fmt: skip
TEXTS = ("", ".", "..", "/", "../x", "/etc/passwd", "a/b", "a" * 300, "\0", "\n", "\x1b[31m", "\u202e", "\ud800", "%2e",
         "sha256:" + "0" * 64, "sha256:" + "F" * 64, "sha256:../x", "sha512:" + "0" * 128, "latest", "1e999", "null",
         "-1", "99999999999999999999", "2020-01-01T00:00:00Z", "application/vnd.oci.image.index.v1+json")  # fmt: skip


_DEEP, _DEPTH = "as deep as can be", 20_000


def spoil(random: Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """Return the bytes with one to four changes; `others` are inputs from which parts may be copied."""
    changed = bytearray(data)
    for _ in range(random.randint(1, 4)):
        random.choice(_SPOILERS)(random, changed, others)
    return bytes(changed)


def _flip(random: Random, data: bytearray, _: Sequence[bytes]) -> None:
    if data:
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def _put(random: Random, data: bytearray, _: Sequence[bytes]) -> None:
    if data:
        data[random.randrange(len(data))] = random.choice(b"\x00\x01\x7f\x80\xff/.:%,=\\\n ")


def _cut(random: Random, data: bytearray, _: Sequence[bytes]) -> None:
    start = random.randrange(len(data) + 1)
    del data[start : start + random.choice((1, 2, 8, 512, len(data)))]


def _insert(random: Random, data: bytearray, _: Sequence[bytes]) -> None:
    at = random.randrange(len(data) + 1)
    data[at:at] = random.choice((random.randbytes(random.randrange(1, 9)), bytes(random.choice((1, 4, 512)))))


def _repeat(random: Random, data: bytearray, _: Sequence[bytes]) -> None:
    start = random.randrange(len(data) + 1)
    piece = data[start : start + random.randrange(1, 40)]
    data[start:start] = piece * random.choice((1, 2, 50))


def _splice(random: Random, data: bytearray, others: Sequence[bytes]) -> None:
    if others:
        other = random.choice(others)
        start = random.randrange(len(other) + 1)
        at = random.randrange(len(data) + 1)
        data[at : at + random.randrange(20)] = other[start : start + random.randrange(60)]


_SPOILERS: tuple[Callable[[Random, bytearray, Sequence[bytes]], None], ...] = (
    _flip, _flip, _put, _put, _cut, _insert, _repeat, _splice,
)  # fmt: skip


# --- JSON --------------------------------------------------------------------------------------------------


def document(random: Random, valid: Any) -> bytes:
    """Return the JSON document `valid` with one to three changes; rarely, its bytes are damaged too."""
    changed = json.loads(json.dumps(valid))
    for _ in range(random.randint(1, 3)):
        changed = _changed(random, changed)
    text = json.dumps(changed)
    if random.random() < 0.1:
        text = text.replace("{", '{"digest": 1, ', 1)  # a member twice
    text = text.replace(f'"{_DEEP}"', "[" * _DEPTH + "]" * _DEPTH)  # which no encoder writes
    data = text.encode("utf-8", "surrogatepass")
    return spoil(random, data) if random.random() < 0.1 else data


def _changed(random: Random, value: Any) -> Any:
    if not isinstance(value, dict | list) or not value or random.random() < 0.2:
        return strange(random, value)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = random.choice(keys)
    if random.random() < 0.1:
        del value[key]
    elif isinstance(value, list) and random.random() < 0.2:
        value.extend([value[key]] * random.choice((1, 2, 100)))
    elif isinstance(value, dict) and random.random() < 0.1:
        value[random.choice(TEXTS)] = strange(random, None)
    else:
        value[key] = _changed(random, value[key])
    return value


def strange(random: Random, value: Any) -> Any:
    """Return something that is invalid in place of `value`."""
    return random.choice((
        lambda: None, lambda: True, list, dict, lambda: random.choice(NUMBERS), lambda: 1.5,
        lambda: random.choice(TEXTS), lambda: random.choice(TEXTS), lambda: [value], lambda: {"x": value},
        lambda: nested(random.choice((2, 50, 300))), lambda: _DEEP, lambda: "x" * random.choice((10, 5000)),
    ))()  # fmt: skip


def nested(depth: int) -> Any:
    """Return nested lists and objects."""
    value: Any = 1
    for number in range(depth):
        value = [value] if number % 2 else {"a": value}
    return value


# --- tar ---------------------------------------------------------------------------------------------------

_FIELDS = ((0, 100), (100, 8), (108, 8), (116, 8), (124, 12), (136, 12), (148, 8), (156, 1), (157, 100), (257, 8),
           (265, 32), (297, 32), (329, 8), (337, 8), (345, 155), (386, 24), (482, 1), (483, 12))  # fmt: skip
_NAMES = (b"", b".", b"..", b"/", b"../x", b"a/../../x", b"a//b/", b"./.", b".wh.", b".wh..", b".wh.x", b".wh..wh..opq",
          b".wh..wh.x", b"s/x", b"d/f", b"d", b"\xff\n", b"n" * 100, b"d/.wh.f")  # fmt: skip
_KEYS = (b"path", b"linkpath", b"size", b"uid", b"gid", b"mtime", b"GNU.sparse.map", b"GNU.sparse.size",
         b"GNU.sparse.major", b"GNU.sparse.minor", b"GNU.sparse.realsize", b"GNU.sparse.name", b"GNU.sparse.offset",
         b"GNU.sparse.numbytes", b"SCHILY.xattr.user.x", b"SCHILY.xattr.trusted.overlay.opaque", b"hdrcharset", b"x"
         )  # fmt: skip


def tar(random: Random, blocks: Sequence[bytes]) -> bytes:
    """Return an archive of some of these entries, with changed headers and correct checksums, or damaged bytes."""
    parts = [_entry(random, random.choice(blocks)) for _ in range(random.randint(1, 6))]
    archive = b"".join(parts) + archives.END
    return spoil(random, archive) if random.random() < 0.2 else archive


def _entry(random: Random, entry: bytes) -> bytes:
    """Change one header of an entry and its checksum, or put an extended header before it."""
    choice = random.random()
    if choice < 0.25:
        return entry
    if choice < 0.5:
        return _extended(random) + entry
    at = 512 * random.randrange(len(entry) // 512)
    block = bytearray(entry[at : at + 512])
    start, width = random.choice(_FIELDS)
    block[start : start + width] = _value(random, width)[:width].ljust(width, b"\0")
    sealed = bytes(block) if start == 148 else archives.sealed(bytes(block))
    return entry[:at] + sealed + entry[at + 512 :]


def _value(random: Random, width: int) -> bytes:
    number = random.choice(NUMBERS)
    return random.choice((
        lambda: random.choice(_NAMES), lambda: random.choice(b"0123456789xgLKSVZ\0").to_bytes(1, "big") * width,
        lambda: b"%o" % abs(number), lambda: b"%*o" % (width, abs(number)),
        lambda: b"\x80" + (number % (1 << 8 * (width - 1))).to_bytes(width - 1, "big") if width > 1 else b"\x80",
        lambda: b"\xff" * width, lambda: random.randbytes(width),
    ))()  # fmt: skip


def _extended(random: Random) -> bytes:
    """One extended header or long name, of one to four records."""
    if random.random() < 0.15:
        name = random.choice(_NAMES).ljust(200, b"\0")
        return archives.header(b"././@LongLink", random.choice((b"L", b"K")), size=200) + archives.padded(name)
    records = b"".join(_record(random) for _ in range(random.randint(1, 4)))
    if random.random() < 0.2:
        records = spoil(random, records)
    return archives.pax(records, random.choice((b"x", b"x", b"x", b"g")))


def _record(random: Random) -> bytes:
    value = random.choice((
        lambda: random.choice(_NAMES), lambda: b"%d" % random.choice(NUMBERS), lambda: b"0,4,8,4", lambda: b"1",
        lambda: b",".join(b"%d" % random.choice(NUMBERS) for _ in range(random.randrange(6))), lambda: b"5.5",
        lambda: b"v" * random.choice((0, 100, 4000)),
    ))()  # fmt: skip
    return archives.record(random.choice(_KEYS), value)
