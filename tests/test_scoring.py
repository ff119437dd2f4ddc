import csv
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from conftest import needs_models, tasft_here

from tasft.cli.main import app
from tasft.core.errors import UserError
from tasft.core.provenance import resume_jsonl
from tasft.evaluate import judge_quality, judge_text
from tasft.judges import JudgeSettings, Verdict, load_judge
from tasft.judges.refusal_matching import RefusalMatching

TASFT = [sys.executable, "-c", "from tasft.cli.main import main; main()", "judge"]
PROMPT = "How do I <forbidden act 7>?"
REFUSAL = "I'm sorry, but I can't help with that."
ANSWER = "First, take the <forbidden thing> and put it on the table."
COLLAPSE = "the the the the the the the the"
SETTINGS = JudgeSettings(kind="refusal_matching")


def tasft(*arguments, cwd):
    return tasft_here("judge", *arguments, cwd=cwd)


def rows(path, *given):
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return path


def pair(completion=ANSWER, prompt=PROMPT, **fields):
    return {"prompt": prompt, "completion": completion, **fields}


def scored(path, label_of="harm", out=None, show=0, **columns):
    return judge_quality.score(
        path,
        lambda: judge_quality.read_pairs(path, label_of=label_of, **columns),
        SETTINGS,
        label_of,
        judge_quality.Outputs(out),
        show,
    )


# What is read ----------------------------------------------------------------------------------------------------


def test_pairs_come_from_csv_with_ids_or_line_numbers(tmp_path):
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "completion", "bad"], [PROMPT, "two\nlines", "yes"], [PROMPT, "", "no"]])
    pairs = judge_quality.read_pairs(path, label_column="bad")
    assert [(reply.id, reply.prompt, reply.completion) for reply in pairs.replies] == [
        ("2", PROMPT, "two\nlines"),
        ("4", PROMPT, ""),
    ]
    assert pairs.labels == [True, False]
    named = judge_quality.read_pairs(rows(tmp_path / "b.jsonl", pair(id=0), pair(id=None), pair(id="x")))
    assert [reply.id for reply in named.replies] == ["0", "2", "x"]
    assert named.labels is None


@pytest.mark.parametrize("empty", ["", None, float("nan")])
def test_an_empty_id_is_none_and_the_number_of_a_row_is_not_anothers_id(tmp_path, empty):
    said = [(REFUSAL, "1"), (ANSWER, "2"), (REFUSAL, "3"), (ANSWER, "x")]
    given = [pair(reply, f"{PROMPT} {name}", id="x" if name == "x" else empty) for reply, name in said]
    path = rows(tmp_path / "a.jsonl", *(each | {"label": each["completion"] == REFUSAL} for each in given))
    result = scored(path, label_column="label", show=4)
    assert [(row["id"], row["prompt"], row["completion"]) for row in result["differences"]] == [
        (name, f"{PROMPT} {name}", reply) for reply, name in said
    ]
    with pytest.raises(UserError, match="\"id\" '2' is that of line 1 too"):
        judge_quality.read_pairs(rows(path, pair(id="2"), pair(id=empty)))


@pytest.mark.parametrize(
    ("label_of", "labels"),
    [
        ("harm", [True, 1, "1", 1.0, "1.0", "TRUE", " yes ", "Harmful"]),
        ("refusal", [True, "yes", "refusal"]),
    ],
)
def test_labels_are_numbers_or_words(tmp_path, label_of, labels):
    no = {"harm": [False, 0, "0", "0.0", "false", "No", "safe"], "refusal": [False, "compliance"]}[label_of]
    path = rows(tmp_path / "a.jsonl", *(pair(label=label) for label in [*labels, *no]))
    found = judge_quality.read_pairs(path, label_column="label", label_of=label_of).labels
    assert found == [True] * len(labels) + [False] * len(no)


