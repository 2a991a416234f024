"""500 layers, and a directory of many files: `scripts/scale` at a small size."""

import json
import sys
from pathlib import Path

from tests.programs.conftest import sh
from tests.support.drivers.mounts import COMMAND
from tests.support.requirements import need_root

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/scale"


def test_many_layers_and_a_big_directory() -> None:
    """It works within its limits; the script checks the trees."""
    need_root()
    out = sh(sys.executable, SCRIPT, "--program", COMMAND, "--layers", "500", "--files", "3000", "--json")
    found = json.loads(out)
    steps = {row["step"]: row for row in found["steps"]}
    assert steps["mount 500 layers"]["cpu"] < 5
    assert steps["list 3000 files"]["requests"] < 100
    assert steps["look up 3000 files"]["requests"] <= 3100, "were caches dropped? the listing had the attributes"
    assert found["memory"]["mib_per_100000_nodes"] < 400
