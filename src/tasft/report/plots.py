"""Rates and training curves as SVG; text in them is ours alone, never a model's or a recipe's."""

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from io import BytesIO
from itertools import cycle

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tasft.report.facts import Along, Comparison, percent
from tasft.report.read import Row, number

CURVES = {
    "imitate_nll": "Imitate loss (nats per token)",
    "penalty": "Penalty on avoid rows",
    "emd": "Mean EMD on avoid tokens",
    "entropy": "Entropy on avoid tokens (nats)",
    "top1": "Largest probability on avoid tokens",
    "kl": "Divergence from step 0 on held-out rows (nats per token)",
    "rewards/margins": "Reward of desirable over undesirable rows (KTO)",
    "kto_kl": "Divergence from the reference as KTO estimates it (nats per reply)",
}

_WIDTH = 4.6  # inches; margins are fixed too, for an automatic layout lays out every text twice


@dataclass(frozen=True)
class Theme:
    """Colours of a plot (Okabe and Ito's palette); before and after differ in their marker too.

    A plot is drawn in `LIGHT`, and `DARK` put in its place: no two colours of a theme may be equal.
    """

    ink: str
    grid: str
    before: str
    after: str


LIGHT = Theme(ink="#3d4752", grid="#dde2e8", before="#d55e00", after="#0072b2")
DARK = Theme(ink="#c3cad3", grid="#39424d", before="#e69f00", after="#56b4e9")


@dataclass(frozen=True)
class Plot:
    """A picture for a light and a dark page as data URLs, with the words for who cannot see it."""

    light: str
    dark: str
    alt: str


def rates_plot(rows: Sequence[Comparison]) -> Plot:
    """Each measure before and after with its 95% interval; one judge, one set."""

    def draw(axes: Axes) -> None:
        for state, marker, shift in (("before", "s", -0.16), ("after", "o", 0.16)):
            for place, row in enumerate(rows):
                estimate = row.before if state == "before" else row.after
                if estimate is None or estimate.value is None:
                    continue
                # Rounding can put an edge a hair on the wrong side of the value.
                low = max(0.0, estimate.value - _or(estimate.low, estimate.value))
                high = max(0.0, _or(estimate.high, estimate.value) - estimate.value)
                axes.errorbar(
                    100 * estimate.value,
                    place + shift,
                    xerr=[[100 * low], [100 * high]],
                    fmt=marker,
                    color=getattr(LIGHT, state),
                    markersize=6,
                    capsize=3,
                    linewidth=1.6,
                    clip_on=False,
                )
            axes.plot([], [], marker, color=getattr(LIGHT, state), markersize=6, label=state)
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0, 100)
        axes.set_xlabel("% of replies", color=LIGHT.ink)
        axes.grid(axis="x", color=LIGHT.grid, linewidth=0.8)
        axes.tick_params(axis="y", length=0)
        legend = axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderaxespad=0.2)
        for text in legend.get_texts():
            text.set_color(LIGHT.ink)

    alt = "; ".join(f"{row.label}: {_spoken(row, 'before')}, {_spoken(row, 'after')}" for row in rows)
    return _both(draw, alt, height=1.0 + 0.46 * len(rows), left=1.5)


def curve_plots(metrics: Sequence[Row]) -> list[Plot]:
    """One small plot for each curve that was logged, over the training steps."""
    return [_curve(metrics, key) for key in CURVES if any(number(row.get(key)) is not None for row in metrics)]


def trade_off_plot(points: Sequence[tuple[int, float, float, bool]], across: str, up: str) -> Plot:
    """Rates of numbered runs, one against another; those on the Pareto front are filled.

    Args:
        points: Number, rate across and rate up in [0, 1], whether it is on the front.
        across: What the first rate is.
        up: What the second is.
    """
    marks: dict[tuple[float, float], list[tuple[int, bool]]] = {}
    for place, x, y, front in points:
        marks.setdefault((100 * x, 100 * y), []).append((place, front))

    def draw(axes: Axes) -> None:
        for at, runs in marks.items():
            front = any(on for _, on in runs)
            colour, fill = (LIGHT.after, "full") if front else (LIGHT.before, "none")
            axes.plot(*at, "o" if front else "s", color=colour, fillstyle=fill, zorder=3, clip_on=False)
            names = ", ".join(str(place) for place, _ in runs)
            axes.annotate(names, at, (4, 4), textcoords="offset points", color=LIGHT.ink, fontsize=8.5)
        for limit, values in ((axes.set_xlim, [x for x, _ in marks]), (axes.set_ylim, [y for _, y in marks])):
            limit(max(0.0, min(values) - 5), min(100.0, max(values) + 5))
        axes.set_xlabel(f"{across} (%)", color=LIGHT.ink)
        axes.set_title(f"{up} (%)", color=LIGHT.ink, loc="left", fontsize=10)
        axes.grid(color=LIGHT.grid, linewidth=0.8)

    alt = f"{up} over {across}: " + "; ".join(
        f"run {place}{' (Pareto front)' if front else ''}: {percent(y)} at {percent(x)}"
        for place, x, y, front in points
    )
    return _both(draw, alt, height=3.2, left=0.6)


def _curve(metrics: Sequence[Row], key: str) -> Plot:
    logged = [
        (step, value)
        for row in metrics
        if (step := number(row.get("step"))) is not None and (value := number(row.get(key))) is not None
    ]
    steps, values = [step for step, _ in logged], [value for _, value in logged]

    def draw(axes: Axes) -> None:
        axes.plot(steps, values, color=LIGHT.after, linewidth=1.6, marker="o" if len(steps) < 3 else "")
        axes.set_title(CURVES[key], color=LIGHT.ink, loc="left", fontsize=10)
        axes.set_xlabel("training step", color=LIGHT.ink)
        axes.grid(color=LIGHT.grid, linewidth=0.8)

    alt = (
        f"{CURVES[key]} over {len(steps)} logged steps: from {values[0]:.3g} to {values[-1]:.3g}, "
        f"lowest {min(values):.3g}, highest {max(values):.3g}"
    )
    return _both(draw, alt, height=2.5, left=0.6)