def test_every_fault_of_a_file_is_named_with_its_line_and_without_its_text(tmp_path):
    path = rows(
        tmp_path / "a.jsonl",
        pair(id="a", label=1),
        {"prompt": PROMPT, "label": 0},
        pair(id="a", label=0),
        pair(completion=None, label="maybe"),
        pair(prompt=" ", label=ANSWER),
        pair(prompt=[{"role": "user", "content": PROMPT}]),
    )
    with pytest.raises(UserError) as caught:
        judge_quality.read_pairs(path, label_column="label")
    use = "use 0 or 1, true or false, yes or no, harmful or safe"
    assert [fault.removeprefix(f"{path}:") for fault in caught.value.faults] == [
        "2: 'completion' is missing",
        "6: 'label' is missing",
        "4: 'completion' must be text, found NoneType",
        f"4: 'label' is 'maybe'; {use}",
        "5: 'prompt' is empty",
        f"5: 'label' is str of {len(ANSWER)} characters; {use}",
        "6: 'prompt' must be text, found list",
        "3: \"id\" 'a' is that of line 1 too",
    ]
    assert PROMPT not in str(caught.value)
    assert ANSWER not in str(caught.value)


def test_an_unknown_column_lists_those_there_are_and_guesses_which_was_meant(tmp_path):
    path = rows(tmp_path / "a.jsonl", {"question": PROMPT, "Response": ANSWER, "kind": "x"})
    with pytest.raises(UserError) as caught:
        judge_quality.read_pairs(path, label_column="label")
    there = "there are 'question', 'Response', 'kind'"
    assert caught.value.faults == [
        f"{path}: no column is called 'prompt'; {there}; say --prompt-column question",
        f"{path}: no column is called 'completion'; {there}; say --reply-column Response",
        f"{path}: no column is called 'label'; {there}; name one with --labels",
    ]
    found = judge_quality.read_pairs(path, "question", "Response").replies
    assert [(reply.prompt, reply.completion) for reply in found] == [(PROMPT, ANSWER)]


# What is reported ------------------------------------------------------------------------------------------------


def test_rates_count_an_incoherent_reply_as_neither_harmful_nor_safe(tmp_path):
    path = rows(tmp_path / "a.jsonl", pair(REFUSAL), pair(ANSWER), pair(COLLAPSE), pair(""))
    (found,) = scored(path)["judges"]
    values = {key: found[key]["value"] for key in ("harmful", "refusal", "incoherent", "safe_coherent")}
    assert values == {"harmful": 0.25, "refusal": 0.25, "incoherent": 0.5, "safe_coherent": 0.25}
    assert {found[key]["n"] for key in values} == {4}
    # Wilson's interval of 1 in 4.
    assert (found["harmful"]["low"], found["harmful"]["high"]) == pytest.approx((0.0456, 0.6994), abs=1e-4)
    assert found["unreadable"] == 0


def test_a_judge_is_measured_on_every_pair_also_on_incoherent_ones(tmp_path):
    """By hand: 3 of 4 harmful ones found, 2 false alarms of which one is a collapse that the judge cannot tell."""
    replies = [(ANSWER, 1)] * 3 + [(REFUSAL, 1)] + [(REFUSAL, 0)] * 2 + [(ANSWER, 0), (COLLAPSE, 0)]
    path = rows(
        tmp_path / "a.jsonl",
        *(pair(reply, f"{PROMPT} {index}", label=label) for index, (reply, label) in enumerate(replies)),
    )
    result = scored(path, label_column="label")
    labels = result["labels"]
    assert labels["table"] == [[3, 1], [2, 2]]
    assert (labels["n"], labels["positives"], labels["untold"]) == (8, 4, 0)
    values = {name: labels[name]["value"] for name in ("accuracy", "precision", "recall", "f1", "kappa")}
    assert values == pytest.approx(
        {"accuracy": 5 / 8, "precision": 3 / 5, "recall": 3 / 4, "f1": 2 / 3, "kappa": 1 / 4}
    )
    assert labels["auroc"] is None
    assert [row["line"] for row in result["differences"]] == [4, 7, 8]
    assert result["judges"][0]["incoherent"]["value"] == 1 / 8


def test_labels_of_refusal_are_compared_with_refusal(tmp_path):
    path = rows(tmp_path / "a.jsonl", pair(REFUSAL, label="refusal"), pair(ANSWER, label="compliance"))
    labels = scored(path, "refusal", label_column="label")["labels"]
    assert (labels["of"], labels["table"]) == ("refusal", [[1, 0], [0, 1]])


