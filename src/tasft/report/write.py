"""A record -> the files of its report: `index.html`, `report.md`, `results.csv`, and of a run `model_card.md`."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from tasft.core.provenance import atomic_write_text
from tasft.report.blocks import Document
from tasft.report.card import model_card, plain_card
from tasft.report.markdown import markdown
from tasft.report.page import page
from tasft.report.read import read_model, read_models, read_run
from tasft.report.record import Record
from tasft.report.results import as_csv
from tasft.report.sections import document

RUN = "Report of a tasft run"


def write_report(run: Path) -> Path:
    """Writes the report of a run folder from its files alone, each file atomically.

    Replies are in `index.html` only, escaped and behind a click.
    What the folder lacks is named in the report.

    Returns:
        The path of `report/index.html`.

    Raises:
        UserError: The folder holds no evaluation, neither before nor after training.
    """
    record = read_run(run)
    report = document(record, RUN)
    index = _write(record, report, run / "report")
    atomic_write_text(run / "report" / "model_card.md", model_card(record, report))
    return index


def write_model_report(folder: Path) -> Path:
    """Writes the report of a model that was evaluated alone into the folder of its evaluation, as `write_report`.

    Raises:
        UserError: The folder holds no evaluation.
    """
    record = read_model(folder)
    return _write(record, document(record, "Report of a model"), folder / "report")


def write_comparison(
    folders: Mapping[str, Path],
    target: Path,
    comparable: Mapping[str, Collection[tuple[str, str]]] | None = None,
    notes: Iterable[str] = (),
) -> Path:
    """Writes one page on several models, the first being the one that the others are compared with.

    Args:
        folders: As `read_models` takes them; the same for `comparable`.
        target: The files go into its `report/`.
        comparable: What may be compared.
        notes: What cannot be, and why.

    Raises:
        UserError: One of them holds no evaluation.
    """
    record = read_models(folders, comparable)
    return _write(record, document(record, "Comparison of models", notes), target / "report")


def _write(record: Record, report: Document, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / "results.csv", as_csv(record))
    atomic_write_text(folder / "report.md", markdown(report))
    atomic_write_text(folder / "index.html", page(report))
    return folder / "index.html"


def write_plain_card(base: str, path: Path, usage: Sequence[str]) -> None:
    """Write the `README.md` of an adapter that was merged into a model and of which no run tells anything."""
    atomic_write_text(path, plain_card(base, usage))


def write_card(run: Path, path: Path, usage: Sequence[str]) -> None:
    """Write the model card of a run as the `README.md` of its merged model.

    Args:
        run: The run folder.
        path: Of the card.
        usage: As `model_card` takes it.

    Raises:
        UserError: As `write_report`.
    """
    record = read_run(run)
    atomic_write_text(path, model_card(record, document(record, RUN), usage))
