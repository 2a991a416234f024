"""The points of a campaign: what is found at one of them does not keep the others from being tried."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.support.campaign import Campaign


def chosen(campaign: Campaign, count: int, quick: int) -> list[int]:
    """Return which of the points 1 to `count` to try: all in a full run, else `quick` evenly spaced ones."""
    if campaign.full or count <= quick:
        return list(range(1, count + 1))
    return sorted({1 + number * (count - 1) // max(quick - 1, 1) for number in range(quick)})


@dataclass
class Points:
    """How many were tried, and what was wrong at which."""

    tried: int = 0
    violations: list[str] = field(default_factory=list)

    @contextmanager
    def at(self, where: str) -> Iterator[None]:
        """Try one point: what the block raises is a violation there."""
        self.tried += 1
        try:
            yield
        except Exception as error:
            text = str(error) if isinstance(error, AssertionError) else repr(error)
            self.violations.append(f"{where}: {text or 'wrong'}")

    def add(self, other: "Points") -> None:
        """Take in what was found elsewhere."""
        self.tried += other.tried
        self.violations += other.violations
