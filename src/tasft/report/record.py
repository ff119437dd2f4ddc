"""What a report is written from: plain values, as the files of a folder have them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tasft.core.stats import Estimate
from tasft.report.files import Row

TITLES = {"base": "base model", "sft": "SFT model", "final": "final model"}
"""State of the model of a run -> how it is called."""


@dataclass(frozen=True)
class Judged:
    """What one judge said of the replies to one set.

    Attributes:
        estimates: Measure -> its rate in [0, 1], from `summary.json`.
        verdicts: Reply id -> verdict.
        unreadable: Verdicts that could not be read; they are in no estimate's n.
        causes: Why replies are incoherent -> how many are.
        topics: Topic of the prompts -> the same estimates for them alone.
        score: Mean of the judge's scores, in its own unit; None where it gives none.
    """

    estimates: Mapping[str, Estimate]
    verdicts: Mapping[str, Row]
    unreadable: int = 0
    causes: Mapping[str, int] = field(default_factory=dict)
    topics: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    score: Estimate | None = None


@dataclass(frozen=True)
class Evaluated:
    """The replies of one model to one set of prompts: reply id -> reply, judge -> what it said."""

    replies: Mapping[str, Row]
    judged: Mapping[str, Judged]


@dataclass(frozen=True)
class Measured:
    """What was measured of one model by other means than prompt sets: metric -> estimate, and a row for each item."""

    estimates: Mapping[str, Estimate]
    items: list[Row]


@dataclass(frozen=True)
class SetRecord:
    """A set of prompts and what became of it, by state; any may be absent."""

    name: str
    kind: str
    source: str
    states: Mapping[str, Evaluated]

    @property
    def title(self) -> str:
        """How it is called in a sentence."""
        kind = f"{self.kind} prompts"
        return kind if self.name == self.kind else f"{kind} ({self.name})"


@dataclass(frozen=True)
class Attacked:
    """What one attack did to the model in one state.

    Attributes:
        judge: Its name.
        estimates: Figure -> its estimate: `success` and `success_per_attempt` in [0, 1], `score` and `best_score` in
            the judge's own unit.
        behaviours: Id of a prompt -> what became of it.
        queries: Prompts that were sent.
        unjudged: Prompts without an attempt that has a verdict.
        evaluated: What was sent, with its replies and the verdicts on them.
    """

    judge: str
    estimates: Mapping[str, Estimate]
    behaviours: Mapping[str, Row]
    queries: int
    unjudged: int
    evaluated: Evaluated


@dataclass(frozen=True)
class Record:
    """All that a report needs of what it is about.

    Attributes:
        name: The recipe's, else the folder's.
        states: State -> how that model is called, in the order of the columns; those that were evaluated.
        before: The state that changes are counted from; None where nothing is compared.
        changed: The states whose change from it is told.
        sets: Toxic sets first.
        judges: In the recipe's order.
        attacks: Attack -> state -> what it did.
        measured: A task or a kind of quality, such as `capability/boolq` -> state -> what was found.
        notes: What is missing or could not be read, one sentence each.
        recipe: The resolved recipe; empty if it is absent. The same for `manifest`.
        recipe_text: The recipe as it stands in the file. The same for `manifest_text`.
        harvest: `harvest/summary.json`, or empty. The same for `calibration`.
        rows: Kind of row -> how many the harvest wrote; a kind without a file is absent.
        mixed: Rows in `train/data.jsonl` as (imitate, avoid), or None.
        steps: Of the training whose model was saved; None if that is not known.
        metrics: One row per logged step.
        monitor: What the monitor against collapse saw, a row for each time.
        start: Set -> what was measured of the model that safety training starts from; without replies and verdicts.
        checkpoints: Step -> the same of the model saved at that step.
        unmeasured: The evaluations of other kinds that are not there.
        gate: What `tasft.run.gate` found, or empty.
    """

    name: str
    states: Mapping[str, str]
    before: str | None
    changed: Sequence[str]
    sets: list[SetRecord]
    judges: list[str]
    attacks: Mapping[str, Mapping[str, Attacked]]
    measured: Mapping[str, Mapping[str, Measured]]
    notes: list[str]
    recipe: Row = field(default_factory=dict)
    recipe_text: str = ""
    manifest: Row = field(default_factory=dict)
    manifest_text: str = ""
    calibration: Row = field(default_factory=dict)
    harvest: Row = field(default_factory=dict)
    rows: Mapping[str, int] = field(default_factory=dict)
    mixed: tuple[int, int] | None = None
    steps: int | None = None
    metrics: list[Row] = field(default_factory=list)
    monitor: list[Row] = field(default_factory=list)
    start: Mapping[str, Evaluated] = field(default_factory=dict)
    checkpoints: Mapping[int, Mapping[str, Evaluated]] = field(default_factory=dict)
    unmeasured: list[str] = field(default_factory=list)
    gate: Row = field(default_factory=dict)

    def field(self, path: str) -> Any:
        """The recipe's value at a dotted path such as `train.penalty`; None where there is none."""
        value: Any = self.recipe
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    @property
    def heads(self) -> list[str]:
        """What stands above the columns of states."""
        return [title[:1].upper() + title[1:] if self.is_run else title for title in self.states.values()]

    @property
    def change_heads(self) -> list[str]:
        """What stands above the columns of changes."""
        before = self.states[self.before] if self.before else ""
        if self.is_run:
            return [f"Change from the {before}"] * len(self.changed)
        return [f"{self.states[state]} against {before}" for state in self.changed]

    @property
    def is_run(self) -> bool:
        """Whether it is a run, with a recipe and a training, and not a model alone or several beside each other."""
        return bool(self.states.keys() & TITLES.keys())
