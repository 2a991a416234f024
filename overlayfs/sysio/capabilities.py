"""Capabilities of the calling thread. See capget(2), capabilities(7)."""

import ctypes
import struct

from overlayfs.sysio.libc import failed, function

CAP_FSETID = 4

_capget = function("capget", ctypes.c_char_p, ctypes.c_void_p)
_capset = function("capset", ctypes.c_char_p, ctypes.c_char_p)
_CAPABILITY_VERSION_3 = 0x20080522
_OF_THIS_THREAD = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
_CAPABILITIES = struct.Struct("=6I")  # effective, permitted, inheritable; twice, the low 32 first (capget(2))


class WithoutCapability:
    """A reusable context in which a capability is missing from the thread's effective set.

    The set is read once, when the context is made: it must be made and entered in threads with equal sets.
    """

    def __init__(self, number: int) -> None:
        found = ctypes.create_string_buffer(_CAPABILITIES.size)
        if _capget(_OF_THIS_THREAD, found) < 0:
            raise failed()
        self._before = found.raw[: _CAPABILITIES.size]
        effective, *rest = _CAPABILITIES.unpack(self._before)
        self._reduced = _CAPABILITIES.pack(effective & ~(1 << number), *rest)

    def __enter__(self) -> None:
        if _capset(_OF_THIS_THREAD, self._reduced) < 0:
            raise failed()

    def __exit__(self, *_: object) -> None:
        _capset(_OF_THIS_THREAD, self._before)
