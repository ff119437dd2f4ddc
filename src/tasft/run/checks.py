"""What can be found wrong with a recipe's inputs before work begins, the cheapest first."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

from tasft.core.errors import UserError
from tasft.data.rows import Example, Prompt, drawn
from tasft.data.sources import missing
from tasft.judges import Judge, encoder
from tasft.models.server_settings import PythonEngine
from tasft.run.inputs import Inputs
from tasft.run.recipe import sources_in


def check_inputs(inputs: Inputs) -> None:
    """Read all that a recipe names, so that every fault shows before work begins.

    Rows and judges come first and show all their faults together; the model is looked at when these are right, since
    its libraries take seconds to load.

    Raises:
        UserError: Names all faults.
    """
    sets = inputs.spec.evaluate.sets.values()
    absent = {field: missing(source) for field, source in sources_in(inputs.spec.model_dump()).items()}
    _raise(
        {fault: f"{field}: {fault}" for field, fault in absent.items() if fault},
        *(partial(inputs.asked, wanted.source) for wanted in sets),
        lambda: inputs.references,
        lambda: inputs.toxic,
        lambda: inputs.benign,
        lambda: inputs.imitate,
        lambda: inputs.safe,
        partial(_method, inputs),
        partial(_parts, inputs),
        partial(_tasks, inputs),
        partial(_annotator, inputs),
        *(partial(inputs.judge, name) for name in dict.fromkeys(inputs.judges)),
        # A wrong one is named before anything is drawn; without it topics are not looked at.
        *([encoder.encoder] if encoder.is_here() else []),
        partial(_filter, inputs),
        partial(_attack, inputs),
        partial(_queries, inputs),
        partial(_gate, inputs),
    )
    _raise({}, partial(_model, inputs))
    _raise({}, lambda: inputs.encoded, partial(_lengths, inputs), partial(_questions, inputs))


def _raise(known: Mapping[str, str], *reads: Callable[[], object]) -> None:
    """Do all of this; every fault that is met is raised at the end, each once: one source may serve two fields.

    Args:
        known: Faults that were found before, with what is said of each instead.
        reads: What is done.
    """
    faults: list[str] = [*known.values()]
    for read in reads:
        try:
            read()
        except UserError as error:
            faults += error.faults
    _refuse(fault for fault in dict.fromkeys(faults) if fault not in known)


def _refuse(faults: Iterable[str]) -> None:
    if faults := list(faults):
        raise UserError(faults)


def _model(inputs: Inputs) -> None:
    from tasft.models.generation import check_readable
    from tasft.models.load import check_targets

    spec = inputs.spec
    if report_to := dict.fromkeys([*spec.train.report_to, *(spec.sft.report_to if spec.sft else ())]):
        from tasft.run import trackers  # Imports what reports are drawn with.

        trackers.check(report_to)
    tokenizer, lora = inputs.tokenizer, inputs.spec.model.lora
    if lora:
        check_targets(inputs.sketch, lora.target_modules)
    # Not the whole vocabulary: Gemma 3 has a token for images that its text models lack.
    used = {*tokenizer("Hello?").input_ids, tokenizer.eos_token_id}
    check_readable(inputs.sketch, tokenizer, [sorted(used), inputs.prompt_ids("Hello?")])


def _lengths(inputs: Inputs) -> None:
    """Prompts with the longest reply are no more than the model reads, and have no token that it does not know."""
    from tasft.models.generation import check_readable, check_room

    spec, model = inputs.spec, inputs.sketch
    replies = ("evaluate.max_new_tokens", spec.evaluate.max_new_tokens)
    asked = {
        f"evaluate.sets.{name}": (drawn(prompts, spec.evaluate.limit, lambda row: row.prompt), replies)
        for name, prompts in inputs.sets.items()
    }
    if spec.harvest and spec.harvests and spec.harvest.engine is None:
        answers = ("harvest.max_new_tokens", spec.harvest.max_new_tokens)
        asked |= {"data.toxic_prompts": (inputs.toxic, answers), "data.benign_prompts": (inputs.benign, answers)}

    def read(name: str) -> None:
        prompts, (settings, most) = asked[name]
        ids = [inputs.prompt_ids(prompt.prompt) for prompt in prompts]
        check_readable(model, inputs.tokenizer, ids)
        check_room(model, ids, most, name, settings)

    _raise({}, *(partial(read, name) for name in asked))


def _questions(inputs: Inputs) -> None:
    """Judges' models in this process read the question about each prompt; of a server nobody knows what it reads."""
    from tasft.judges.panel import Panel
    from tasft.judges.questions import AskingJudge

    limit = inputs.spec.evaluate.limit
    answered = [row for rows in inputs.sets.values() for row in drawn(rows, limit, lambda row: row.prompt)]
    asked = (("harvest.judge", inputs.filters, inputs.toxic), ("evaluate.judges", inputs.evaluators, answered))

    def read(field: str, judge: Judge, prompts: list[Prompt]) -> None:
        for one in judge.members if isinstance(judge, Panel) else [judge]:
            unread = one.unread([row.prompt for row in prompts]) if isinstance(one, AskingJudge) else 0
            if unread:
                raise UserError(
                    f"{field}: {one.name} asks its model about {unread} of {len(prompts)} prompts in more tokens than "
                    "it reads, even without a reply: leave them out, or take another judge"
                )

    _raise(
        {},
        *(
            partial(read, field, inputs.judge(name), prompts)
            for field, names, prompts in asked
            for name in dict.fromkeys(names)
        ),
    )


