"""Plots as SVG that takes its colours from the page: one picture for light and for dark.

matplotlib draws with stand-in colours, which become references to CSS variables (`--ink`, `--s1`,
...); texts stay texts, in the font of the page. The outer size is left out, so that a plot fills
its place.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

    from jobs.report_page.facts import Histogram, StageFacts, Throughput

WIDE = (9.0, 2.7)
HALF = (4.4, 2.5)
"""Inches; a plot is shown at about 100 pixels an inch, with text of 12 to 13 pixels."""
VARIABLES = {
    "#0a0b01": "--ink",
    "#0a0b02": "--faint",
    "#0a0b03": "--line",
    "#0a0b11": "--s1",
    "#0a0b12": "--s2",
    "#0a0b13": "--s3",
}
"""Stand-in colour and the variable that takes its place."""
INK, FAINT, LINE, BLUE, ORANGE, GREY = VARIABLES
MAX_BARS = 24
"""Workers drawn one by one; of more, their distribution is drawn."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    # A dollar sign in a name is no formula, which could even be a wrong one.
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": FAINT,
    "ytick.labelcolor": FAINT,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.labelcolor": INK,
}


class Plots:
    """Makes the plots of one page; knows how many there are, so that their ids differ."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)

    def throughput(self, throughput: Throughput) -> str:
        """Return frames per second over running time."""
        unit, seconds = time_unit(float(throughput.edges_s[-1]))
        with self._axes(WIDE, "Frames per second over running time") as (axes, svg):
            edges = throughput.edges_s / seconds
            axes.stairs(throughput.frames_per_s, edges, fill=True, color=BLUE, alpha=0.35)
            axes.stairs(throughput.frames_per_s, edges, color=BLUE, linewidth=1.5, baseline=None)
            for number, at in enumerate(throughput.restarts_s):
                label = "started again" if number == 0 else None
                axes.axvline(at / seconds, color=ORANGE, linewidth=1, linestyle="--", label=label)
            if throughput.restarts_s:
                axes.legend(loc="upper right")
            axes.set_xlabel(f"running time, {unit}")
            axes.set_ylabel("frames/s")
            axes.set_xlim(0, float(edges[-1]))
            axes.set_ylim(bottom=0)
        return svg[0]

    def stages(self, stages: Sequence[StageFacts]) -> str:
        """Return what each stage did with its time."""
        unit, seconds = time_unit(max(s.busy_s + s.wait_input_s + s.wait_output_s for s in stages))
        parts = (
            ("busy", BLUE, [s.busy_s for s in stages]),
            ("waited for the stage before", ORANGE, [s.wait_input_s for s in stages]),
            ("waited for the stage after", GREY, [s.wait_output_s for s in stages]),
        )
        names = [stage.stage.replace("_", " ") for stage in stages]
        size = (WIDE[0], 1.2 + 0.3 * len(stages))
        with self._axes(size, "Time of each stage, summed over videos") as (axes, svg):
            _stacked(axes, names, parts, seconds)
            axes.set_xlabel(unit)
        return svg[0]

    def workers(self, workers: Sequence[dict[str, Any]]) -> str:
        """Return how busy the workers were."""
        title = "Time of each worker"
        if len(workers) > MAX_BARS:
            alive = [(w["busy_s"], w["busy_s"] + w["idle_s"]) for w in workers]
            shares = np.array([busy / whole for busy, whole in alive if whole > 0])
            with self._axes(
                WIDE, f"Share of their time that {len(workers):,} workers were busy"
            ) as (
                axes,
                svg,
            ):
                counts, edges = np.histogram(100 * shares, np.linspace(0, 100, 21))
                axes.stairs(counts, edges, fill=True, color=BLUE)
                axes.set_xlabel("busy, % of the time after loading")
                axes.set_ylabel("workers")
            return svg[0]
        unit, seconds = time_unit(
            max(w["busy_s"] + w["idle_s"] + (w["load_s"] or 0) for w in workers)
        )
        parts = (
            ("busy", BLUE, [w["busy_s"] for w in workers]),
            ("idle", ORANGE, [w["idle_s"] for w in workers]),
            ("loading", GREY, [w["load_s"] or 0.0 for w in workers]),
        )
        names = [f"{w['worker_id']} on {shorten(w['host'], 18)}" for w in workers]
        with self._axes((WIDE[0], 1.2 + 0.3 * len(workers)), title) as (axes, svg):
            _stacked(axes, names, parts, seconds)
            axes.set_xlabel(unit)
        return svg[0]

    def histogram(
        self,
        histogram: Histogram,
        title: str,
        unit: str,
        *,
        log10: bool = False,
        what: str = "objects",
    ) -> str:
        """Return a distribution; with `log10`, edges are exponents."""
        from matplotlib.ticker import FuncFormatter, NullFormatter

        counts, edges = _trimmed(histogram) if log10 else (histogram.counts, histogram.edges)
        with self._axes(HALF, title) as (axes, svg):
            axes.stairs(counts, 10**edges if log10 else edges, fill=True, color=BLUE)
            if log10:
                axes.set_xscale("log")
                axes.xaxis.set_major_formatter(FuncFormatter(_plain_number))
                axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel(unit)
            axes.set_ylabel(what)
        return svg[0]

    def bins(self, histogram: Histogram, title: str, unit: str, what: str) -> str:
        """Return a distribution over whole numbers, a bar of equal width for each bin."""
        edges = histogram.edges.astype(int).tolist()
        last = int(np.flatnonzero(histogram.counts)[-1]) + 1 if histogram.total else 1
        names = [
            f"{low}" if high - low == 1 else f"{low}–{high - 1}"
            for low, high in itertools.pairwise(edges)
        ]
        names[-1] = f"{edges[-2]}+"
        with self._axes(HALF, title) as (axes, svg):
            axes.bar(names[:last], histogram.counts[:last], color=BLUE, width=0.8)
            axes.set_xlabel(unit)
            axes.set_ylabel(what)
            if last > 9:
                axes.tick_params("x", labelsize=7.5)
        return svg[0]

    def ranked(self, rows: Sequence[tuple[str, int]], title: str, unit: str) -> str:
        """Return counts by name, the largest on top."""
        size = (HALF[0], max(HALF[1], 1.0 + 0.24 * len(rows)))
        with self._axes(size, title) as (axes, svg):
            names = [shorten(name, 22) for name, _ in rows]
            places = range(len(rows))
            axes.barh(places, [number for _, number in rows], color=BLUE, height=0.7)
            axes.set_yticks(places, names)
            axes.invert_yaxis()
            axes.grid(visible=False, axis="y")
            axes.grid(visible=True, axis="x")
            axes.set_xlabel(unit)
            _spaced(axes.xaxis)
        return svg[0]

    @contextmanager
    def _axes(self, size: tuple[float, float], title: str) -> Iterator[tuple[Axes, list[str]]]:
        """Yield axes, and a list that holds the SVG once they are drawn."""
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        number = next(self._numbers)
        made: list[str] = []
        with rc_context({**_STYLE, "svg.hashsalt": f"plot{number}"}):
            figure = Figure(figsize=size, layout="constrained")
            FigureCanvasSVG(figure)
            axes = figure.add_subplot()
            axes.set_title(title)
            yield axes, made
            if axes.get_ylabel():
                _spaced(axes.yaxis)
            file = io.StringIO()
            figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        made.append(inline_svg(file.getvalue(), number, title))


def inline_svg(svg: str, number: int, title: str) -> str:
    """Return a plot of matplotlib as a part of a page.

    Parameters
    ----------
    svg : str
        As matplotlib wrote it, a whole document.
    number : int
        Tells its ids from those of other plots.
    title : str
        What it shows, for those who cannot see it.

    Returns
    -------
    str
        An ``svg`` element without size, references to the outside, or colours of its own.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head, rest = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None, "matplotlib writes a viewBox"
    rest = re.sub(r'\bid="([^"]*)"', rf'id="p{number}-\1"', rest)
    rest = re.sub(r"url\(#([^)]*)\)", rf"url(#p{number}-\1)", rest)
    rest = re.sub(r'xlink:href="#([^"]*)"', rf'href="#p{number}-\1"', rest)
    for colour, variable in VARIABLES.items():
        rest = rest.replace(colour, f"var({variable})")
    # The page chooses the font; matplotlib has measured with a wider one than most.
    rest = re.sub(r"font: (?:bold )?([\d.]+)px [^;\"]*", _font, rest)
    label = title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return f'<svg {box[0]} role="img" aria-label="{label}">{rest}'


