"""Results as pictures."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench import acceptance
from bench.results import Report, Result
from overlayfs_cli.benchmark.contenders import KERNEL, OURS, PLAIN
from overlayfs_cli.benchmark.copyup_plot import colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = {PLAIN: "|", KERNEL: "D"}
DRAWN = ("metadata", "data", "work")


def draw(report: Report, directory: Path) -> list[Path]:
    """Draw every picture for which there are results; return the files."""
    import matplotlib as mpl

    mpl.use("Agg")  # draw into files, without a display
    from matplotlib import pyplot

    directory.mkdir(parents=True, exist_ok=True)
    made = []
    for name, make in PICTURES.items():
        figure = make(report)
        if figure is not None:
            made.append(directory / f"{name}.png")
            figure.savefig(made[-1], dpi=100, format="png")
            pyplot.close(figure)
    return made


def _kinds(report: Report, of: Callable[[Result], bool]) -> list[str]:
    return list(dict.fromkeys(r.filesystem for r in report.results if r.filesystem in ("ext4", "tmpfs") and of(r)))


def _tidy(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)


def targets(report: Report) -> "Figure | None":
    """Draw our ratio for each target as a bar, with a mark at the target."""
    from matplotlib import pyplot

    kinds = _kinds(report, lambda result: True)
    rows = [t for t in acceptance.TARGETS if any(_figure(report, t, kind) for kind in kinds)]
    if not rows:
        return None
    figure, all_axes = pyplot.subplots(
        1, len(kinds), figsize=(7.5 * len(kinds), 0.36 * len(rows) + 1.8), sharey=True, squeeze=False
    )
    for axes, kind in zip(all_axes[0], kinds, strict=True):
        _targets_panel(axes, report, kind, rows)
    figure.suptitle("Our figure divided by theirs; the black mark is the target", fontsize=13)
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    return figure


def _targets_panel(axes: "Axes", report: Report, kind: str, rows: Sequence[acceptance.Target]) -> None:
    for place, target in enumerate(rows):
        figure = _figure(report, target, kind)
        if figure is None:
            continue
        met = target.is_met(figure)
        axes.barh(place, figure, color="#4c9f70" if met else "#d1495b", height=0.66)
        axes.plot([target.most or target.least] * 2, [place - 0.42, place + 0.42], color="black", linewidth=2)
        right = max(figure, target.most or target.least)
        axes.annotate(f" {figure:.2f}", (right, place), va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [f"{t.workload}  :  {t.against}" for t in rows], fontsize=9)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.axvline(1.0, color="#888888", linewidth=1)
    axes.set_title(f"{kind}: green is met, red is missed", fontsize=11)
    axes.margins(x=0.12)
    axes.set_ylim(len(rows) - 0.4, -0.6)  # shared by the panels, so that inverting the axis of each would undo it
    _tidy(axes)


def _figure(report: Report, target: acceptance.Target, kind: str) -> float | None:
    mine = report.find(kind, target.workload, OURS)
    theirs = acceptance.opponent(report, target, kind, OURS)
    if mine is None or theirs is None or not mine.median or not theirs.median:
        return None
    return mine.median / theirs.median


def overview(report: Report) -> "Figure | None":
    """Draw the time of each contender as a multiple of the plain directory's, one line for each workload."""
    from matplotlib import pyplot

    kinds = _kinds(report, lambda result: result.group in DRAWN and result.contender == PLAIN)
    if not kinds:
        return None
    names = list(dict.fromkeys(r.workload for r in report.results if r.group in DRAWN and r.unit == "s"))
    figure, all_axes = pyplot.subplots(
        1, len(kinds), figsize=(7 * len(kinds), 0.34 * len(names) + 2), sharey=True, squeeze=False
    )
    for axes, kind in zip(all_axes[0], kinds, strict=True):
        _overview_panel(axes, report, kind, names)
    handles, labels = all_axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=len(labels), frameon=False)
    figure.suptitle("Times as multiples of the plain directory's (left is better)", fontsize=13)
    figure.tight_layout(rect=(0, 0.04, 1, 0.98))
    return figure


def _overview_panel(axes: "Axes", report: Report, kind: str, names: Sequence[str]) -> None:
    candidates = [n for n in dict.fromkeys(r.contender for r in report.results if r.kind != OURS) if n != PLAIN] + [
        OURS
    ]
    for contender in candidates:
        points = []
        for place, name in enumerate(names):
            base, mine = report.median(kind, name, PLAIN), report.median(kind, name, contender)
            if base and mine:
                points.append((mine / base, place))
        size = 90 if contender == OURS else 42
        xs, ys = [x for x, _ in points], [y for _, y in points]
        marker = MARKERS.get(contender, "o")
        axes.scatter(
            xs, ys, s=size, color=colour(contender, candidates), label=contender, marker=marker, zorder=3, alpha=0.9
        )
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.axvline(1.0, color="#888888", linewidth=1)
    axes.set_title(kind, fontsize=11)
    _tidy(axes)
    axes.grid(axis="y", alpha=0.15)


