"""Upper, work directory and mount point inside the layer itself, as in a sandbox over `/`."""

import os
from pathlib import Path

import pytest

from tests.mounted.conftest import Mount, Stack


class Nested(Stack):
    """A stack whose upper, work directory and mount point are in the lower layer `low`."""

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        self.upper, self.work, self.point = (base / "low" / name for name in ("u", "w", "m"))
        for each in (self.upper, self.work, self.point):
            each.mkdir()


@pytest.fixture
def nested(mount: Mount) -> Mount:
    """A mount of such a stack."""
    mount.stack = Nested(mount.stack.base / "nested")
    mount.point = mount.stack.point
    mount.start()
    return mount


def test_the_upper_is_not_part_of_the_layer(nested: Mount) -> None:
    assert sorted(os.listdir(nested.point)) == ["d", "m", "t"]
    for name in ("u", "w"):
        assert not (nested.point / name).exists()
    (nested.point / "d" / "f").write_bytes(b"changed")
    assert (nested.stack.upper / "d" / "f").read_bytes() == b"changed"
    assert (nested.stack.base / "low" / "d" / "f").read_bytes() == b"low" * 1000


def test_the_mount_does_not_show_itself(nested: Mount) -> None:
    assert os.listdir(nested.point / "m") == []
    (nested.point / "m" / "new").write_bytes(b"x")
    assert os.listdir(nested.point / "m") == ["new"]


def test_a_name_that_is_hidden_in_the_layer_can_be_created(nested: Mount) -> None:
    (nested.point / "u").mkdir()
    (nested.point / "u" / "f").write_bytes(b"mine")
    assert (nested.stack.upper / "u" / "f").read_bytes() == b"mine"
    (nested.point / "u" / "f").unlink()
    (nested.point / "u").rmdir()
    assert not (nested.point / "u").exists()
