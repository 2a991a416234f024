"""Strategies and samples for the tests of the formats."""

import os
import stat
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from hypothesis import strategies as st

from overlayfs.format import override

P = ParamSpec("P")
T = TypeVar("T")


def attempt(function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T | int:
    """Return the result of a call, or the errno of the `OSError` it raises."""
    try:
        return function(*arguments, **named)
    except OSError as error:
        return error.errno or 0


_ANY_BYTE = st.integers(1, 255).filter(lambda byte: byte != ord("/"))

component = st.one_of(
    st.lists(_ANY_BYTE, min_size=1, max_size=255).map(bytes),
    st.sampled_from([b"a", b"...", b" ", b"\n", b"\xff" * 255, b".wh.x", b"x" * 251]),
).filter(lambda name: name not in (b".", b".."))
"""Any name that can be in a directory."""

_words = st.sampled_from([
    b"trusted.", b"user.", b"security.", b"overlay.", b"overlay", b"opaque", b"fuseoverlayfs.", b"containers.",
    b"override_", b"stat", b"overlaypy.", b"x", b".", b"y" * 200,
])  # fmt: skip

attribute_names = st.lists(_words, min_size=1, max_size=5).map(b"".join).filter(lambda name: len(name) <= 255)
"""Names of attributes, most of them close to the reserved ones."""

_ids = st.integers(0, 2**32 - 2)
_modes = st.integers(0, 0o7777)
_kinds = st.sampled_from([None, stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK])
_devices = st.builds(os.makedev, st.integers(0, 2**12 - 1), st.integers(0, 2**20 - 1))

overrides = st.one_of(
    st.builds(override.Override, _ids, _ids, _modes, _kinds),
    st.builds(override.Override, _ids, _ids, _modes, st.sampled_from([stat.S_IFCHR, stat.S_IFBLK]), _devices),
)
"""Every value that `override.encode` takes."""
