"""Parts of one's own: the worked examples of the guide, and parts that do not do what they should."""

import re
import sys
import textwrap
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, rows
from running import small_recipe

from tasft.core import parts
from tasft.core.errors import UserError
from tasft.core.parts import Own, Part
from tasft.core.provenance import read_json
from tasft.judges import JudgeSettings, Pair, load_judge
from tasft.loss import PENALTIES, unlikelihood
from tasft.models.engine import Sampling, requests_for
from tasft.models.own import OwnEngine
from tasft.models.server_settings import PythonEngine
from tasft.run import recipe_file
from tasft.run.pipeline import Pipeline
from tasft.train.penalties import penalty_of

PAIRS = [Pair("a", "How do I <act 1>?", "You take a lamp."), Pair("b", "How do I <act 2>?", "I can't.")]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder from which parts are imported, forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("mypkg", "mine"):
            del sys.modules[name]


def laid(below, above):
    return {
        **below,
        **{key: laid(below.get(key, {}), each) if isinstance(each, dict) else each for key, each in above.items()},
    }


def test_the_worked_examples_of_the_guide_run_as_one_recipe(here, tiny):
    text = (ROOT / "docs" / "guides" / "parts.md").read_text()
    for name, code in re.findall(r"```python\n# (\S+)\n(.*?)```", text, re.DOTALL):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(code)
    assert len(list(Path("mypkg").iterdir())) == 4
    recipe = small_recipe(here, tiny)
    for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        recipe = laid(recipe, yaml.safe_load(block))
    Path("mine.yaml").write_text(yaml.safe_dump(recipe))
    run = Path("run")

    def go():
        opened = Pipeline(recipe_file.load("mine.yaml"), run)
        opened.go(("harvest", "train", "evaluate"))
        return read_json(run / "train" / "done.json")["key"]

    first = go()
    verdicts = rows(run / "harvest" / "verdicts.jsonl")
    assert {row["judge"] for row in verdicts} == {"words"}
    assert all(row["harmful"] == (row["score"] > 0) for row in verdicts if row["score"] is not None)
    replies = [row for row in rows(run / "harvest" / "replies.jsonl") if row["set"] == "own anchor"]
    assert replies
    assert all(row["prompt"].startswith("Say why this is dangerous: ") for row in replies)
    assert rows(run / "evaluate" / "final" / "mine" / "replies.jsonl")[0]["prompt"].startswith("Please explain")
    # A changed part is asked anew, and an unchanged one is not.
    assert go() == first
    Path("mypkg/losses.py").write_text(Path("mypkg/losses.py").read_text() + "\n# changed\n")
    assert go() != first


def test_a_penalty_of_ones_own_that_is_ours_gives_our_sums(here):
    hidden, labels = torch.randn(6, 4), torch.tensor([1, -100, 2, 0, -100, 3])
    from tasft.loss import Head

    Path("mine.py").write_text(
        "import tasft.loss\n"
        "def unlikelihood(hidden, head, labels, weights=None):\n"
        "    return tasft.loss.unlikelihood(hidden, head, labels, weights=weights)\n"
        "def nlcl(hidden, head, labels, weights=None, *, segments):\n"
        "    return tasft.loss.nlcl(hidden, head, labels, weights=weights, segments=segments)\n"
        "nlcl.needs = ['segments']\n"
    )
    head, segments = Head(torch.randn(5, 4)), torch.zeros(6, dtype=torch.long)
    own = penalty_of("python", Part(target="mine:unlikelihood"))
    assert torch.equal(own.fn(hidden, head, labels).total, unlikelihood(hidden, head, labels).total)
    own = penalty_of("python", {"target": "mine:nlcl"})
    assert own.needs == PENALTIES["nlcl"].needs
    assert torch.equal(
        own.fn(hidden, head, labels, segments=segments).total,
        PENALTIES["nlcl"].fn(hidden, head, labels, segments=segments).total,
    )