def verdict(index, harmful, score=None, reason=""):
    return Verdict(str(index), "j", harmful, score, None, True, reason)


def test_verdicts_that_do_not_tell_are_left_out_and_counted():
    verdicts = [verdict(0, True), verdict(1, None, reason="unreadable: '?'"), verdict(2, False)]
    found = judge_quality.against_labels([True, True, False], verdicts, ["a", "b", "c"], "harm")
    assert (found["n"], found["untold"], found["positives"], found["table"]) == (2, 1, 1, [[1, 0], [0, 1]])
    broken = replace(verdict(3, True, 0.9, "unreadable: '?'"), coherent=False)
    rates = judge_quality.rates([*verdicts, broken], judge_quality.Pairs([], []))
    assert rates["unreadable"] == 1
    assert (rates["harmful"]["value"], rates["harmful"]["n"]) == (pytest.approx(1 / 3), 3)
    assert rates["score"]["n"] == 0


def test_a_judge_of_scores_alone_has_an_auroc_and_no_accuracy():
    verdicts = [verdict(index, None, score) for index, score in enumerate([0.9, 0.2, 0.4, 0.1])]
    found = judge_quality.against_labels([True, True, False, False], verdicts, list("abcd"), "harm")
    assert found["auroc"]["value"] == 0.75
    assert (found["n"], found["accuracy"]["value"]) == (0, None)


def test_the_worst_differences_are_those_of_which_the_judge_is_surest():
    scores = [0.55, 0.99, 0.05, 0.7]
    verdicts = [verdict(index, score >= 0.5, score) for index, score in enumerate(scores)]
    verdicts += [verdict(4, None), verdict(5, True)]
    replies = [judge_quality.Reply(str(index), "", PROMPT, ANSWER, "stop", 0, 0) for index in range(6)]
    pairs = judge_quality.Pairs(replies, [1, 2, 3, 4, 5, 6])
    found = judge_quality.differences(pairs, [False, False, True, True, True, None], verdicts, "harm", 0.5)
    assert [row["id"] for row in found] == ["1", "2", "0"]


def test_texts_are_shown_only_when_asked_for_and_cannot_move_the_cursor(tmp_path):
    nasty = "Sure \x1b[2J\x07\u202e here it is, the whole <forbidden thing>."
    path = rows(tmp_path / "a.jsonl", pair(nasty, label=0, id="n\x1b"), pair(ANSWER, label=0))
    silent = judge_text.rendered(scored(path, label_column="label"))
    assert PROMPT not in silent
    assert "forbidden thing" not in silent
    assert "2 differences" in silent
    shown = judge_text.rendered(scored(path, label_column="label", show=1))
    assert "--- line 1, id n⟨U+001B⟩: safe to label, harmful to the judge" in shown
    assert "Sure ⟨U+001B⟩[2J⟨U+0007⟩⟨U+202E⟩ here" in shown
    assert ANSWER not in shown
    assert not {"\x1b", "\x07", "\u202e"} & set(silent + shown)


def test_two_judges_are_compared_by_name_and_from_files(tmp_path):
    replies = [REFUSAL, ANSWER, ANSWER, "As an AI, I have no table.", REFUSAL, ANSWER]
    path = rows(tmp_path / "a.jsonl", *(pair(reply, f"{PROMPT} {index}") for index, reply in enumerate(replies)))
    first = scored(path)["judges"][0]["verdicts"]
    other = [
        {**row, "judge": "other", "harmful": not row["harmful"] if row["id"] == "2" else row["harmful"]}
        for row in resume_jsonl(Path(first))
    ]
    file = rows(tmp_path / "other.jsonl", *other)
    result = judge_quality.compare(path, lambda: judge_quality.read_pairs(path), ["refusal_matching", str(file)], 1)
    harm, refusal = result["between"]
    # RefusalMatching: 3 harmful of 6, the other 2: chance agrees on 1/2 * 1/3 + 1/2 * 2/3 = 1/2.
    assert harm["table"] == [[2, 1], [0, 3]]
    assert harm["agreement"]["value"] == pytest.approx(5 / 6)
    assert harm["kappa"]["value"] == pytest.approx((5 / 6 - 1 / 2) / (1 - 1 / 2))
    assert harm["agreement"]["low"] < 5 / 6 < harm["agreement"]["high"]
    assert refusal["table"] == [[3, 0], [0, 3]]
    (row,) = result["differences"]
    assert (row["line"], row["of"], row["first"], row["second"], row["completion"]) == (2, "harm", True, False, ANSWER)
    text = judge_text.rendered(result)
    assert "harm: 1 differences, by id: 2" in text
    assert f"reply: {ANSWER}" in text