def depth(report: Report) -> "Figure | None":
    """Draw the cost of a look-up by the number of layers."""
    return _curves(
        report,
        {
            "hit, directory not yet known": "look-up hit, {}",
            "miss, directory not yet known": "look-up miss, {}",
            "miss, directory known": "look-up miss, known, {}",
            "listing, for each entry": "list, {}",
        },
        [(str(n), f"{n} layer{'s' * (n > 1)}") for n in (1, 10, 100, 500)],
        ("Microseconds by the number of layers (lower is better)", "layers", "us"),
    )


def clients(report: Report) -> "Figure | None":
    """Draw the throughput of several clients."""
    return _curves(
        report,
        {"all clients together": "{}"},
        [(str(n), f"{n} client{'s' * (n > 1)}") for n in (1, 2, 4, 8)],
        ("Turns each second by the number of clients (higher is better)", "clients", "turns/s"),
    )


def _curves(
    report: Report, panels: dict[str, str], steps: Sequence[tuple[str, str]], words: tuple[str, str, str]
) -> "Figure | None":
    from matplotlib import pyplot

    known = {result.workload for result in report.results if result.median}
    panels = {  # a curve needs two points
        name: pattern
        for name, pattern in panels.items()
        if sum(pattern.format(label) in known for _, label in steps) > 1
    }
    names = {pattern.format(label) for pattern in panels.values() for _, label in steps}
    kinds = _kinds(report, lambda result: result.workload in names)[:1]
    if not kinds:
        return None
    title, across, unit = words
    width = max(7.0, 4.6 * len(panels))
    figure, all_axes = pyplot.subplots(1, len(panels), figsize=(width, 4.6), sharey=True, squeeze=False)
    for axes, (name, pattern) in zip(all_axes[0], panels.items(), strict=True):
        _curves_panel(axes, report, kinds[0], [(x, pattern.format(label)) for x, label in steps])
        axes.set_title(name, fontsize=11)
        axes.set_xlabel(across)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} {unit}")
    handles, labels = all_axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=len(labels), frameon=False, fontsize=9)
    figure.suptitle(f"{title}, on {kinds[0]}", fontsize=12)
    figure.tight_layout(rect=(0, 0.07, 1, 0.97))
    return figure


def _curves_panel(axes: "Axes", report: Report, kind: str, steps: Sequence[tuple[str, str]]) -> None:
    candidates = list(dict.fromkeys(r.contender for r in report.results if r.kind != OURS or r.contender == OURS))
    for contender in candidates:
        values = [(x, report.median(kind, name, contender)) for x, name in steps]
        known = [(x, value) for x, value in values if value is not None]
        if known:
            width = 3.0 if contender == OURS else 1.6
            xs, ys = [x for x, _ in known], [y for _, y in known]
            axes.plot(xs, ys, marker="o", linewidth=width, color=colour(contender, candidates), label=contender)
    axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)


def start_up(report: Report) -> "Figure | None":
    """Draw the time until each mount is ready, and the parts of ours."""
    from matplotlib import pyplot

    kind = next(iter(_kinds(report, lambda result: result.group == "start-up")), None)
    parts = {name: value for name, value in report.anatomy.items() if name != "total"}
    if kind is None or not parts:
        return None
    candidates = [r for r in report.results if r.workload == "mount, 3 layers" and r.filesystem == kind and r.median]
    figure, axes = pyplot.subplots(figsize=(10, 0.5 * len(candidates) + 2.2))
    names = [result.contender for result in candidates]
    for place, result in enumerate(candidates):
        axes.barh(place, result.median or 0.0, color=colour(result.contender, names), height=0.6)
        axes.annotate(f" {result.median:.0f} ms", (result.median or 0.0, place), va="center")
    left = 0.0
    for number, (name, value) in enumerate(parts.items()):
        axes.barh(len(names), value, left=left, height=0.6, color=pyplot.get_cmap("Reds")(0.3 + 0.14 * number))
        axes.annotate(f"{name}\n{value:.0f} ms", (left + value / 2, len(names) + 0.75), ha="center", fontsize=8)
        left += value
    axes.set_yticks(range(len(names) + 1), [*names, "ours, by part"])
    axes.set_ylim(len(names) + 1.1, -0.6)
    axes.set_title("Time until the mount command returns, and what our quickest start is made of", fontsize=12)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} ms")
    _tidy(axes)
    figure.tight_layout()
    return figure


PICTURES: dict[str, Callable[[Report], "Figure | None"]] = {
    "targets": targets,
    "overview": overview,
    "layers": depth,
    "clients": clients,
    "start-up": start_up,
}
