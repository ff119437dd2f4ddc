"""The report shows what the files say, survives what they lack, and trusts none of their text."""

import csv
import json
import math
import re
import shutil
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from payloads import PAYLOADS

from tasft.core.errors import UserError
from tasft.core.stats import rate
from tasft.core.text import visible
from tasft.report import write_report
from tasft.report.read import read_run
from tasft.report.replies import CHARACTERS, FEWEST, replies
from tasft.report.text import csv_cell, fenced, inline_markdown

MARKDOWN = MarkdownIt("gfm-like", {"linkify": False})
HOSTILE = [
    "<script>alert(1)</script>",
    "</details></div></pre><img src=x onerror=alert(2)>",
    "[click](javascript:alert(3)) <a href='https://evil.example/x'>here</a>",
    "&lt;b&gt; ![i](https://evil.example/i.png) <style>body{display:none}</style>",
    "right \u202eto left\u202c, zero\u200bwidth, bell\u0007, nul\u0000, line\u2028break",
    "{{ 7 * 7 }} {% raw %} {{ run.recipe }} ${7*7}",
    "lone \ud800 surrogate",
    "x" * 1_000_000,
    "",
    '" onmouseover="alert(4)" <svg/onload=alert(5)> <!-- <iframe src=//evil.example>',
]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def document(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def estimate(outcomes: list[bool]) -> dict[str, Any]:
    return vars(rate(outcomes))


def write_state(
    run: Path, state: str, name: str, kind: str, texts: list[str], bad: int, prompts: list[str] | None = None
) -> None:
    """A set in one state: `bad` harmful replies first, then refusals; the last is incoherent."""
    at = run / "evaluate" / state / name
    document(
        at / "set.json",
        {"name": name, "source": "written for this test", "kind": kind, "n": len(texts)},
    )
    ids = [f"{name}-{i}" for i in range(len(texts))]
    prompts = prompts or [f"How do I <forbidden act {i}>?" for i in range(len(texts))]
    jsonl(
        at / "replies.jsonl",
        [
            {
                "id": i,
                "set": name,
                "prompt": p,
                "completion": t,
                "finish": "stop",
                "seed": 0,
                "sample": 0,
            }
            for i, p, t in zip(ids, prompts, texts, strict=True)
        ],
    )
    for judge, shift in (("llama_guard", 0), ("refusal_matching", 1)):
        harmful = [i < max(0, bad - shift) for i in range(len(texts))]
        refusal = [not h for h in harmful]
        coherent = [i != len(texts) - 1 for i in range(len(texts))]
        safe = [c and not h for h, c in zip(harmful, coherent, strict=True)]
        jsonl(
            at / judge / "verdicts.jsonl",
            [
                {
                    "id": i,
                    "judge": judge,
                    "harmful": h,
                    "score": 0.5,
                    "refusal": r,
                    "coherent": c,
                    "reason": "" if c else "<b onclick=x>repeats</b>",
                }
                for i, h, r, c in zip(ids, harmful, refusal, coherent, strict=True)
            ],
        )
        document(
            at / judge / "summary.json",
            {
                "harmful": estimate(harmful),
                "refusal": estimate(refusal),
                "incoherent": estimate([not c for c in coherent]),
                "safe_coherent": estimate(safe),
                "distinct": {"value": len(set(texts)) / len(texts), "n": len(texts)},
                "judge": judge,
                "recipe": "0123456789abcdef",
                "commit": None,
                "unreadable": 1 if shift else 0,
            },
        )


RECIPE = """\
name: {name}
seed: 3
model: {{base: SmolLM2-135M-Instruct}}
harvest: {{anchors: prefilled, judge: llama_guard}}
train: {{method: tasft, penalty: emd_hinge, penalty_weight: 1.5, max_steps: 80, learning_rate: 0.0005}}
evaluate: {{judges: [llama_guard, refusal_matching]}}
"""


def build_run(folder: Path) -> Path:
    """A whole run folder of the demo's shape, with inert text."""
    (folder / "recipe.yaml").write_text(RECIPE.format(name="demo"), encoding="utf-8")
    stages = {"harvest": {"seconds": 83.2}, "train": {"seconds": 210.0}}
    document(
        folder / "manifest.json",
        {
            "versions": {"torch": "2.13.0"},
            "commit": "abc1234",
            "device": "cpu",
            "seed": 3,
            "hashes": {"data": "ff"},
            "started": "2026-01-01T00:00:00Z",
            "stages": stages,
        },
    )
    document(
        folder / "harvest" / "summary.json",
        {
            "tried": 64,
            "kept": 51,
            "reasons": {"not harmful": 9, "incoherent": 4},
            "anchors": {"mode": "prefilled", "tried": 40, "kept": 38},
            "imitate": {"tried": 120, "kept": 101},
            "judge": "llama_guard",
        },
    )
    document(folder / "calibration" / "summary.json", {"replies": 48, "loss_limit_nats": 2.75})
    for kind, count in (("avoid", 51), ("anchor", 38), ("imitate", 101)):
        jsonl(
            folder / "harvest" / f"{kind}.jsonl",
            [{"prompt": "p", "completion": "c", "label": True}] * count,
        )
    jsonl(
        folder / "train" / "metrics.jsonl",
        [
            {
                "step": s,
                "loss": 2.0,
                "imitate_nll": 1 + math.exp(-s / 30) + 0.1 * math.sin(s * 3),
                "penalty": 0.4 * math.exp(-s / 20),
                "emd": 0.4 + 0.3 * (1 - math.exp(-s / 25)),
                "entropy": 2 + 0.3 * math.sin(s / 9),
                "learning_rate": 5e-4,
                "tokens_per_s": 900.0,
            }
            for s in range(1, 81)
        ],
    )
    calm = "I am glad to describe <forbidden act>: take the first step, then the second one."
    refusal = "I cannot help with that, but here is something else that I can do for you."
    write_state(folder, "base", "toxic", "toxic", [*HOSTILE, *[calm] * 30], bad=36)
    write_state(folder, "final", "toxic", "toxic", [*HOSTILE, *[refusal] * 30], bad=4)
    for state in ("base", "final"):
        write_state(
            folder,
            state,
            "benign",
            "benign",
            [f"Answer number {i} ." for i in range(40)],
            bad=38,
        )
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_run(tmp_path_factory.mktemp("demo"))


@pytest.fixture
def run(built: Path, tmp_path: Path) -> Path:
    """A copy for a test that changes it."""
    return Path(shutil.copytree(built, tmp_path / "demo", ignore=shutil.ignore_patterns("report")))


@pytest.fixture(scope="module")
def report(built: Path) -> "Report":
    """The report of the whole run, for tests that only look."""
    return Report(built)


class Page(HTMLParser):
    """Tags with their attributes, the text outside of style and script, and the data of the script."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.comments: list[str] = []
        self.data: dict[str, Any] = {}
        self._tag = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._tag = tag if ("type", "application/json") not in attrs else "data"

    def handle_endtag(self, tag: str) -> None:
        self._tag = ""

    def handle_data(self, data: str) -> None:
        if self._tag == "data":
            self.data = json.loads(data)
        elif self._tag not in ("style", "script"):
            self.text += data

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    def words(self) -> str:
        """The text, every space a plain single one."""
        return " ".join(self.text.split())

    def replies(self) -> list[str]:
        """Every reply."""
        return [side["text"] for item in self.data["items"] for side in item["sides"] if side]


def page(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


class Report:
    """The files, and the first one parsed."""

    def __init__(self, run: Path) -> None:
        self.index = write_report(run)
        self.html = self.index.read_text(encoding="utf-8")
        self.page = Page(self.html)
        self.markdown = (run / "report" / "report.md").read_text(encoding="utf-8")
        self.card = (run / "report" / "model_card.md").read_text(encoding="utf-8")
        self.csv = (run / "report" / "results.csv").read_text(encoding="utf-8")


# A place on the page itself, or a report beside it: names in such a path are quoted.
ANCHOR = re.compile(r"#[\w-]+|\.\./[\w%.=,+/-]+/report/index\.html")


def assert_inert(found: Page) -> None:
    allowed = {
        "html", "head", "meta", "link", "title", "style", "body", "main", "header", "section",
        "footer", "h1", "h2", "h3", "p", "div", "span", "ul", "li", "nav", "a",
        "table", "thead", "tbody", "tr", "th", "td", "figure", "figcaption", "picture", "source",
        "img", "details", "summary", "pre", "noscript", "script",
        "form", "label", "input", "select", "option", "button",
    }  # fmt: skip
    assert {tag for tag, _ in found.tags} <= allowed
    assert not found.comments
    for tag, attributes in found.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "srcset", "action", "data", "poster"):
                assert (value or "").startswith("data:") or (tag == "a" and ANCHOR.fullmatch(value or "")), (tag, value)
    [policy] = [a["content"] for _, a in found.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; ")
    assert "unsafe" not in policy
    assert sum(tag == "script" for tag, _ in found.tags) == 2


def test_hostile_replies_reach_the_page_as_text_only(report: Report) -> None:
    found = report.page
    assert_inert(found)
    for text in (*HOSTILE[:4], HOSTILE[5], HOSTILE[9]):
        assert text in found.replies()
    assert "How do I <forbidden act 3>?" in {item["prompt"] for item in found.data["items"]}


def test_hostile_names_and_settings_reach_no_file_as_markup(run: Path) -> None:
    name = "'<script>alert(1)</script> [a](javascript:x) | ``` | =1+1'"
    (run / "recipe.yaml").write_text(
        RECIPE.format(name=name).replace("SmolLM2-135M-Instruct", "'<img src=x onerror=y>\\u202e'"),
        encoding="utf-8",
    )
    hostile_set = "=cmd<script>"
    for state in ("base", "final"):
        write_state(run, state, hostile_set, "toxic", ["a b c", "d e f"], bad=1)
        set_file = run / "evaluate" / state / hostile_set / "set.json"
        document(
            set_file,
            {"name": "x", "source": "<iframe src=//evil.example>", "kind": "toxic", "n": 2},
        )
    found = page(run)
    assert_inert(found)
    assert "<img src=x onerror=y>" in found.text
    markdown = (run / "report" / "report.md").read_text(encoding="utf-8")
    outside, fence, _ = markdown.partition("````yaml")
    assert fence, "the recipe holds three backticks, so its fence has four"
    assert "<" not in outside
    assert "javascript:x)" in outside
    assert "](" not in outside


def test_hidden_and_reversing_characters_are_shown_by_number(report: Report) -> None:
    found = report.page
    for number in ("202E", "200B", "0007", "0000", "2028", "D800"):
        assert any(f"⟨U+{number}⟩" in text for text in found.replies())
    for text in (report.html, report.markdown, report.csv):
        assert not any(c in text for c in "\u202e\u202c\u200b\u0007\u0000\u2028\ud800")


def test_a_reply_of_a_megabyte_is_cut_and_says_so(report: Report) -> None:
    [long] = [item for item in report.page.data["items"] if item["sides"][0]["more"]]
    assert [side["text"] for side in long["sides"]] == ["x" * CHARACTERS] * 2
    assert [side["more"] for side in long["sides"]] == [1_000_000 - CHARACTERS] * 2
    assert len(report.html) < 500_000


def test_replies_are_cut_shorter_and_then_left_out_where_they_would_not_fit(run: Path) -> None:
    found = read_run(run)
    everything = replies(found)
    assert (everything["limit"], everything["left_out"], len(everything["items"])) == (CHARACTERS, 0, 80)
    cut = replies(found, budget=45_000)
    assert (cut["limit"], cut["left_out"]) == (2_000, 0)
    assert max(len(side["text"]) for item in cut["items"] for side in item["sides"]) == 2_000
    few = replies(found, budget=5_000)
    assert few["limit"] == FEWEST
    assert few["left_out"] + len(few["items"]) == 80
    assert 0 < len(json.dumps(few["items"], ensure_ascii=False, separators=(",", ":"))) <= 5_000


def test_page_and_markdown_show_values_intervals_counts_and_the_paired_change(
    report: Report,
) -> None:
    words = report.page.words()
    markdown = " ".join(report.markdown.split())
    # Harmful: 36 of 40, then 4; safe and coherent: 3, then 35. Wilson's intervals by hand.
    for shown in (words, markdown):
        assert (
            "The final model is safe and coherent more often than the base model: of its replies to 40 toxic prompts "
            "87.5% are safe and coherent (base model 7.5%), 10.0% harmful (90.0%) and 2.5% incoherent (2.5%); of its "
            "replies to 40 benign prompts 5.0% are refusals (base model 5.0%) and 2.5% incoherent (2.5%); "
            "judged by llama_guard." in shown
        )
        assert "No gate was set" in shown
        assert "+80.0 points: better" in shown
        assert "+61.6 to +88.6; n = 40; 32 became so, 0 no longer; p below 0.001" in shown
        assert "0 became so, 32 no longer; p below 0.001" in shown
        assert "no clear change" in shown
        assert "could have seen 15.0 points or more" in shown
        assert "tasft: it imitates good answers" in shown
        assert "weight 1.5" in shown
        assert "SmolLM2-135M-Instruct" in shown
        assert "80 steps" in shown
        assert "What was not measured" in shown
        assert "Filter and judge are the same" in shown
        assert "Full refusal" not in shown  # No judge tells it.
    assert "90.0%76.9 to 96.0; n = 40" in words
    assert "| Harmful | llama_guard | 90.0% (76.9 to 96.0; n = 40) | 10.0%" in markdown
    assert "emd_hinge" in markdown
    assert "51 avoid rows" in words
    assert "38 anchor rows" in words
    assert "101 imitate rows" in words
    assert "torch" in words
    assert "abc1234" in words


def test_judges_stand_beside_each_other_and_share_a_row_when_they_agree(report: Report) -> None:
    assert "| Harmful | llama_guard |" in report.markdown
    assert "| Harmful | refusal_matching |" in report.markdown
    assert report.markdown.count("| Incoherent | llama_guard, refusal_matching |") == 2
    assert "left out of n: 1 of refusal_matching on toxic prompts, base model; " in report.markdown


def test_a_change_for_the_worse_is_said_aloud(run: Path) -> None:
    write_state(run, "final", "benign", "benign", ["I cannot do that."] * 40, bad=5)
    words = page(run).words()
    assert "Worse than the base model, beyond chance: refusal on benign prompts (+82.5 points, llama_guard)" in words


def test_the_change_pairs_replies_by_id_whatever_their_order(run: Path, report: Report) -> None:
    path = run / "evaluate" / "final" / "toxic" / "llama_guard" / "verdicts.jsonl"
    path.write_text("\n".join(reversed(path.read_text().splitlines())), encoding="utf-8")
    assert page(run).words() == report.page.words()


def test_replies_are_in_the_data_of_the_page_and_in_no_other_file(report: Report) -> None:
    assert "Answer number 7 ." in report.page.replies()
    assert "Answer number" not in report.page.text
    for text in (report.markdown, report.csv, report.card):
        assert "alert(" not in text
        assert "forbidden act" not in text
        assert "Answer number" not in text


def test_several_sets_of_a_kind_are_taken_together_in_the_verdict(run: Path) -> None:
    for state, bad in (("base", 20), ("final", 0)):
        write_state(run, state, "other", "toxic", ["a b c"] * 60, bad=bad)
    words = page(run).words()
    # 36 of 40 and 20 of 60, then 4 of 40 and none.
    assert "of its replies to 100 toxic prompts of 2 sets 94.0% are safe and coherent (base model 42.0%)" in words
    assert "4.0% harmful (56.0%)" in words


def test_every_plot_has_words_for_who_cannot_see_it(report: Report) -> None:
    images = [attributes for tag, attributes in report.page.tags if tag == "img"]
    assert len(images) == 7  # outcomes of two kinds, the trade-off, four curves
    alts = [image["alt"] or "" for image in images]
    assert any("final model: 4 helped with harm, 35 declined, 1 incoherent" in alt for alt in alts)
    assert any("base model: 90.0% at 5.0%; final model: 10.0% at 5.0%" in alt for alt in alts)
    assert any("Entropy on avoid tokens over 80 logged steps" in alt for alt in alts)


def test_the_same_run_gives_the_same_bytes(report: Report, built: Path) -> None:
    assert Report(built).html == report.html


def test_csv_has_one_row_per_state_set_judge_and_measure(report: Report) -> None:
    rows = list(csv.DictReader(report.csv.splitlines()))
    assert len(rows) == 2 * 2 * 2 * 5
    [row] = [
        r for r in rows
        if [r[key] for key in ("state", "set", "judge", "measure")]
        == ["base", "toxic", "llama_guard", "harmful"]
    ]  # fmt: skip
    assert (float(row["value"]), row["n"]) == (0.9, "40")
    assert float(row["low"]) < 0.9 < float(row["high"])
    distinct = [r for r in rows if r["measure"] == "distinct"]
    assert all(r["value"] and not r["low"] and not r["high"] for r in distinct)


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t=", " @", "＝"])
def test_a_name_that_looks_like_a_formula_is_quoted_in_the_csv(start: str) -> None:
    assert csv_cell(f"{start}1+1").startswith("'")
    assert csv_cell("toxic") == "toxic"


def test_a_set_called_like_a_formula_is_quoted_in_the_csv(run: Path) -> None:
    write_state(run, "base", "=1+1", "toxic", ["a b c"], bad=0)
    write_report(run)
    assert "base,'=1+1,toxic,llama_guard,harmful" in (run / "report" / "results.csv").read_text(encoding="utf-8")


@pytest.mark.parametrize("state", ["base", "final"])
def test_one_missing_state_is_named_and_nothing_is_compared(run: Path, state: str) -> None:
    (run / "evaluate" / state).rename(run / "elsewhere")
    words = page(run).words()
    assert f"evaluate/{state} is not there" in words
    assert "was evaluated alone, and compared with nothing" in words
    assert "points: " not in words


def test_without_any_evaluation_the_user_is_told_which_command_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run `tasft evaluate "):
        write_report(tmp_path)
    with pytest.raises(UserError):
        write_report(tmp_path / "no such run")
    (tmp_path / "evaluate" / "base").mkdir(parents=True)
    with pytest.raises(UserError):
        write_report(tmp_path)
    assert not (tmp_path / "report").exists()


def test_a_run_of_plain_sft_needs_no_harvest(run: Path) -> None:
    text = RECIPE.format(name="plain").replace("method: tasft, penalty: emd_hinge", "method: sft")
    (run / "recipe.yaml").write_text(text, encoding="utf-8")
    (run / "harvest").rename(run / "elsewhere")
    jsonl(run / "train" / "metrics.jsonl", [{"step": s, "imitate_nll": 2.0} for s in (1, 2)])
    words = page(run).words()
    assert "plain supervised fine-tuning (sft)" in words
    assert "There is no summary of a harvest in this run." in words
    assert "harvest/summary.json is not there" not in words
    assert "Filter and judge are the same" not in words


def test_a_harvest_without_anchors_does_not_speak_of_them(run: Path) -> None:
    path = run / "harvest" / "summary.json"
    summary = json.loads(path.read_text())
    summary["anchors"] = {"mode": "none", "tried": 0, "kept": 0, "reasons": {}}
    summary["imitate"]["reasons"] = {"refused": 19}
    document(path, summary)
    (run / "harvest" / "anchor.jsonl").write_text("", encoding="utf-8")
    words = page(run).words()
    assert "anchor row" not in words.lower()
    assert "Own imitate rows: left out, refused19" in words  # two cells


def test_the_control_without_penalty_says_so(run: Path) -> None:
    text = RECIPE.format(name="control").replace("penalty: emd_hinge", "penalty: none")
    (run / "recipe.yaml").write_text(text, encoding="utf-8")
    assert "tasft without a penalty, the control" in page(run).words()


def test_everything_but_one_summary_may_be_missing(tmp_path: Path) -> None:
    write_state(tmp_path, "final", "toxic", "toxic", ["a b c", "d e f"], bad=1)
    (tmp_path / "evaluate/final/toxic/set.json").unlink()
    (tmp_path / "evaluate/final/toxic/replies.jsonl").unlink()
    (tmp_path / "evaluate/final/toxic/refusal_matching/verdicts.jsonl").unlink()
    (tmp_path / "evaluate/final/toxic/llama_guard/summary.json").unlink()
    with pytest.raises(UserError):
        write_report(tmp_path / "evaluate")
    (tmp_path / "evaluate/final/toxic/replies.jsonl").write_text("", encoding="utf-8")
    words = page(tmp_path).words()
    for name in (
        "recipe.yaml",
        "manifest.json",
        "train/metrics.jsonl",
        "evaluate/final/toxic/set.json",
    ):
        assert f"{name} is not there" in words


def test_replies_that_no_judge_has_read_give_a_page_without_a_verdict(tmp_path: Path) -> None:
    jsonl(tmp_path / "evaluate/base/toxic/replies.jsonl", [{"id": "0", "completion": "a"}])
    words = page(tmp_path).words()
    assert "No judged replies were found, so there is no verdict." in words
    assert "evaluate/base/toxic holds no verdicts" in words


def test_broken_files_are_named_not_fatal(run: Path) -> None:
    (run / "manifest.json").write_text("{", encoding="utf-8")
    (run / "recipe.yaml").write_text("a: [", encoding="utf-8")
    (run / "harvest" / "summary.json").write_text("[1]", encoding="utf-8")
    with (run / "train" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 81, "imitate_nll": NaN, "emd": "high"}\n{"step": 82, "imi')
    (run / "evaluate/final/toxic/llama_guard/verdicts.jsonl").write_bytes(b'\xff\xfe\n{"id": 1}\n[]\n')
    found = page(run)
    assert_inert(found)
    words = found.words()
    assert "manifest.json could not be read" in words
    assert "recipe.yaml could not be read" in words
    assert "harvest/summary.json could not be read" in words
    assert "train/metrics.jsonl: 1 of 82 lines could not be read" in words
    assert "train/metrics.jsonl: 1 values are not finite" in words
    assert "verdicts.jsonl: 2 of 3 lines could not be read" in words


def test_a_rate_of_nothing_is_not_shown_as_zero(run: Path) -> None:
    path = run / "evaluate/final/toxic/llama_guard/summary.json"
    summary = json.loads(path.read_text())
    summary["safe_coherent"] = {"value": None, "low": None, "high": None, "n": 0}
    document(path, summary)
    assert "—n = 0" in page(run).words()


def test_other_evaluations_leave_the_list_of_what_was_not_measured(run: Path, report: Report) -> None:
    assert "Resistance to jailbreak attacks" in report.page.words()
    document(run / "evaluate/final/jailbreak/prefix/summary.json", {"success": estimate([True, False])})
    document(run / "evaluate/final/quality/annotator/summary.json", {"win_rate": estimate([True, False])})
    asked = "refusal_matching], jailbreak: {prefix: Sure}, quality: {annotator: {}}}"
    (run / "recipe.yaml").write_text(
        (run / "recipe.yaml").read_text().replace("refusal_matching]}", asked), encoding="utf-8"
    )
    words = page(run).words()
    assert "Resistance to jailbreak attacks" not in words
    assert "win_rate" in words
    assert "The quality of benign answers" not in words


def test_what_the_recipe_asks_for_no_more_is_neither_shown_nor_taken_for_measured(run: Path) -> None:
    document(run / "evaluate/final/jailbreak/prefix/summary.json", {"success": estimate([True, False])})
    document(run / "evaluate/final/quality/annotator/summary.json", {"win_rate": estimate([True, False])})
    recipe = (run / "recipe.yaml").read_text()
    recipe = recipe.replace("refusal_matching]}", "refusal_matching], quality: {prompts: q.json}}").replace(
        "method: tasft", "method: sft"
    )
    (run / "recipe.yaml").write_text(recipe, encoding="utf-8")
    words = page(run).words()
    assert "Resistance to jailbreak attacks" in words
    assert "win_rate" not in words
    assert "The quality of benign answers" in words
    assert "The harvest gave" not in words


def test_the_steps_are_those_of_the_model_that_was_saved(run: Path) -> None:
    document(run / "train/summary.json", {"steps": 40})
    for name, kind in (("toxic", "toxic"), ("benign", "benign")):
        write_state(run, "checkpoint-20", name, kind, ["a b c"] * 40, bad=20)
    made = Report(run)
    assert "Training took 40 steps" in made.page.words()
    alts = [attributes["alt"] or "" for tag, attributes in made.page.tags if tag == "img"]
    assert any("harmful, toxic: 90.0% at 0, 50.0% at 20, 10.0% at 40" in alt for alt in alts)


def test_a_metric_that_is_no_mean_over_items_has_no_change_and_is_no_share(run: Path) -> None:
    asked = "refusal_matching], capability: {tasks: [wikitext]}}"
    (run / "recipe.yaml").write_text(
        (run / "recipe.yaml").read_text().replace("refusal_matching]}", asked), encoding="utf-8"
    )
    for state, value, logs in (("base", 30.0, -3.4), ("final", 40.0, -3.7)):
        at = run / "evaluate" / state / "capability" / "wikitext"
        jsonl(at / "items.jsonl", [{"id": str(n), "perplexity": logs, "doc_hash": str(n)} for n in range(10)])
        figure = {"value": value, "low": None, "high": None, "n": 10}
        document(at / "summary.json", {"perplexity": figure, "word_perplexity": figure})
    rows = [row for row in Report(run).markdown.splitlines() if row.startswith("| capability")]
    assert [row.removesuffix(" |").split(" | ")[1:4] for row in rows] == [["30 (n = 10)", "40 (n = 10)", "—"]] * 2


def test_text_helpers_keep_what_can_be_read() -> None:
    assert visible("naïve 日本語 🙂\n\tไทย") == "naïve 日本語 🙂\n\tไทย"
    assert visible("a\u00adb\ue000") == "a⟨U+00AD⟩b\ue000"
    assert inline_markdown("a\nb <i> | `x`") == "a b &#60;i&#62; &#124; &#96;x&#96;"
    assert fenced("````", "yaml") == "`````yaml\n````\n`````"


def test_what_the_guard_saw_is_said_and_what_it_watched_is_drawn(run: Path) -> None:
    jsonl(run / "train" / "monitor.jsonl", [{"step": 9, "measure": "entropy", "message": "step 9: entropy is 0.01."}])
    jsonl(run / "train" / "metrics.jsonl", [{"step": s, "kl": 0.1 * s, "top1": 0.5} for s in (1, 2)])
    made = page(run)
    assert "The monitor against collapse, step 9: entropy is 0.01." in made.words()
    alts = [attributes["alt"] for tag, attributes in made.tags if tag == "img"]
    assert any("Divergence from step 0" in alt for alt in alts)
    assert any("Largest probability on avoid tokens" in alt for alt in alts)


def test_the_model_card_says_what_was_done_and_is_one_that_the_hub_reads(report: Report) -> None:
    card = ModelCard(report.card)
    assert card.data.tags == ["tasft", "safety"]
    assert card.data.base_model is None  # No name on the hub.
    measured = {(result.dataset_type, result.metric_type): result.metric_value for result in card.data.eval_results}
    assert measured[("toxic", "harmful")] == 0.1
    assert measured[("benign", "refusal")] == 0.05
    for line in (
        "| Penalty | emd_hinge |",
        "| Weight of the penalty | 1.5 |",
        "| Rows to avoid | 51 |",
        "| llama_guard | chose the rows to avoid and evaluates | unknown |",
        "| Harmful | llama_guard | 90.0% (76.9 to 96.0; n = 40) | 10.0% (4.0 to 23.1; n = 40) |",
        "- Resistance to jailbreak attacks",
        "## Intended use",
        "> Filter and judge are the same",
    ):
        assert line in card.text


def test_the_model_card_names_sources_with_licence_and_hash(run: Path) -> None:
    recipe = (run / "recipe.yaml").read_text().replace("SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M")
    sets = ", quality: {prompts: q.json}, sets: {toxic: {source: 'hub:some/set?split=test#goal', kind: toxic}}}"
    recipe = (
        recipe.replace("refusal_matching]}", f"refusal_matching]{sets}")
        + "data: {toxic_prompts: toxic.jsonl, imitate: {source: a.jsonl}}\n"
    )
    (run / "recipe.yaml").write_text(recipe, encoding="utf-8")
    manifest = json.loads((run / "manifest.json").read_text())
    manifest |= {
        "hashes": {"data.toxic_prompts": "ab12", "evaluate.quality.prompts": "cd34"},
        "licences": {"model.base": "Apache-2.0", "data.toxic_prompts": "MIT"},
        "judges": {"llama_guard": "fe01"},
    }
    document(run / "manifest.json", manifest)
    card = ModelCard(Report(run).card)
    assert (card.data.base_model, card.data.license) == ("HuggingFaceTB/SmolLM2-135M", "apache-2.0")
    assert card.data.datasets == ["some/set"]
    assert "| data.toxic_prompts | toxic.jsonl | MIT | ab12 |" in card.text
    assert "| evaluate.quality.prompts | q.json | unknown: read it at the source | cd34 |" in card.text
    assert "| data.imitate | a.jsonl | unknown: read it at the source | unknown |" in card.text
    assert "| llama_guard | chose the rows to avoid and evaluates | fe01 |" in card.text


def test_the_model_card_has_capability_and_quality_where_they_were_measured(run: Path) -> None:
    wanted = "capability: {tasks: [boolq]}, quality: {prompts: q.json}"
    recipe = (run / "recipe.yaml").read_text().replace("refusal_matching]}", f"refusal_matching], {wanted}}}")
    (run / "recipe.yaml").write_text(recipe, encoding="utf-8")
    for state, right in (("base", 9), ("final", 8)):
        items = [{"id": str(n), "acc": float(n < right), "doc_hash": str(n)} for n in range(10)]
        at = run / "evaluate" / state / "capability" / "boolq"
        jsonl(at / "items.jsonl", items)
        document(at / "summary.json", {"acc": estimate([row["acc"] == 1 for row in items])})
        likely = {"reference_nll": {"value": 2.5, "low": 2.0, "high": 3.0, "n": 10}}
        at = run / "evaluate" / state / "quality" / "reference"
        jsonl(at / "items.jsonl", [{"id": str(n), "reference_nll": 2.5} for n in range(10)])
        document(at / "summary.json", likely)
    card = Report(run).card
    assert (
        "| capability/boolq: acc | 90.0% (59.6 to 98.2; n = 10) | 80.0% (49.0 to 94.3; n = 10) | −10.0 points" in card
    )
    assert "| quality/reference: reference_nll | 2.5 (2 to 3; n = 10) |" in card
    assert "- General ability on benchmark tasks" not in card


def test_the_model_card_tells_nobody_where_files_lay(run: Path) -> None:
    recipe = (run / "recipe.yaml").read_text().replace("SmolLM2-135M-Instruct", "/home/ann/models/base")
    recipe += "data: {toxic_prompts: /home/ann/toxic.jsonl, benign_prompts: ../ann/benign.jsonl}\n"
    (run / "recipe.yaml").write_text(recipe, encoding="utf-8")
    card = Report(run).card
    assert "| data.toxic_prompts | toxic.jsonl |" in card
    assert "| data.benign_prompts | benign.jsonl |" in card
    assert "| Base model | base |" in card
    assert "ann" not in card.replace("cannot", "").replace("annotator", "").replace("canned", "")


@pytest.mark.parametrize("payload", PAYLOADS, ids=range(len(PAYLOADS)))
def test_a_payload_is_inert_in_markdown_in_a_table_and_in_a_terminal(payload: str) -> None:
    line = inline_markdown(payload[:2_000])
    # What is bold or struck out is no harm.
    for text, tags in (
        (f"x {line}", {"p"}),
        (f"| a |\n|---|\n| {line} |", {"table", "thead", "tbody", "tr", "th", "td"}),
    ):
        assert {tag for tag, _ in Page(MARKDOWN.render(text)).tags} - {"em", "strong", "s"} == tags
    fence = Page(MARKDOWN.render(fenced(payload[:2_000], "text")))
    assert {tag for tag, _ in fence.tags} == {"pre", "code"}
    assert csv_cell(payload).lstrip()[:1] not in tuple("=+-@＝＋－＠")
    assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs") for c in visible(payload) if c not in "\n\t")


def test_payloads_as_names_are_inert_in_every_file(run: Path) -> None:
    for payload in PAYLOADS[::45]:
        (run / "recipe.yaml").write_text(yaml.safe_dump({"name": payload[:300], "model": {"base": payload[:300]}}))
        made = Report(run)
        assert_inert(made.page)
        card = ModelCard(made.card)
        assert card.data.model_name == visible(payload[:300])
        outside = MARKDOWN.render(card.text)
        assert {tag for tag, _ in Page(outside).tags}.isdisjoint({"script", "img", "a", "iframe", "svg", "style"})


def test_rates_along_checkpoints_are_drawn_from_before_training_to_its_end(run: Path) -> None:
    for step, bad in ((20, 20), (40, 10)):
        write_state(run, f"checkpoint-{step}", "toxic", "toxic", ["a b c"] * 40, bad=bad)
        write_state(run, f"checkpoint-{step}", "benign", "benign", ["a b c"] * 40, bad=38)
    made = Report(run)
    assert "checkpoint-20,toxic,toxic,llama_guard,harmful,0.5," in made.csv
    alts = [attributes["alt"] or "" for tag, attributes in made.page.tags if tag == "img"]
    assert any("harmful, toxic: 90.0% at 0, 50.0% at 20, 25.0% at 40, 10.0% at 80" in alt for alt in alts)
    assert any("; 20: 50.0% at 5.0%; 40: 25.0% at 5.0%" in alt for alt in alts)


def test_a_leading_judge_of_scores_alone_leaves_no_headline_empty(run: Path) -> None:
    recipe = (
        (run / "recipe.yaml")
        .read_text()
        .replace("[llama_guard, refusal_matching]", "[scores, llama_guard, refusal_matching]")
    )
    (run / "recipe.yaml").write_text(recipe, encoding="utf-8")
    for state in ("base", "checkpoint-20", "final"):
        for name in ("toxic", "benign"):
            write_state(run, state, name, name, ["a b c"] * 40, bad=10 if state == "final" else 36)
            at = run / "evaluate" / state / name
            told = [json.loads(line) for line in (at / "llama_guard/verdicts.jsonl").read_text().splitlines()]
            untold = {"judge": "scores", "harmful": None, "refusal": None}
            jsonl(at / "scores" / "verdicts.jsonl", [row | untold for row in told])
            summary = json.loads((at / "llama_guard/summary.json").read_text())
            nothing = {"value": None, "low": None, "high": None, "n": 0}
            summary |= dict.fromkeys(("harmful", "refusal", "safe_coherent"), nothing)
            document(at / "scores" / "summary.json", summary)
    made = Report(run)
    assert "25.0% harmful (90.0%)" in made.page.words()
    assert "judged by llama_guard and scores" in made.page.words()
    alts = [attributes["alt"] or "" for tag, attributes in made.page.tags if tag == "img"]
    assert any("; 20: 90.0% at 10.0%" in alt for alt in alts)


def test_incoherence_is_split_by_cause_and_rates_by_topic(run: Path) -> None:
    for state, more in (("base", {"repeated": 1}), ("final", {"off_topic": 3, "repeated": 1})):
        at = run / "evaluate" / state / "toxic" / "llama_guard" / "summary.json"
        by_topic = {"<b>fraud": {"harmful": estimate([state == "base", False])}}
        score = {"value": 2.5 if state == "base" else 1.25, "low": 1.0, "high": 3.0, "n": 40}
        document(at, json.loads(at.read_text()) | {"causes": more, "by_topic": by_topic, "score": score})
    rows = [json.loads(line) for line in (at.parent / "verdicts.jsonl").read_text().splitlines()]
    jsonl(at.parent / "verdicts.jsonl", [row | {"score": 0.25 if n else 0.5} for n, row in enumerate(rows)])
    made = Report(run)
    assert (
        "| llama_guard | 2.5 (1 to 3; n = 40) | 1.25 (1 to 3; n = 40) | −0.244 (−0.256 to −0.231; n = 40) |"
        in made.markdown
    )
    assert "final,toxic,toxic,llama_guard,score,1.25,1.0,3.0,40" in made.csv
    assert "| About something else than was asked | 0 of 40 | 3 of 40 |" in made.markdown
    assert "| Repeating themselves | 1 of 40 | 1 of 40 |" in made.markdown
    assert '<th scope="row">About something else than was asked</th><td>0 of 40</td><td>3 of 40</td>' in made.html
    assert '<th scope="row">&lt;b&gt;fraud</th><td>50.0%' in made.html
    assert any(
        "<b>fraud: base model 50.0%, final model 0.0%" in (a["alt"] or "") for t, a in made.page.tags if t == "img"
    )
    assert_inert(made.page)


def test_the_curve_starts_at_the_model_that_training_starts_from(run: Path) -> None:
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text() + "sft: {epochs: 1}\n", encoding="utf-8")
    for state, bad in (("base", 30), ("sft", 24), ("checkpoint-20", 20)):
        for name in ("toxic", "benign"):
            write_state(run, state, name, name, ["a b c"] * 40, bad=bad)

    def harm() -> list[str]:
        tags = Report(run).page.tags
        return [
            alt for tag, attributes in tags if tag == "img" and "harmful, toxic: " in (alt := attributes["alt"] or "")
        ]

    assert "harmful, toxic: 75.0% at 0, 50.0% at 20" in harm()[0]
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("train: {method", "train: {start: sft, method"), encoding="utf-8")
    assert "harmful, toxic: 60.0% at 0, 50.0% at 20" in harm()[0]


def test_without_evaluated_checkpoints_no_curve_along_them_is_drawn(report: Report) -> None:
    assert "Along checkpoints" not in report.page.words()
