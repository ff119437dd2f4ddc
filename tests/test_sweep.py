"""Sweeps of tiny models: what is run, shared, reported, taken up and lost."""

import csv
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import ROOT, rows
from golden import BASE, COLLAPSED, GOOD, OVER_REFUSING, write_run
from running import done, small_recipe
from test_report import build_run, write_state

from tasft.cli.main import main
from tasft.core.errors import UserError
from tasft.core.provenance import lock
from tasft.report.sweep import pareto, write_sweep_report
from tasft.run import recipe_file, sweep

TASFT = [sys.executable, "-c", "from tasft.cli.main import main; main()"]


@pytest.fixture
def base(tmp_path, tiny):
    return write_base(tmp_path, tiny)


def write_base(folder, tiny):
    """A recipe of seconds, as a file beside the sweep's."""
    values = small_recipe(folder, tiny)
    del values["seed"], values["harvest"]["anchors"]
    values["train"]["max_steps"] = 2
    path = folder / "base.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def write(folder, **fields):
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"name": "try", "base": "base.yaml", **fields}, sort_keys=False))
    return path


def names(path):
    return [cell.name for cell in sweep.load(str(path))[1]]


@pytest.fixture
def tasft(monkeypatch, capfd):
    """The command in this process: its exit code, what it said and what it complained of."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["tasft", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capfd.readouterr()

    return call


def state(folder):
    return {cell["folder"]: cell for cell in json.loads((folder / "sweep.json").read_text())["cells"]}


def table(folder):
    with (folder / "table.csv").open() as file:
        return list(csv.DictReader(file))


# The file


def test_the_grid_is_combined_with_every_pair_and_seed(base, tmp_path):
    pairs = [{"train.penalty": "emd", "train.penalty_weight": 1.0}, {"train.penalty": "nlcl"}]
    path = write(tmp_path, grid={"harvest.rows": [2, 4]}, pairs=pairs, seeds=[0, 1])
    assert names(path) == [
        *(f"penalty=emd,penalty_weight=1.0,rows={rows},seed={seed}" for rows in (2, 4) for seed in (0, 1)),
        *(f"penalty=nlcl,rows={rows},seed={seed}" for rows in (2, 4) for seed in (0, 1)),
    ]
    cell = sweep.load(str(path))[1][3]
    assert (cell.spec.train.penalty, cell.spec.harvest.rows, cell.spec.seed) == ("emd", 4, 1)
    assert cell.spec.name == "try.penalty-emd-penalty_weight-1.0-rows-4-seed-1"


def test_folder_names_are_safe_and_never_those_of_another_cell(base, tmp_path):
    values = ["a/b", "a b", "x" * 300]
    made = names(write(tmp_path, grid={"data.benign_prompts": values, "train.epochs": [None]}))
    assert len(set(made)) == 3
    assert all("/" not in name and " " not in name and len(name) < 120 for name in made)
    path = write(tmp_path, grid={"train.epochs": [None], "model.lora": [{"r": 1}, {"r": 2}]})
    assert [name.rpartition("-")[0] for name in names(path)] == ["epochs=null,lora=-r-1-", "epochs=null,lora=-r-2-"]


def test_fields_whose_last_names_are_the_same_are_written_in_full(base, tmp_path):
    path = write(
        tmp_path, grid={"harvest.max_new_tokens": [8], "evaluate.max_new_tokens": [8], "train.penalty": ["emd"]}
    )
    assert names(path) == ["harvest.max_new_tokens=8,evaluate.max_new_tokens=8,penalty=emd"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "nothing is varied"),
        ({"grid": {"train.penalty": []}}, "grid.train.penalty"),
        ({"grid": {"seed": [1]}, "seeds": [1]}, "seed: varied twice"),
        ({"grid": {"train.penalty": ["emd"]}, "pairs": [{"train.penalty": "nlcl"}]}, "train.penalty: varied twice"),
        ({"grid": {"name": ["a"]}}, "name: the cells"),
        ({"seeds": [1, 1]}, "the cell seed=1 is there twice"),
        ({"seeds": [1], "gird": {}}, "gird: no such field"),
        ({"seeds": [1], "base": "nowhere.yaml"}, "nowhere.yaml"),
        ({"seeds": ["1"]}, "seeds.0"),
    ],
)
def test_a_fault_of_the_file_is_named(base, tmp_path, fields, said):
    with pytest.raises(UserError) as caught:
        sweep.load(str(write(tmp_path, **fields)))
    assert said in str(caught.value)


def test_all_faults_of_all_cells_are_named_at_once_and_each_is_said_once(base, tmp_path):
    path = write(tmp_path, grid={"train.penalty": ["emd", "emdd"], "harvest.rows": [0, 5], "train.stesp": [1]})
    with pytest.raises(UserError) as caught:
        sweep.load(str(path))
    faults = caught.value.faults
    assert len(faults) == 3
    assert any("train.stesp: no such field (cell penalty=emd,rows=0,stesp=1 and 3 more)" in fault for fault in faults)
    assert any("train.penalty" in fault and "and 1 more" in fault for fault in faults)


def test_check_reads_the_data_of_cells_that_differ_in_it_and_run_refuses_a_sweep_file(base, tmp_path, tasft):
    path = write(tmp_path, grid={"data.toxic_prompts": ["nowhere.jsonl", str(tmp_path / "toxic.jsonl")]})
    code, _, faults = tasft("check", path)
    assert code == 2
    assert faults.count("tasft: ") == 1
    assert "nowhere.jsonl" in faults
    assert tasft("sweep", path, "--out", tmp_path / "out")[::2] == (2, faults)
    assert "run it with tasft sweep" in tasft("run", path)[2]
    code, said, _ = tasft("sweep", write(tmp_path, seeds=[3, 4]), "--dry-run", "--out", tmp_path / "out")
    assert code == 0
    lines = said.splitlines()
    assert {"seed=3", "seed=4", "0 of 2 cells are done"} < set(lines)
    assert "seed=3:" in lines
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused(base, tmp_path):
    found = sweep.load(str(write(tmp_path, seeds=[1])))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not the folder of a sweep"):
        sweep.go(*found, tmp_path / "thesis")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "sweep.json").write_text('{"name": "other", "cells": []}')
    with pytest.raises(UserError, match="holds the sweep 'other'"):
        sweep.go(*found, tmp_path / "other")


@pytest.mark.parametrize("name", [name for name in recipe_file.shipped() if recipe_file.is_sweep(name)])
def test_every_shipped_sweep_is_valid(name):
    assert sweep.load(name)[1]


def test_the_sweep_of_the_page_has_as_many_cells_as_it_says(tmp_path):
    page = (ROOT / "docs" / "guides" / "sweeps.md").read_text()
    path = tmp_path / "sweep.yaml"
    path.write_text(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1])
    assert f"= {len(sweep.load(str(path))[1])} cells" in page


# The front


def test_the_front_is_that_of_all_pairs():
    import numpy as np

    points = np.random.default_rng(0).integers(0, 4, (60, 3)).tolist()

    def beats(one, other):
        return all(a <= b for a, b in zip(one, other, strict=True)) and one != other

    assert pareto(points) == [not any(beats(other, point) for other in points) for point in points]
    assert pareto([]) == []
    assert pareto([[1.0, 2.0], [1.0, 2.0], [2.0, 2.0]]) == [True, True, False]


def test_a_sweep_without_toxic_prompts_has_a_report_too(tmp_path):
    cells = []
    for name in ("a", "b"):
        run = tmp_path / "cells" / name
        run.mkdir(parents=True)
        build_run(run)
        for at in (run / "evaluate").glob("*/toxic"):
            shutil.rmtree(at)
        cells.append({"fields": {"seed": name}, "folder": f"cells/{name}", "state": "done"})
    (tmp_path / "sweep.json").write_text(json.dumps({"name": "x", "cells": cells}))
    write_sweep_report(tmp_path)
    assert all(row["over_refusal"] and "harmful" not in row for row in table(tmp_path))


def test_paths_of_runs_with_evaluated_checkpoints_are_drawn_together(tmp_path):
    cells = []
    for name in ("a", "b", "c"):
        run = tmp_path / "cells" / name
        run.mkdir(parents=True)
        build_run(run)
        for step, bad in ((20, 20), (40, 10)) if name != "b" else ():
            for kind, few in (("toxic", bad), ("benign", 38)):
                write_state(run, f"checkpoint-{step}", kind, kind, ["a b c"] * 40, bad=few)
        cells.append({"fields": {"seed": name}, "folder": f"cells/{name}", "state": "done"})
    (tmp_path / "sweep.json").write_text(json.dumps({"name": "x", "cells": cells}))
    page = write_sweep_report(tmp_path).read_text()
    assert "Harm against over-refusal: 1: 10.0% at 5.0%; 3: 10.0% at 5.0%" in page
    assert "Along training" in page
    with (tmp_path / "along.csv").open() as file:
        told = list(csv.DictReader(file))
    assert [(row["run"], row["step"]) for row in told] == [
        (run, step) for run in "13" for step in ("0", "20", "40", "80")
    ]
    assert (told[1]["harmful"], told[1]["harmful.n"], told[1]["over_refusal"]) == ("0.5", "40", "0.05")
    assert "| 1 | 20 | 50.0% (35.2 to 64.8; n = 40) |" in (tmp_path / "report/report.md").read_text()


# The work


@pytest.fixture(scope="module")
def ended(tmp_path_factory, tiny):
    """A sweep of two cells that can be done and one that cannot: its folder, and what the command said."""
    folder = tmp_path_factory.mktemp("sweep")
    base = write_base(folder, tiny)
    values = yaml.safe_load(base.read_text())
    (folder / "answers.jsonl").write_text('{"instruction": "Name a fruit.", "output": "An apple."}\n')
    values["evaluate"] |= {
        "quality": {"prompts": str(folder / "answers.jsonl")},
        "jailbreak": {"set": "toxic", "limit": 2, "prefix": "Sure"},
    }
    base.write_text(yaml.safe_dump(values))
    pairs = [
        {"train.penalty": "emd", "harvest.rows": 2},
        {"train.penalty": "nlcl", "harvest.rows": 2, "train.max_length": 8, "train.overlong": "error"},
        {"train.penalty": "nlcl", "harvest.rows": 5},
    ]
    path = write(folder, pairs=pairs, seeds=[1])
    command = [*TASFT, "sweep", str(path), "--out", str(folder / "out")]
    return folder / "out", subprocess.run(command, capture_output=True, text=True), path


FEW = "cells/penalty=emd,rows=2,seed=1"
FAILED = "cells/penalty=nlcl,rows=2,max_length=8,overlong=error,seed=1"
MANY = "cells/penalty=nlcl,rows=5,seed=1"


def test_a_cell_that_fails_is_reported_in_its_own_words_and_the_others_are_done(ended):
    out, command, _ = ended
    assert command.returncode == 2, command.stderr
    assert "Traceback" not in command.stderr
    assert "1 of 3 cells failed" in command.stderr
    cells = state(out)
    assert {folder: cell["state"] for folder, cell in cells.items()} == {FEW: "done", FAILED: "failed", MANY: "done"}
    assert "max_length" in cells[FAILED]["reason"]
    assert f"FAILED: {cells[FAILED]['reason']}" in command.stdout


def test_a_cell_says_a_line_for_a_stage_and_nothing_twice(ended):
    _, command, _ = ended
    lines = command.stdout.splitlines()
    heads = [number for number, line in enumerate(lines) if line.endswith(":")]
    assert len(heads) == 3
    for start in heads:
        end = next(number for number in range(start, len(lines)) if lines[number].startswith("["))
        stages = [line.split(":")[0] for line in lines[start + 1 : end]]
        assert stages == [stage for stage in ("harvest", "train", "evaluate") if stage in stages]
    others = [line for line in lines if not re.match(r"(harvest|train|evaluate): (done|shared)", line)]
    assert len(others) == len(set(others)) == 2 + 2 * 3 + 1  # A note, how many cells, head and end of each, the report.
    # On the other stream there are only bars, and how many failed.
    warned = [line for line in command.stderr.splitlines() if "arning" in line or line.startswith("[transformers]")]
    assert warned == []


def test_what_cells_share_was_done_once(ended):
    out, _, _ = ended
    # Each step that was done, in whichever cell.
    did = [step for file in out.glob("cells/*/manifest.json") for step in json.loads(file.read_text())["stages"]]
    for step in ("calibration", "evaluate/base/toxic", "evaluate/base/toxic/refusal_matching", "evaluate/base/benign"):
        assert did.count(step) == 1, step
    assert did.count("harvest") == 2  # One for each number of rows; ...
    (draft,) = out.glob("shared/*.draft/harvest/replies.jsonl")
    drawn = [row["id"] for row in rows(draft)]
    assert len(drawn) == len(set(drawn)) == 12 + 24  # ... but the answers were drawn for both together.
    assert (out / FEW / "harvest/replies.jsonl").read_bytes() == (out / MANY / "harvest/replies.jsonl").read_bytes()
    same = "evaluate/base/toxic/replies.jsonl"
    assert (out / FEW / same).stat().st_mtime_ns == (out / MANY / same).stat().st_mtime_ns
    few, many = ({row["id"] for row in rows(out / cell / "harvest/avoid.jsonl")} for cell in (FEW, MANY))
    assert few < many
    assert (len(few), len(many)) == (2, 5)
    weights = "train/adapter/adapter_model.safetensors"
    assert (out / FEW / weights).read_bytes() != (out / MANY / weights).read_bytes()


def test_a_cell_is_an_ordinary_run_that_stands_alone(ended, tmp_path, tasft):
    out, _, _ = ended
    copy = tmp_path / "run"
    shutil.copytree(out / FEW, copy)
    before = done(copy)
    _, said, _ = tasft("run", copy)
    assert said.count(": done before") == 4, said  # harvest, train, evaluate, report
    assert ": done in" not in said
    assert done(copy) == before
    # Its rows are its own: a file that grows here does not grow in the other cells.
    assert (out / FEW / "harvest/replies.jsonl").stat().st_nlink == 1
    assert (out / FEW / "train/adapter/adapter_model.safetensors").stat().st_nlink == 2


def test_the_table_has_a_row_for_each_cell_with_the_figures_of_its_summaries(ended):
    out, _, _ = ended
    found = table(out)
    assert [row["state"] for row in found] == ["done", "failed", "done"]
    assert [row["harvest.rows"] for row in found] == ["2", "2", "5"]
    for row, cell in ((found[0], FEW), (found[2], MANY)):
        assert row["commit"] == (json.loads((out / cell / "manifest.json").read_text())["commit"] or "")
        for place in ("base", "final"):
            summary = json.loads((out / cell / f"evaluate/{place}/toxic/refusal_matching/summary.json").read_text())
            for measure in ("harmful", "refusal", "incoherent", "safe_coherent"):
                for part, value in summary[measure].items():
                    column = f"{place}.toxic.refusal_matching.{measure}" + ("" if part == "value" else f".{part}")
                    assert float(row[column]) == value, column
        for name, measure in (("quality.reference", "reference_nll"), ("jailbreak.prefix", "success")):
            found_there = json.loads(
                (out / cell / "evaluate/final" / name.replace(".", "/") / "summary.json").read_text()
            )
            assert float(row[f"final.{name}.{measure}"]) == found_there[measure]["value"]
        assert row["harmful"] == row["final.toxic.refusal_matching.harmful"]
        assert row["over_refusal"] == row["final.benign.refusal_matching.refusal"]
    names = ("harmful", "incoherent", "over_refusal")
    points = [[float(row[name]) for name in names] for row in (found[0], found[2])]
    untouched = [float(found[0][f"before.{name}"]) for name in names]
    best = pareto([*points, untouched])
    wanted = [int(best[n] and points[n] != untouched and points[n][1] < 0.5) for n in (0, 1)]
    assert [row["pareto"] for row in found] == [str(wanted[0]), "", str(wanted[1])]
    assert not found[1]["final.toxic.refusal_matching.harmful"]


def test_the_report_names_the_failure_and_draws_the_trade_offs(ended, tasft):
    out, _, _ = ended
    page = (out / "report/index.html").read_text()
    assert page.count("<figure>") == 2
    text = (out / "report/report.md").read_text()
    assert "2 of 3 runs are done" in text
    assert "| Base model |" in text
    for told in (page, text):
        assert "Run 2 failed" in told
    (out / "report/index.html").unlink()
    assert tasft("report", out)[0] == 0
    assert (out / "report/index.html").read_text() == page


@pytest.mark.parametrize(("gates", "code"), [([False, False], 3), ([False, True], 0), ([None, None], 0)])
def test_a_sweep_of_which_no_cell_meets_its_gate_ends_with_3(base, tmp_path, monkeypatch, tasft, gates, code):
    path = write(tmp_path, seeds=[1, 2])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sweep.json").write_text("{}")
    monkeypatch.setattr(sweep, "go", lambda *_: [sweep.CellOutcome(gate=gate) for gate in gates])
    ended, _, complaint = tasft("sweep", path, "--out", tmp_path / "out")
    assert ended == code, complaint
    assert ("none of 2 cells meets its gate" in complaint) is (code == 3)


def test_cells_that_are_no_better_than_the_untouched_model_or_incoherent_are_not_on_the_front(tmp_path):
    finals = {"same": BASE, "collapsed": COLLAPSED, "good": GOOD, "over": OVER_REFUSING}
    cells = []
    for name, final in finals.items():
        write_run(tmp_path / "cells" / name, final)
        cells.append({"fields": {"train.penalty": name}, "folder": f"cells/{name}", "state": "done"})
    (tmp_path / "sweep.json").write_text(json.dumps({"name": "x", "cells": cells}))
    write_sweep_report(tmp_path)
    assert [(row["pareto"], row["gate"]) for row in table(tmp_path)] == [("0", "0"), ("0", "0"), ("1", "1"), ("1", "0")]
    text = (tmp_path / "report/report.md").read_text()
    assert "**Gate met.** 1 of 4 runs meet their gate: run 3." in text
    assert "On the Pareto front: run 3, 4." in text
    assert "Incoherent in at least half of their replies to toxic prompts: run 2." in text
    for name in ("same", "collapsed"):
        (row,) = [row for row in text.splitlines() if f"| {name} |" in row]
        assert "| not met |" in row


def test_a_second_call_does_only_what_is_not_done(ended, tasft):
    out, _, path = ended
    before = {cell: done(out / cell) for cell in (FEW, MANY)}
    code, said, _ = tasft("sweep", path, "--out", out)
    assert "2 of 3 cells: done before" in said
    assert code == 2
    assert {cell: done(out / cell) for cell in (FEW, MANY)} == before


def wait_for(found, process, seconds=300):
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline, "it did not come"
        assert process.poll() is None, "it ended before"
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_cell_is_reported_and_a_killed_sweep_goes_on_where_it_was(base, tmp_path):
    out = tmp_path / "out"
    path = write(tmp_path, grid={"train.max_steps": [60]}, seeds=[1, 2])
    command = [*TASFT, "sweep", str(path), "--out", str(out)]

    # What ends a cell does not end the sweep.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    wait_for(lambda: list(out.glob("shared/*/train/checkpoint-*/trainer_state.json")), process)
    (cell,) = [child for child in psutil.Process(process.pid).children() if "spawn_main" in str(child.cmdline())]
    drawn = (out / "cells/max_steps=60,seed=1/harvest/replies.jsonl").read_bytes()
    cell.kill()
    wait_for(lambda: list(out.glob("cells/*seed=2/train/done.json")), process)
    assert "signal 9" in state(out)["cells/max_steps=60,seed=1"]["reason"]

    # The sweep itself, and its cell with it.
    process.kill()
    process.wait()
    (last,) = [path for path in out.glob("cells/*") if path.name.endswith("seed=2")]
    for _ in range(500):
        try:
            lock(last).release()
            break
        except UserError:
            time.sleep(0.02)
    else:
        raise AssertionError("the cell lives on")
    first = out / "cells/max_steps=60,seed=1"
    assert not (first / "train").exists()
    trained = done(last)["train"]

    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert {cell["state"] for cell in state(out).values()} == {"done"}
    assert (first / "harvest/replies.jsonl").read_bytes() == drawn
    assert done(last)["train"] == trained
    steps = [row["step"] for row in rows(first / "train/metrics.jsonl")]
    assert steps == sorted(set(steps))


@pytest.mark.slow
def test_a_node_of_a_ray_cluster_dies_and_nothing_is_lost(base, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    # So named, but it is what makes Ray stay on the loopback address.
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    from ray.cluster_utils import Cluster

    out = tmp_path / "out"
    path = write(tmp_path, grid={"train.max_steps": [150], "train.learning_rate": [1e-2, 3e-3, 1e-3]})
    settings = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=settings)
    process, log = None, (tmp_path / "log").open("w")
    try:
        node = cluster.add_node(**settings)
        command = [*TASFT, "sweep", str(path), "--out", str(out), "--ray", cluster.address]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

        def at_work():
            """The cell that the second node is at work on, and has trained a little."""
            raylet = node.all_processes["raylet"][0].process
            for child in psutil.Process(raylet.pid).children(recursive=True):
                for file in child.open_files():
                    cell = Path(file.path).parent
                    if cell.parent == out / "cells" and list(out.glob("shared/*/train/checkpoint-*")):
                        return cell
            return None

        wait_for(at_work, process, seconds=600)
        hit = at_work()
        written = {file: file.read_bytes() for file in out.glob("shared/*/**/replies.jsonl")}
        cluster.remove_node(node, allow_graceful=False)
        assert not (hit / "report" / "done.json").exists()
        assert process.wait(timeout=600) == 0, (tmp_path / "log").read_text()
    finally:
        if process:
            process.kill()
        cluster.shutdown()
    assert [cell["state"] for cell in state(out).values()] == ["done"] * 3
    assert written
    for file, content in written.items():
        assert file.read_bytes().startswith(content)
    for file in out.glob("shared/*/**/replies.jsonl"):
        ids = [(row["set"], row["id"]) for row in rows(file)]
        assert len(ids) == len(set(ids)) > 0, file
    for file in out.glob("cells/*/train/metrics.jsonl"):
        steps = [row["step"] for row in rows(file)]
        assert steps == sorted(set(steps))
        assert steps[-1] == 150


PARTS = """
from tasft.loss import IGNORE_INDEX, TokenSum


