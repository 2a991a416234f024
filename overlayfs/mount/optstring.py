"""The text of `-o`: options between commas, layers between colons, escapes, quotes. No option is known here.

A backslash takes away the meaning of the character after it, as in the kernel's overlayfs (`ovl_unescape` of
`fs/overlayfs/params.c`): `\\,` is a comma, `\\:` a colon, `\\\\` a backslash. A comma between double quotes does not
end an option whose name is in `QUOTED`; elsewhere a quote is an ordinary character of a path.
"""

import re
from collections.abc import Iterator

QUOTED = (b"context", b"fscontext", b"defcontext", b"rootcontext")

_QUOTED_OPTION = re.compile(rb"(?:" + b"|".join(QUOTED) + rb')="[^"]*"')
_PLAIN_OPTION = re.compile(rb"(?:\\.|[^,\\]|\\$)*", re.DOTALL)
_PLAIN_LAYER = re.compile(rb"(?:\\.|[^:\\]|\\$)*", re.DOTALL)


def split_options(text: bytes) -> list[bytes]:
    """Return the options of one `-o` string, escapes untouched; empty ones (`a,,b,`) are dropped."""
    return [option for option in _options(text) if option]


def _options(text: bytes) -> Iterator[bytes]:
    start = 0
    while start <= len(text):
        found = _QUOTED_OPTION.match(text, start) or _PLAIN_OPTION.match(text, start)
        assert found is not None  # _PLAIN_OPTION matches the empty string
        yield found.group()
        start = found.end() + 1


def split_layers(value: bytes) -> list[bytes]:
    """Return the paths of a `lowerdir` value, top first, unescaped; an empty path stays for the caller to refuse."""
    paths, start = [], 0
    while start <= len(value):
        found = _PLAIN_LAYER.match(value, start)
        assert found is not None
        paths.append(unescape(found.group()))
        start = found.end() + 1
    return paths


def unescape(value: bytes) -> bytes:
    """Return the value with every `\\x` replaced by `x`; a lone backslash at the end stays."""
    return re.sub(rb"\\(.)", rb"\1", value, flags=re.DOTALL)


def escape_layer(path: bytes) -> bytes:
    """Return the path as one entry of `lowerdir=`: `split_layers(escape_layer(path)) == [path]`."""
    return re.sub(rb"([\\:,])", rb"\\\1", path)


def unquote(value: bytes) -> bytes:
    """Return the value without the double quotes around it, if there are any."""
    return value[1:-1] if len(value) >= 2 and value[:1] == value[-1:] == b'"' else value
