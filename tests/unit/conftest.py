"""Rules for the tests of single modules."""

import pytest

from tests.support.requirements import need_root


@pytest.fixture(autouse=True)
def _needs(request: pytest.FixtureRequest) -> None:
    """A test marked `root` is skipped with a reason for other users."""
    if request.node.get_closest_marker("root") is not None:
        need_root()
