"""Sizes of the workloads."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Sizes of the workloads; the small set is for trials."""

    files: int = 5000
    directories: int = 350
    repository: int = 3000
    modules: int = 300
    sources: int = 40
    wheels: int = 10
    wheel_files: int = 100
    huge: int = 100_000
    touched: int = 10_000
    blocks: int = 512  # MiB of the data workloads
    largest: int = 1 << 30  # bytes of the largest file of the copy-up workloads
    nodes: int = 1_000_000
    inserts: int = 200
    layers: int = 500


FULL = Sizes()
QUICK = Sizes(1500, 100, 800, 300, 12, 5, 60, 10_000, 1000, 64, 100 << 20, 50_000, 60, 500)
