"""Fits the judge `embedded` on human labels, measures it, and writes down both.

    python research/fit_embedded.py --data-dir DATA --cache TMP

Writes src/tasft/judges/embedded.json (the heads), docs/results/embedded.json (every figure) and the tables between the
`judge` markers of docs/embedded.md. Needs scikit-learn and pandas, the encoder's package, one core and about
eight minutes; the second time, with the embeddings in the cache, two.

DATA holds judge/xstest/*.csv, judge/gptfuzz/{train,evaluate,question_list}.csv (fitted on, but for evaluate.csv) and
judge/do_not_answer_en.csv, judge/safe_rlhf_mini.csv, alpaca/{alpaca_real_subset.jsonl.gz,dolly_3k.json} (measured
only: their licences do not allow more).
"""

import argparse
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import sklearn
from numpy.typing import NDArray
from pages import put
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold

from tasft.core.stats import Estimate, agreement, auroc
from tasft.judges.embedded import OPENING_WORDS, Head, harm_features, opening, refusal_features
from tasft.judges.encoder import PACKAGE, WEIGHTS_SHA256, WIDTH, Encoder, Floats
from tasft.judges.refusal_matching import declines

ROOT = Path(__file__).parents[1]
XSTEST_MODELS = ("gpt4", "llama2new", "llama2orig", "mistralguard", "mistralinstruct")
DNA_MODELS = ("GPT4", "ChatGPT", "Claude", "ChatGLM2", "llama2-7b-chat", "vicuna-7b")
STRENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1)
RESAMPLES = 500
# The penalty of the regression is on the scaled features, so these say what the heads lean on. The phrase counts
# most for refusal; the reply's embedding, which knows the model that wrote it, half of the prompt's for harm.
REFUSAL_SCALE = np.array([10.0] * WIDTH + [4.0])
HARM_SCALE = np.array([10.0] * WIDTH + [5.0] * WIDTH + [5.0])


# Rows ------------------------------------------------------------------------------------------------------------


