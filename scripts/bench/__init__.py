"""Benchmarks of our mount and its peers; see `python scripts/bench --help`."""
