"""The points of a campaign: a violation at one of them does not stop the others from being tried."""

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
    """The number of points tried, and the violations found."""

    tried: int = 0
    violations: list[str] = field(default_factory=list)

    @contextmanager
    def at(self, where: str) -> Iterator[None]:
        """Try one point: an exception in the block is a violation at that point."""
        self.tried += 1
        try:
            yield
        except Exception as error:
            text = str(error) if isinstance(error, AssertionError) else repr(error)
            self.violations.append(f"{where}: {text or 'wrong'}")

    def add(self, other: "Points") -> None:
        """Add the results of another group of points."""
        self.tried += other.tried
        self.violations += other.violations