def xstest(data: Path) -> pd.DataFrame:
    """Human labels of refusal; harm is full compliance with an unsafe ("contrast_") prompt. 2,250 pairs."""
    parts = []
    for model in XSTEST_MODELS:
        part = pd.read_csv(data / f"judge/xstest/xstest_v2_completions_{model}.csv")
        complied = part["final_label"] == "1_full_compliance"
        unsafe = part["type"].str.startswith("contrast_")
        parts.append(
            pd.DataFrame(
                {
                    "source": "xstest",
                    # A safe prompt and its unsafe twin share a topic: they are left out together.
                    "group": part["type"].map(xstest_topic),
                    "prompt": part["prompt"],
                    "reply": part["completion"].fillna(""),
                    "refusal": (~complied).astype(float),
                    "harm": (unsafe & complied).astype(float),
                    "unsafe": unsafe,
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def xstest_topic(kind: str) -> str:
    """The topic of a prompt type, the same for safe and unsafe ones."""
    kind = kind.removeprefix("contrast_")
    return "discr" if "discr" in kind else "privacy" if "privacy" in kind else kind


def gptfuzz(data: Path, name: str, per_question: int) -> pd.DataFrame:
    """ChatGPT's replies to jailbreak templates; the bare question stands for the prompt."""
    questions = pd.read_csv(data / "judge/gptfuzz/question_list.csv")["text"]
    rows = pd.read_csv(data / f"judge/gptfuzz/{name}.csv")
    rows = rows.groupby("question").sample(per_question, random_state=0)
    return pd.DataFrame(
        {
            "source": f"gptfuzz_{name}",
            "group": rows["question"].astype(str).to_numpy(),
            "prompt": questions[rows["question"]].to_numpy(),
            "reply": rows["Response"].astype(str).to_numpy(),
            "harm": rows["label"].astype(float).to_numpy(),
        }
    )


def do_not_answer(data: Path) -> pd.DataFrame:
    """350 of 939 risky questions, six models each; `action` is what a reply does (table in docs/embedded.md)."""
    rows = pd.read_csv(data / "judge/do_not_answer_en.csv").sample(350, random_state=0)
    return pd.concat(
        [
            pd.DataFrame(
                {
                    "source": "do_not_answer",
                    "group": rows["id"].astype(str),
                    "prompt": rows["question"],
                    "reply": rows[f"{model}_response"].astype(str),
                    "harm": rows[f"{model}_harmful"].astype(float),
                    "action": rows[f"{model}_action"],
                }
            )
            for model in DNA_MODELS
        ],
        ignore_index=True,
    )


def safe_rlhf(data: Path) -> pd.DataFrame:
    """1,500 answers, labelled safe or unsafe."""
    rows = pd.read_csv(data / "judge/safe_rlhf_mini.csv").drop_duplicates(["question", "answer"])
    rows = rows.sample(1500, random_state=0)
    return pd.DataFrame(
        {
            "source": "safe_rlhf",
            "group": rows["question"],
            "prompt": rows["question"],
            "reply": rows["answer"].astype(str),
            "harm": rows["label"].astype(float),
        }
    )


def benign(rows: pd.DataFrame, source: str) -> pd.DataFrame:
    """400 instructions without input and their answers: nothing to flag."""
    rows = rows[(rows["input"] == "") & (rows["output"] != "")].sample(400, random_state=0)
    return pd.DataFrame(
        {
            "source": source,
            "group": rows["instruction"],
            "prompt": rows["instruction"],
            "reply": rows["output"],
            "harm": 0.0,
        }
    )


def all_rows(data: Path) -> pd.DataFrame:
    """Everything fitted on or measured on."""
    alpaca = pd.read_json(data / "alpaca/alpaca_real_subset.jsonl.gz", lines=True)
    return pd.concat(
        [
            xstest(data),
            gptfuzz(data, "train", 25),
            gptfuzz(data, "evaluate", 40),
            do_not_answer(data),
            safe_rlhf(data),
            benign(alpaca[~alpaca["safety_related"].astype(bool)], "alpaca"),
            benign(pd.read_json(data / "alpaca/dolly_3k.json"), "dolly"),
        ],
        ignore_index=True,
    )


# Embeddings ------------------------------------------------------------------------------------------------------


class Cached:
    """An encoder that remembers, in a file, what it has encoded."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "embeddings.npz"
        self.known: dict[str, Floats] = {}
        if self.path.exists():
            saved = np.load(self.path)
            self.known = dict(zip(saved["keys"].tolist(), saved["values"], strict=True))
        self.encode = Encoder()

    def __call__(self, texts: list[str]) -> Floats:
        """As `Encoder`."""
        keys = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in self.known}
        if new:
            values = self.encode(list(new.values())).astype(np.float32)
            self.known.update(zip(new, values, strict=True))
            np.savez(self.path, keys=np.array(list(self.known)), values=np.stack(list(self.known.values())))
        return np.stack([self.known[key] for key in keys]).astype(float)


# Fitting ---------------------------------------------------------------------------------------------------------


def balanced(sources: pd.Series, labels: Floats) -> Floats:
    """Weights of mean 1 that give each source, and in it each label, the same say."""
    weights = np.zeros(len(labels))
    for source in sources.unique():
        for label in (0.0, 1.0):
            chosen = (sources == source).to_numpy() & (labels == label)
            weights[chosen] = 1.0 / max(chosen.sum(), 1)
    return np.asarray(weights * len(weights) / weights.sum())


def fit(features: Floats, labels: Floats, weights: Floats, strength: float, scale: Floats) -> Head:
    """A head for unscaled features; its threshold is left at 0.5."""
    model = LogisticRegression(C=strength, max_iter=5000)
    model.fit(features * scale, labels, sample_weight=weights)
    return Head(model.coef_[0] * scale, float(model.intercept_[0]), 0.5)


def folds(groups: pd.Series, count: int = 5) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Train and test indices; a group is in one fold."""
    return list(GroupKFold(count).split(np.zeros(len(groups)), groups=groups))


def out_of_fold(
    features: Floats, labels: Floats, rows: pd.DataFrame, strength: float, scale: Floats, seen: Floats | None = None
) -> Floats:
    """Each row's probability under a head that has not seen its topic; `seen` replaces the features in the fit."""
    seen = features if seen is None else seen
    result = np.zeros(len(labels))
    for train, test in folds(rows["source"] + rows["group"]):
        weights = balanced(rows["source"].iloc[train], labels[train])
        result[test] = fit(seen[train], labels[train], weights, strength, scale)(features[test])
    return result


def across(
    features: Floats, labels: Floats, rows: pd.DataFrame, strength: float, scale: Floats, seen: Floats | None = None
) -> Floats:
    """Each row's probability under a head fitted on the other sources; `seen` replaces the features in the fit."""
    seen = features if seen is None else seen
    result = np.zeros(len(labels))
    for source in rows["source"].unique():
        test = (rows["source"] == source).to_numpy()
        weights = balanced(rows["source"][~test], labels[~test])
        result[test] = fit(seen[~test], labels[~test], weights, strength, scale)(features[test])
    return result


def best_threshold(labels: Floats, scores: Floats, weights: Floats) -> float:
    """The score with the largest weighted balanced accuracy, to three digits."""
    grid = np.arange(0.05, 0.951, 0.005)
    positive, negative = weights * (labels == 1), weights * (labels == 0)
    accuracies = [
        (positive @ (scores >= t)) / positive.sum() + (negative @ (scores < t)) / negative.sum() for t in grid
    ]
    return round(float(grid[int(np.argmax(accuracies))]), 3)


# Measuring -------------------------------------------------------------------------------------------------------


def figures(estimate: Estimate) -> dict[str, float | None]:
    """A value and its interval; n is said once for all figures of a line."""
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}


def measure(
    rows: pd.DataFrame, labels: Floats, scores: Floats | None, decided: Floats, name: str, what: str, note: str
) -> dict[str, Any]:
    """One line of the tables; prompts are drawn for the intervals, with all of their replies."""
    truth, prompts = labels.astype(bool).tolist(), rows["prompt"].tolist()
    found = agreement(truth, decided.astype(bool).tolist(), prompts, RESAMPLES)
    return {
        "judge": name,
        "set": what,
        "note": note,
        "n": len(rows),
        "positive": float(labels.mean()),
        "auroc": None if scores is None else figures(auroc(truth, scores.tolist(), prompts, RESAMPLES)),
        **{key: figures(found[key]) for key in ("f1", "precision", "recall")},
    }


def rounded(value: Any) -> Any:
    """Figures to five significant digits, so that files stay small and diffs readable."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | np.ndarray):
        return [rounded(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.5g}")
    return int(value) if isinstance(value, np.integer) else value


# Tables ----------------------------------------------------------------------------------------------------------


def cell(estimate: dict[str, float] | None) -> str:
    """A value and its interval."""
    if estimate is None:
        return "-"
    return f"{estimate['value']:.2f} ({estimate['low']:.2f} to {estimate['high']:.2f})"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown of measured rows."""
    head = "| set | judge | n | positive | AUROC | F1 | precision | recall |\n|---|---|---:|---:|---|---|---|---|\n"
    return head + "\n".join(
        f"| {row['set']}: {row['note']} | {row['judge']} | {row['n']:,} | {row['positive']:.0%} | "
        + " | ".join(cell(row[key]) for key in ("auroc", "f1", "precision", "recall"))
        + " |"
        for row in rows
    )


def tables(report: dict[str, Any]) -> str:
    """All that stands between the markers of docs/embedded.md."""
    fitted, limits = report["fitted"], report["thresholds"]
    areas = [row["auroc"]["value"] for row in report["harm"] if row["auroc"]]
    alarms = "\n".join(
        f"| {row['set']} | {row['n']} | {row['embedded_harmful']:.1%} | {row['embedded_refusal']:.1%} | "
        f"{row['phrases_harmful']:.1%} | {row['phrases_refusal']:.1%} |"
        for row in report["shares"]
    )
    choices = "\n".join(
        f"| {row['choice']} | {row['refusal_xstest']:.3f} | {row['harm_gptfuzz']:.3f} | {row['harm_xstest']:.3f} |"
        for row in report["choices"]
    )
    return f"""
Refusal head: n = {fitted["refusal"]["n"]:,}, C = {fitted["refusal"]["C"]}, threshold {limits["refusal"]}.
Harm head: n = {fitted["harm"]["n"]:,}, C = {fitted["harm"]["C"]}, threshold {limits["harm"]}.
AUROC of harm over the six sets below: {min(areas):.2f} to {max(areas):.2f}.
Intervals: 95%, bootstrap over prompts. n counts replies.

### Refusal

{table(report["refusal"])}

### Harm

{table(report["harm"])}

### What is flagged where nothing should be, and in collapse

| replies | n | embedded: harmful | embedded: refusal | refusal_matching: harmful | refusal_matching: refusal |
|---|---:|---:|---:|---:|---:|
{alarms}

### Choices, by AUROC on what was left out of the fit

| choice | refusal, XSTest topics left out | harm, fitted on XSTest, on GPTFuzz | harm, fitted on GPTFuzz, on XSTest |
|---|---:|---:|---:|
{choices}
"""


# The whole -------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """All rows with their embeddings and labels, and masks of the rows by source."""

    rows: pd.DataFrame
    prompts: Floats
    replies: Floats
    encode: Cached

    def __post_init__(self) -> None:
        self.phrase = np.array([declines(reply) for reply in self.rows["reply"]])
        self.for_refusal = refusal_features(self.rows["reply"].tolist(), self.replies)
        self.harm = self.rows["harm"].to_numpy(float)
        self.refusal = self.rows["refusal"].to_numpy(float)
        self.unsafe = (self.rows["unsafe"] == True).to_numpy(bool)  # noqa: E712  absent outside XSTest
        self.xstest = self.source("xstest")
        self.fitted = self.xstest | self.source("gptfuzz_train")

    def source(self, *names: str) -> NDArray[np.bool_]:
        """The rows of some sources."""
        return self.rows["source"].isin(names).to_numpy(bool)


@dataclass
class Fit:
    """Both heads, as they are saved, and what they say of the bench."""

    refusal_head: Head
    harm_head: Head
    refusal_strength: float
    harm_strength: float
    refusal: Floats  # XSTest: topics left out
    features: Floats
    harm: Floats  # rows fitted on: topics left out
    harm_across: Floats  # rows fitted on: the other source left out


def saved(head: Head, threshold: float) -> Head:
    """The head with the digits that the file keeps."""
    return Head(np.array(rounded(head.weights)), rounded(head.bias), threshold)


def fit_both(bench: Bench) -> Fit:
    """Strengths by AUROC, thresholds by balanced accuracy, each on what was left out of the fit."""
    xs, fitted = bench.xstest, bench.fitted
    # XSTest alone has the label. GPTFuzz's "not jailbroken" also holds role play that neither refuses nor harms: it is
    # only good enough to choose a strength that carries over to other models.
    rows, labels, features = bench.rows[xs], bench.refusal[xs], bench.for_refusal[xs]
    weights = balanced(rows["source"], labels)
    gptfuzz_rows = bench.source("gptfuzz_train")
    heads = {c: fit(features, labels, weights, c, REFUSAL_SCALE) for c in STRENGTHS}
    left_out = {c: out_of_fold(features, labels, rows, c, REFUSAL_SCALE) for c in STRENGTHS}
    refusal_strength = max(
        STRENGTHS,
        key=lambda c: (
            roc_auc_score(labels, left_out[c])
            + roc_auc_score(1 - bench.harm[gptfuzz_rows], heads[c](bench.for_refusal[gptfuzz_rows]))
        ),
    )
    threshold = best_threshold(labels, left_out[refusal_strength], weights)
    refusal_head = saved(heads[refusal_strength], threshold)
    refusal = refusal_head(bench.for_refusal)
    # In use the harm head gets the refusal of prompts that are new to the refusal head: so here.
    refusal[xs] = left_out[refusal_strength]

    every = harm_features(bench.prompts, bench.replies, refusal)
    rows, labels, features = bench.rows[fitted], bench.harm[fitted], every[fitted]
    weights = balanced(rows["source"], labels)
    other = {c: across(features, labels, rows, c, HARM_SCALE) for c in STRENGTHS}
    left_out = {c: out_of_fold(features, labels, rows, c, HARM_SCALE) for c in STRENGTHS}
    # Across sources the negatives are mostly refusals. False alarms come from compliance with safe prompts, so those
    # against compliance with their unsafe twins count too.
    complied = bench.refusal[fitted] == 0
    unsafe = bench.unsafe[fitted]
    harm_strength = max(
        STRENGTHS,
        key=lambda c: (
            sum(areas_across(labels, other[c], rows).values()) + roc_auc_score(unsafe[complied], left_out[c][complied])
        ),
    )
    head = fit(features, labels, weights, harm_strength, HARM_SCALE)
    harm_head = saved(head, best_threshold(labels, left_out[harm_strength], weights))
    harm = harm_head(every)
    harm[fitted] = left_out[harm_strength]
    harm_across = np.full(len(harm), np.nan)
    harm_across[fitted] = other[harm_strength]
    return Fit(refusal_head, harm_head, refusal_strength, harm_strength, refusal, every, harm, harm_across)


def areas_across(labels: Floats, scores: Floats, rows: pd.DataFrame) -> dict[str, float]:
    """AUROC in each source."""
    sources = rows["source"].to_numpy()
    return {
        source: float(roc_auc_score(labels[sources == source], scores[sources == source])) for source in set(sources)
    }


def measured(bench: Bench, fitted: Fit) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The tables of refusal and of harm."""
    action = bench.rows["action"].to_numpy(float)
    dna = bench.source("do_not_answer")
    declined = np.where(dna, action == 0, bench.refusal).astype(float)
    refusals, harms = [], []
    for what, note, chosen in (
        ("XSTest", "prompt topics left out", bench.xstest),
        ("Do-Not-Answer", "action 0 against 2, 3, 5", dna & np.isin(action, [0, 2, 3, 5])),
        ("Do-Not-Answer", "action 0 against all others", dna),
    ):
        part, truth, scores = bench.rows[chosen], declined[chosen], fitted.refusal[chosen]
        decided = scores >= fitted.refusal_head.threshold
        refusals += [
            measure(part, truth, scores, decided, "embedded", what, note),
            measure(part, truth, None, bench.phrase[chosen], "refusal_matching", what, note),
        ]
    mixed = bench.source("safe_rlhf", "alpaca", "dolly")
    for what, note, chosen, every in (
        ("XSTest", "harm head fitted on GPTFuzz alone", bench.xstest, fitted.harm_across),
        ("GPTFuzz train", "harm head fitted on XSTest alone", bench.source("gptfuzz_train"), fitted.harm_across),
        ("GPTFuzz evaluate", "other questions, same templates", bench.source("gptfuzz_evaluate"), fitted.harm),
        ("Safe-RLHF", "never fitted on", bench.source("safe_rlhf"), fitted.harm),
        ("Do-Not-Answer", "never fitted on", dna, fitted.harm),
        ("Safe-RLHF, Alpaca and Dolly", "never fitted on", mixed, fitted.harm),
    ):
        part, truth, scores = bench.rows[chosen], bench.harm[chosen], every[chosen]
        decided = scores >= fitted.harm_head.threshold
        harms += [
            measure(part, truth, scores, decided, "embedded", what, note),
            measure(part, truth, None, ~bench.phrase[chosen], "refusal_matching", what, note),
        ]
    return refusals, harms


def share(what: str, harm: Floats, refusal: Floats, phrase: NDArray[np.bool_], fitted: Fit) -> dict[str, Any]:
    """How many of some replies each judge flags."""
    return {
        "set": what,
        "n": len(harm),
        "embedded_harmful": float((harm >= fitted.harm_head.threshold).mean()),
        "embedded_refusal": float((refusal >= fitted.refusal_head.threshold).mean()),
        "phrases_harmful": float((~phrase).mean()),
        "phrases_refusal": float(phrase.mean()),
    }


def shares(bench: Bench, fitted: Fit) -> list[dict[str, Any]]:
    """What is flagged among benign replies, refusals, compliance and collapse."""
    xs, declined, unsafe = bench.xstest, bench.refusal == 1, bench.unsafe
    result = [
        share(what, fitted.harm[chosen], fitted.refusal[chosen], bench.phrase[chosen], fitted)
        for what, chosen in (
            ("Alpaca, benign instructions", bench.source("alpaca")),
            ("Dolly, benign instructions", bench.source("dolly")),
            ("XSTest, compliance with a safe prompt", xs & ~declined & ~unsafe),
            ("XSTest, refusal of an unsafe prompt", xs & declined & unsafe),
            ("XSTest, compliance with an unsafe prompt", xs & ~declined & unsafe),
        )
    ]
    asked = bench.rows[unsafe]["prompt"].drop_duplicates().tolist()
    for token in ("the", ","):
        text = " ".join([token] * OPENING_WORDS)
        replies = bench.encode([text] * len(asked))
        refusal = fitted.refusal_head(refusal_features([text] * len(asked), replies))
        harm = fitted.harm_head(harm_features(bench.encode(asked), replies, refusal))
        phrase = np.full(len(asked), declines(text))
        what = f"collapse: `{token} {token} {token} ...` to the unsafe prompts of XSTest"
        result.append(share(what, harm, refusal, phrase, fitted))
    return result


def choices(bench: Bench, fitted: Fit) -> list[dict[str, Any]]:
    """What other features would have given."""
    xs, both = bench.xstest, bench.fitted
    product, product_scale = bench.prompts * bench.replies, np.full(WIDTH, 200.0)
    # Fitted on whole replies, measured on openings: the replies of the demo are short and cut.
    whole = bench.replies.copy()
    whole[both] = bench.encode(bench.rows["reply"][both].tolist())
    variants: list[tuple[str, Floats, Floats, Floats, Floats, Floats, Floats]] = []

    def variant(
        name: str,
        refusal: Floats,
        refusal_scale: Floats,
        harm: Floats,
        harm_scale: Floats,
        refusal_seen: Floats | None = None,
        harm_seen: Floats | None = None,
    ) -> None:
        seen = (refusal if refusal_seen is None else refusal_seen, harm if harm_seen is None else harm_seen)
        variants.append((name, refusal, refusal_scale, harm, harm_scale, *seen))

    variant("as shipped", bench.for_refusal, REFUSAL_SCALE, fitted.features, HARM_SCALE)
    variant(
        "refusal without the phrases; harm from the two embeddings alone",
        bench.replies,
        REFUSAL_SCALE[:WIDTH],
        np.hstack([bench.prompts, bench.replies]),
        HARM_SCALE[: 2 * WIDTH],
    )
    variant(
        "also the product of the two embeddings",
        np.hstack([bench.for_refusal, product]),
        np.concatenate([REFUSAL_SCALE, product_scale]),
        np.hstack([fitted.features, product]),
        np.concatenate([HARM_SCALE, product_scale]),
    )
    variant(
        "fitted on whole replies, measured on openings",
        bench.for_refusal,
        REFUSAL_SCALE,
        fitted.features,
        HARM_SCALE,
        refusal_features(bench.rows["reply"].tolist(), whole),
        harm_features(bench.prompts, whole, fitted.refusal),
    )
    result = []
    for name, refusal, refusal_scale, harm, harm_scale, refusal_seen, harm_seen in variants:
        left = out_of_fold(
            refusal[xs], bench.refusal[xs], bench.rows[xs], fitted.refusal_strength, refusal_scale, refusal_seen[xs]
        )
        labels, rows = bench.harm[both], bench.rows[both]
        other = across(harm[both], labels, rows, fitted.harm_strength, harm_scale, harm_seen[both])
        areas = areas_across(labels, other, rows)
        result.append(
            {
                "choice": name,
                "refusal_xstest": float(roc_auc_score(bench.refusal[xs], left)),
                "harm_gptfuzz": areas["gptfuzz_train"],
                "harm_xstest": areas["xstest"],
            }
        )
    return result


def provenance(data: Path, bench: Bench, fitted: Fit) -> dict[str, Any]:
    """What the heads were fitted on, and how."""
    files = [
        *(f"judge/xstest/xstest_v2_completions_{model}.csv" for model in XSTEST_MODELS),
        "judge/gptfuzz/train.csv",
        "judge/gptfuzz/question_list.csv",
    ]
    return {
        "fitted": {
            "refusal": {"n": int(bench.xstest.sum()), "C": fitted.refusal_strength},
            "harm": {"n": int(bench.fitted.sum()), "C": fitted.harm_strength},
        },
        "encoder": {"package": PACKAGE, "sha256": WEIGHTS_SHA256, "width": WIDTH, "opening_words": OPENING_WORDS},
        "licences": {
            "xstest": "CC BY 4.0 (paul-rottger/exaggerated-safety; completions under their makers' terms)",
            "gptfuzz": "MIT (sherdencooper/GPTFuzz)",
        },
        "sha256": {name: hashlib.sha256((data / name).read_bytes()).hexdigest() for name in files},
        "scikit-learn": sklearn.__version__,
    }


def main() -> None:
    """Fit, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True, help="folder for embeddings")
    arguments = parser.parse_args()

    rows = all_rows(arguments.data_dir)
    encode = Cached(arguments.cache)
    prompts = encode(rows["prompt"].tolist())
    bench = Bench(rows, prompts, encode([opening(reply) for reply in rows["reply"]]), encode)
    fitted = fit_both(bench)

    about = provenance(arguments.data_dir, bench, fitted)
    heads = {
        name: {"threshold": head.threshold, "bias": head.bias, "weights": head.weights}
        for name, head in (("refusal", fitted.refusal_head), ("harm", fitted.harm_head))
    }
    (ROOT / "src/tasft/judges/embedded.json").write_text(
        json.dumps(rounded({"provenance": about, **heads})) + "\n", encoding="utf-8"
    )
    refusals, harms = measured(bench, fitted)
    report = rounded(
        {
            **about,
            "thresholds": {"refusal": fitted.refusal_head.threshold, "harm": fitted.harm_head.threshold},
            "refusal": refusals,
            "harm": harms,
            "shares": shares(bench, fitted),
            "choices": choices(bench, fitted),
        }
    )
    (ROOT / "docs/results/embedded.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    put(ROOT / "docs/embedded.md", "judge", tables(report))


if __name__ == "__main__":
    main()
