"""Expected errors: an operation of a test names the errno that it must fail with."""

import errno as errors
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

P = ParamSpec("P")
T = TypeVar("T")


def name_of(number: int | None) -> str:
    """Return the symbol of an errno, for messages."""
    return "success" if number is None else errors.errorcode.get(number, str(number))


def expect(err: int | None, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Make the call; with `err` it must fail with exactly that errno, and the result must not be used."""
    if err is None:
        return call(*args, **kwargs)
    try:
        result = call(*args, **kwargs)
    except OSError as error:
        if error.errno == err:
            return cast(T, None)
        raise AssertionError(_message(call, args, err, name_of(error.errno))) from error
    raise AssertionError(_message(call, args, err, f"success ({result!r})"))


def errno_of(call: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> int | None:
    """Return the errno of a call, None for success."""
    try:
        call(*args, **kwargs)
    except OSError as error:
        return error.errno
    return None


def _message(call: Callable[..., object], args: tuple[object, ...], err: int, got: str) -> str:
    name = getattr(call, "__name__", str(call))
    return f"{name}{args!r}: expected {name_of(err)}, got {got}"
