"""Our mount measured beside its peers. `python scripts/bench --help` says how to run it."""
