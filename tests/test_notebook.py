"""The notebook runs from its first cell to its last, offline."""

import json
import warnings

import matplotlib
import pytest
from conftest import ROOT, needs_models

NOTEBOOK = json.loads((ROOT / "docs" / "notebook.ipynb").read_text(encoding="utf-8"))


def test_what_it_keeps_of_its_outputs_is_small():
    assert len(json.dumps([cell.get("outputs") for cell in NOTEBOOK["cells"]])) < 100_000


@needs_models
@pytest.mark.slow
def test_every_cell_runs():
    matplotlib.use("agg")
    names: dict[str, object] = {}
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    rates = names["rates"]
    assert set(rates) == {"before", "after"}
    assert all(0 <= rate <= 1 for kinds in rates.values() for rate in kinds.values())
