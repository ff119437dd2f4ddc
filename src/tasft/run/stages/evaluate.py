"""What is measured of each state of the model."""

from collections.abc import Iterator
from dataclasses import replace

from tasft.core.step import Step, done_key
from tasft.evaluate.states import Asked, steps_of
from tasft.judges.judging import noted
from tasft.models.engine import Sampling
from tasft.run.context import Context
from tasft.run.stages import capability, harvest, jailbreak, quality
from tasft.train import checkpoints


def steps(context: Context) -> Iterator[Step]:
    """Prompt sets and each state of the model -> `evaluate/STATE/SET/JUDGE`, and what else the recipe asks for."""
    spec = context.spec.evaluate
    held_to = harvest.usual(context)
    sets = [
        Asked(name, wanted.kind, wanted.source, context.inputs.sets[name], spec.limit)
        for name, wanted in spec.sets.items()
    ]
    trained = {"train": done_key(context.folder / "train")}
    saved = checkpoints.checkpoints(context.folder / "train", context.spec.train.save_steps) if spec.checkpoints else ()
    states = {
        "base": context.base_reads,
        **({"sft": context.before_reads} if context.spec.sft else {}),
        **dict.fromkeys(saved, trained),
        "final": trained,
    }
    for state, depends in states.items():
        reads = {"state": state, **depends}
        usual = held_to
        if state == context.before:
            assert held_to.losses
            usual = replace(held_to, losses=noted(held_to.losses))
        yield from steps_of(
            context.folder / "evaluate" / state,
            context.models.opened(state),
            sets,
            [context.inputs.judge(name) for name in spec.judges],
            Sampling(spec.max_new_tokens, seed=context.spec.seed),
            reads,
            context.about,
            usual,
        )
        if not state.startswith("checkpoint-"):
            yield from capability.steps(context, state, reads)
            yield from quality.steps(context, state, reads)
            yield from jailbreak.steps(context, state, usual, reads)
