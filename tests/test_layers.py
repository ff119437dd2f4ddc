"""Which room may import which: the arrows of the house, enforced."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "tasft"

# Room: the rooms below it that it may import from. A file may import from its own room too, but not in a circle.
MAY_IMPORT = {
    "cli": {"run", "evaluate", "judges", "models", "data", "report", "core"},
    "run": {"harvest", "train", "evaluate", "judges", "models", "data", "report", "core"},
    "harvest": {"judges", "models", "data", "core"},
    "integrations": {"train", "loss", "core"},
    "train": {"judges", "models", "data", "loss", "core"},
    "evaluate": {"judges", "models", "data", "loss", "core"},
    "judges": {"models", "data", "core"},
    "models": {"data", "loss", "core"},
    "data": {"loss", "core"},
    "report": {"core"},
    "loss": set(),
    "core": set(),
    "__init__": {"run", "train", "judges", "data", "report", "loss", "core"},
}
LOSSES_MAY_USE = {"torch", "jaxtyping", "tasft", "scipy", "numpy", "triton"}
LOSSES_MAY_USE |= {"math", "dataclasses", "typing", "collections", "types"}


def module_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path):
    """Modules of ours that a file imports, also inside functions, without the package's own name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not any(name.name.startswith("tasft.") for name in node.names), f"{path}: from tasft.x import y"
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tasft":
            for name in node.names:
                full = f"{node.module}.{name.name}".removeprefix("tasft.")
                below = PACKAGE.joinpath(*full.split("."))
                is_module = below.with_suffix(".py").is_file() or below.is_dir()
                yield full if is_module else full.rpartition(".")[0]


FILES = {module_of(path): path for path in PACKAGE.rglob("*.py")}


@pytest.mark.parametrize("module", FILES)
def test_every_module_obeys_the_layering(module):
    room = module.split(".")[0]
    extra = {name for name in imports_of(FILES[module]) if name.split(".")[0] not in MAY_IMPORT[room] | {room}}
    assert not extra, f"{module} imports {sorted(extra)}: remove it, or argue for a new arrow"


LONGEST_FILE, LONGEST_BODY = 500, 60  # Lines; of a function, without its signature and docstring.
# Functions that are longer, and why.
LONGER = {
    "harvest.harvest.harvest": "a list of what is drawn, judged and kept, each of which the next one needs",
}


def body_of(function):
    first = function.body[1:] if ast.get_docstring(function) and len(function.body) > 1 else function.body
    return first[-1].end_lineno - first[0].lineno + 1


def test_no_file_and_no_function_is_too_long_to_be_read_at_once():
    assert not {module for module, path in FILES.items() if len(path.read_text().splitlines()) > LONGEST_FILE}
    longer = {
        f"{module}.{node.name}"
        for module, path in FILES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and body_of(node) > LONGEST_BODY
    }
    assert longer == LONGER.keys()


def test_the_table_names_every_room_and_no_other():
    assert {module.split(".")[0] for module in FILES} == set(MAY_IMPORT)


def test_rooms_and_files_have_no_circle():
    TopologicalSorter(MAY_IMPORT).prepare()
    TopologicalSorter({module: set(imports_of(path)) - {module} for module, path in FILES.items()}).prepare()


def test_the_losses_import_nothing_but_torch_and_what_comes_with_it():
    for path in (PACKAGE / "loss").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            assert {name.split(".")[0] for name in names} <= LOSSES_MAY_USE, f"{path.name} imports {names}"


def test_a_recipe_is_read_without_the_packages_that_would_run_it():
    code = (
        "import sys, tasft.run.recipe, tasft.run.recipe_file\n"
        "print([name for name in ('torch', 'transformers', 'peft', 'accelerate', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_names_of_penalties_are_those_of_the_losses():
    from tasft.core.names import PENALTIES as names
    from tasft.loss import PENALTIES

    assert names == tuple(PENALTIES)


def test_public_names_are_there_and_no_others():
    import tasft

    assert set(tasft.__all__) == set(tasft._HOMES) <= set(dir(tasft))
    assert all(getattr(tasft, name) is not None for name in tasft.__all__)
    with pytest.raises(AttributeError, match="Trainer"):
        tasft.Trainer  # noqa: B018


# Two classes of one name, and why.
TWICE = {
    "Question": "to a judge's model, and the request to a server that it becomes",
    "Answer": "likewise",
    "Verdict": "of a judge, and the block of a report that shows the run's",
}


def defined(kind):
    """Public names that files define at their top, each with its modules."""
    homes = {}
    for module, path in FILES.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, kind) and not node.name.startswith("_"):
                homes.setdefault(node.name, set()).add(module)
    return homes


def test_a_class_of_one_name_is_one_thing():
    twice = {name: modules for name, modules in defined(ast.ClassDef).items() if len(modules) > 1}
    assert twice.keys() == TWICE.keys(), twice


def test_a_function_of_a_name_that_two_modules_have_is_called_with_that_of_its_module():
    twice = {name: modules for name, modules in defined(ast.FunctionDef).items() if len(modules) > 1}
    bare = {}
    for module, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            for name in node.names if isinstance(node, ast.ImportFrom) else ():
                home = f"{node.module}".removeprefix("tasft.")
                # Within a room, and of a room's own front, a bare name is still the only one in sight.
                if name.name in twice and home in twice[name.name] and home.split(".")[0] != module.split(".")[0]:
                    bare.setdefault(name.name, set()).add((module, home))
    mixed = {name: places for name, places in bare.items() if len({home for _, home in places}) > 1}
    assert not mixed, mixed
