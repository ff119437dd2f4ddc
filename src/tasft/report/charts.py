"""The plots of reports. Each says in its title what is good; axes of rates run from 0 to 100 percent."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from tasft.core.measures import OUTCOMES, percent
from tasft.core.stats import Estimate
from tasft.report.blocks import Plot
from tasft.report.drawing import LIGHT, MARKERS, SERIES, SMALL, Label, place_labels, plot, reach, short, wrapped
from tasft.report.files import Row, number

CURVES = {
    "imitate_nll": ("Imitate loss", "lower is better", "nats per token of the rows to imitate"),
    "penalty": ("Penalty on avoid rows", "lower is better", "the term that pushes away from the rows to avoid"),
    "emd": (
        "Mean EMD on avoid tokens",
        "higher is farther away",
        "earth mover's distance between the model's distribution and the avoided token, in the units of the penalty",
    ),
    "entropy": (
        "Entropy on avoid tokens",
        "should not fall to 0",
        "nats; near 0 the model gives one token all the probability, a mark of collapse",
    ),
    "top1": ("Largest probability on avoid tokens", "should not rise to 1", "near 1 is a mark of collapse"),
    "kl": (
        "Divergence from step 0 on held-out rows",
        "lower is better",
        "KL in nats per token: how far the model has moved on rows that it does not train on",
    ),
    "rewards/margins": ("Reward margin (KTO)", "higher is better", "reward of desirable less that of undesirable rows"),
    "kto_kl": ("Divergence from the reference (KTO)", "lower is better", "nats per reply, as KTO estimates it"),
}
"""Key of `metrics.jsonl` -> title, good direction, meaning."""


def outcome_bars(kind: str, counts: Mapping[str, Mapping[str, int]]) -> Plot:
    """What the replies to one kind of prompts are, a stacked bar for each state, with counts.

    Args:
        kind: toxic or benign.
        counts: How a state is called -> which of `OUTCOMES` -> how many.
    """
    shown = [name for name in OUTCOMES if any(by_outcome.get(name) for by_outcome in counts.values())]

    def draw(axes: Axes) -> None:
        for y, by_outcome in enumerate(counts.values()):
            start, total = 0.0, sum(by_outcome.values())
            for name in shown:
                share = 100 * by_outcome.get(name, 0) / total
                axes.barh(y, share, left=start, height=0.62, color=LIGHT[name], edgecolor=LIGHT["paper"], lw=0.8)
                if share >= 6:
                    axes.text(
                        start + share / 2,
                        y,
                        f"{by_outcome[name]}",
                        ha="center",
                        va="center",
                        color=LIGHT["paper"],
                        fontsize=SMALL,
                        fontweight="bold",
                    )
                start += share
        for name in shown:
            axes.barh(0, 0, color=LIGHT[name], label=OUTCOMES[name])
        axes.set_yticks(range(len(counts)), [wrapped(title, 15) for title in counts])
        axes.set_ylim(len(counts) - 0.5, -0.5)
        axes.set_xlim(0, 100)
        axes.set_xlabel("% of replies; numbers are counts")
        axes.tick_params(axis="y", length=0)
        columns = 3
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(-1.3 / 3.15, 1.0),
            ncols=columns,
            frameon=False,
            fontsize=SMALL,
            handlelength=1,
            handleheight=1,
            columnspacing=1,
            borderaxespad=0.1,
        )

    good = "less red and grey is better" if kind == "toxic" else "more green is better"
    alt = f"Replies to {kind} prompts: " + "; ".join(
        f"{title}: " + ", ".join(f"{by_outcome.get(name, 0)} {OUTCOMES[name]}" for name in shown)
        for title, by_outcome in counts.items()
    )
    title = f"Replies to {kind} prompts: {good}"
    lines = (len(shown) + 2) // 3
    return plot(draw, title, alt, height=0.95 + 0.2 * lines + 0.36 * len(counts), left=1.3, top=0.3 + 0.2 * lines)


@dataclass(frozen=True)
class Mark:
    """A model in a trade-off: how it is labelled, over-refusal across, harm up; which series it belongs to."""

    label: str
    across: Estimate
    up: Estimate
    series: str = ""
    filled: bool = True


def trade_off(
    marks: Sequence[Mark],
    across: str,
    up: str,
    paths: Mapping[str, Sequence[Mark]] | None = None,
    intervals: bool = True,
    corners: tuple[str, str] = ("lower left: harmless and helpful", "lower right: refuses all"),
    better: str = "lower left is better",
) -> Plot:
    """One rate of models against another, each from 0 to 100 percent.

    Args:
        marks: The models; those of a series share colour and shape.
        across: What the first rate is.
        up: What the second is.
        paths: Name -> its checkpoints, joined by a line.
        intervals: Draw them.
        corners: What the lower left and the lower right corner mean.
        better: Where it is good.
    """
    series = list(dict.fromkeys(mark.series for mark in marks))
    looks = {name: (SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(series)}
    placed = [(100 * (m.across.value or 0), 100 * (m.up.value or 0)) for m in marks]

    def draw(axes: Axes) -> None:
        for path in (paths or {}).values():
            xs, ys = [100 * (m.across.value or 0) for m in path], [100 * (m.up.value or 0) for m in path]
            axes.plot(xs, ys, "-", color=LIGHT["ink"], linewidth=1, marker=".", markersize=5, zorder=2, clip_on=False)
        for mark, (x, y) in zip(marks, placed, strict=True):
            colour, shape = looks[mark.series]
            if intervals:
                (_, xerr), (_, yerr) = reach(mark.across), reach(mark.up)
                axes.errorbar(x, y, yerr, xerr, fmt="none", ecolor=colour, elinewidth=1, capsize=2, alpha=0.75)
            fill = "full" if mark.filled else "none"
            axes.plot(x, y, shape, color=colour, fillstyle=fill, markersize=7, zorder=3, clip_on=False)
        for name in series if series != [""] else []:
            colour, shape = looks[name]
            axes.plot([], [], shape, color=colour, label=short(name))
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 100)
        axes.set_xlabel(f"{across} (%)")
        axes.set_ylabel(f"{up} (%)")
        axes.grid(color=LIGHT["grid"], linewidth=0.8)
        if series != [""]:
            axes.legend(
                loc="lower left",
                bbox_to_anchor=(0, 1.06),
                ncols=2,
                fontsize=SMALL,
                frameon=False,
                handlelength=1,
                borderaxespad=0,
            )
        # Above the plot, where no mark can lie on them.
        axes.text(0, 103, corners[0], color=LIGHT["ink"], fontsize=SMALL, style="italic", clip_on=False)
        axes.text(100, 103, corners[1], color=LIGHT["ink"], fontsize=SMALL, style="italic", ha="right")
        every = placed + [
            (100 * (m.across.value or 0), 100 * (m.up.value or 0)) for p in (paths or {}).values() for m in p
        ]
        place_labels(axes, _merged([*marks, *(m for p in (paths or {}).values() for m in p if m.label)]), every)

    alt = f"{up} against {across[0].lower()}{across[1:]}: " + "; ".join(
        f"{m.label or m.series}: {percent(m.up.value)} at {percent(m.across.value)}"
        for m in (*marks, *(m for path in (paths or {}).values() for m in path))
    )
    lines = (len(series) + 1) // 2 if series != [""] else 0
    title = f"{up} against {across[0].lower()}{across[1:]}: {better}"
    return plot(draw, title, alt, height=3.8 + 0.2 * lines, left=0.6, top=0.5 + 0.2 * lines)


def _merged(marks: Sequence[Mark], near: float = 2.5) -> list[Label]:
    """Labels; marks that lie on each other have one together."""
    groups: list[tuple[float, float, list[str]]] = []
    for mark in marks:
        x, y = 100 * (mark.across.value or 0), 100 * (mark.up.value or 0)
        if not mark.label:
            continue
        for at_x, at_y, texts in groups:
            if abs(at_x - x) <= near and abs(at_y - y) <= near:
                texts.append(mark.label)
                break
        else:
            groups.append((x, y, [mark.label]))
    return [(x, y, _some(texts)) for x, y, texts in groups]


def _some(texts: Sequence[str], most: int = 4) -> str:
    more = f" +{len(texts) - most}" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def gate_chart(limits: Sequence[Row]) -> Plot | None:
    """Each limit of the gate with its figure, its interval and a line; None when nothing was measured."""
    rows = [
        limit for limit in limits if number(limit.get("value")) is not None and number(limit.get("limit")) is not None
    ]
    if not rows:
        return None

    def of(limit: Row, key: str) -> float:
        value = number(limit.get(key))
        return 100 * (value if value is not None else float(limit["value"]))

    edges = [of(limit, key) for limit in rows for key in ("value", "low", "high", "limit")]
    zoomed = min(edges) < 0 or not any(limit.get("relative") is False for limit in rows)
    low, high = (min(0.0, min(edges)) - 3, max(edges) + 3) if zoomed else (0.0, 100.0)

    def draw(axes: Axes) -> None:
        for y, limit in enumerate(rows):
            good = limit.get("met") is True
            colour = LIGHT["harmless" if good else "harmful"]
            value = of(limit, "value")
            error = [[max(0.0, value - of(limit, "low"))], [max(0.0, of(limit, "high") - value)]]
            axes.errorbar(
                value, y, xerr=error, fmt="o" if good else "X", color=colour, capsize=3, markersize=7, clip_on=False
            )
            axes.plot([of(limit, "limit")] * 2, [y - 0.35, y + 0.35], color=LIGHT["ink"], linewidth=2.2)
        axes.set_yticks(range(len(rows)), [wrapped(str(limit.get("what") or limit.get("field"))) for limit in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(low, high)
        zoom = f"; zoomed: {low:.0f} to {high:.0f}".replace("-", "−") if zoomed else ""
        axes.set_xlabel(f"% or points{zoom}")
        axes.grid(axis="x", color=LIGHT["grid"], linewidth=0.8)
        axes.tick_params(axis="y", length=0)

    alt = "Limits of the gate: " + "; ".join(
        f"{limit.get('what') or limit.get('field')}: {of(limit, 'value'):.1f}, limit {of(limit, 'limit'):.1f}, "
        f"{'kept' if limit.get('met') is True else 'not kept'}"
        for limit in rows
    )
    return plot(
        draw, "Limits of the gate: a green circle is kept", alt, height=1.0 + 0.46 * len(rows), left=1.9, top=0.35
    )


def topic_plot(title: str, by_topic: Mapping[str, Mapping[str, Estimate]], titles: Mapping[str, str]) -> Plot:
    """A rate by topic of the prompts, the states of each topic below each other, with intervals."""
    states = [state for state in titles if any(state in rates for rates in by_topic.values())]
    step = 0.7 / max(1, len(states))
    columns = 3 if max((len(titles[state]) for state in states), default=0) < 14 else 2
    lines = -(-len(states) // columns)

    def draw(axes: Axes) -> None:
        for index, state in enumerate(states):
            for y, rates in enumerate(by_topic.values()):
                if state in rates:
                    value, error = reach(rates[state])
                    at = y + (index - (len(states) - 1) / 2) * step
                    axes.errorbar(
                        value, at, xerr=error, fmt=MARKERS[index % 5], color=SERIES[index % 5], capsize=2, clip_on=False
                    )
            axes.plot([], [], MARKERS[index % 5], color=SERIES[index % 5], label=short(titles[state]))
        axes.set_yticks(range(len(by_topic)), [wrapped(topic, 24) for topic in by_topic])
        axes.set_ylim(len(by_topic) - 0.5, -0.5)
        axes.set_xlim(0, 100)
        axes.set_xlabel("% of replies")
        axes.grid(axis="x", color=LIGHT["grid"], linewidth=0.8)
        axes.tick_params(axis="y", length=0)
        _legend(axes, columns, -1.6 / 2.85)  # From the left edge of the picture.

    alt = f"{title}: " + "; ".join(
        f"{topic}: " + ", ".join(f"{titles[state]} {percent(rates[state].value)}" for state in states if state in rates)
        for topic, rates in by_topic.items()
    )
    height = 1.0 + 0.2 * lines + (0.16 + 0.16 * len(states)) * len(by_topic)
    return plot(draw, title, alt, height=height, left=1.6, top=0.35 + 0.2 * lines)


def _legend(axes: Axes, columns: int, left: float = 0.0) -> None:
    axes.legend(
        loc="lower left", bbox_to_anchor=(left, 1), ncols=columns, frameon=False, fontsize=SMALL, handlelength=1.2,
        columnspacing=1, borderaxespad=0.1,
    )  # fmt: skip


_ALONG = {
    "harmful": ("harmful, toxic", LIGHT["first"], "s"),
    "incoherent": ("incoherent, toxic", LIGHT["ink"], "^"),
    "refusal": ("refusal, benign", LIGHT["second"], "o"),
}


def along_plot(points: Sequence[tuple[float, Mapping[str, Estimate]]]) -> Plot:
    """Rates of `outcomes.ALONG` over the training steps, with 95% intervals."""
    lines = {
        measure: [(step, rates[measure]) for step, rates in points if measure in rates]
        for measure in _ALONG
        if any(measure in rates for _, rates in points)
    }
    width = max((step for step, _ in points), default=1) / 100

    def draw(axes: Axes) -> None:
        for index, (measure, line) in enumerate(lines.items()):
            label, colour, marker = _ALONG[measure]
            shown = [reach(estimate) for _, estimate in line]
            axes.errorbar(
                # Dodged, so that no interval hides another.
                [step + (index - 1) * width for step, _ in line],
                [value for value, _ in shown],
                yerr=np.array([[error[0][0] for _, error in shown], [error[1][0] for _, error in shown]]),
                fmt=f"{marker}-", color=colour, markersize=5, capsize=2.5, linewidth=1.4, elinewidth=0.9,
                clip_on=False, label=label,
            )  # fmt: skip
        axes.set_ylim(0, 100)
        axes.set_xlabel("training step")
        axes.set_ylabel("% of replies")
        axes.grid(color=LIGHT["grid"], linewidth=0.8)
        _legend(axes, 3)

    alt = "Over the training steps: " + "; ".join(
        f"{_ALONG[measure][0]}: " + ", ".join(f"{percent(e.value)} at {step:g}" for step, e in line)
        for measure, line in lines.items()
    )
    return plot(draw, "Rates along checkpoints: lower is better", alt, height=3.4, left=0.6)


def curve_plots(metrics: Sequence[Row], monitor: Sequence[Row] = ()) -> list[tuple[Plot, str]]:
    """One small plot for each curve that was logged, over the training steps, with what it means."""
    return [
        (_curve(metrics, key, monitor), f"{title}: {meaning}.")
        for key, (title, _, meaning) in CURVES.items()
        if any(number(row.get(key)) is not None for row in metrics)
    ]


def _curve(metrics: Sequence[Row], key: str, monitor: Sequence[Row]) -> Plot:
    logged = [
        (step, value)
        for row in metrics
        if (step := number(row.get("step"))) is not None and (value := number(row.get(key))) is not None
    ]
    steps, values = [step for step, _ in logged], [value for _, value in logged]
    tripped = [step for event in monitor if event.get("measure") == key and (step := number(event.get("step")))]
    title, good, _ = CURVES[key]

    def draw(axes: Axes) -> None:
        axes.plot(steps, values, color=LIGHT["second"], linewidth=1.6, marker="o" if len(steps) < 3 else "")
        for step in tripped:
            axes.axvline(step, color=LIGHT["harmful"], linestyle="--", linewidth=1)
        if tripped:
            axes.plot([], [], "--", color=LIGHT["harmful"], label="monitor")
            axes.legend(loc="best", fontsize=SMALL, frameon=False)
        axes.set_xlabel("training step")
        axes.grid(color=LIGHT["grid"], linewidth=0.8)

    alt = (
        f"{title} over {len(steps)} logged steps: from {values[0]:.3g} to {values[-1]:.3g}, "
        f"lowest {min(values):.3g}, highest {max(values):.3g}"
        + (f"; the monitor fired at step {', '.join(f'{step:g}' for step in tripped)}" if tripped else "")
    )
    return plot(draw, f"{title}: {good}", alt, height=2.5, left=0.65, top=0.35)


def heat_map(
    title: str,
    rows: tuple[str, Sequence[str]],
    columns: tuple[str, Sequence[str]],
    cells: Mapping[tuple[str, str], float],
) -> Plot:
    """Rates of a sweep over its two fields, in percent, written into the cells.

    Args:
        title: What the rate is and which way is good.
        rows: Name of the field down, and its values.
        columns: Likewise across.
        cells: Value down and value across -> rate in [0, 1]; what was not measured is absent.
    """
    grid = np.array([[100 * cells.get((down, across), np.nan) for across in columns[1]] for down in rows[1]])

    def draw(axes: Axes) -> None:
        for i, j in np.ndindex(*grid.shape):
            known = not np.isnan(grid[i, j])
            share = float(grid[i, j]) / 100 if known else 0.0
            look = (
                {"facecolor": LIGHT["second"], "alpha": 0.12 + 0.88 * share} if known else {"facecolor": LIGHT["grid"]}
            )
            axes.add_patch(Rectangle((j - 0.48, i - 0.48), 0.96, 0.96, edgecolor="none", **look))
            text = f"{grid[i, j]:.1f}" if known else "—"
            colour = LIGHT["paper"] if share > 0.55 else LIGHT["ink"]
            axes.text(j, i, text, ha="center", va="center", fontsize=SMALL, color=colour)
        axes.set_xlim(-0.5, len(columns[1]) - 0.5)
        axes.set_ylim(len(rows[1]) - 0.5, -0.5)
        axes.set_xticks(range(len(columns[1])), [wrapped(value, 14) for value in columns[1]])
        axes.set_yticks(range(len(rows[1])), [wrapped(value, 18) for value in rows[1]])
        axes.set_xlabel(f"{columns[0]}; {rows[0]} down")
        axes.tick_params(length=0)

    alt = f"{title}: " + "; ".join(
        f"{rows[0]} {down}, {columns[0]} {across}: {percent(value)}" for (down, across), value in cells.items()
    )
    return plot(draw, title, alt, height=1.1 + 0.42 * len(rows[1]), left=1.35, top=0.35)