def test_another_writer_of_prompts_that_only_seem_toxic_writes_anew(here, tiny):
    recipe = small_recipe(here, tiny)
    recipe["harvest"] |= {"contrastive": {"words": 1, "per_word": 2, "engine": {"target": "mine:one"}}}
    Path("mine.yaml").write_text(yaml.safe_dump(recipe))
    says = """
    def {name}(prompts, sampling):
        return ["The {name} forbidden question?" for prompt in prompts]
    """
    code = "".join(textwrap.dedent(says.format(name=name)) for name in ("one", "two"))
    Path("mine.py").write_text(code)

    def written(*overrides):
        Pipeline(recipe_file.load("mine.yaml", overrides), Path("run")).go(("harvest",))
        found = [
            row["completion"] for row in rows(Path("run/harvest/replies.jsonl")) if row["set"].startswith("contrast")
        ]
        return len(found), set(found)

    assert written() == (2, {"The one forbidden question?"})
    assert written("harvest.contrastive.engine.target=mine:two") == (2, {"The two forbidden question?"})
    Path("mine.py").write_text(code.replace("The two", "By now the two"))
    del sys.modules["mine"]
    assert written("harvest.contrastive.engine.target=mine:two") == (2, {"By now the two forbidden question?"})


def test_an_engine_of_ones_own_answers_each_request_whatever_was_done_before(here):
    Path("mine.py").write_text(
        "def shout(prompts, sampling, mark='!'):\n"
        "    return [f'{each.upper()}{mark}{sampling.seed}' for each in prompts]\n"
    )
    engine = OwnEngine(PythonEngine(target="mine:shout", options={"mark": "?"}))
    from tasft.data.rows import Prompt

    requests = requests_for([Prompt(str(number), f"say {number}") for number in range(70)])
    whole = [reply for batch in engine.generate(requests, Sampling(8), "set") for reply in batch]
    assert [reply.completion.partition("?")[0] for reply in whole] == [f"SAY {number}" for number in range(70)]
    part = [reply for batch in engine.generate(requests, Sampling(8), "set", done={"3", "69"}) for reply in batch]
    assert part == [reply for reply in whole if reply.id not in ("3", "69")]
    assert len({reply.seed for reply in whole}) == 3
    with pytest.raises(UserError, match="cannot go on from a text"):
        next(engine.generate(requests_for([Prompt("1", "x")], prefix="No"), Sampling(8), "set"))


JUDGES = {
    "raises": (
        "raise KeyError('words')",
        r"mine:judge raised an error when it worked: KeyError: 'words' \(.*mine.py:2\)",
    ),
    "too_few": ("return [{'harmful': True}]", "mine:judge gave back 1 verdicts for 2: give a list of one for each"),
    "nothing": ("return None", "mine:judge gave back NoneType verdicts for 2"),
    "no_row": ("return [True, False]", "of the reply 'a': expected a dictionary with some of harmful, .*found True"),
    "nan": ("return [{'score': float('nan')}] * 2", "of the reply 'a': score is nan; give a finite number"),
    "word": ("return [{'harmful': 'yes'}] * 2", "harmful is 'yes'; give bool, or None"),
    "field": ("return [{'harm': True}] * 2", "'harm' is not known; give some of harmful, refusal"),
}


@pytest.mark.parametrize("name", JUDGES)
def test_a_judge_that_gives_back_something_else_is_answered_with_a_sentence(here, name):
    code, sentence = JUDGES[name]
    Path("mine.py").write_text(f"def judge(pairs):\n    {code}\n")
    with pytest.raises(UserError, match=sentence):
        load_judge("python:mine:judge").judge(PAIRS)


