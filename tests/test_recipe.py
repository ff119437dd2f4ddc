import ast
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from tasft.core.errors import UserError
from tasft.run import recipe, recipe_file

ROOT = Path(__file__).parents[1]
SMALL = {
    "name": "small",
    "model": {"base": "somewhere"},
    "data": {"toxic_prompts": "demo-toxic-harvest", "benign_prompts": "demo-benign-train"},
    "harvest": {},
    "train": {"max_steps": 3},
    "evaluate": {"sets": {"toxic": {"source": "demo-toxic-heldout", "kind": "toxic"}}},
}


def written(folder, values, name="recipe.yaml"):
    path = folder / name
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return str(path)


def faults(folder, values, *overrides):
    with pytest.raises(UserError) as caught:
        recipe_file.load(written(folder, values), overrides)
    return caught.value.faults


def test_a_resolved_recipe_reads_back_as_itself(tmp_path):
    spec = recipe_file.load(written(tmp_path, SMALL))
    assert recipe_file.load(written(tmp_path, recipe_file.dump(spec), "again.yaml")) == spec


@pytest.mark.parametrize("name", [name for name in recipe_file.shipped() if not recipe_file.is_sweep(name)])
def test_every_shipped_recipe_is_valid(name):
    assert recipe_file.load(name).name == name


def test_all_faults_are_named_at_once_each_with_its_field(tmp_path):
    wrong = SMALL | {"train": {"max_steps": 0, "penalty": "emdd", "lambda": 2}, "modle": {}, "seed": "x"}
    found = faults(tmp_path, wrong)
    assert len(found) == 5
    for field in ("train.max_steps", "train.penalty", "train.lambda: no such field", "modle: no such field", "seed"):
        assert any(field in fault for fault in found), field
    assert any("'emd_hinge'" in fault for fault in found)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"train": {}}, "either epochs or max_steps"),
        ({"train": {"max_steps": 1, "epochs": 1}}, "either epochs or max_steps"),
        ({"train": {"max_steps": 1, "batch_size": 8, "micro_batch_size": 3}}, "not a multiple"),
        ({"harvest": None}, "add a harvest section"),
        ({"data": {"benign_prompts": "x"}}, "data.toxic_prompts is missing"),
        ({"data": {"toxic_prompts": "x"}}, "nothing to imitate"),
        ({"train": {"max_steps": 1, "method": "sft"}}, "data.imitate is missing"),
        ({"train": {"max_steps": 1, "start": "sft"}}, "add an sft section"),
        ({"sft": {"max_steps": 1}}, "the sft section needs data.imitate"),
        ({"evaluate": {"sets": {}}}, "evaluate.sets"),
        ({"name": "../up"}, "name"),
        ({"evaluate": {"sets": {"../up": {"source": "x", "kind": "toxic"}}}}, "evaluate.sets"),
        ({"evaluate": {"sets": {"quality": {"source": "x", "kind": "toxic"}}}}, "a name of another evaluation"),
        ({"evaluate": {"sets": ["paper", "papers"]}}, "no prompt set is called 'papers'"),
        ({"evaluate": {"sets": []}}, "evaluate.sets"),
        ({"evaluate": {"sets": {"mine": {"source": "x.jsonl"}}}}, "evaluate.sets.mine.kind: is missing"),
        ({"train": {"max_steps": 1, "batch_size": 2, "avoid_per_step": 2}}, "leaves no row to imitate"),
        ({"train": {"max_steps": 1, "learning_rate": float("inf")}}, "train.learning_rate"),
        ({"model": {"base": "x", "quantize": "4bit", "lora": None}}, "model.quantize"),
        ({"model": {}}, "model.base: is missing"),
        ({"harvest": {"temperature": -1}}, "harvest.temperature"),
        ({"extends": "nowhere.yaml"}, "nowhere.yaml"),
        ({"extends": 3}, "must name a recipe file"),
        ({"extends": "recipe.yaml"}, "extends itself"),
    ],
)
def test_a_wrong_recipe_gets_a_sentence(tmp_path, change, sentence):
    assert any(sentence in fault for fault in faults(tmp_path, SMALL | change))


@pytest.mark.parametrize("text", ["", "- a\n", "a: [\n", "3", "\ta: 1"])
def test_what_is_not_a_recipe_is_named_with_its_file(tmp_path, text):
    assert all("recipe.yaml" in fault for fault in faults(tmp_path, text))


def test_a_name_that_is_no_recipe_lists_the_shipped_ones():
    with pytest.raises(UserError, match="demo"):
        recipe_file.load("demmo")


