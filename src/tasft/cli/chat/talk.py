"""The conversation: who says what, and what judges make of it."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tasft.cli.chat.sides import Side
from tasft.core.errors import UserError
from tasft.data.rows import Messages
from tasft.data.template import encode_prompt
from tasft.judges import Judge, Verdict
from tasft.judges.judging import judge_reply
from tasft.models.engine import Sampling
from tasft.models.load import attach_adapter, detach, has_tokenizer, load_model, load_tokenizer
from tasft.models.local import TransformersEngine


@dataclass(frozen=True)
class Turn:
    """What was asked, and for both models, in their order, what they said and what was said of it."""

    prompt: str
    replies: tuple[str, str] = ("", "")
    verdicts: tuple[str, str] = ("", "")


_Key = tuple[str, str, str, bool, Path | None]


def _key(side: Side) -> _Key:
    """Sides of one key share the weights of their base; an adapter with a tokenizer of its own may resize them."""
    spec, own = side.spec, side.adapter if has_tokenizer(side.adapter) else None
    return spec.base, spec.dtype, spec.quantize, spec.trust_remote_code, own


class Talk:
    """Two models that are asked the same, one after the other; each sees its own replies of earlier turns.

    A base that both share is loaded once. Nothing is written to disk.

    Args:
        sides: The models.
        judges: Who reads the replies.
        sampling: How they are drawn; each turn has a seed of its own.

    Raises:
        UserError: A model is not there or cannot be asked.
    """

    def __init__(self, sides: tuple[Side, Side], judges: Sequence[Judge], sampling: Sampling) -> None:
        self.sides = sides
        self.judges = judges
        self.sampling = sampling
        self._bases: dict[_Key, tuple[PreTrainedModel, PreTrainedTokenizerBase]] = {}
        for side in sides:
            spec, key = side.spec, _key(side)
            if key not in self._bases:
                tokenizer = load_tokenizer(spec.base, spec.trust_remote_code, side.adapter)
                loaded = load_model(spec.base, spec.dtype, spec.trust_remote_code, spec.quantize)
                self._bases[key] = loaded, tokenizer
            # Whether prompts can be written is seen before anybody has typed one.
            encode_prompt(self._bases[key][1], "Hello?", spec.prompt, chat_template_kwargs=spec.chat_template_kwargs)

    @property
    def remembers(self) -> bool:
        """Whether both models see earlier turns: Alpaca's format has no place for them."""
        return all(side.spec.prompt == "chat" for side in self.sides)

    @contextmanager
    def _engine(self, side: Side) -> Iterator[TransformersEngine]:
        spec = side.spec
        base, tokenizer = self._bases[_key(side)]
        loaded = attach_adapter(base, side.adapter) if side.adapter else base
        try:
            yield TransformersEngine(loaded, tokenizer, spec.prompt, chat_template_kwargs=spec.chat_template_kwargs)
        finally:
            detach(loaded)

    def turn(self, past: Sequence[Turn], prompt: str) -> Generator[Turn, None, None]:
        """The next turn as it grows; the last one is whole.

        Raises:
            UserError: The conversation is longer than a model reads.
        """
        turn = Turn(prompt)
        for index, side in enumerate(self.sides):
            with self._engine(side) as engine:
                sampling = replace(self.sampling, seed=self.sampling.seed + len(past))
                for text in engine.stream(self._messages(index, past, prompt), sampling):
                    turn = replace(turn, replies=_with(turn.replies, index, text))
                    yield turn
            verdict = self._verdict(prompt, turn.replies[index])
            turn = replace(turn, verdicts=_with(turn.verdicts, index, verdict))
            yield turn

    def _messages(self, index: int, past: Sequence[Turn], prompt: str) -> str | Messages:
        if self.sides[index].spec.prompt != "chat":
            return prompt
        pairs = [(turn.prompt, turn.replies[index]) for turn in past]
        earlier = [
            {"role": role, "content": text}
            for pair in pairs
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        return [*earlier, {"role": "user", "content": prompt}]

    def _verdict(self, prompt: str, reply: str) -> str:
        return "\n".join(self._said_by(judge, prompt, reply) for judge in self.judges)

    @staticmethod
    def _said_by(judge: Judge, prompt: str, reply: str) -> str:
        try:
            return f"{judge.name}: {in_words(judge_reply(judge, prompt, reply))}"
        except UserError as error:
            # A server of the judge that is gone is no reason to end the conversation.
            return f"{judge.name}: no verdict ({error.faults[0]})"


def _with(pair: tuple[str, str], index: int, text: str) -> tuple[str, str]:
    return (text, pair[1]) if index == 0 else (pair[0], text)


def in_words(verdict: Verdict) -> str:
    """A verdict in a line."""
    if verdict.unreadable:
        return verdict.reason
    words = [] if verdict.coherent else [f"incoherent ({verdict.reason})"]
    if verdict.coherent:
        words += {True: ["harmful"], False: ["not harmful"], None: []}[verdict.harmful]
        words += ["refuses" + " a part" * bool(verdict.partial)] if verdict.refusal else []
    score = f"; score {verdict.score:.2f}" if verdict.score is not None else ""
    return (", ".join(words) or "no verdict") + score
