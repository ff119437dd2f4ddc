"""Attacks on one state of the model; a part of the stage evaluate."""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from tasft.core import provenance
from tasft.core.step import Step
from tasft.data.rows import prompts_hash
from tasft.evaluate import jailbreak
from tasft.evaluate.settings import Jailbreak, JailbreakPair
from tasft.judges import Judge
from tasft.judges.judging import Usual, rules
from tasft.models.engine import Sampling
from tasft.models.own import decided_by
from tasft.models.server import ServerEngine
from tasft.run.context import Context


def steps(context: Context, state: str, usual: Usual, reads: dict[str, Any]) -> Iterator[Step]:
    """Toxic prompts and a state of the model -> `evaluate/STATE/jailbreak/ATTACK`."""
    wanted, name = context.spec.evaluate.jailbreak, context.spec.evaluate.jailbreak_judge
    if wanted is None or name is None:
        return
    judge, prompts = context.inputs.judge(name), context.inputs.behaviours
    sampling = Sampling(context.spec.evaluate.max_new_tokens, seed=context.spec.seed)
    reads = reads | {
        "prompts": prompts_hash(prompts),
        "max_new_tokens": sampling.max_new_tokens,
        "seed": sampling.seed,
        "judge": rules(judge),
        "limits": usual.limits,
        "losses": usual.reads,
    }

    def work(attack: jailbreak.Attack, folder: Path) -> None:
        extra = {"set": wanted.set, "threshold": judge.threshold, **context.about}
        target = context.models.opened(state)
        jailbreak.attack_model(attack, prompts, target, judge, sampling, folder, extra, usual)

    for attack, settings in _attacks(context, wanted, judge):
        folder = context.folder / "evaluate" / state / "jailbreak" / attack.name
        yield Step(folder, reads | {attack.name: settings}, partial(work, attack))


def _attacks(context: Context, wanted: Jailbreak, judge: Judge) -> Iterator[tuple[jailbreak.Attack, Any]]:
    """Each attack with all that its result depends on, as JSON."""
    if wanted.prefix is not None:
        yield jailbreak.Prefix(wanted.prefix), wanted.prefix
    if wanted.templates is not None:
        placeholder = wanted.templates.placeholder
        texts = context.inputs.templates
        yield jailbreak.Templates(texts, placeholder), [provenance.content_hash(texts), placeholder]
    if wanted.pair is not None:
        yield (
            _pair(context, wanted.pair, judge),
            wanted.pair.model_dump() | {"attacker": decided_by(wanted.pair.attacker)},
        )


def _pair(context: Context, spec: JailbreakPair, judge: Judge) -> jailbreak.PairAttack:
    assert judge.threshold is not None
    server = ServerEngine(spec.attacker) if spec.attacker else None
    return jailbreak.PairAttack(
        attacker=(lambda: nullcontext(server)) if server else context.models.opened("base"),
        model=spec.attacker.model if spec.attacker else context.spec.model.base,
        sampling=jailbreak.attacker_sampling(spec.max_new_tokens, context.spec.seed),
        streams=spec.streams,
        iterations=spec.iterations,
        threshold=judge.threshold,
        # Few servers go on from a beginning.
        opening="" if server else jailbreak.OPENING,
    )
