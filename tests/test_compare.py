"""One page for many models, one of a model alone, and a server of all of them."""

import http.client
import json
import shutil
import threading

import pytest
import yaml
from golden import COLLAPSED, GOOD, OVER_REFUSING, attack, write_run
from test_report import Page, assert_inert, document, jsonl
from typer.testing import CliRunner

from tasft.cli.compare import compare, titles_of
from tasft.cli.main import app
from tasft.cli.view import Viewer
from tasft.core.errors import UserError
from tasft.core.stats import rate
from tasft.report import write_comparison, write_model_report, write_report
from tasft.report.index import listing, reports_in
from tasft.report.page import page


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with three runs, as `tasft evaluate` leaves them, and their reports."""
    folder = tmp_path_factory.mktemp("runs")
    for name, final in (("good", GOOD), ("collapsed", COLLAPSED), ("over-refusing", OVER_REFUSING)):
        run = write_run(folder / name, final)
        for done in [path.parent / "done.json" for path in run.glob("evaluate/*/*/*/summary.json")]:
            document(done, {"key": "k", "reads": {"judge": done.parent.name, "sampling": {}, "limits": {}}})
        for done in [path.parent / "done.json" for path in run.glob("evaluate/*/*/set.json")]:
            document(done, {"key": "k", "reads": {}})
        write_report(run)
    return folder


def test_one_page_has_all_models_against_the_first(runs, tmp_path):
    base = runs / "good" / "evaluate" / "base"
    found = compare([base, runs / "good", runs / "collapsed"], tmp_path / "out")
    assert list(found["models"]) == ["good base", "good", "collapsed"]
    text = (tmp_path / "out" / "report" / "report.md").read_text()
    assert "good is safe and coherent more often than good base: of its replies to 40 toxic prompts 92.5%" in text
    assert "collapsed became incoherent (most such replies are repeating themselves), and is" in text
    head = "| Measure | Judge | good base | good | collapsed | good against good base | collapsed against good base |"
    assert head in text
    row = next(
        row for row in found["rows"] if (row["model"], row["measure"], row["set"]) == ("good", "harmful", "toxic")
    )
    # The table of the terminal, the page and the data say the same.
    assert f"{100 * row['difference']['value']:.1f}".replace("-", "−") == "−65.0"
    assert "| Harmful | llama_guard, llm_judge | 70.0% (54.6 to 81.9; n = 40) | 5.0% " in text
    assert "−65.0 points: better" in text
    assert "Report of a tasft run" not in text


def test_replies_are_paired_by_prompt_and_not_by_id(runs, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(runs / "good", other)
    for path in other.glob("evaluate/final/*/replies.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()][::-1]
        names = {row["id"]: f"x{number}" for number, row in enumerate(rows)}
        path.write_text("".join(json.dumps(row | {"id": names[row["id"]]}) + "\n" for row in rows))
        about = json.loads((path.parent / "set.json").read_text())
        document(path.parent / "set.json", about | {"ids": list(names.values())})
        for verdicts in path.parent.glob("*/verdicts.jsonl"):
            said = [json.loads(line) for line in verdicts.read_text().splitlines()]
            verdicts.write_text("".join(json.dumps(row | {"id": names[row["id"]]}) + "\n" for row in said))
    write_comparison({"one": runs / "good", "other": other}, tmp_path / "cmp")
    text = (tmp_path / "cmp/report/report.md").read_text()
    rows = [row for row in text.splitlines() if row.startswith(("| Harmful", "| Incoherent", "| Refusal"))]
    assert len(rows) == 6
    assert all("0 became so, 0 no longer" in row for row in rows)


def test_what_may_not_be_compared_is_left_out_and_said(runs, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(runs / "collapsed", other)
    for done in other.glob("evaluate/final/toxic/llama_guard/done.json"):
        document(done, {"key": "k", "reads": {"judge": "another version", "sampling": {}, "limits": {}}})
    found = compare([runs / "good", other], tmp_path / "cmp")
    assert found["notes"] == [
        "other: toxic, llama_guard: not compared, the judge is not the same: have one of them judged again"
    ]
    text = (tmp_path / "cmp/report/report.md").read_text()
    assert "not compared, the judge is not the same" in text
    (row,) = [row for row in text.splitlines() if row.startswith("| Harmful | llama_guard |") and "70" not in row][:1]
    assert row.endswith("| — | — |")


def measured(run, state, task, right):
    """A task of lm-eval, item by item."""
    at = run / "evaluate" / state / "capability" / task
    jsonl(at / "items.jsonl", [{"id": f"{n}", "acc": float(hit), "doc_hash": f"{n}"} for n, hit in enumerate(right)])
    document(at / "summary.json", {"task": task, "num_fewshot": 0, "acc": vars(rate(right))})
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["evaluate"]["capability"] = {"tasks": [task]}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for done in (at, run / "evaluate" / state / "jailbreak" / "prefix"):
        document(done / "done.json", {"key": "k", "reads": {}})


@pytest.fixture
def others(runs, tmp_path):
    """The good run and the collapsed one, attacked and with a task."""
    for name, hits in (("good", [True] * 9 + [False]), ("collapsed", [False] * 10)):
        shutil.copytree(runs / name, tmp_path / name)
        attack(tmp_path / name, "final", ["I am glad to describe <forbidden act>."] * 3)
        measured(tmp_path / name, "final", "boolq", hits)
    return [tmp_path / "good", tmp_path / "collapsed"]


def test_attacks_and_capability_stand_on_the_page_of_many_models(others, tmp_path):
    found = compare(others, tmp_path / "out")
    text = (tmp_path / "out" / "report" / "report.md").read_text()
    (task,) = [line for line in text.splitlines() if line.startswith("| capability/boolq: acc |")]
    assert task.startswith("| capability/boolq: acc | 90.0% (59.6 to 98.2; n = 10) | 0.0% ")
    row = next(row for row in found["rows"] if row["set"] == "capability/boolq")
    assert f"{100 * row['difference']['value']:.1f} points".replace("-", "−") in task
    assert "0 right now, 9 no longer" in task
    assert "| Attack | Judge | Succeeded on prompts, good | Succeeded on prompts, collapsed | collapsed against" in text
    assert "| Reply begun for the model | llama_guard | 100.0%" in text
    assert "benchmark tasks" not in text.split("## What was not measured")[1].split("##")[0]
    table = (tmp_path / "out" / "report" / "results.csv").read_text()
    assert "collapsed,capability/boolq,capability,,acc,0.0," in table
    assert "jailbreak/prefix" in (tmp_path / "out" / "report" / "index.html").read_text()


def test_tasks_and_attacks_that_differ_are_left_out_of_the_page(others, tmp_path):
    at = others[1] / "evaluate" / "final" / "capability" / "boolq" / "summary.json"
    document(at, json.loads(at.read_text()) | {"num_fewshot": 5})
    found = compare(others, tmp_path / "out")
    assert "collapsed: capability/boolq: not compared, num_fewshot differ" in found["notes"]
    text = (tmp_path / "out" / "report" / "report.md").read_text()
    (task,) = [line for line in text.splitlines() if line.startswith("| capability/boolq: acc |")]
    assert task.endswith("| — | — |")
    assert "General ability on benchmark tasks" in text


def test_names_of_equal_folders_are_told_apart_and_faults_are_named(runs, tmp_path):
    twice = [runs / "good", runs / "good", runs / "good" / "evaluate" / "base"]
    assert list(titles_of(twice)) == ["good", "good (2)", "good base"]
    with pytest.raises(UserError, match="at least two"):
        compare([runs / "good"], tmp_path / "x")
    with pytest.raises(UserError, match="holds something else"):
        compare([runs / "good", runs / "collapsed"], runs / "good")
    assert not (tmp_path / "x").exists()


def test_the_command_prints_a_table_for_each_and_the_page(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["compare", *(str(runs / name) for name in ("good", "collapsed", "over-refusing"))])
    assert done.exit_code == 0, done.output
    assert "good first, collapsed second" in done.stdout
    assert "good first, over-refusing second" in done.stdout
    index = tmp_path / "runs" / "compare-good-collapsed-over-refusing" / "report" / "index.html"
    assert f"report: {index.relative_to(tmp_path)}" in done.stdout
    assert_inert(Page(index.read_text()))
    assert index.stat().st_mode & 0o077 == 0  # Replies are harmful text.


def test_a_model_alone_has_a_page_without_a_comparison(runs, tmp_path):
    shutil.copytree(runs / "good" / "evaluate" / "base", tmp_path / "alone")
    document(tmp_path / "alone" / "manifest.json", {"model": "x"})
    words = Page(write_model_report(tmp_path / "alone").read_text()).words()
    assert (
        "alone was evaluated alone, and compared with nothing: of its replies to 40 toxic prompts 27.5% are safe"
        in words
    )
    assert "No gate was set" in words
    assert "points: " not in words
    assert "What was done" not in words
    assert not (tmp_path / "alone" / "report" / "model_card.md").exists()
    with pytest.raises(UserError, match="no replies"):
        write_model_report(tmp_path)


def test_the_list_has_gate_rates_and_links_of_every_report(runs):
    found = {each.folder.name: each for each in reports_in(runs)}
    assert found.keys() == {"good", "collapsed", "over-refusing"}
    assert found["good"].gate is True
    assert found["collapsed"].gate is False
    assert found["good"].rates == {
        ("toxic", "safe_coherent"): pytest.approx(0.925),
        ("toxic", "harmful"): pytest.approx(0.05),
        ("toxic", "incoherent"): pytest.approx(0.025),
        ("benign", "refusal"): pytest.approx(0.05),
    }
    made = page(listing(runs))
    assert 'href="files/good/report/index.html"' in made
    assert "3 reports; 1 of 3 gates are met." in Page(made).words()
    assert "SmolLM2-135M-Instruct" in made


@pytest.fixture
def served(runs):
    """Asks a running server for a path: status, headers and body."""
    with Viewer(runs) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

        def get(path, host=None):
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
            connection.putrequest("GET", path, skip_host=True)
            connection.putheader("Host", host or f"127.0.0.1:{server.server_port}")
            connection.endheaders()
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()

        yield get
        server.shutdown()


def test_reports_are_served_and_nothing_else(runs, served, tmp_path):
    attack(runs / "good", "final", ["never served"])
    status, headers, body = served("/")
    assert status == 200
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert b"files/good/report/index.html" in body
    assert served("/files/good/report/index.html")[2] == (runs / "good/report/index.html").read_bytes()
    assert served("/files/good/report/results.csv")[1]["Content-Type"] == "text/csv"
    (runs / "link").mkdir(exist_ok=True)
    if not (runs / "link/report").exists():
        (runs / "link/report").symlink_to(tmp_path)
    (tmp_path / "index.html").write_text("secret")
    for path in (
        "/files/good/recipe.yaml",
        "/files/good/evaluate/final/toxic/replies.jsonl",
        "/files/good/report/gate.json",
        "/files/good/report/",
        "/files/../../etc/passwd",
        "/files/%2e%2e/%2e%2e/report/index.html",
        "/files/link/report/index.html",
        "/files/nowhere/report/index.html",
        "/files/good%00/report/index.html",
        "/other",
    ):
        assert served(path)[0] == 404, path


def test_another_name_of_this_address_is_refused(served):
    assert served("/", "evil.example:80")[0] == 403
    assert served("/", "localhost:1234")[0] == 200


def test_what_cannot_be_served_is_named(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        Viewer(tmp_path / "nowhere")
    with Viewer(tmp_path) as server, pytest.raises(UserError, match="cannot be listened on"):
        Viewer(tmp_path, server.server_port)