def _font(match: re.Match[str]) -> str:
    weight = "; font-weight: 600" if "bold" in match[0] else ""
    return f"font-size: {match[1]}px{weight}"


def _spaced(axis: Axis) -> None:
    """Write numbers with their thousands apart, and few of them."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], min_n_ticks=2))
    axis.set_major_formatter(FuncFormatter(_plain_number))


def _plain_number(value: float, _: object) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def time_unit(seconds: float) -> tuple[str, float]:
    """Return a unit for times up to this one, and its seconds.

    Examples
    --------
    >>> time_unit(40), time_unit(3000), time_unit(90_000)
    (('seconds', 1.0), ('minutes', 60.0), ('hours', 3600.0))
    """
    if seconds < 180:
        return "seconds", 1.0
    return ("minutes", 60.0) if seconds < 3 * 3600 else ("hours", 3600.0)


def shorten(text: str, length: int) -> str:
    """Return a text with its middle left out where it is too long.

    Examples
    --------
    >>> shorten("a-very-long-name", 9)
    'a-ve…name'
    """
    if len(text) <= length:
        return text
    keep = length - 1
    return f"{text[: keep - keep // 2]}…{text[len(text) - keep // 2 :]}"


def _stacked(
    axes: Axes,
    names: Sequence[str],
    parts: Sequence[tuple[str, str, Sequence[float]]],
    seconds: float,
) -> None:
    """Draw a bar per name, made of parts."""
    places = np.arange(len(names))
    left = np.zeros(len(names))
    for label, colour, values in parts:
        lengths = np.array(values) / seconds
        axes.barh(places, lengths, left=left, color=colour, height=0.65, label=label)
        left += lengths
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    axes.figure.legend(loc="outside upper right", ncols=len(parts))


def _trimmed(histogram: Histogram) -> tuple[Any, Any]:
    """Return counts and edges of the powers of ten that hold something."""
    filled = np.flatnonzero(histogram.counts)
    if not len(filled):
        return histogram.counts, histogram.edges
    # From one power of ten to another, so that the scale has numbers at both ends.
    low = math.floor(histogram.edges[filled[0]] + 1e-9)
    high = math.ceil(histogram.edges[filled[-1] + 1] - 1e-9)
    first, last = np.searchsorted(histogram.edges, [low - 1e-9, high - 1e-9])
    return histogram.counts[first:last], histogram.edges[first : last + 1]