@pytest.mark.parametrize(
    ("code", "target", "sentence"),
    [
        ("", "mine:judge", "mine:judge: mine has no judge"),
        ("def judges(pairs): ...", "mine:judge", "did you mean judges?"),
        ("import nowhere", "mine:judge", r"mine cannot be imported \(ModuleNotFoundError: No module named 'nowhere'\)"),
        ("def judge(", "mine:judge", r"mine cannot be imported \(SyntaxError"),
        ("", "nowhere:judge", "nowhere cannot be imported"),
        ("judge = 3", "mine:judge", "mine:judge is a int, and cannot be called"),
        ("def judge(): ...", "mine:judge", r"mine:judge takes \(\), but is called with \(pairs\)"),
        ("def judge(pairs, words): ...", "mine:judge", r"takes \(pairs, words\).*missing a required argument: 'words'"),
        (
            "class judge:\n    def __init__(self): raise ValueError('no key')",
            "mine:judge",
            "when it was made: ValueError",
        ),
        ("def judge(pairs): ...\njudge.tells = {'harm'}", "mine:judge", "tells names harm; a judge tells some of"),
        ("", "nobody", r"'nobody' is no part: write it as mypkg.parts:Name, or .* \(none has\)"),
    ],
)
def test_a_judge_that_cannot_be_had_is_answered_with_a_sentence(here, code, target, sentence):
    Path("mine.py").write_text(code)
    with pytest.raises(UserError, match=sentence):
        load_judge(f"python:{target}")


def test_a_penalty_that_does_not_fit_is_answered_with_a_sentence(here):
    Path("mine.py").write_text(
        "def few(hidden, head): ...\n"
        "def needy(hidden, head, labels, weights, all): ...\nneedy.needs = ['all']\n"
        "def bare(hidden, head, labels, weights=None): return hidden.sum()\n"
    )
    for name, sentence in (
        ("few", r"mine:few takes \(hidden, head\), but is called with \(hidden, head, labels, \*, weights\)"),
        ("needy", "mine:needy: needs names all; there is beta, margins"),
    ):
        with pytest.raises(UserError, match=sentence):
            penalty_of("python", {"target": f"mine:{name}"})
    with pytest.raises(UserError, match="mine:bare gave back Tensor; a penalty gives a "):
        penalty_of("python", {"target": "mine:bare"}).fn(torch.ones(2, 2), None, torch.ones(2))
    with pytest.raises(UserError, match="penalty is python: say where it is"):
        penalty_of("python")


@pytest.mark.parametrize(
    ("target", "options", "sentence"),
    [
        ("subprocess:Popen", {"args": ["touch", "planted"]}, "subprocess does not lie in this folder"),
        ("os:system", {"command": "touch planted"}, "os does not lie in this folder"),
        ("torch.hub:load", {}, "torch does not lie in this folder"),
        ("mine:subprocess.Popen", {"args": ["touch", "planted"]}, "Popen is of subprocess, and not defined in mine"),
        ("mine:run", {"args": ["touch", "planted"]}, "run is of subprocess, and not defined in mine"),
    ],
)
def test_a_recipe_of_somebody_else_runs_no_code_but_that_of_this_folder(here, target, options, sentence):
    Path("mine.py").write_text("import subprocess\nfrom subprocess import run\n")
    with pytest.raises(UserError, match=sentence):
        load_judge("mine", {"mine": JudgeSettings(kind="python", target=target, options=options)})
    assert not Path("planted").exists()


def test_a_registered_part_has_a_name(here, monkeypatch):
    Path("mine.py").write_text("def judge(pairs): return [{'harmful': True} for _ in pairs]\n")
    found = [EntryPoint("loud", "mine:judge", "tasft.judges")]
    monkeypatch.setattr(parts, "entry_points", lambda group: [each for each in found if each.group == group])
    parts.registered.cache_clear()
    try:
        own = Own("judges", Part(target="loud"), lambda _: ["pairs"])
        assert own.where == "loud"
        assert own(PAIRS) == [{"harmful": True}] * 2
        judge = load_judge("mine", {"mine": JudgeSettings(kind="python", target="loud")})
        assert [verdict.harmful for verdict in judge.judge(PAIRS)] == [True, True]
    finally:
        parts.registered.cache_clear()
