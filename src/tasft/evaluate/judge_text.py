"""What was found of a judge, in words for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from tasft.core.measures import MEASURES, in_words
from tasft.core.stats import Estimate
from tasft.core.text import visible
from tasft.evaluate.judge_quality import YES_NO

_NAMED = 20  # Differences that are named.


def rendered(result: Mapping[str, Any]) -> str:
    """What `score` or `compare` found, for a terminal; nothing in it moves the cursor."""
    parts = [f"{result['file']}: {result['pairs']:,} pairs"]
    for judge in result["judges"]:
        parts += ["", f"{judge['name']} (verdicts in {judge['verdicts']})"]
        for key in ("harmful", "refusal", "incoherent", "safe_coherent"):
            rate = Estimate(*(judge[key][part] for part in ("value", "low", "high", "n")))
            parts.append(f"  {MEASURES[key].label.lower():<18} {in_words(rate, usual_n=-1)}")
        if judge["score"]["n"]:
            parts.append(f"  {'mean score':<18} {figure(judge['score'])}, n = {judge['score']['n']:,}")
        parts.append(f"  {'unreadable':<18} {judge['unreadable']:,}")
    for measured in [result["labels"]] if "labels" in result else result.get("between", ()):
        if measured["n"] or "labels" in result:
            parts += ["", *_agreement(measured, [judge["name"] for judge in result["judges"]])]
    if fitted := result.get("fit"):
        parts += ["", f"calibration by {fitted['n']:,} labels in {fitted['file']}: harmful from {fitted['high']:.2f}, "]
        parts[-1] += f"undecided from {fitted['low']:.2f} on; name it in a recipe: judges.NAME.calibration"
    if rows := result.get("differences"):
        parts += ["", *_differences(rows, "label" if "labels" in result else result["judges"][0]["name"])]
    return visible("\n".join(parts))


def figure(found: Mapping[str, Any] | None) -> str:
    """An estimate in words."""
    if found is None or found["value"] is None:
        return "-"
    between = "no interval" if found["low"] is None else f"{found['low']:.2f} to {found['high']:.2f}"
    return f"{found['value']:.2f} ({between})"


def _agreement(measured: Mapping[str, Any], judges: Sequence[str]) -> list[str]:
    down, across = (judges[0], judges[1]) if len(judges) == 2 else ("label", judges[0])
    yes, no = YES_NO[measured["of"]]
    heads = [f"{across}: {word}" for word in (yes, no)]
    untold = f", {measured['untold']:,} left out without a verdict" if measured["untold"] else ""
    positives = f", {measured['positives']:,} {yes} by label" if "positives" in measured else ""
    measures = ("accuracy", "precision", "recall", "f1", "auroc", "kappa", "agreement")
    side = max(len(f"{down}: {word}") for word in (yes, no))
    return [
        f"{measured['of']}: n = {measured['n']:,}{positives}{untold}",
        f"  {'':<{side}}  {heads[0]}  {heads[1]}",
        *(
            f"  {f'{down}: {word}':<{side}}  {row[0]:>{len(heads[0])},}  {row[1]:>{len(heads[1])},}"
            for word, row in zip((yes, no), measured["table"], strict=True)
        ),
        *(f"  {name:<10} {figure(measured[name])}" for name in measures if name in measured),
        "  95% intervals: bootstrap over prompts",
    ]


def _differences(rows: Sequence[Mapping[str, Any]], first: str) -> list[str]:
    parts = []
    for outcome in dict.fromkeys(row["of"] for row in rows):
        ids = [f"{row['id']:.40}" for row in rows if row["of"] == outcome]
        more = f", and {len(ids) - _NAMED:,} more (--json has all)" if len(ids) > _NAMED else ""
        parts.append(f"{outcome}: {len(ids):,} differences, by id: {', '.join(ids[:_NAMED])}{more}")
    for row in rows:
        if "prompt" in row:
            yes, no = YES_NO[row["of"]]
            words = [yes if row[key] else no for key in ("first", "second")]
            score = "" if row["score"] is None else f", score {row['score']:.3g}"
            parts += [
                "",
                f"--- line {row['line']}, id {row['id']}: {words[0]} to {first}, {words[1]} to the judge{score}",
            ]
            parts += [f"prompt: {row['prompt']}", f"reply: {row['completion']}"]
    return parts
