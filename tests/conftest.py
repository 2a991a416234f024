"""Rules for every test: the directory for scratch trees, the driver of a test, and the check for leftovers."""

import os
import shutil
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.support import campaign as campaigns
from tests.support import engines, leftovers, processes, requirements

DRIVER_NAMES = ("plain", "fs", "fuse", "pyfuse3", "kernel")
# Drivers that only some tests request, and the driver that selects them
VARIANTS = {"command": "fuse"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--drivers", default=",".join(DRIVER_NAMES), help="the drivers of the behaviour suite, with commas"
    )
    parser.addoption(
        "--engine", choices=engines.NAMES, help="the engine of every mount that names none (default: what users get)"
    )
    parser.addoption("--campaign", type=Path, help="run the fault campaigns at full size and append their facts here")
    parser.addoption("--campaigns", default="", help="of the campaigns only these, with commas: T1,T4")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "on(*drivers): run only on these drivers; elsewhere the operation makes no sense"
    )
    config.addinivalue_line("markers", "deviates(driver, reason): this driver is known to fail, and must fail, here")
    config.addinivalue_line("markers", "engine(name): what only this engine does; a mount by another is not tried")
    config.addinivalue_line("markers", "campaign(number): part of a fault campaign, T1 to T21 of docs/reliability.md")
    engines.choose(config.getoption("--engine"))
    processes.adopt()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "driver" in metafunc.fixturenames:
        metafunc.parametrize("driver", _drivers(metafunc))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests of which `--drivers` left no variant."""
    asked = set(filter(None, config.getoption("--campaigns").split(",")))
    items[:] = [
        item
        for item in items
        if _is_of_campaigns(item, asked)
        and "NOTSET" not in getattr(getattr(item, "callspec", None), "id", "")
        and _is_of_this_engine(item)
    ]


def _is_of_campaigns(item: pytest.Item, asked: set[str]) -> bool:
    marker = item.get_closest_marker("campaign")
    return not asked or (marker is not None and marker.args[0] in asked)


def _is_of_this_engine(item: pytest.Item) -> bool:
    """Return whether the engine of this run is the one that the test needs; `_drivers` checks tests with drivers."""
    marker = item.get_closest_marker("engine")
    has_driver = "driver" in getattr(getattr(item, "callspec", None), "params", {})
    return marker is None or has_driver or marker.args[0] == engines.current()


def _drivers(metafunc: pytest.Metafunc) -> list[object]:
    chosen = metafunc.config.getoption("--drivers").split(",")
    marker = next(iter(metafunc.definition.iter_markers("on")), None)
    names = DRIVER_NAMES if marker is None else _both_engines(marker.args)
    wanted = [name for name in names if _is_served(name, metafunc)]
    known = {item.args[0]: item.kwargs["reason"] for item in metafunc.definition.iter_markers("deviates")}
    return [pytest.param(name, marks=_marks(name, known)) for name in wanted if VARIANTS.get(name, name) in chosen]


def _both_engines(names: tuple[str, ...]) -> tuple[str, ...]:
    """Run tests marked for our mount with both engines."""
    return tuple(each for name in names for each in ((name, "pyfuse3") if name == "fuse" else (name,)))


def _is_served(name: str, metafunc: pytest.Metafunc) -> bool:
    """Return whether a driver runs the engine that a test needs, and no other driver does under `--engine`."""
    engine = {"fuse": engines.current(), "command": engines.current(), "pyfuse3": engines.PYFUSE3}.get(name)
    marker = next(iter(metafunc.definition.iter_markers("engine")), None)
    if engine is None or (marker is not None and marker.args[0] != engine):
        return engine is None
    return engines.asked() is None or name != ("fuse" if engines.asked() == engines.PYFUSE3 else "pyfuse3")


def _marks(name: str, known: dict[str, str]) -> list[pytest.MarkDecorator]:
    return [pytest.mark.xfail(strict=True, reason=known[name])] if name in known else []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where everything must be present, a skipped test counts as failed."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and requirements.strict():
        report.outcome = "failed"
        report.longrepr = f"skipped although CI=true: {report.longrepr}"
    return report


def pytest_terminal_summary(terminalreporter: "pytest.TerminalReporter") -> None:
    """Report the tests that were skipped."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = sorted({str(report.longrepr[2]) for report in skipped if isinstance(report.longrepr, tuple)})
    if skipped:
        terminalreporter.section(f"NOT RUN: {len(skipped)} tests")
        for reason in reasons:
            terminalreporter.line(reason)


@pytest.fixture
def campaign(request: pytest.FixtureRequest) -> campaigns.Campaign:
    """The campaign that the test is marked as part of."""
    marker = request.node.get_closest_marker("campaign")
    assert marker is not None, "a test that uses the fixture `campaign` needs the marker `campaign`"
    return campaigns.Campaign(marker.args[0], request.config.getoption("--campaign"))


@pytest.fixture(scope="session")
def scratch() -> Iterator[Path]:
    """One directory for everything that the run creates; the session ends with the check for leftovers."""
    base = Path(tempfile.mkdtemp(prefix="ofs-", dir=os.environ.get("OVERLAYFS_TEST_DIR")))
    base.chmod(0o755)
    before = processes.children()
    yield base
    lines = leftovers.leftovers(base, before)
    assert not lines, "\n".join(lines)
    shutil.rmtree(base)


@pytest.fixture
def place(scratch: Path) -> Iterator[Path]:
    """An empty directory for one test, removed after it."""
    path = Path(tempfile.mkdtemp(prefix="t", dir=scratch))
    path.chmod(0o755)
    yield path
    assert not leftovers.mounts_below(path)
    shutil.rmtree(path)