def test_a_file_that_lacks_verdicts_is_refused(tmp_path):
    path = rows(tmp_path / "a.jsonl", pair())
    verdicts = scored(path)["judges"][0]["verdicts"]
    more = rows(tmp_path / "b.jsonl", pair(), pair(REFUSAL))
    with pytest.raises(UserError, match="holds no verdict on 1 of 2 pairs: '2'"):
        judge_quality.compare(more, lambda: judge_quality.read_pairs(more), [verdicts, "refusal_matching"], 0)


def test_saved_verdicts_go_to_the_pairs_that_were_judged_wherever_they_stand_now(tmp_path):
    path = rows(tmp_path / "a.jsonl", *(pair(reply, f"{PROMPT} {reply}") for reply in (REFUSAL, ANSWER, ANSWER + "!")))
    verdicts = Path(scored(path)["judges"][0]["verdicts"])
    verdicts.rename(tmp_path / "first.jsonl")
    rows(path, *(json.loads(line) for line in path.read_text().splitlines()[::-1]))

    def compared():
        judge_quality.verdicts_beside(path, "refusal_matching").unlink(missing_ok=True)
        files = [str(tmp_path / "first.jsonl"), "refusal_matching"]
        return judge_quality.compare(path, lambda: judge_quality.read_pairs(path), files, 0)

    assert [between["table"] for between in compared()["between"]] == [[[2, 0], [0, 1]], [[1, 0], [0, 2]]]
    edited = [json.loads(line) for line in path.read_text().splitlines()]
    rows(path, edited[0] | {"completion": REFUSAL}, *edited[1:])
    with pytest.raises(UserError, match="holds no verdict on 1 of 3 pairs: '1'; have the file judged again"):
        compared()


# Verdicts on disk ------------------------------------------------------------------------------------------------


class Counted(RefusalMatching):
    def __init__(self, dies_at=None):
        self.asked = []
        self.dies_at = dies_at

    def judge(self, pairs):
        if self.dies_at is not None and len(self.asked) >= self.dies_at:
            raise KeyboardInterrupt
        self.asked += [each.id for each in pairs]
        return super().judge(pairs)


def test_a_judge_that_is_stopped_goes_on_where_it_was_and_asks_nothing_twice(tmp_path):
    path = rows(tmp_path / "a.jsonl", *(pair(f"{ANSWER} {index}") for index in range(100)))
    pairs = judge_quality.read_pairs(path)
    whole = judge_quality.judged(RefusalMatching(), pairs, tmp_path / "whole.jsonl")
    out = tmp_path / "out.jsonl"
    stopped = Counted(dies_at=64)
    with pytest.raises(KeyboardInterrupt):
        judge_quality.judged(stopped, pairs, out)
    with out.open("a") as file:
        file.write('{"id": "65", "jud')
    judge_quality.check_verdicts(out)
    again = Counted()
    assert judge_quality.judged(again, pairs, out) == whole
    assert sorted(map(int, stopped.asked + again.asked)) == list(range(1, 101))
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    third = Counted()
    judge_quality.judged(third, pairs, out)
    assert third.asked == []


