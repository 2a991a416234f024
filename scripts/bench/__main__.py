"""`python scripts/bench`: measure our mount and its peers. Needs root; takes minutes to an hour.

python scripts/bench run [GROUP|WORKLOAD...]         everything, or a part; table, --json, --plots
python scripts/bench acceptance [WORKLOAD...]        the target ratios, met or missed
python scripts/bench list                            groups and workloads
python scripts/bench report JSON...                  tables and pictures from earlier runs
python scripts/bench archives                        import and export beside tar and umoci
python scripts/bench commit                          a live commit beside buildah and podman
python scripts/bench verify                          verification beside xxhsum and cat
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # started by its directory: the package is then known by its name
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from bench.arguments import main

    sys.exit(main())
