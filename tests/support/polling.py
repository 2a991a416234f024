"""Waiting for a condition, with a deadline."""

import time
from collections.abc import Callable

LIMIT = 15.0


def until(condition: Callable[[], object], limit: float = LIMIT) -> None:
    """Return when the condition is true; fail if it is not within `limit` seconds."""
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, f"did not happen within {limit:g} s"
        time.sleep(0.005)