_ALONG = {
    "harmful": ("harmful, toxic", "before", "s"),
    "incoherent": ("incoherent, toxic", "ink", "^"),
    "refusal": ("refusal, benign", "after", "o"),
}


def along_plot(points: Along) -> Plot:
    """Rates of `facts.ALONG` over the training steps, with 95% intervals."""
    lines = {
        measure: [(step, rates[measure]) for step, rates in points if measure in rates]
        for measure in _ALONG
        if any(measure in rates for _, rates in points)
    }

    def draw(axes: Axes) -> None:
        for measure, line in lines.items():
            label, colour, marker = _ALONG[measure]
            values = [100 * _or(estimate.value, 0) for _, estimate in line]
            axes.errorbar(
                [step for step, _ in line],
                values,
                yerr=[
                    [max(0.0, v - 100 * _or(e.low, v / 100)) for v, (_, e) in zip(values, line, strict=True)],
                    [max(0.0, 100 * _or(e.high, v / 100) - v) for v, (_, e) in zip(values, line, strict=True)],
                ],
                fmt=f"{marker}-",
                color=getattr(LIGHT, colour),
                markersize=5,
                capsize=2.5,
                linewidth=1.4,
                elinewidth=0.9,
                clip_on=False,
                label=label,
            )
        axes.set_ylim(0, 100)
        axes.set_xlabel("training step", color=LIGHT.ink)
        axes.set_ylabel("% of replies", color=LIGHT.ink)
        axes.grid(color=LIGHT.grid, linewidth=0.8)
        legend = axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.14, 1),
            ncols=3,
            frameon=False,
            borderaxespad=0.2,
            columnspacing=1,
            handlelength=1.4,
            fontsize=8,
        )
        for text in legend.get_texts():
            text.set_color(LIGHT.ink)

    alt = "Over the training steps: " + "; ".join(
        f"{_ALONG[measure][0]}: " + ", ".join(f"{percent(e.value)} at {step:g}" for step, e in line)
        for measure, line in lines.items()
    )
    return _both(draw, alt, height=3.2, left=0.7)


def path_plot(runs: Mapping[str, Along], names: bool) -> Plot | None:
    """Harmful replies against refusals of benign prompts, step by step; None where not both were measured.

    Args:
        runs: Name of a run -> what `facts.along` gives.
        names: Write at the end of each path the name of its run; else at each point its step.
    """
    paths = {name: path for name, points in runs.items() if (path := _path(points))}
    if not paths:
        return None
    marks: dict[tuple[float, float], list[str]] = {}
    for name, path in paths.items():
        for step, x, y in path[-1:] if names else path:
            marks.setdefault((x, y), []).append(name if names else f"{step:g}")

    def draw(axes: Axes) -> None:
        for path, line, marker in zip(paths.values(), cycle(("-", "--", ":", "-.")), cycle("os^Dv"), strict=False):
            xs, ys = [x for _, x, _ in path], [y for _, _, y in path]
            axes.plot(xs, ys, marker, linestyle=line, color=LIGHT.after, linewidth=1, markersize=4)
        for at, texts in marks.items():
            axes.annotate(", ".join(texts), at, (5, 4), textcoords="offset points", color=LIGHT.ink, fontsize=8.5)
        axes.margins(0.12)
        axes.set_xlabel("refusal of benign prompts (%)", color=LIGHT.ink)
        axes.set_ylabel("harmful, toxic prompts (%)", color=LIGHT.ink)
        axes.grid(color=LIGHT.grid, linewidth=0.8)

    alt = "Harmful replies against refusals of benign prompts: " + "; ".join(
        f"{f'run {name}, ' if names else ''}step {step:g}: {y:.1f}% harmful, {x:.1f}% refused"
        for name, path in paths.items()
        for step, x, y in path
    )
    return _both(draw, alt, height=3.2, left=0.7)


def _path(points: Along) -> list[tuple[float, float, float]]:
    """Step, refusals and harmful replies in percent, where both are known."""
    return [
        (step, 100 * refusal, 100 * harmful)
        for step, rates in points
        if "refusal" in rates and "harmful" in rates
        if (refusal := rates["refusal"].value) is not None and (harmful := rates["harmful"].value) is not None
    ]


def _or(value: float | None, other: float) -> float:
    return other if value is None else value


def _spoken(row: Comparison, state: str) -> str:
    estimate = row.before if state == "before" else row.after
    return f"{state} {percent(estimate.value if estimate else None)}"


def _both(draw: Callable[[Axes], None], alt: str, height: float, left: float) -> Plot:
    light = _svg(draw, height, left)
    dark = light
    for old, new in zip(astuple(LIGHT), astuple(DARK), strict=True):
        dark = dark.replace(old, new)
    return Plot(_data_url(light), _data_url(dark), alt)


def _data_url(svg: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def _svg(draw: Callable[[Axes], None], height: float, left: float) -> str:
    # A fixed salt and no date: the same run gives the same bytes. No pyplot: no global state.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tasft", "font.size": 9.5}):
        figure = Figure(figsize=(_WIDTH, height))
        axes = figure.add_axes((left / _WIDTH, 0.5 / height, 1 - (left + 0.15) / _WIDTH, 1 - 0.85 / height))
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(LIGHT.grid)
        axes.tick_params(colors=LIGHT.ink)
        axes.set_axisbelow(True)
        buffer = BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue().decode()
