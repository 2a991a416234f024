"""Random lives of a tree, step by step beside the model: same results, same errors, same tree, also after a remount.

More than 10,000 steps in the usual run: OVERLAYFS_MODEL_EXAMPLES lives of up to STEPS each. It is the same every
time; with OVERLAYFS_MODEL_SEED=N it is another one, and the same for the same N.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.model.reference import Model
from tests.model.steps import KINDS, Domain, Kind, Life, layers
from tests.support.drivers import Stack, driver_class
from tests.support.requirements import need_root
from tests.support.spec import Tree as Spec
from tests.support.spec import flatten

T = TypeVar("T")
STEPS = 50
EXAMPLES = int(os.environ.get("OVERLAYFS_MODEL_EXAMPLES", "240"))
SEED = os.environ.get("OVERLAYFS_MODEL_SEED")


@st.composite
def drawn(draw: st.DrawFn, domain: Domain) -> Any:
    """A strategy of the values of a domain."""

    def pick(values: Sequence[T]) -> T:
        return draw(st.sampled_from(values))

    return domain(pick)


def a_rule(kind: Kind) -> Any:
    """The rule of a kind of step."""
    arguments: dict[str, Any] = {name: drawn(domain) for name, domain in kind.domains.items()}
    made: Any = rule(**arguments)
    when: Any = precondition(kind.possible)
    return when(made(kind.act))


class Ends(Life, RuleBasedStateMachine):
    """How a life begins and ends."""

    base: Path

    @initialize(made=drawn(layers))
    def start(self, made: list[Spec]) -> None:
        self.place = Path(tempfile.mkdtemp(dir=self.base))
        self.begin(driver_class("fs")(Stack(self.place / "s", list(made), {})), Model(flatten(made)))

    def teardown(self) -> None:
        if hasattr(self, "tree"):
            try:
                self.end()
            finally:
                shutil.rmtree(self.place)

    @invariant()
    def open_files_show_their_data(self) -> None:
        if hasattr(self, "open_files"):
            self.check_open_files(self.link_counts())


Machine = type("Machine", (Ends,), {name: a_rule(kind) for name, kind in KINDS.items()})


def machine_settings() -> settings:
    """No deadline, since a life touches a disk; no database, since CI starts from nothing."""
    return settings(
        max_examples=EXAMPLES,
        stateful_step_count=STEPS,
        derandomize=SEED is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        print_blob=True,
    )


@pytest.fixture
def memory(scratch: Path) -> Iterator[Path]:
    """A directory in memory, since lives sync and remount often; on disk where there is no /dev/shm."""
    shared = Path("/dev/shm")
    base = Path(tempfile.mkdtemp(prefix="ofs-", dir=shared if shared.is_dir() else scratch))
    yield base
    shutil.rmtree(base)


@pytest.mark.timeout(900)
def test_lives(memory: Path) -> None:
    need_root()
    Ends.base = memory
    machine = seed(int(SEED))(Machine) if SEED is not None else Machine
    umask = os.umask(0)
    try:
        run_state_machine_as_test(machine, settings=machine_settings())
    finally:
        os.umask(umask)