def test_an_override_reaches_its_field_and_a_bad_one_is_named(tmp_path):
    spec = recipe_file.load(
        written(tmp_path, SMALL), ["train.penalty=nlcl", "train.learning_rate=1e-3", "model.lora=null"]
    )
    assert (spec.train.penalty, spec.train.learning_rate, spec.model.lora) == ("nlcl", 1e-3, None)
    found = faults(tmp_path, SMALL, "train.penalty", "name.x=1", "=3")
    assert len(found) == 3


def test_named_sets_may_be_listed_and_know_their_kind(tmp_path):
    spec = recipe_file.load(written(tmp_path, SMALL | {"evaluate": {"sets": ["xstest", "harmfulq"]}}))
    assert {name: (wanted.source, wanted.kind) for name, wanted in spec.evaluate.sets.items()} == {
        "xstest-safe": ("xstest-safe", "benign"),
        "xstest-unsafe": ("xstest-unsafe", "toxic"),
        "harmfulq": ("harmfulq", "toxic"),
    }
    assert recipe_file.load(written(tmp_path, recipe_file.dump(spec), "again.yaml")) == spec
    assert list(recipe_file.load(written(tmp_path, SMALL), ["evaluate.sets=xstest"]).evaluate.sets) == [
        "xstest-safe",
        "xstest-unsafe",
    ]
    mapped = SMALL | {"evaluate": {"sets": {"xs": {"source": "xstest-safe"}}}}
    assert recipe_file.load(written(tmp_path, mapped)).evaluate.sets["xs"].kind == "benign"


def test_a_recipe_can_extend_another(tmp_path):
    written(tmp_path, SMALL, "below.yaml")
    above = {"extends": "below.yaml", "train": {"penalty": "nlcl"}}
    spec = recipe_file.load(written(tmp_path, above))
    assert (spec.train.penalty, spec.train.max_steps) == ("nlcl", 3)


def sections(model):
    yield model
    for field in model.model_fields.values():
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from sections(kind)


def test_every_field_is_read_by_something_and_says_what_it_means():
    read = {
        node.attr
        for path in (ROOT / "src" / "tasft").rglob("*.py")
        if path.name != "recipe.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
    # The adapter's fields are the keyword arguments of `model.add_lora`.
    passed_whole = set(recipe.Lora.model_fields)
    for section in sections(recipe.Recipe):
        for name, field in section.model_fields.items():
            assert name in read | passed_whole, f"{section.__name__}.{name} is read by nothing"
            nested = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
            assert field.description or nested or name in ("model", "data", "train", "evaluate"), name


@pytest.mark.parametrize(
    ("gate", "sentence"),
    [
        ({}, "gate: no limit is given"),
        ({"strict": True}, "gate: no limit is given"),
        ({"harmfull": 2}, "gate.harmfull: no such field"),
        ({"harmful": -1}, "gate.harmful: input should be greater than or equal to 0"),
        ({"harmful": 101}, "gate.harmful"),
        ({"harmful": "2%"}, "gate.harmful: input should be a valid number"),
        ({"over_refusal": 5}, "gate.over_refusal needs benign prompts: evaluate.sets has none"),
        ({"capability": {"boolq": -1}}, "gate.capability.boolq: evaluate.capability does not run it (no task)"),
        ({"jailbreak": {"prefix": 1}}, "gate.jailbreak.prefix: evaluate.jailbreak does not run it (no attack)"),
        ({"jailbreak": {"prefixx": 1}}, "gate.jailbreak.prefixx"),
    ],
)
def test_a_wrong_gate_gets_a_sentence(tmp_path, gate, sentence):
    assert any(sentence in fault for fault in faults(tmp_path, SMALL | {"gate": gate}))


def test_a_gate_is_read_with_what_it_limits(tmp_path):
    sets = SMALL["evaluate"]["sets"] | {"benign": {"source": "demo-benign-heldout", "kind": "benign"}}
    evaluate = {"sets": sets, "capability": {"tasks": ["boolq"]}, "jailbreak": {"set": "toxic", "prefix": "Sure"}}
    limits = {"harmful": 2, "over_refusal": 5, "capability": {"boolq": -1}, "jailbreak": {"prefix": 10}}
    spec = recipe_file.load(written(tmp_path, SMALL | {"evaluate": evaluate, "gate": limits}))
    assert spec.gate.capability == {"boolq": -1.0}
    assert recipe_file.load(written(tmp_path, recipe_file.dump(spec), "again.yaml")) == spec