def _method(inputs: Inputs) -> None:
    if inputs.spec.train.method == "kto":
        from tasft.train.baselines import require_kto

        require_kto()
    if inputs.spec.replaces:
        from tasft.train.baselines import safe_instead

        safe_instead([Example(prompt.prompt, "", label=False) for prompt in inputs.toxic], inputs.safe)


def _parts(inputs: Inputs) -> None:
    train, harvest = inputs.spec.train.heeded(), inputs.spec.harvest

    def penalty() -> None:
        if train.own_penalty:
            from tasft.train.penalties import penalty_of

            penalty_of("python", train.own_penalty)

    def anchors() -> None:
        if harvest and harvest.own_anchors:
            from tasft.harvest.anchors import own_anchors

            own_anchors(harvest.own_anchors)

    def engines() -> None:
        for engine in (harvest and harvest.engine, harvest and harvest.contrastive and harvest.contrastive.engine):
            if isinstance(engine, PythonEngine):
                from tasft.models.own import OwnEngine

                OwnEngine(engine)

    _raise({}, penalty, anchors, engines)


def _tasks(inputs: Inputs) -> None:
    if wanted := inputs.spec.evaluate.capability:
        from tasft.evaluate import capability

        capability.check(wanted.tasks, wanted.num_fewshot, inputs.spec.data.data_dir)


def _annotator(inputs: Inputs) -> None:
    wanted = inputs.spec.evaluate.quality
    if wanted and wanted.annotator:
        from tasft.evaluate.quality import annotator_config

        annotator_config(wanted.annotator.config, wanted.annotator.server)


def _filter(inputs: Inputs) -> None:
    for name in inputs.filters:
        needs = {"harmful": "harvest.judge", "refusal": "harvest.anchors: prefilled"}
        if inputs.spec.harvest and inputs.spec.harvest.anchors != "prefilled":
            del needs["refusal"]
        missing = needs.keys() - inputs.judge(name).tells
        _refuse(f"{needs[what]} needs a judge that tells {what}, which {name} does not" for what in missing)


def _attack(inputs: Inputs) -> None:
    wanted, name = inputs.spec.evaluate.jailbreak, inputs.spec.evaluate.jailbreak_judge
    if wanted is None or name is None:
        return
    judge = inputs.judge(name)
    if "harmful" not in judge.tells:
        raise UserError(f"evaluate.jailbreak needs a judge that tells harmful, which {name} does not")
    if wanted.pair and judge.threshold is None:
        raise UserError(
            f"evaluate.jailbreak.pair needs a judge whose score decides what is harmful, which {name} has not: "
            "take classifier, or kind llm_judge with rubric pair"
        )
    if wanted.pair and wanted.pair.attacker:
        from tasft.models.server import ServerEngine

        ServerEngine(wanted.pair.attacker)


def _queries(inputs: Inputs) -> None:
    wanted = inputs.spec.evaluate.jailbreak
    if wanted is None:
        return
    times = {
        "prefix": 1,
        "templates": len(inputs.templates),
        "pair": wanted.pair.streams * wanted.pair.iterations if wanted.pair else 0,
    }
    prompts = len(inputs.behaviours)
    _refuse(
        f"evaluate.jailbreak.{attack}: {prompts} prompts, each sent up to {times[attack]} times, are "
        f"more than {wanted.queries} queries: lower a limit, or raise evaluate.jailbreak.queries"
        for attack in wanted.attacks
        if prompts * times[attack] > wanted.queries
    )


def _gate(inputs: Inputs) -> None:
    gate = inputs.spec.gate
    if gate is None:
        return
    name = inputs.spec.evaluate.judges[0]
    _refuse(
        f"gate.{field} needs a judge that tells {what} first in evaluate.judges, which {name} does not"
        for field, what in (("harmful", "harmful"), ("over_refusal", "refusal"))
        if getattr(gate, field) is not None and what not in inputs.judge(name).tells
    )
    _refuse(_by_the_filter_alone(inputs))


def _by_the_filter_alone(inputs: Inputs) -> Iterator[str]:
    """Limits that hang on the word of the judge by which the training rows were chosen."""
    gate, evaluate, harvest = inputs.spec.gate, inputs.spec.evaluate, inputs.spec.harvest
    if gate is None or harvest is None:
        return
    who = {
        "harmful": evaluate.judges[0] if gate.harmful is not None else None,
        "over_refusal": evaluate.judges[0] if gate.over_refusal is not None else None,
        "jailbreak": evaluate.jailbreak_judge if gate.jailbreak else None,
    }

    def behind(name: str) -> str:
        # Fitted to labels it is the same judge still.
        judge = inputs.judge(name)
        return str(getattr(judge, "inner", judge).version)

    for field, name in who.items():
        if name is not None and behind(name) == behind(harvest.judge):
            yield (
                f"gate.{field} hangs on {name} alone, which also chose the rows to avoid (harvest.judge): put another "
                "judge first in evaluate.judges, or a panel of several, declared under judges: "
                f"{{both: {{kind: panel, of: [{name}, another], agree: all}}}}"
            )
