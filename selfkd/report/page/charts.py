"""Charts as SVG that stands in a page: matplotlib draws them, and here they take the page's own colours, letters and width.

Each colour is drawn as a sign that is then replaced by a variable of the style sheet, so that one drawing is right in light, in dark and
in print. Beside colour, lines differ by marker and dashes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup

from selfkd.core import digest
from selfkd.report.page.text import beginning, clean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SVG, LINK = "http://www.w3.org/2000/svg", "{http://www.w3.org/1999/xlink}href"
WIDE, HIGH = 5.4, 3.1  # inches of 72 points
LINES = ("line-1", "line-2", "line-3", "line-4", "line-5", "line-6")
MARKERS, DASHES = "osD^vP", ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))
INKS = {name: f"#0{at:x}0{at:x}0{at:x}" for at, name in enumerate(("ink", "soft", "rule", "paper", *LINES), 1)}
LONGEST_NAME = 34  # characters of a line's name
STYLE: Any = {  # matplotlib names the type of each of its words
    "svg.fonttype": "none",
    "svg.hashsalt": "selfkd",
    "text.parse_math": False,
    "axes.formatter.useoffset": False,
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INKS["soft"],
    "axes.labelcolor": INKS["ink"],
    "axes.titlecolor": INKS["ink"],
    "text.color": INKS["ink"],
    "xtick.color": INKS["soft"],
    "ytick.color": INKS["soft"],
    "xtick.labelcolor": INKS["ink"],
    "ytick.labelcolor": INKS["ink"],
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": INKS["rule"],
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Curve:
    """A line of a chart: its points, where there is one their bounds, and which of them count less (a round that was rolled back)."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    bounds: Sequence[tuple[float, float] | None] = ()
    faint: Sequence[bool] = field(default_factory=list)


@contextmanager
def _drawn(wide: float, high: float) -> Iterator[tuple[Any, Axes, list[str]]]:
    """Yield (figure, axes, where the SVG goes); matplotlib is loaded when a chart is."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure, drawn, out = Figure(figsize=(wide, high), layout="constrained"), list[str](), io.StringIO()
        FigureCanvasSVG(figure)
        yield figure, figure.add_subplot(), drawn
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        drawn.append(out.getvalue())


def curves(
    lines: Sequence[Curve], title: str, says: str, y: str, percent: bool, base: float | None = None, x: str = "round"
) -> Markup:
    """Return lines over rounds, each with its band; `base` is drawn across. `says` is what a reader hears who cannot see it."""
    with _drawn(WIDE, HIGH) as (_, axes, drawn):
        for at, line in enumerate(lines):
            _curve(axes, line, at)
        if base is not None:
            axes.axhline(base, color=INKS["soft"], linestyle=(0, (2, 2)), linewidth=1.2, label="base")
        _scales(axes, lines, x, y, percent)
        if len(lines) > 1 or base is not None:
            axes.legend(loc="upper left", bbox_to_anchor=(0, -0.2), ncols=2, borderaxespad=0.0, handlelength=2.6)
    return placed(drawn[0], title, says)


def small(line: Curve, title: str, says: str, percent: bool) -> Markup:
    """Return one line in a small field, for a diagnostic."""
    with _drawn(3.2, 1.5) as (_, axes, drawn):
        _curve(axes, line, 0)
        _scales(axes, [line], "", "", percent)
    return placed(drawn[0], title, says)


def _curve(axes: Axes, line: Curve, at: int) -> None:
    colour, marker = INKS[LINES[at % len(LINES)]], MARKERS[at % len(MARKERS)] if len(line.x) <= 40 else ""
    name = beginning(str(clean(line.name)), LONGEST_NAME)
    axes.plot(line.x, line.y, color=colour, linestyle=DASHES[at % len(DASHES)], linewidth=1.8, label=name)
    faint = [at < len(line.faint) and line.faint[at] for at in range(len(line.x))]
    for hollow in (False, True):
        points = [(x, y) for x, y, one in zip(line.x, line.y, faint, strict=True) if one is hollow]
        if points and marker:
            face = INKS["paper"] if hollow else colour
            axes.plot(*zip(*points, strict=True), marker, color=colour, markerfacecolor=face, markersize=5, linestyle="none")
    known = [(x, *between) for x, between in zip(line.x, line.bounds) if between]
    if not known:
        return
    xs, lows, highs = ([one[place] for one in known] for place in range(3))
    if at == 0:
        axes.fill_between(xs, lows, highs, color=colour, alpha=0.18, linewidth=0)
    else:
        axes.vlines(xs, lows, highs, color=colour, linewidth=1.0, alpha=0.8)


def _scales(axes: Axes, lines: Sequence[Curve], x: str, y: str, percent: bool) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axes.set_xlabel(x)
    axes.set_ylabel(beginning(str(clean(y)), LONGEST_NAME))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4 if not y else 6))
    axes.margins(x=0.04)
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None, symbol=" %"))
        axes.set_ylim(*_between(axes.get_ylim(), max((value for line in lines for value in line.y), default=1.0)))
    if {value for line in lines for value in line.x} == {0}:
        axes.set_xlim(-0.5, 0.5)


def _between(limits: tuple[float, float], most: float) -> tuple[float, float]:
    """Return the limits of a share, which goes up to `most`: never a scale of less than ten points, on which noise looks like news."""
    low, high = limits
    short = max(0.0, 0.1 - (high - low)) / 2
    return max(0.0, low - short) - 0.005, (min(1.0, high + short) if most <= 1 else high + short) + 0.005


def stacked(parts: Mapping[str, Sequence[float]], rounds: Sequence[int], title: str, says: str, y: str) -> Markup:
    """Return a bar for each round, of parts one over the other: the first is what was kept."""
    with _drawn(WIDE, HIGH) as (_, axes, drawn):
        floor = [0.0] * len(rounds)
        for at, (name, values) in enumerate(parts.items()):
            hatch = ("", "//", "..", "xx", "\\\\", "--")[at % 6]
            face = INKS[LINES[at % len(LINES)]]
            axes.bar(
                rounds,
                values,
                bottom=floor,
                color=face if not at else "none",
                edgecolor=face,
                hatch=hatch,
                width=0.7,
                label=beginning(str(clean(name)), 46),
            )
            floor = [below + value for below, value in zip(floor, values, strict=True)]
        _scales(axes, [], "round", y, False)
        if len(rounds) <= 8:
            axes.set_xticks(rounds)
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.2), ncols=1, borderaxespad=0.0)
    return placed(drawn[0], title, says)


def dots(rows: Sequence[tuple[str, float, tuple[float, float] | None]], title: str, says: str, x: str, percent: bool) -> Markup:
    """Return a dot for each row with its interval, the first row at the top and its value as a line through all of them."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    with _drawn(WIDE, max(1.6, 0.9 + 0.27 * len(rows))) as (_, axes, drawn):
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        places = list(range(len(rows), 0, -1))
        for at, (place, (_, value, between)) in enumerate(zip(places, rows, strict=True)):
            colour = INKS[LINES[0 if at == 0 else 1]]
            if between:
                axes.hlines(place, *between, color=colour, linewidth=2)
            axes.plot([value], [place], "oD"[at > 0], color=colour, markersize=6)
        axes.axvline(rows[0][1], color=INKS["soft"], linestyle=(0, (2, 2)), linewidth=1)
        axes.set_yticks(places, [beginning(str(clean(name)), LONGEST_NAME) for name, _, _ in rows])
        axes.set_ylim(0.4, len(rows) + 0.6)
        axes.set_xlabel(beginning(str(clean(x)), LONGEST_NAME))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        if percent:
            axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None, symbol=" %"))
    return placed(drawn[0], title, says)