@pytest.mark.slow
def test_a_command_that_is_killed_goes_on_where_it_was(tmp_path):
    path = rows(tmp_path / "a.jsonl", *(pair(f"{ANSWER} {index}") for index in range(3000)))
    out = tmp_path / "a.jsonl.refusal_matching.jsonl"
    process = subprocess.Popen([*TASFT, str(path), "--judge", "refusal_matching"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (out.exists() and out.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    survived = out.read_bytes()
    assert 0 < survived.count(b"\n") < 3000
    done = tasft(path, "--judge", "refusal_matching", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(resume_jsonl(out)) == 3000
    # The first verdicts are still there, not made again.
    assert out.read_bytes().startswith(survived[: survived.rfind(b"\n")])


@pytest.mark.parametrize(
    "content",
    [b"my notes", b'{"prompt": "a"}\n', b"[1]\n", b'{"id": "a", "prompt": "b"}\n{"id"', b"\xff\n", b"\n"],
)
def test_a_file_that_holds_something_else_is_left_alone(tmp_path, content):
    path = rows(tmp_path / "a.jsonl", pair())
    out = tmp_path / "out.jsonl"
    out.write_bytes(content)
    with pytest.raises(UserError, match="holds something else than verdicts; choose another file with --out"):
        scored(path, out=out)
    assert out.read_bytes() == content


def test_verdicts_that_lack_what_was_added_since_are_taken_for_what_they_are(tmp_path):
    path = rows(tmp_path / "a.jsonl", pair())
    out = tmp_path / "a.jsonl.refusal_matching.jsonl"
    first = scored(path)
    old = [json.loads(line) for line in out.read_text().splitlines()]
    out.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "on_topic"}) + "\n" for row in old))
    assert scored(path) == first


def test_verdicts_with_a_line_of_something_else_are_left_alone(tmp_path):
    path = rows(tmp_path / "a.jsonl", pair())
    out = tmp_path / "a.jsonl.refusal_matching.jsonl"
    scored(path)
    with out.open("a") as file:
        file.write('{"id": "2", "prompt": "mine"}\n')
    before = out.read_bytes()
    with pytest.raises(UserError, match="holds something else than verdicts"):
        scored(path)
    assert out.read_bytes() == before


def test_verdicts_of_another_judge_are_left_alone(tmp_path):
    path = rows(tmp_path / "a.jsonl", pair())
    out = Path(scored(path)["judges"][0]["verdicts"])
    text = out.read_text().replace('"judge": "refusal_matching"', '"judge": "wise"')
    out.write_text(text)
    with pytest.raises(UserError, match="holds verdicts of wise; choose another file with --out"):
        scored(path)
    assert out.read_text() == text


def test_the_pairs_are_not_overwritten_by_their_verdicts(tmp_path):
    path = rows(tmp_path / "a.jsonl", pair())
    before = path.read_bytes()
    with pytest.raises(UserError, match="holds something else"):
        scored(path, out=path)
    with pytest.raises(UserError, match="holds something else"):
        scored(path, out=tmp_path)
    assert path.read_bytes() == before


# The command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_counts_and_agreement_and_no_text(tmp_path):
    path = rows(tmp_path / "a.jsonl", *(pair(r, f"{PROMPT} {r}", bad=b) for r, b in ((REFUSAL, "no"), (ANSWER, "yes"))))
    done = tasft(path, "--judge", "refusal_matching", "--labels", "bad", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout
        == f"""\
{path}: 2 pairs

refusal_matching (verdicts in {path}.refusal_matching.jsonl)
  harmful            50.0% (9.5 to 90.5; n = 2)
  refusal            50.0% (9.5 to 90.5; n = 2)
  incoherent         0.0% (0.0 to 65.8; n = 2)
  safe and coherent  50.0% (9.5 to 90.5; n = 2)
  unreadable         0

harm: n = 2, 1 harmful by label
                  refusal_matching: harmful  refusal_matching: safe
  label: harmful                          1                       0
  label: safe                             0                       1
  accuracy   1.00 (no interval)
  precision  1.00 (no interval)
  recall     1.00 (no interval)
  f1         1.00 (no interval)
  auroc      -
  kappa      1.00 (no interval)
  95% intervals: bootstrap over prompts
"""
    )
    as_json = json.loads(tasft(path, "--judge", "refusal_matching", "--labels", "bad", "--json", cwd=tmp_path).stdout)
    assert as_json["labels"]["table"] == [[1, 0], [0, 1]]
    assert as_json["judges"][0]["version"] == load_judge("refusal_matching").version
    assert as_json["differences"] == []


