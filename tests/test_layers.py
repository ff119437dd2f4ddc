"""Which module may import which: the arrows of the design, enforced."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "tasft"
EVERYWHERE = {"errors", "provenance"}

# Module or package: what it may import from tasft, besides `errors` and `provenance`.
MAY_IMPORT = {
    "redact": set(),
    "errors": {"redact"},
    "provenance": set(),
    "sets": set(),
    "data": {"sets"},
    "coherence": set(),
    "encoder": set(),
    "stats": set(),
    "items": {"stats"},
    "text": set(),
    "loss": {"loss"},
    "model": {"loss"},
    "encode": {"data", "loss"},
    "metrics": set(),
    "progress": set(),
    "preview": {"encode", "loss", "text"},
    "engines": {"engines", "data", "encode", "launch", "model", "redact"},
    "batch": {"loss"},
    "guard": {"coherence"},
    "launch": set(),
    "sampler": set(),
    "trainer": {"batch", "encode", "loss", "metrics", "model", "sampler"},
    "judges": {"judges", "coherence", "data", "encoder", "engines", "launch", "model"},
    "calibration": {"coherence", "data", "engines", "judges", "launch"},
    "contamination": set(),
    "contrastive": {"data", "engines"},
    "harvest": {"contrastive", "data", "engines", "judges", "launch"},
    "evaluate": {
        "evaluate",
        "coherence",
        "data",
        "encode",
        "engines",
        "items",
        "judges",
        "launch",
        "loss",
        "model",
        "sets",
        "stats",
        "steps",
        "text",
    },
    "recipe": {"engines", "judges", "loss", "redact", "sets"},
    "report": {"report", "items", "stats", "text"},
    "doctor": {"encoder", "model", "text"},
    "init": {"model", "recipe"},
    "estimate": {"calibration", "encode", "model", "pipeline", "recipe", "text", "training"},
    "gate": {"recipe", "report", "stats"},
    "steps": {"launch"},
    "baselines": {"data", "encode", "loss", "metrics"},
    "inputs": {
        "baselines",
        "contamination",
        "data",
        "encode",
        "encoder",
        "engines",
        "evaluate",
        "judges",
        "model",
        "recipe",
        "sets",
    },
    "training": {"baselines", "data", "guard", "launch", "model", "recipe", "trainer"},
    "pipeline": {
        "baselines",
        "calibration",
        "coherence",
        "contrastive",
        "data",
        "encode",
        "encoder",
        "engines",
        "evaluate",
        "gate",
        "harvest",
        "inputs",
        "judges",
        "launch",
        "model",
        "preview",
        "recipe",
        "report",
        "steps",
        "training",
    },
    "sweep": {"inputs", "pipeline", "progress", "recipe", "redact", "report"},
    "export": {"encode", "model", "recipe", "report", "steps"},
    "chat": {"chat", "data", "encode", "engines", "judges", "model", "recipe", "text"},
    "cli": {
        "chat",
        "doctor",
        "engines",
        "estimate",
        "evaluate",
        "export",
        "init",
        "inputs",
        "judges",
        "launch",
        "pipeline",
        "progress",
        "recipe",
        "redact",
        "report",
        "sweep",
        "text",
    },
    "__init__": {"trainer"},
}
PURE = {
    "redact": set(),
    "errors": {"redact"},
    "loss": {"loss"},
    "coherence": set(),
    "provenance": {"errors"},
    "stats": {"errors"},
}


def imports_of(path):
    """Modules of ours that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not any(name.name.startswith("tasft.") for name in node.names), f"{path}: from tasft.x import y"
        if isinstance(node, ast.ImportFrom) and node.module == "tasft":
            yield from (name.name for name in node.names)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tasft."):
            yield node.module.split(".")[1]


def room(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def test_every_module_obeys_the_layering():
    for path in PACKAGE.rglob("*.py"):
        name = room(path)
        allowed = PURE.get(name, MAY_IMPORT[name] | EVERYWHERE)
        extra = set(imports_of(path)) - allowed
        assert not extra, f"{path.name} imports {sorted(extra)}: remove it, or argue for a new arrow"


def test_the_table_names_every_room_and_no_other():
    assert {room(path) for path in PACKAGE.rglob("*.py")} == set(MAY_IMPORT)


def test_the_losses_import_nothing_but_torch_and_what_comes_with_it():
    allowed = {
        "torch",
        "jaxtyping",
        "tasft",
        "math",
        "dataclasses",
        "typing",
        "collections",
        "scipy",
        "numpy",
        "types",
        "triton",
    }
    for path in (PACKAGE / "loss").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            assert {name.split(".")[0] for name in names} <= allowed, f"{path.name} imports {names}"