# ---- in a page ----


def placed(text: str, title: str, says: str) -> Markup:
    """Return an SVG file as an element of a page: no size or colour of its own, no name that another chart has, and in words too."""
    root = ElementTree.fromstring(text)
    own = f"chart-{digest.of(title, says, text)[:10]}"
    for parent in list(root.iter()):
        for child in [one for one in parent if one.tag == f"{{{SVG}}}metadata"]:
            parent.remove(child)
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | {name.lstrip("#") for name in re.findall(r'href="(#[^"]+)"', text)}
    for one in root.iter():
        _restyle(one, own, used)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"class": "chart", "role": "img", "aria-labelledby": f"{own}-title {own}-says", "focusable": "false"}
    for at, (tag, said) in enumerate((("title", title), ("desc", says))):
        element = ElementTree.Element(f"{{{SVG}}}{tag}", {"id": f"{own}-{'says' if at else 'title'}"})
        element.text = str(clean(said))
        root.insert(at, element)
    ElementTree.register_namespace("", SVG)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _restyle(one: ElementTree.Element, own: str, used: set[str]) -> None:
    name = one.attrib.pop("id", None)
    if name in used:
        one.attrib["id"] = f"{own}-{name}"
    if link := one.attrib.pop(LINK, None):
        one.attrib["href"] = f"#{own}-{link.lstrip('#')}"
    for attribute, value in list(one.attrib.items()):
        one.attrib[attribute] = _in_page(value, own)


def _in_page(value: str, own: str) -> str:
    value = re.sub(r"url\(#", f"url(#{own}-", value)
    value = re.sub(r"font: (?:\w+ )*([\d.]+px)[^;]*", r"font-size: \1", value)
    for name, ink in INKS.items():
        value = value.replace(ink, f"var(--{name})")
    return value
