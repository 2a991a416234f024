"""The picture of what copy-up costs: one panel for each change, the time by the size of the file."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from overlayfs.errors import UsageError
from overlayfs_cli import output
from overlayfs_cli.benchmark import copyup_report
from overlayfs_cli.benchmark.contenders import KERNEL, OURS, PLAIN
from overlayfs_cli.benchmark.copyup import Cost

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {OURS: "#d62728", PLAIN: "#999999", KERNEL: "#222222", "fuse-overlayfs": "#1f77b4", "unionfs-fuse": "#2ca02c"}
FURTHER = ("#9467bd", "#8c564b", "#e377c2", "#17becf")  # for peers that were named on the command line
COLUMNS = 3


def need_matplotlib() -> None:
    """UsageError where no picture can be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib; install it with: pip install 'overlayfs[bench]'")


def colour(name: str, names: Sequence[str]) -> str:
    """Return the colour of a contender: the same one in every picture."""
    others = [each for each in names if each not in COLOURS]
    return COLOURS.get(name) or FURTHER[others.index(name) % len(FURTHER)]


def draw(costs: Sequence[Cost], heading: str, target: Path) -> None:
    """Write a PNG file."""
    import matplotlib as mpl

    mpl.use("Agg")  # a file is wanted; no window system is asked for
    from matplotlib import pyplot

    plain = [cost for cost in costs if not cost.case.where]
    operations = list(dict.fromkeys(cost.case.operation for cost in plain))
    rows = -(-len(operations) // COLUMNS)
    figure, axes = pyplot.subplots(rows, COLUMNS, figsize=(13, 4.2 * rows), sharex=True, sharey=True, squeeze=False)
    for number, operation in enumerate(operations):
        those = [cost for cost in plain if cost.case.operation == operation]
        _panel(axes[number // COLUMNS][number % COLUMNS], operation, those)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.suptitle(f"{heading.splitlines()[0]}\nMedian by size of the file; lower is better", fontsize=12)
    figure.legend(handles, labels, loc="lower center", ncol=len(labels), frameon=False, fontsize=11)
    figure.tight_layout(rect=(0, 0.05, 1, 0.98))
    figure.savefig(target, dpi=110, format="png")
    pyplot.close(figure)


def _panel(axes: "Axes", operation: str, costs: Sequence[Cost]) -> None:
    names = copyup_report.contender_names(costs)
    sizes = sorted({cost.case.size for cost in costs})
    for name in names:
        found = {cost.case.size: cost for cost in costs if cost.contender == name and cost.median is not None}
        places = [sizes.index(size) for size in sorted(found)]
        values = [(found[size].median or 0.0) * 1000 for size in sorted(found)]
        width = 3.0 if name == OURS else 1.6
        axes.plot(places, values, marker="o", linewidth=width, color=colour(name, names), label=name)
    axes.set_yscale("log")
    axes.set_title(operation, fontsize=11, loc="left")
    axes.set_xticks(range(len(sizes)), [output.size_text(size) for size in sizes])
    axes.tick_params(labelbottom=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} ms")
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
