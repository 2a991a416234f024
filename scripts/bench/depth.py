"""The cost of the number of layers: look-ups of existing and absent names, and listings, with 1 to 500 layers."""

import os
from dataclasses import replace

from bench import content
from bench.workload import Step, Trial, Workload, expect, nothing, seconds_of

GROUP = "layers"
DEPTHS = (1, 10, 100, 500)
ROUNDS = 3  # of look-ups of existing names; the first sends requests, the others show what the kernel caches


def first_touch(trial: Trial) -> None:
    """Make the kernel look up the directory without listing it."""
    os.stat(trial.path("shared"))


def listed(trial: Trial) -> None:
    """Make the kernel list the directory."""
    trial.remembered = len(os.listdir(trial.path("shared")))


def list_again(trial: Trial) -> None:
    """List the directory; microseconds per entry."""
    trial.value = seconds_of(lambda: listed(trial)) / content.DEPTH_FILES * 1e6


def all_listed(trial: Trial) -> None:
    """Check that every name of every layer was there."""
    expect(trial.remembered == content.DEPTH_FILES, f"{trial.remembered} names instead of {content.DEPTH_FILES}")


def hits(trial: Trial) -> None:
    """Look up every name once; microseconds per look-up."""
    names = [os.fspath(trial.path(f"shared/{number:05}")) for number in range(content.DEPTH_FILES)]
    trial.value = seconds_of(lambda: [os.stat(name) for name in names]) / len(names) * 1e6


def misses(trial: Trial) -> None:
    """Look up as many names that are not there, each once; microseconds per look-up."""
    names = [os.fspath(trial.path(f"shared/absent{number:05}")) for number in range(content.DEPTH_FILES)]
    trial.remembered = 0

    def look() -> None:
        trial.remembered = sum(not os.path.lexists(name) for name in names)

    trial.value = seconds_of(look) / len(names) * 1e6


def all_missed(trial: Trial) -> None:
    """Check that nothing was found."""
    expect(trial.remembered == content.DEPTH_FILES, "names were found that are in no layer")


def _of(layers: int) -> tuple[Workload, ...]:
    def workload(name: str, act: Step, check: Step = nothing, *, before: Step) -> Workload:
        named = f"{name}, {layers} layer{'s' * (layers > 1)}"
        made = Workload(named, GROUP, f"{content.DEPTH}{layers}", act, check, before)
        return replace(made, unit="us", changes=False, copies_up=False)

    return (
        workload("list", act=list_again, check=all_listed, before=first_touch),
        workload("look-up hit", act=hits, before=first_touch),
        workload("look-up miss", act=misses, check=all_missed, before=first_touch),
        workload("look-up hit, known", act=hits, before=listed),
        workload("look-up miss, known", act=misses, check=all_missed, before=listed),
    )


WORKLOADS = tuple(workload for layers in DEPTHS for workload in _of(layers))
