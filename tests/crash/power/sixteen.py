"""Sixteen files of a lower layer get one byte changed, and some of them are made durable."""

from collections.abc import Iterator
from pathlib import Path

from tests.crash.power.history import Reference
from tests.crash.power.steps import Step

FILES = [f"f{number:02}" for number in range(16)]
SIZE = 60_000
DURABLE = 3  # every third is made durable at once


class Sixteen:
    """The load; with `prepared` the upper holds the metadata of each file already, so the change fetches the data."""

    def __init__(self, prepared: bool = False) -> None:
        self.name = "sixteen"
        self.setup = [Step("chmod", file, size=0o600) for file in FILES] if prepared else []

    def build(self, base: Path) -> None:
        """Make the lower files."""
        for number, file in enumerate(FILES, 97):
            (base / file).write_bytes(bytes([number]) * SIZE)

    def run(self, reference: Reference) -> Iterator[Step]:
        """Yield each step after it was performed on the reference."""
        for number, file in enumerate(FILES):
            changed = Step("write", file, at=number * 3_000, size=1, tag=number + 1)
            for step in (changed, *([Step("fsync-writer", file)] if number % DURABLE == 0 else [])):
                reference.perform(step)
                yield step
        reference.perform(Step("sync", ""))
        yield reference.steps[-1]