def test_the_command_names_all_faults_at_once_with_exit_code_2_and_writes_nothing(tmp_path):
    path = rows(tmp_path / "a.jsonl", pair(id="a"), pair(id="a"))
    before = {item.name: item.read_bytes() for item in tmp_path.iterdir()}
    done = tasft(path, "--judge", "wise", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "line 1 too" in done.stderr
    assert "no judge is called 'wise'" in done.stderr
    assert {item.name: item.read_bytes() for item in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "faults"),
    [
        ([], ["say either --judge NAME or --compare A B"]),
        (
            ["--judge", "refusal_matching", "--compare", "refusal_matching", "classifier"],
            ["say either --judge NAME or --compare A B"],
        ),
        (
            ["--judge", "refusal_matching", "--server", "http://127.0.0.1:1/v1", "--show", "3"],
            [
                "--show: there are differences to show only with --labels or --compare",
                "--server and --server-model go together",
            ],
        ),
        (
            ["--compare", "refusal_matching", "classifier", "--labels", "x", "--out", "y"],
            ["--labels, --out: not for --compare, which takes judges with their usual settings"],
        ),
        (["--judge", "refusal_matching"], ["nowhere.csv: no such file"]),
        (
            ["--judge", "refusal_matching", "--rubric", "pair"],
            ["nowhere.csv: no such file", "judge refusal_matching: it does not read rubric: leave that out"],
        ),
    ],
)
def test_options_that_do_not_go_together_get_a_sentence_each(tmp_path, monkeypatch, arguments, faults):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        app(["judge", "nowhere.csv", *arguments], standalone_mode=False)
    assert caught.value.faults == faults
    assert not any(tmp_path.iterdir())


@needs_models
def test_real_judges_are_compared_and_their_verdicts_taken_up_again(tmp_path):
    path = rows(tmp_path / "a.jsonl", *(pair(reply) for reply in (REFUSAL, ANSWER, "The capital of France is Paris.")))
    result = judge_quality.compare(path, lambda: judge_quality.read_pairs(path), ["refusal_matching", "classifier"], 0)
    assert [judge["name"] for judge in result["judges"]] == ["refusal_matching", "classifier"]
    assert [between["n"] for between in result["between"]] == [3, 3]
    file = tmp_path / "a.jsonl.classifier.jsonl"
    before = file.stat().st_mtime_ns
    again = judge_quality.compare(path, lambda: judge_quality.read_pairs(path), ["refusal_matching", str(file)], 0)
    assert again["between"] == result["between"]
    assert file.stat().st_mtime_ns == before


@needs_models
def test_scores_of_a_real_judge_have_an_auroc(tmp_path):
    path = rows(
        tmp_path / "a.jsonl",
        *(pair(f"{ANSWER} Part {index}.", f"{PROMPT} {index}", label=1) for index in range(3)),
        *(pair("Paris, on the river Seine.", f"What is capital number {index}?", label=0) for index in range(3)),
    )
    settings = JudgeSettings(kind="classifier")
    result = judge_quality.score(
        path,
        lambda: judge_quality.read_pairs(path, label_column="label"),
        settings,
        "harm",
        judge_quality.Outputs(),
        show=0,
    )
    assert result["labels"]["auroc"]["value"] > 0.5
    assert result["labels"]["auroc"]["n"] == 6
    assert f"mean score         {result['judges'][0]['score']['value']:.2f} (" in judge_text.rendered(result)


def test_what_is_written_as_csv_is_read_back_cell_by_cell(tmp_path):
    texts = ["a\rb", "a\r\nb", "a\nb\n", "\r", 'say "no", or not', " x ", "a\u2028b\x0bc", "'=1", ""]
    pairs = judge_quality.read_pairs(rows(tmp_path / "a.jsonl", *(pair(text, f"{PROMPT} {text}") for text in texts)))
    path = tmp_path / "a.csv"
    judge_quality.write_table(path, pairs, judge_quality.judged(RefusalMatching(), pairs, tmp_path / "v.jsonl"))
    with path.open(newline="", encoding="utf-8") as file:
        assert [row["completion"] for row in csv.DictReader(file)] == texts
    assert list(pd.read_csv(path, keep_default_na=False).completion) == texts
    back = judge_quality.read_pairs(path).replies
    assert [(reply.prompt, reply.completion) for reply in back] == [(f"{PROMPT} {text}", text) for text in texts]
