"""Real work: programs that users wait for."""

import sys

from bench import metadata
from bench.workload import Trial, Workload, expect, shell

GROUP = "work"
IMPORT = f"{sys.executable} -S -c 'import sys; sys.path.insert(0, \"modules\"); import everything'"
PIP = (
    f"{sys.executable} -m pip install -q --no-index --no-cache-dir --no-warn-script-location --root-user-action=ignore"
    " --disable-pip-version-check --find-links $A/wheels --prefix=$PWD/installed"
)


def installed(trial: Trial) -> None:
    """Check that every file of every wheel is installed and compiled."""
    wheels = len(list((trial.site.assets / "wheels").glob("*.whl")))
    sources = list(trial.path("installed").rglob("bench*/*.py"))
    compiled = list(trial.path("installed").rglob("bench*/__pycache__/*.pyc"))
    expect(len(sources) == len(compiled) and len(sources) % wheels == 0 and len(sources) > wheels, "pip left files out")


def install(trial: Trial) -> None:
    """Install all wheels, without a network."""
    names = " ".join(path.name.partition("-")[0] for path in sorted((trial.site.assets / "wheels").glob("*.whl")))
    trial.shell(f"{PIP} {names}")


def imported(trial: Trial) -> None:
    """Check that every module was imported."""
    modules = len(list((trial.site.layers("modules") / "whole/modules").glob("*/module*.py")))
    expect(trial.seen.strip() == str(modules).encode(), f"Python says {trial.seen[:60]!r} instead of {modules}")


def built(trial: Trial) -> None:
    """Check that the program runs and prints its sum."""
    sources = len(list((trial.site.layers("project") / "whole/project").glob("part*.c")))
    expected = sum(number + number for number in range(sources))
    trial.shell("project/program")
    expect(trial.seen.strip() == str(expected).encode(), "the program that was built is wrong")


def nothing_found(trial: Trial) -> None:
    """Check that grep has read everything: it counts the lines of every file."""
    files = metadata.known(trial.site.layers("tree"), "tree")[0]
    expect(trial.lines() == files, f"grep has read {trial.lines()} files instead of {files}")


GREP = "grep -rc nosuchword tree || true"

WORKLOADS = (
    Workload(
        "grep -r cold", GROUP, "tree", shell(GREP), nothing_found,
        cold=True, tool=("grep", "-rc", "nosuchword", "."), changes=False, copies_up=False,
    ),
    Workload(
        "grep -r warm", GROUP, "tree", shell(GREP), nothing_found,
        before=shell(f"{GREP} >/dev/null; {GREP}"), changes=False, copies_up=False,
    ),
    Workload("pip install", GROUP, "empty", install, installed, copies_up=False),
    Workload(
        "Python, 300 imports, cold", GROUP, "modules", shell(IMPORT), imported,
        cold=True, tool=(sys.executable, "-S", "-c", "pass"), changes=False, copies_up=False,
    ),
    Workload(
        "Python, 300 imports, warm", GROUP, "modules", shell(IMPORT), imported,
        before=shell(f"{IMPORT}; {IMPORT}"), changes=False, copies_up=False,
    ),
    Workload("make", GROUP, "project", shell("make -s -C project"), built, copies_up=False),
)  # fmt: skip
