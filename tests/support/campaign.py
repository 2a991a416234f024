"""The results of a fault campaign, for docs/reliability.md.

A campaign is one or more tests marked ``campaign("T1")``, by the numbers of docs/reliability.md. In the usual run they
are small; with ``--campaign FILE`` (`make campaign`) they have full size and append a line of JSON to FILE for each
fact. A campaign counts only if it catches its mutants (tests/support/mutants).
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SHOWN = 10  # violations in the message of a failed test


@dataclass(frozen=True)
class Campaign:
    """The size of one campaign, and the file for its results. `records`: that file, in a full run."""

    number: str
    records: Path | None = None

    @property
    def full(self) -> bool:
        """Whether this is the full run."""
        return self.records is not None

    def size(self, quick: int, full: int) -> int:
        """Return how much to do in this run."""
        return full if self.full else quick

    def held(self, what: str, points: int, violations: Sequence[str], seed: int | None = None) -> None:
        """Record that `points` points of `what` were tried; fail with the violations if there are any.

        A campaign that tried nothing fails, too.
        """
        self._write(kind="held", what=what, points=points, violations=len(violations), seed=seed)
        assert points, f"{self.number}: no point of {what} was tried"
        assert not violations, _listed(f"{self.number}: {what}", points, violations)

    def caught(self, mutant: str, points: int, violations: Sequence[str]) -> None:
        """Record that the campaign, run on this mutant, found `violations`; fail if there are none."""
        self._write(kind="caught", what=mutant, points=points, violations=len(violations), seed=None)
        assert violations, f"{self.number} did not notice the mutant {mutant} at {points} points"

    def peer(self, program: str, what: str, points: int, violations: int) -> None:
        """Record the result of the same load on another program's file system; never fails."""
        self._write(kind="peer", who=program, what=what, points=points, violations=violations, seed=None)

    def _write(self, **fact: object) -> None:
        if self.records is None:
            return
        line = json.dumps({"campaign": self.number, **fact}) + "\n"
        fd = os.open(self.records, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(fd, line.encode())  # one call: several workers write into the same file
        finally:
            os.close(fd)


def _listed(title: str, points: int, violations: Sequence[str]) -> str:
    more = f"\n... and {len(violations) - SHOWN} more" if len(violations) > SHOWN else ""
    return f"{title}: {len(violations)} violations at {points} points\n" + "\n".join(violations[:SHOWN]) + more
