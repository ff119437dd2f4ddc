"""How plots are drawn: SVG for a light and a dark page, and labels that lie over nothing.

Names in plots (topics, judges, values of fields) go through `short` or `wrapped`; matplotlib escapes them, and a
picture in a page runs nothing.
"""

import base64
import warnings
from collections.abc import Callable, Sequence
from io import BytesIO

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tasft.core.stats import Estimate
from tasft.core.text import visible
from tasft.report.blocks import Plot

WIDTH = 4.6  # inches; margins are fixed too, for an automatic layout lays out every text twice
SMALL = 8.5  # points: 11 px and more on a page that is 1280 px wide

# Okabe and Ito's palette where it has enough contrast. A plot is drawn in the light colours, and the dark ones put in
# their place: no two may be equal.
COLOURS = {
    "ink": ("#3d4752", "#c3cad3"),
    "grid": ("#dde2e8", "#39424d"),
    "paper": ("#fffffe", "#14191f"),
    "first": ("#d55e00", "#e69f00"),
    "second": ("#0072b2", "#56b4e9"),
    "third": ("#7a5195", "#d0a3e0"),
    "fourth": ("#00705a", "#2fbf9b"),
    "fifth": ("#7d6100", "#f0e442"),
    "harmful": ("#b3261e", "#ff8a80"),
    "declined": ("#3a6ea5", "#7fb2e6"),
    "harmless": ("#237a4b", "#7ad3a0"),
    "incoherent": ("#5f6771", "#a8b0ba"),
    "undecided": ("#8a6d00", "#ffe08a"),
}
LIGHT = {name: light for name, (light, _) in COLOURS.items()}
SERIES = tuple(LIGHT[name] for name in ("first", "second", "third", "fourth", "fifth"))
MARKERS = "so^Dv"

Label = tuple[float, float, str]


def plot(
    draw: Callable[[Axes], None], title: str, alt: str, height: float, left: float = 0.6, top: float = 0.55
) -> Plot:
    """A picture.

    Args:
        draw: Draws into axes of which title, colours and frame are seen to.
        title: What it shows and what is good; a line of it may hold about 60 characters.
        alt: All that it says, in words.
        height: In inches, margins included.
        left: Margin in inches, for what stands beside the axis.
        top: Likewise above it.
    """
    # A fixed salt and no date: the same run gives the same bytes. No pyplot: no global state.
    with (
        matplotlib.rc_context(
            # No formulas: a name may hold any character.
            {"svg.fonttype": "none", "svg.hashsalt": "tasft", "font.size": 9.5, "text.parse_math": False}
        ),
        warnings.catch_warnings(),
    ):
        # Of letters that matplotlib's own font lacks; the browser has them.
        warnings.filterwarnings("ignore", message="Glyph")
        figure = Figure(figsize=(WIDTH, height), dpi=72)
        box = (left / WIDTH, 0.5 / height, 1 - (left + 0.15) / WIDTH, 1 - (0.5 + top) / height)
        axes = figure.add_axes(box)
        draw(axes)
        figure.text(0.02, 1 - 0.04 / height, title, color=LIGHT["ink"], fontsize=9.5, va="top", fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(LIGHT["grid"])
        axes.tick_params(colors=LIGHT["ink"], labelsize=SMALL)
        axes.xaxis.label.set_color(LIGHT["ink"])
        axes.yaxis.label.set_color(LIGHT["ink"])
        axes.set_axisbelow(True)
        legend = axes.get_legend()
        for text in legend.get_texts() if legend else ():
            text.set_color(LIGHT["ink"])
        buffer = BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawn = buffer.getvalue().decode()
    dark = drawn
    for old, new in COLOURS.values():
        dark = dark.replace(old, new)
    return Plot(_data_url(drawn), _data_url(dark), alt)


def _data_url(svg: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def short(text: str, most: int = 20) -> str:
    """A name on one line, fit to be shown; a long one loses its middle, for names of a kind differ at their ends."""
    line = " ".join(visible(text).split())
    head = (most - 1) // 2
    return line if len(line) <= most else f"{line[:head]}…{line[head + 1 - most :]}"


def wrapped(text: str, width: int = 26) -> str:
    """A name in at most two lines."""
    line = " ".join(visible(text).split())
    if len(line) <= width:
        return line
    cut = line.rfind(" ", 0, width + 1)
    cut = cut if cut > 0 else width
    return f"{line[:cut]}\n{short(line[cut:], width)}"


def reach(estimate: Estimate) -> tuple[float, list[list[float]]]:
    """Value in percent and the lengths of its interval below and above, as matplotlib takes them."""
    value = estimate.value or 0.0
    low = value if estimate.low is None else estimate.low
    high = value if estimate.high is None else estimate.high
    # Rounding can put an edge a hair on the wrong side of the value.
    return 100 * value, [[100 * max(0.0, value - low)], [100 * max(0.0, high - value)]]


_PLACES = [
    (dx * far, dy * far)
    for far in (1.0, 2.0, 3.2, 4.5)
    for dx, dy in ((1, 0.6), (1, -0.6), (-1, 0.6), (-1, -0.6), (0, 1), (0, -1), (1, 0), (-1, 0), (1, 0.1), (-1, 0.1))
]


def place_labels(axes: Axes, labels: Sequence[Label], marks: Sequence[tuple[float, float]]) -> None:
    """Write labels beside their marks, over no mark and no other label where there is room; to be called last.

    Args:
        axes: With its final limits.
        labels: Place of the mark, in data, and the text.
        marks: All that is drawn and must not be covered.
    """
    pixels = [tuple(axes.transData.transform(mark)) for mark in marks]
    taken = [(x - 4.0, y - 4.0, x + 4.0, y + 4.0) for x, y in pixels]
    frame = axes.get_window_extent()
    for x, y, text in labels:
        at_x, at_y = axes.transData.transform((x, y))
        width, height = 0.58 * SMALL * len(text), 1.15 * SMALL
        best, least = _PLACES[0], float("inf")
        for number, (dx, dy) in enumerate(_PLACES):
            box = _box(at_x, at_y, dx, dy, width, height)
            over = sum(_shared(box, other) for other in taken)
            outside = _area(box) - _shared(box, (frame.x0, frame.y0, frame.x1, frame.y1 + height))
            cost = 10 * over + 20 * outside + number
            if cost < least:
                best, least = (dx, dy), cost
        box = _box(at_x, at_y, *best, width, height)
        taken.append(box)
        axes.annotate(
            text,
            (x, y),
            (box[0] - at_x, box[1] - at_y + 1.5),
            textcoords="offset points",
            color=LIGHT["ink"],
            fontsize=SMALL,
            annotation_clip=False,
        )


Box = tuple[float, float, float, float]


def _box(x: float, y: float, dx: float, dy: float, width: float, height: float) -> Box:
    left = x + 6 * dx if dx > 0 else x + 6 * dx - width if dx < 0 else x - width / 2
    bottom = y + 6 * dy if dy > 0 else y + 6 * dy - height if dy < 0 else y - height / 2
    return left, bottom, left + width, bottom + height


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _shared(one: Box, other: Box) -> float:
    return max(0.0, min(one[2], other[2]) - max(one[0], other[0])) * max(
        0.0, min(one[3], other[3]) - max(one[1], other[1])
    )
