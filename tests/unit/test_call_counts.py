"""The path of a request: how many functions of the package each kind enters. The counts are exact, so detours show."""

import tempfile
from pathlib import Path

import pytest

from tests.support.call_counts import count_calls

pytestmark = pytest.mark.root  # without trusted.* attributes some paths differ

BOUNDS = {
    "LOOKUP of a file of a layer": 30,
    "GETATTR": 20,
    "OPEN for writing, with copy-up": 250,
    "WRITE": 15,
    "READ": 12,
    "RELEASE": 16,
    "CREATE": 150,
    "UNLINK of a file of the upper": 95,
    "UNLINK of a file of a layer": 65,
    "MKDIR": 115,
    "RENAME of a merged directory, the first time": 400,
    "RENAME, all in the upper": 180,
}


def test_no_request_takes_a_longer_path() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:  # file systems that lack a feature take other paths
        found = {request: sum(functions.values()) for request, functions in count_calls(Path(place)).items()}
    assert found.keys() == BOUNDS.keys()
    assert not {request: count for request, count in found.items() if count >= BOUNDS[request]}