class Judge:
    tells = {"harmful", "refusal"}

    def __init__(self, letter):
        self.letter = letter

    def __call__(self, pairs):
        return [{"harmful": self.letter in pair.completion, "refusal": False} for pair in pairs]


def mean(hidden, head, labels, weights=None):
    keep = labels != IGNORE_INDEX
    return TokenSum((hidden[keep] * head.weight[labels[keep]]).sum(-1).clamp(min=0).sum(), keep.sum())


def half(hidden, head, labels, weights=None):
    total, count = mean(hidden, head, labels)
    return TokenSum(total / 2, count)


def wrong(hidden):
    return hidden
"""


def write_parts(folder, targets):
    (folder / "ownparts.py").write_text(PARTS)
    values = yaml.safe_load((folder / "base.yaml").read_text())
    values["judges"] = {"letters": {"kind": "python", "target": "ownparts:Judge", "options": {"letter": "e"}}}
    values["harvest"]["judge"] = "letters"
    values["evaluate"]["judges"] = ["letters"]
    values["train"]["penalty"] = "python"
    (folder / "base.yaml").write_text(yaml.safe_dump(values))
    return write(folder, grid={"train.own_penalty": [{"target": f"ownparts:{target}"} for target in targets]})


def test_a_part_of_ones_own_that_one_cell_names_is_looked_at_too(base, tmp_path, monkeypatch, tasft):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    code, _, faults = tasft("check", write_parts(tmp_path, ["mean", "wrong"]))
    assert code == 2
    assert "ownparts:wrong takes (hidden), but is called with (hidden, head, labels, *, weights)" in faults


@pytest.mark.slow
def test_parts_of_ones_own_work_in_the_cells_of_a_sweep(base, tmp_path):
    path, out = write_parts(tmp_path, ["mean", "half"]), tmp_path / "out"
    subprocess.run([*TASFT, "sweep", path.name, "--out", out], cwd=tmp_path, check=True, capture_output=True)
    cells = json.loads((out / "sweep.json").read_text())["cells"]
    assert [cell["state"] for cell in cells] == ["done", "done"]
    keys = {json.loads((out / cell["folder"] / "train" / "done.json").read_text())["key"] for cell in cells}
    assert len(keys) == 2
    for cell in cells:
        verdicts = (out / cell["folder"] / "evaluate/final/toxic/letters/verdicts.jsonl").read_text().splitlines()
        assert {json.loads(line)["judge"] for line in verdicts} == {"letters"}
