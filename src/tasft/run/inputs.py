"""What a recipe reads, apart from model weights; torch and transformers are imported for the tokenizer alone."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

from tasft.core.errors import UserError
from tasft.data import forms
from tasft.data.rows import Example, Prompt, drawn, examples_in, prompts_in, read_examples, user_turns, with_input
from tasft.data.sets import KNOWN
from tasft.data.sources import differences_of, parts_of, read_source, source_hash
from tasft.evaluate.jailbreak import read_templates
from tasft.evaluate.references import Reference, read_references
from tasft.evaluate.settings import HELD_OUT
from tasft.judges import Judge, load_judge
from tasft.run.recipe import Recipe, sources_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tasft.data.encode import EncodingReport

T = TypeVar("T")


class Inputs:
    """What a recipe reads, apart from model weights; each source is read once."""

    def __init__(self, spec: Recipe) -> None:
        self.spec = spec
        self.dropped: dict[str, int] = {}
        """Of each field, prompts that were left out because an evaluation set has them."""
        self.told: list[str] = []
        """What was noted of sources when they were read; some are read twice."""
        self._made: dict[str, Judge] = {}

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The base model's tokenizer; it has been seen to write a prompt and a reply."""
        from tasft.data.encode import Encoding, prove
        from tasft.models.load import load_tokenizer

        spec = self.spec.model
        tokenizer = load_tokenizer(spec.base, spec.trust_remote_code)
        prove(tokenizer, Encoding(spec.prompt, chat_template_kwargs=spec.chat_template_kwargs))
        return tokenizer

    @cached_property
    def toxic(self) -> list[Prompt]:
        """Prompts whose harmful answers become avoid rows; none that an evaluation set has."""
        return self._prompts("data.toxic_prompts", self.spec.data.toxic_prompts)

    @cached_property
    def benign(self) -> list[Prompt]:
        """Prompts whose own answers become imitate rows; none that an evaluation set has."""
        return self._prompts("data.benign_prompts", self.spec.data.benign_prompts)

    def _prompts(self, field: str, source: str | None) -> list[Prompt]:
        prompts = self._kept(field, self._read(source), aside=False) if source else []
        return self._uncontaminated(field, prompts, [[prompt.prompt] for prompt in prompts])

    def _kept(self, field: str, rows: Sequence[T], aside: bool) -> list[T]:
        """Rows of a field that are held out of it, or those that are not; all where no set asks for them."""
        if field not in {wanted.source for wanted in self.spec.evaluate.sets.values()}:
            return list(rows)
        from tasft.data.contamination import held_out

        share = float(str(self.spec.data.heldout).rstrip("%")) / 100
        questions = [self._question(row) for row in rows]
        chosen = iter(held_out([text for text in questions if text is not None], share, self.spec.seed))
        return [row for row, text in zip(rows, questions, strict=True) if (text is not None and next(chosen)) is aside]

    def _question(self, row: object) -> str | None:
        """The prompt of a prompt or a row as one text that is asked as it is learned; None where it is more."""
        assert isinstance(row, Prompt | Example)
        if isinstance(row, Prompt):
            return row.prompt
        return None if row.input and self.spec.model.prompt == "alpaca" else row.question

    def _uncontaminated(self, field: str, rows: list[T], texts: list[list[str]]) -> list[T]:
        """Rows none of whose texts is (nearly) a prompt that is evaluated."""
        from tasft.data.contamination import overlapping

        held_out = [prompt.prompt for prompts in self.sets.values() for prompt in prompts]
        held_out += [row.instruction for row in self.references]
        found = iter(overlapping([text for own in texts for text in own], held_out))
        overlaps = [any(list(islice(found, len(own)))) for own in texts]
        self.dropped[field] = sum(overlaps)
        if rows and all(overlaps):
            raise UserError(f"{field}: every prompt is in an evaluation set: nothing is left to train on")
        return [row for row, is_in in zip(rows, overlaps, strict=True) if not is_in]

    @cached_property
    def imitate(self) -> list[Example]:
        """Rows of `data.imitate`, drawn with the run's seed; none whose prompt an evaluation set has."""
        mixture = self.spec.data.mixture
        return [
            row
            for number, (wanted, rows) in enumerate(zip(mixture, self._mixture, strict=True))
            for row in self._to_imitate(
                f"data.imitate.{number}" if len(mixture) > 1 else "data.imitate",
                self._kept("data.imitate", rows, aside=False),
                wanted.rows,
            )
        ]

    @cached_property
    def _mixture(self) -> list[list[Example]]:
        """All rows of each source of `data.imitate`."""
        mixture = []
        for wanted in self.spec.data.mixture:
            loaded = read_source(wanted.source)
            rows, notes = examples_in(loaded, wanted.keep, wanted.drop, wanted.format, wanted.columns)
            self.told += notes
            mixture.append([replace(row, weight=row.weight * wanted.weight) for row in rows])
        return mixture

    @cached_property
    def safe(self) -> list[Example]:
        """Rows of `data.safe_responses`, as many as a run with method stl takes, or all if the harvest chooses."""
        wanted = self.spec.data.safe_responses
        if wanted is None or self.spec.train.method != "stl":
            return []
        examples = read_examples(wanted.source, form=wanted.format, columns=wanted.columns)
        rows = [replace(row, source="safe_responses") for row in examples]
        return self._to_imitate("data.safe_responses", rows, None if wanted.rows == "harvested" else wanted.rows)

    def _to_imitate(self, field: str, rows: list[Example], wanted: int | None) -> list[Example]:
        """Rows drawn with the run's seed, none whose prompt an evaluation set has."""
        avoid = sum(not row.label for row in rows)
        if avoid:
            raise UserError(
                f"{field}: {avoid} rows are to be avoided (label false), which recipes take from the harvest: drop "
                "them, or train on the file with TASFTTrainer"
            )
        talks = sum(not isinstance(row.prompt, str) or not isinstance(row.completion, str) for row in rows)
        if talks and self.spec.model.prompt == "alpaca":
            raise UserError(
                f"{field}: {talks} rows are chat messages, which model.prompt alpaca cannot write: use chat"
            )
        if not rows:
            raise UserError(f"{field}: no row is left: see to keep and drop")
        rows = self._uncontaminated(field, rows, [_texts(row) for row in rows])
        count = len(rows) if wanted is None else wanted
        if not rows or len(rows) < count:
            raise UserError(f"{field}: there are {len(rows)} rows to imitate, {count or 1} are wanted")
        return random.Random(self.spec.seed).sample(rows, count)

    @cached_property
    def sets(self) -> dict[str, list[Prompt]]:
        """Prompts of each evaluation set, also those that `evaluate.limit` leaves out."""
        return {name: self.asked(wanted.source) for name, wanted in self.spec.evaluate.sets.items()}

    def asked(self, source: str) -> list[Prompt]:
        """Prompts of an evaluation set: those of a source, or held out of a field of `data`."""
        if source not in HELD_OUT:
            return self._read(source)
        if source == "data.imitate":
            questions = [self._question(row) for rows in self._mixture for row in rows]
            if several := questions.count(None):
                note = (
                    f"data.heldout: {several:,} of {len(questions):,} rows of data.imitate cannot be set aside: a set "
                    "asks one text, and they have a system message, earlier turns, tools or, with model.prompt alpaca, "
                    "an input"
                )
                if several == len(questions):
                    raise UserError(f"{note}: name a file of prompts in evaluate.sets")
                self.told.append(note)
            aside = [row for rows in self._mixture for row in self._kept(source, rows, aside=True)]
            prompts = [Prompt(str(number), str(self._question(row))) for number, row in enumerate(aside, 1)]
        else:
            named = getattr(self.spec.data, source.partition(".")[2])
            prompts = self._kept(source, self._read(named), aside=True)
        if not prompts:
            raise UserError(f"data.heldout: {self.spec.data.heldout} of {source} gives no row: set more aside")
        return prompts

    def _read(self, source: str) -> list[Prompt]:
        prompts, note = prompts_in(read_source(source, self.spec.data.data_dir))
        self.told += [note] if note else []
        return prompts

    @cached_property
    def behaviours(self) -> list[Prompt]:
        """Prompts that attacks are tried on; those of a limit up to that of the sets are asked plainly too."""
        wanted = self.spec.evaluate.jailbreak
        return drawn(self.sets[wanted.set], wanted.limit, lambda prompt: prompt.prompt) if wanted else []

    @cached_property
    def templates(self) -> list[str]:
        """What those prompts are put into."""
        wanted = self.spec.evaluate.jailbreak
        if wanted is None or wanted.templates is None:
            return []
        source = wanted.templates
        return drawn(read_templates(source.source, source.placeholder, self.spec.data.data_dir), source.limit, str)

    @cached_property
    def references(self) -> list[Reference]:
        """Rows of `evaluate.quality.prompts`."""
        wanted = self.spec.evaluate.quality
        return read_references(wanted.prompts, wanted.limit) if wanted else []

    @cached_property
    def hashes(self) -> dict[str, str]:
        """Content hash of each source, by its field."""
        data_dir = self.spec.data.data_dir
        return {field: source_hash(source, data_dir) for field, source in sources_in(self.spec.model_dump()).items()}

    @cached_property
    def licences(self) -> dict[str, str]:
        """Licence of what is read, by its field, as far as it is known."""
        from tasft.models.bundled import BUNDLED

        bundled = BUNDLED.get(self.spec.model.base)
        known = {field: KNOWN.get(parts_of(source)[0]) for field, source in sources_in(self.spec.model_dump()).items()}
        return ({"model.base": bundled.licence} if bundled else {}) | {
            field: named.licence for field, named in known.items() if named
        }

    @cached_property
    def judge_versions(self) -> dict[str, str]:
        """Content hash of each judge: its model, its prompt, its threshold."""
        return {name: self.judge(name).version for name in self.judges}

    @cached_property
    def sketch(self) -> "PreTrainedModel":
        """The base model without weights."""
        from tasft.models.load import sketch

        return sketch(self.spec.model.base, self.spec.model.trust_remote_code)

    def prompt_ids(self, prompt: str) -> list[int]:
        """The tokens of a prompt, as the model is asked it."""
        from tasft.data.template import encode_prompt

        spec = self.spec.model
        return encode_prompt(self.tokenizer, prompt, spec.prompt, chat_template_kwargs=spec.chat_template_kwargs)

    @cached_property
    def encoded(self) -> "dict[str, EncodingReport]":
        """What becomes of the rows that the recipe names when they are encoded, by `sft` and `train`.

        Raises:
            UserError: A row cannot be encoded, or has tokens that the model does not know or more than it reads.
        """
        from tasft.data.encode import Encoding, encode_rows
        from tasft.models.generation import check_rows

        spec, reports = self.spec.model, {}
        for stage, settings in (("sft", self.spec.sft), ("train", self.spec.train)):
            rows = [*self.imitate, *(self.safe if stage == "train" else ())]
            if settings is None or not rows:
                continue
            encoding = Encoding(
                spec.prompt,
                settings.max_length,
                settings.turns,
                overlong=settings.overlong,
                duplicates=settings.duplicates,
                chat_template_kwargs=spec.chat_template_kwargs,
            )
            encoded, reports[stage] = encode_rows(rows, self.tokenizer, encoding)
            check_rows(self.sketch, self.tokenizer, [row["input_ids"] for row in encoded], f"{stage}.max_length")
        return reports

    def warnings(self) -> list[str]:
        """What is no fault, but a reader of the result will ask about it."""
        form_notes = forms.said(Counter(row.form for row in self.imitate), self.spec.train.turns)
        # Now: reading the rows above counts too.
        counts = [(field, count) for field, count in self.dropped.items() if count]
        warnings = [*dict.fromkeys(self.told), *(f"data.imitate: {line}" for line in form_notes)]
        warnings += [
            f"{field}: {count} prompt{'s' * (count > 1)} left out: (nearly) in an evaluation set"
            for field, count in counts
        ]
        try:
            encoded = self.encoded
        except UserError:
            encoded = {}  # The check has told.
        warnings += list(dict.fromkeys(f"data: rows: {note}" for report in encoded.values() for note in report.notes))
        warnings += self._about_thoughts()
        if unread := self.spec.train.unread():
            warnings.append(
                f"train.method is {self.spec.train.method}, which does not read train.{', train.'.join(unread)}"
            )
        jailbreak = self.spec.evaluate.jailbreak
        for wanted in self.spec.evaluate.sets.values():
            warnings += differences_of(wanted.source, self.spec.data.data_dir)
        if jailbreak and jailbreak.templates:
            warnings += differences_of(jailbreak.templates.source, self.spec.data.data_dir)
        versions = {self.judge(name).version: name for name in self.evaluators}
        for name in self.filters:
            version = self.judge(name).version
            others = [judge for judge in self.spec.evaluate.judges if self.judge(judge).version != version]
            beside = f"read {', '.join(others)} beside it" if others else "evaluate with another judge beside it"
            if version in versions:
                warnings.append(
                    f"harvest.judge: {name} chooses the rows to avoid and also evaluates ({versions[version]}), which "
                    f"flatters the result; {beside}"
                )
        if jailbreak and jailbreak.pair and jailbreak.pair.attacker is None:
            warnings.append(
                "evaluate.jailbreak.pair: without an attacker the base model rewrites the prompts itself; a small one "
                "hardly can, and the figure then says little"
            )
        return warnings

    def _about_thoughts(self) -> list[str]:
        from tasft.data.template import Writer

        spec = self.spec.model
        if not Writer(self.tokenizer, spec.prompt, spec.chat_template_kwargs).thinks:
            return []
        at_once = " or say model.chat_template_kwargs: {enable_thinking: false}"
        knows = "enable_thinking" in str(self.tokenizer.chat_template)
        return [
            "model.base: it may think before it answers; answers are what is judged and learned, but thoughts count "
            "among harvest.max_new_tokens and evaluate.max_new_tokens: leave them room"
            f"{at_once if knows else ''}"
        ]

    def judge(self, name: str) -> Judge:
        """A judge of the recipe, made once."""
        if name not in self._made:
            self._made[name] = load_judge(name, self.spec.judges)
        return self._made[name]

    @property
    def filters(self) -> list[str]:
        """Judges that choose rows."""
        return [self.spec.harvest.judge] if self.spec.harvest and self.spec.harvests else []

    @property
    def evaluators(self) -> list[str]:
        """Judges whose verdicts are results."""
        attacked = self.spec.evaluate.jailbreak_judge
        return [*self.spec.evaluate.judges, *([attacked] if attacked else [])]

    @property
    def judges(self) -> list[str]:
        """All judges that the recipe uses."""
        return [*self.filters, *self.evaluators]


def _texts(row: Example) -> list[str]:
    """What a row has to answer: each turn of the user; an instruction and its input, together and apart."""
    whole = [row.input, with_input(row.prompt, row.input)] if isinstance(row.prompt, str) else []
    return [text for text in dict.fromkeys([*user_turns(row.prompt), *whole]) if text.strip()]
