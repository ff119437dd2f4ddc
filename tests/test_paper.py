"""The recipes of the paper's tables."""

import json
from itertools import product
from math import prod
from pathlib import Path

import pytest
from conftest import ROOT, script

from tasft.run import recipe_file, sweep
from tasft.run.checks import check_inputs
from tasft.run.inputs import Inputs

DATA = Path(__file__).parents[1].parent / "shared/data"


def test_the_recipes_of_the_paper_are_those_of_its_table():
    files = script("paper").written()
    assert {path: path.read_text(encoding="utf-8") for path in files} == files
    assert set((ROOT / "recipes" / "paper").glob("*.yaml")) == set(files)


@pytest.mark.parametrize("name", ["llama-7b", "llama-13b", "mistral-7b", "llama-3.1-8b"])
def test_each_row_of_the_paper_is_a_recipe(name):
    _, cells = sweep.load(str(ROOT / "recipes" / "paper" / f"paper-{name}-rows.yaml"))
    specs = [cell.spec.train for cell in cells]
    assert [spec.method for spec in specs] == ["sft", "kto"] + ["stl"] * 4 + ["tasft"] * 14
    assert sum(cell.spec.harvest.contrastive is not None for cell in cells) == 4
    # s = 1000 / 21000: 1 - (1 - s)^3 = 0.13616, and 1 - s^3 = 0.99989.
    tuned = script("paper").MODELS[name]
    tokens = 56.9 if "3.1" in name else 63.3
    assert specs[13].penalty_weight == pytest.approx(tuned.emd[0] * 0.13616 / 0.99989, rel=5e-3)
    assert specs[6].penalty_weight == pytest.approx(tuned.nlcl[0] * 0.13616 / 0.99989 / tokens, rel=5e-3)
    # With 3,335 contrastive rows s = 1000 / 24335: 1 - (1 - s)^3 = 0.11828, and 1 - s^3 = 0.99993.
    for cell in cells:
        spec, contrastive = cell.spec.train, cell.spec.harvest.contrastive
        if contrastive:
            most = getattr(tuned, spec.penalty)[0] / (tokens if spec.penalty == "nlcl" else 1)
            times = spec.penalty_weight / (most * 0.11828 / 0.99993)
            assert min(abs(times - 1), abs(times - 2)) < 5e-3


def test_a_weight_is_translated_by_what_a_step_holds():
    """Micro-batches of 3 drawn at random: the chance that one holds a row of each kind, counted one by one."""
    paper, avoid, imitate = script("paper"), 40, 60
    share = avoid / (avoid + imitate)
    chances = {
        kinds: prod(share if kind else 1 - share for kind in kinds) for kinds in product([True, False], repeat=3)
    }
    with_avoid, with_imitate = (sum(p for kinds, p in chances.items() if kind in kinds) for kind in (True, False))
    assert paper.factor(avoid, imitate) == pytest.approx(with_avoid / with_imitate)


@pytest.mark.parametrize("name", ["llama-7b", "llama-13b", "mistral-7b", "llama-3.1-8b"])
def test_what_departs_from_the_paper_is_written_out_and_marked(name):
    lines = (ROOT / "recipes" / "paper" / f"paper-{name}.yaml").read_text().splitlines()
    for field in ("sampling", "normalization", "penalize_eos", "max_length", "kl_rows", "learning_rate"):
        at = max(number for number, line in enumerate(lines) if line.strip().startswith(f"{field}:"))
        assert "ours" in f"{lines[at - 1]} {lines[at]}".lower(), field


@pytest.mark.skipif(not DATA.is_dir(), reason="the public sets are not here")
@pytest.mark.parametrize("name", ["llama-7b", "llama-13b", "mistral-7b", "llama-3.1-8b"])
def test_a_recipe_of_the_paper_reads_the_public_files(tiny, tmp_path, name):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"What is {n}?", "completion": "A thing."}) + "\n" for n in range(9)))
    stand_ins = [
        f"model.base={tiny}",
        f"data.imitate={{source: {rows}, rows: 9}}",
        f"data.toxic_prompts={rows}",
        f"data.benign_prompts={rows}",
        f"data.data_dir={DATA}",
        f"evaluate.quality.prompts={DATA / 'alpaca_eval' / 'text_davinci_003_model_outputs.json'}",
        "judges={deberta: {kind: refusal_matching}, rated: {kind: classifier}}",
        "harvest.judge=classifier",
        "evaluate.judges=[refusal_matching]",
        "evaluate.max_new_tokens=64",  # The small tokenizer makes more of a prompt, and its model reads 512.
    ]
    inputs = Inputs(recipe_file.load(str(ROOT / "recipes" / "paper" / f"paper-{name}.yaml"), stand_ins))
    check_inputs(inputs)
    assert sum(len(inputs.sets[name]) for name in ("i-malicious", "i-cona", "i-controversial", "harmfulq")) == 518


def test_mean_lengths_of_alpacas_outputs_are_those_that_were_measured():
    found = json.loads((ROOT / "docs/results/paper-tokens.json").read_text())["tokens"]
    tokenizers = {"llama-7b": "llama", "llama-13b": "llama", "mistral-7b": "mistral", "llama-3.1-8b": "llama-3.1"}
    for name, model in script("paper").MODELS.items():
        assert model.tokens == round(found[tokenizers[name]]["value"], 1), name
