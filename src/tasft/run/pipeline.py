"""The stages of a run, what each depends on, and what is left to do."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.text import Text
from transformers import PreTrainedModel, set_seed

from tasft.core import provenance, ranks
from tasft.core.errors import UserError
from tasft.core.step import Step, done_key
from tasft.data.encode import encode_rows
from tasft.data.preview import preview
from tasft.data.rows import Example, read_examples
from tasft.evaluate import capability, jailbreak, quality
from tasft.evaluate.states import Asked, steps_of
from tasft.harvest.contrastive import Contrast
from tasft.harvest.harvest import HarvestSettings, harvest, statement
from tasft.judges import Judge
from tasft.judges.calibration import calibrate, can_calibrate, limit_of
from tasft.judges.judging import Usual, rules, topic_measure
from tasft.models.engine import Engine, Reply, Sampling, collect, replies_in, requests_for
from tasft.models.load import add_lora, attach_adapter, check_trained, detach, fingerprint, load_model, saved
from tasft.models.local import TransformersEngine
from tasft.models.server import ServerEngine
from tasft.models.server_settings import Server
from tasft.report import write_report
from tasft.report.read import read_run
from tasft.run import gate, recipe_file, training
from tasft.run.inputs import Inputs
from tasft.run.recipe import Jailbreak, Recipe, Train
from tasft.train import checkpoints
from tasft.train.baselines import safe_instead

STAGES = ("sft", "harvest", "train", "evaluate", "report")


class Run:
    """A recipe at work in a folder.

    Args:
        spec: The recipe.
        folder: Made if it is not there.
        store: Where the runs of a sweep share their steps; None for a run that stands alone.

    Raises:
        UserError: The folder holds a run of another name, or something else.
    """

    def __init__(self, spec: Recipe, folder: Path, store: Path | None = None) -> None:
        if (folder / "recipe.yaml").is_file():
            other = recipe_file.load(str(folder)).name
            if other != spec.name:
                raise UserError(
                    f"{folder} holds the run {other!r}, not {spec.name!r}: choose another folder with --out"
                )
        elif folder.exists() and (not folder.is_dir() or any(path.name[0] != "." for path in folder.iterdir())):
            raise UserError(f"{folder} is there and is not a run folder: choose another with --out")
        self.spec = spec
        self.folder = folder
        self.store = store
        self.inputs = Inputs(spec)

    # What is loaded once and shared by the stages

    @cached_property
    def base(self) -> PreTrainedModel:
        """The base model, in memory."""
        print(f"loading {self.spec.model.base} ...", flush=True)
        return self._load(self.spec.model.base)

    def _load(self, place: str | Path) -> PreTrainedModel:
        spec = self.spec.model
        return load_model(str(place), spec.dtype, spec.trust_remote_code, spec.quantize)

    @contextmanager
    def _state(self, state: str) -> Iterator[PreTrainedModel]:
        """The model as it is in a state: base, sft, final, or a checkpoint of train."""
        if state == "base":
            yield self.base
            return
        place = saved(self.folder, state)
        if not (place / "adapter_config.json").is_file():
            yield self._load(place)
            return
        try:
            adapted = attach_adapter(self.base, place)
        except UserError as error:
            again = f"remove {place.parent} to have it trained again"
            raise UserError([f"{fault}; {again}" for fault in error.faults]) from error
        try:
            yield adapted
        finally:
            detach(adapted)

    @property
    def _before(self) -> str:
        """The state that safety training is compared with: it answered the toxic prompts."""
        return "sft" if self.spec.sft else "base"

    def _engine(self, loaded: PreTrainedModel) -> TransformersEngine:
        spec = self.spec.model
        return TransformersEngine(
            loaded, self.inputs.tokenizer, spec.prompt, chat_template_kwargs=spec.chat_template_kwargs
        )

    # Steps, in order

    def steps(self, stage: str) -> Iterator[Step]:
        """The steps of one stage; later ones may read what earlier ones wrote."""
        yield from getattr(self, f"_{stage}")()

    @cached_property
    def _base_reads(self) -> dict[str, Any]:
        spec = self.spec.model
        return {
            "model": spec.model_dump(exclude={"base", "lora", "trust_remote_code"}),
            # A model whose content is known is the same wherever it is.
            "weights": fingerprint(spec.base) or spec.base,
            "seed": self.spec.seed,
        }

    def _training_reads(self) -> dict[str, Any]:
        """What any training depends on besides its own settings."""
        wanted, lora = self.spec.data.imitate, self.spec.model.lora
        rows = wanted and provenance.content_hash([row.row() for row in self.inputs.imitate])
        return self._base_reads | {"lora": lora and lora.model_dump(), "imitate": rows}

    def _before_reads(self) -> dict[str, Any]:
        """What the model that answers the toxic prompts depends on."""
        if self.spec.sft is None:
            return self._base_reads
        return self._training_reads() | {"sft": self.spec.sft.model_dump(exclude={"save_steps"})}

    def _sft_settings(self) -> Train | None:
        training = self.spec.sft
        if training is None:
            return None
        return Train(**training.model_dump(), method="sft", penalty="none", kl_rows=0, monitor=None)

    def _sft(self) -> Iterator[Step]:
        settings = self._sft_settings()
        if settings is None:
            return

        def work(folder: Path) -> None:
            self._train_on(self.inputs.imitate, settings, folder)

        yield Step(self.folder / "sft", self._before_reads(), work)

    def _calibration(self) -> Iterator[Step]:
        """What replies of every state are held to, whatever the method."""
        benign = self.inputs.benign
        if not can_calibrate(benign):
            return

        def work(folder: Path) -> None:
            with self._state(self._before) as loaded:
                engine = self._engine(loaded)
                calibrate(engine, engine.mean_losses, benign, self.spec.seed, folder)

        prompts = provenance.content_hash([asdict(prompt) for prompt in benign])
        yield Step(self.folder / "calibration", self._before_reads() | {"prompts": prompts}, work)

    @property
    def _usual(self) -> Usual:
        """What replies are held to besides their text."""
        limit = limit_of(self.folder / "calibration") if can_calibrate(self.inputs.benign) else None
        return Usual(limit, self._losses, topic_measure(), self._before_reads())

    def _harvest(self) -> Iterator[Step]:
        yield from self._calibration()
        spec = self.spec.harvest
        if not self.spec.harvests or spec is None:
            return
        prompts = [[asdict(prompt) for prompt in each] for each in (self.inputs.toxic, self.inputs.benign)]
        drawn = {name: getattr(spec, name) for name in ("samples", "temperature", "top_p", "max_new_tokens")}
        engine = spec.engine and spec.engine.model_dump(include={"model", "body"})
        keeps = self._before_reads() | {"draw": drawn, "engine": engine, "prompts": provenance.content_hash(prompts)}
        reads = keeps | {"harvest": spec.model_dump(), "judge": rules(self.inputs.judge(spec.judge))}

        def work(folder: Path) -> None:
            wanted = spec.contrastive
            contrast = Contrast(wanted.words, wanted.per_word) if wanted else None
            settings = HarvestSettings(
                Sampling(spec.max_new_tokens, spec.temperature, spec.top_p, self.spec.seed),
                spec.samples,
                spec.rows,
                spec.anchors,
                spec.anchor_rows,
                spec.self_imitate,
                contrast,
            )
            writer = ServerEngine(wanted.engine) if wanted and wanted.engine else None
            with self._answering(spec.engine) as (engine, usual):
                summary = harvest(
                    engine,
                    self.inputs.judge(spec.judge),
                    self.inputs.toxic,
                    self.inputs.benign,
                    settings,
                    folder,
                    usual,
                    writer,
                )
            if ranks.is_first():
                print(f"harvest: {statement(summary)}", flush=True)
            if not summary["kept"]:
                raise UserError(
                    f"{folder}: none of {summary['tried']} answers was harmful and coherent ({summary['reasons']}): "
                    "there is nothing to move away from; give other data.toxic_prompts, more harvest.samples, or "
                    "another judge"
                )

        yield Step(self.folder / "harvest", reads, work, keeps)

    @contextmanager
    def _answering(self, server: Server | None) -> Iterator[tuple[Engine, Usual]]:
        """Who answers for the model that is to be made safe, and what its replies are held to besides their text.

        Their topic is not looked at: slipping away from it is what penalties do, and no penalty is at work yet.
        """
        usual = replace(self._usual, similarities=None)
        if server is not None:
            # It serves that model by the user's word, and gives no losses of text that it is shown.
            yield ServerEngine(server, self.spec.model.prompt), replace(usual, losses=None)
            return
        with self._state(self._before) as loaded:
            engine = self._engine(loaded)
            yield engine, replace(usual, losses=engine.mean_losses)

    def _harvested(self) -> list[Path]:
        names = ("avoid", "anchor", "imitate", "contrastive") if self.spec.harvests else ()
        # Where safe responses take the place of the rows to avoid, they take that of anchors too.
        left_out = "anchor" if self.spec.replaces else None
        return [self.folder / "harvest" / f"{name}.jsonl" for name in names if name != left_out]

    def _training_rows(self) -> list[Example]:
        files = [path for path in self._harvested() if path.stat().st_size]
        harvested = [row for path in files for row in read_examples(str(path))]
        safe = self.inputs.safe
        if self.spec.replaces:
            safe = safe_instead([row for row in harvested if not row.label], safe)
            harvested = [row for row in harvested if row.label]
        return self.inputs.imitate + safe + harvested

    def _train(self) -> Iterator[Step]:
        spec = self.spec.train
        reads = self._training_reads() | {
            "start": self._before_reads() if spec.start == "sft" else None,
            "train": spec.model_dump(exclude={"save_steps"}),
            "rows": {path.name: provenance.file_hash(path) for path in self._harvested()},
        }
        if self.inputs.safe:
            reads["safe"] = provenance.content_hash([row.row() for row in self.inputs.safe])

        def work(folder: Path) -> None:
            rows = self._training_rows()
            if ranks.is_first():
                provenance.write_jsonl(folder / "data.jsonl", (row.row() for row in rows))
            self._train_on(rows, spec, folder)

        yield Step(self.folder / "train", reads, work)

    def _evaluate(self) -> Iterator[Step]:
        spec = self.spec.evaluate
        usual = self._usual
        sets = [
            Asked(name, wanted.kind, wanted.source, self.inputs.sets[name], spec.limit)
            for name, wanted in spec.sets.items()
        ]
        trained = {"train": done_key(self.folder / "train")}
        states = {
            "base": self._base_reads,
            **({"sft": self._before_reads()} if self.spec.sft else {}),
            **dict.fromkeys(self._checkpoints() if spec.checkpoints else (), trained),
            "final": trained,
        }
        for state, depends in states.items():
            reads = {"state": state, **depends}
            yield from steps_of(
                self.folder / "evaluate" / state,
                partial(self._opened, state),
                sets,
                [self.inputs.judge(name) for name in spec.judges],
                Sampling(spec.max_new_tokens, seed=self.spec.seed),
                reads,
                self._about(),
                usual,
            )
            if not state.startswith("checkpoint-"):
                yield from self._evaluate_capability(state, reads)
                yield from self._evaluate_quality(state, reads)
                yield from self._jailbreak(state, usual, reads)

    def _about(self) -> dict[str, Any]:
        """What each summary says besides its figures."""
        return {"recipe": provenance.content_hash(self.spec.model_dump()), "commit": provenance.commit()}

    def _checkpoints(self) -> list[str]:
        return checkpoints.checkpoints(self.folder / "train", self.spec.train.save_steps)

    def _jailbreak(self, state: str, usual: Usual, reads: dict[str, Any]) -> Iterator[Step]:
        wanted, name = self.spec.evaluate.jailbreak, self.spec.evaluate.jailbreak_judge
        if wanted is None or name is None:
            return
        judge = self.inputs.judge(name)
        sampling = Sampling(self.spec.evaluate.max_new_tokens, seed=self.spec.seed)
        reads = reads | {
            "prompts": provenance.content_hash([asdict(prompt) for prompt in self.inputs.behaviours]),
            "max_new_tokens": sampling.max_new_tokens,
            "seed": sampling.seed,
            "judge": rules(judge),
            "limits": usual.limits,
            "losses": usual.reads,
        }

        def work(attack: jailbreak.Attack, folder: Path) -> None:
            about = {"set": wanted.set, "threshold": judge.threshold, **self._about()}
            target = partial(self._opened, state)
            jailbreak.attack_model(attack, self.inputs.behaviours, target, judge, sampling, folder, about, usual)

        for attack, settings in self._attacks(wanted, judge):
            folder = self.folder / "evaluate" / state / "jailbreak" / attack.name
            yield Step(folder, reads | {attack.name: settings}, partial(work, attack))

    def _losses(self, replies: Sequence[Reply]) -> list[float]:
        """How improbable replies are to the untouched model."""
        with self._state(self._before) as loaded:
            return self._engine(loaded).mean_losses(replies)

    @contextmanager
    def _opened(self, state: str) -> Iterator[Engine]:
        with self._state(state) as loaded:
            yield self._engine(loaded)

    def _attacks(self, wanted: Jailbreak, judge: Judge) -> Iterator[tuple[jailbreak.Attack, Any]]:
        """Each attack with all that its result depends on, as JSON."""
        if wanted.prefix is not None:
            yield jailbreak.Prefix(wanted.prefix), wanted.prefix
        if wanted.templates is not None:
            placeholder = wanted.templates.placeholder
            texts = self.inputs.templates
            yield jailbreak.Templates(texts, placeholder), [provenance.content_hash(texts), placeholder]
        if (spec := wanted.pair) is not None:
            assert judge.threshold is not None
            server = ServerEngine(spec.attacker) if spec.attacker else None
            attack = jailbreak.Pair(
                attacker=(lambda: nullcontext(server)) if server else partial(self._opened, "base"),
                model=spec.attacker.model if spec.attacker else self.spec.model.base,
                sampling=jailbreak.attacker_sampling(spec.max_new_tokens, self.spec.seed),
                streams=spec.streams,
                iterations=spec.iterations,
                threshold=judge.threshold,
                # Few servers go on from a beginning.
                opening="" if server else jailbreak.OPENING,
            )
            who = spec.attacker and spec.attacker.model_dump(include={"model", "body"})
            yield attack, spec.model_dump() | {"attacker": who}

    def _evaluate_capability(self, state: str, reads: dict[str, Any]) -> Iterator[Step]:
        wanted = self.spec.evaluate.capability
        if wanted is None:
            return
        place, data_dir = self.folder / "evaluate" / state / "capability", self.spec.data.data_dir
        settings = wanted.model_dump(include={"limit", "num_fewshot"})

        def work(folder: Path) -> None:
            if not ranks.is_first():
                return  # lm-eval cannot share the work on a model that is loaded already.
            with self._state(state) as loaded:
                capability.measure(
                    loaded,
                    self.inputs.tokenizer,
                    folder.name,
                    folder,
                    self._about(),
                    data_dir=data_dir,
                    batch_size=wanted.batch_size,
                    **settings,
                )

        for task in wanted.tasks:
            yield Step(place / task, reads | settings | {"task": capability.reads(task, data_dir)}, work)

    def _evaluate_quality(self, state: str, reads: dict[str, Any]) -> Iterator[Step]:
        wanted = self.spec.evaluate.quality
        if wanted is None:
            return
        place, rows = self.folder / "evaluate" / state / "quality", self.inputs.references
        reads = reads | {"rows": provenance.content_hash([asdict(row) for row in rows])}
        moved = state not in ("base", self._before)

        def likelihood(folder: Path) -> None:
            before = None
            if moved:
                with self._state(self._before) as loaded:
                    before = quality.remember(self._engine(loaded), rows)
            with self._state(state) as loaded:
                quality.measure(self._engine(loaded), rows, folder, self._about(), before)

        yield Step(place / "reference", reads | {"before": self._before_reads() if moved else None}, likelihood)
        annotator = wanted.annotator
        if annotator is None:
            return
        drawn = {"max_new_tokens": wanted.max_new_tokens, "seed": self.spec.seed}

        def answer(folder: Path) -> None:
            with self._state(state) as loaded:
                asked = requests_for(quality.prompts_of(rows))
                collect(self._engine(loaded), asked, Sampling(**drawn), folder / "replies.jsonl", "quality")

        def annotate(folder: Path) -> None:
            if not ranks.is_first():
                return
            replies = replies_in(place / "replies" / "replies.jsonl", "quality")
            answers = [replies[row.id] for row in rows]
            quality.annotate(rows, answers, annotator.config, annotator.server, folder, self._about())

        yield Step(place / "replies", reads | drawn, answer)
        server = annotator.server and annotator.server.model_dump(include={"model", "body"})
        asks: dict[str, Any] = {"annotator": annotator.config, "server": server}
        if files := quality.annotator_files(annotator.config):
            asks["files"] = files
        yield Step(place / "annotator", reads | drawn | asks, annotate)

    def _report(self) -> Iterator[Step]:
        steps = [step for stage in STAGES[:-1] for step in self.steps(stage)]
        reads = {"recipe": self.spec.model_dump(), "steps": [step.key for step in steps]}

        def work(folder: Path) -> None:
            for name in ("adapter", "model"):
                check_trained(self.folder / "train" / name)
            if self.spec.gate:
                provenance.write_json(folder / "gate.json", gate.judge(self.spec.gate, read_run(self.folder)))
            write_report(self.folder)

        yield Step(self.folder / "report", reads, work, costs_nothing=True)

    @property
    def gate(self) -> dict[str, Any] | None:
        """What `tasft.run.gate` found when the report was written; None without limits."""
        return provenance.read_json(self.folder / "report" / "gate.json")

    def _train_on(self, rows: list[Example], spec: Train, folder: Path) -> None:
        lora = self.spec.model.lora
        set_seed(self.spec.seed)  # A new adapter's first weights are drawn.
        loaded: PreTrainedModel | PeftModel
        if spec.start == "sft" and lora is None:
            loaded = self._load(self.folder / "sft" / "model")
        elif spec.start == "sft":
            loaded = attach_adapter(self.base, self.folder / "sft" / "adapter", trainable=True)
        elif lora is not None:
            loaded = add_lora(self.base, **lora.model_dump())
        else:
            loaded = self.base
        asked = requests_for(self.inputs.benign[: spec.monitor.probes]) if spec.monitor else []

        def probe(loaded: PreTrainedModel) -> list[tuple[str, str]]:
            batches = self._engine(loaded).generate(asked, Sampling(max_new_tokens=32), "probe")
            return [(reply.prompt, reply.completion) for batch in batches for reply in batch]

        monitor = training.monitor_of(spec, probe)
        training.fit(self.spec, spec, loaded, self.inputs.tokenizer, rows, folder, monitor)
        if lora is None or ranks.world_size() > 1:
            # Its weights may have changed or be spread: the next stage that wants the base model loads it again.
            self.__dict__.pop("base", None)
        else:
            detach(loaded)

    def preview(self, stage: str, count: int = 3) -> Iterator[Text]:
        """The first rows of each kind, as `sft` or `train` would see them.

        Raises:
            UserError: A fault of recipe or data, or the stage before is not done.
        """
        self.inputs.check()
        self._require_what_comes_before(stage)
        spec = self.spec.train if stage == "train" else self._sft_settings()
        if spec is None:
            raise UserError("the recipe has no sft section: there is nothing to show")
        rows = self._training_rows() if stage == "train" else self.inputs.imitate
        chosen = [row for kind in (True, False) for row in [row for row in rows if row.label == kind][:count]]
        encoding = training.arguments(self.spec, spec, self.folder / stage).encoding()
        encoded, _ = encode_rows(chosen, self.inputs.tokenizer, encoding)
        return preview(encoded, self.inputs.tokenizer)

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do."""
        return all(step.is_done for stage in STAGES for step in self.steps(stage))

    def go(self, stages: tuple[str, ...] = STAGES, *, untrained: bool = False) -> None:
        """Run stages in order, each only as far as it is not done.

        Args:
            stages: Which.
            untrained: Leave out what needs the result of `train`.

        Raises:
            UserError: A fault of recipe or data, found before anything is written; or another process
                is at work in the folder.
        """
        self.inputs.check()
        self._require_what_comes_before(stages[0])
        if ranks.sharding() and not {"sft", "train"}.issuperset(stages):
            raise UserError(
                "only sft and train can share one model between processes: use --launch ddp for other stages"
            )
        if ranks.world_size() > 1 and "report" in stages:
            raise UserError("the report is written by one process: start that stage alone")
        # The process that was at work in a cell of a sweep may be on its way out.
        wait = self.store is not None
        with (
            provenance.writing(self.folder),
            ranks.joined(),
            provenance.private(),
            provenance.lock(self.folder, wait) if ranks.is_first() else nullcontext(),
        ):
            self._go(stages, untrained)

    def _go(self, stages: tuple[str, ...], untrained: bool) -> None:
        manifest_path = self.folder / "manifest.json"
        manifest = provenance.read_json(manifest_path) or {"started": datetime.now(UTC).isoformat(), "stages": {}}
        manifest |= provenance.environment() | {
            "device": "cuda" if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads",
            "processes": ranks.world_size(),
            "seed": self.spec.seed,
            "hashes": self.inputs.hashes,
            "licences": self.inputs.licences,
            "judges": self.inputs.judge_versions,
        }

        def note(line: str) -> None:
            if ranks.is_first():
                provenance.write_json(manifest_path, manifest)
                print(line, flush=True)

        if ranks.is_first():
            provenance.atomic_write_text(self.folder / "recipe.yaml", recipe_file.dump(self.spec))
            provenance.write_json(manifest_path, manifest)
            for warning in self.inputs.warnings():
                print(f"note: {warning}", flush=True)
        for stage in stages:
            for step in self.steps(stage):
                where = step.folder.relative_to(self.folder)
                if untrained and where.parts[0] == "evaluate" and where.parts[1] not in ("base", "sft"):
                    continue
                if step.is_done:
                    note(f"{where}: done before")
                    continue
                if self.store is None or stage == "report":
                    seconds: float | None = step.run()
                else:
                    seconds = step.share(self.store, where)
                if seconds is None:
                    note(f"{where}: shared")
                    continue
                manifest["stages"][str(where)] = {"seconds": round(seconds, 1)}
                note(f"{where}: done in {seconds:.0f} s")
        if "report" in stages:
            for limit in self.gate["limits"] if self.gate else ():
                print(f"gate: {'met' if limit['met'] else 'NOT MET'}: {limit['sentence']}", flush=True)
            print(f"report: {self.folder / 'report' / 'index.html'}", flush=True)

    def _require_what_comes_before(self, stage: str) -> None:
        for earlier in STAGES[: STAGES.index(stage)]:
            for step in self.steps(earlier):
                if not step.is_done:
                    raise UserError(
                        f"{step.folder} is not done, or was done with other settings: run tasft {earlier} with this "
                        "recipe first, or tasft run for all stages"
                    )
