"""What TA-SFT is compared with: safe responses to the toxic prompts (STL), and KTO as TRL has it."""

import random
from collections.abc import Sequence
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tasft.core.errors import UserError
from tasft.core.provenance import require, write_json
from tasft.data.encode import Encoding, Row, encode_rows
from tasft.data.rows import Example
from tasft.loss import IGNORE_INDEX
from tasft.models.generation import fit_padding
from tasft.models.head import Tail, learn_tail
from tasft.train.finite import FiniteSteps
from tasft.train.metrics import MetricsFile
from tasft.train.start import QUESTION, head_calls, refuse_adapted_head

CHUNK = 32768  # Tokens of the vocabulary that TRL takes at a time.

BETA = 0.1
"""How dear distance from the reference is to KTO, as its authors and TRL have it."""

# Desirable weight times count over undesirable weight times count: the middle of what KTO's authors advise, 1 to 4/3.
BALANCE = 7 / 6


def safe_instead(avoid: Sequence[Example], responses: Sequence[Example]) -> list[Example]:
    """The safe response to the prompt of each row to avoid, in their order.

    Of several responses to a prompt the first is taken.

    Raises:
        UserError: Prompts that have none.

    Source: Bianchi et al. 2023 (arXiv 2309.07875) for training on such responses; Lu, Sinha, Varakantham 2024 (arXiv
    2412.06843) for putting them in the place of the rows to avoid.
    """
    by_prompt: dict[str | None, Example] = {}
    for response in responses:
        by_prompt.setdefault(response.question, response)
    without = [row for row in avoid if row.question not in by_prompt]
    if without:
        raise UserError(
            f"data.safe_responses: {len(without)} of {len(avoid)} prompts that the harvest kept have no safe response, "
            f"{str(without[0].prompt)!r:.60} first: name the prompts of that source in data.toxic_prompts"
        )
    return [by_prompt[row.question] for row in avoid]


def kto_weights(desirable: int, undesirable: int) -> tuple[float, float]:
    """Weights of desirable and undesirable rows for these counts: one is 1, the other is raised.

    Weight times count of the desirable, over that of the undesirable, is then `BALANCE`; so the rarer kind's is raised,
    or that of the desirable where there are about as many of both.

    Source: Ethayarajh et al. 2024 (arXiv 2402.01306), Eq. 8.
    """
    ratio = BALANCE * undesirable / desirable
    return (ratio, 1.0) if ratio >= 1 else (1.0, 1 / ratio)


def kto_rows(rows: Sequence[Row], micro_batch_size: int) -> list[dict[str, Any]]:
    """Encoded rows as TRL's `KTOTrainer` holds them, in the order in which it will take them.

    KTO estimates its KL on prompts with the completions of others: of the row before in the micro-batch. A row that is
    alone in the last one takes that of the row before it, in the micro-batch before.
    """
    made = []
    for row in rows:
        begin = next(position for position, label in enumerate(row["labels"]) if label != IGNORE_INDEX)
        made.append(
            {
                "prompt_ids": row["input_ids"][:begin],
                "completion_ids": row["input_ids"][begin:],
                "label": not row["avoid"],
            }
        )
    for start in range(0, len(made), micro_batch_size):
        batch = made[start : start + micro_batch_size]
        before = batch[-1] if len(batch) > 1 else made[start - 1]
        for row in batch:
            row["KL_completion_ids"] = before["completion_ids"]
            before = row
    return made


def require_kto() -> None:
    """Refuse to begin without TRL.

    Raises:
        UserError: It is not installed, or too old.
    """
    if find_spec("trl") is None or find_spec("datasets") is None:
        raise UserError("train.method kto needs TRL: pip install '.[kto]'")
    require("trl")


def _score_by(tail: Tail, model: PreTrainedModel) -> None:
    """Have TRL's losses read the output head of a model that it has prepared as the model does itself.

    TRL knows what a model does to the products of its head by the names of its settings, which are not all; and without
    Triton it makes logits of padding and prompts too.
    """
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import FusedCausalLMOutput

    whole = model.forward

    @wraps(whole)
    def forward(*args: Any, fused_lm_head: bool = False, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if not fused_lm_head or labels is None:
            return whole(*args, labels=labels, **kwargs)
        states: list[Tensor] = []
        with head_calls(model, states.append):
            outputs = whole(*args, **kwargs)
        head, said = tail.head(model), labels[:, 1:]
        counted = said != IGNORE_INDEX
        wanted = ("log_probs", "entropy", "mean_logits") if torch.is_grad_enabled() else ("log_probs",)
        before, temperature = states[0][:, :-1][counted], 1.0
        rows = (before, head.weight, head.bias, said[counted])
        values = ChunkedLogProbFunction.apply(*rows, temperature, CHUNK, head.softcap, head.scale, wanted)
        log_probs, entropy, _, mean_logits, _ = (
            None if value is None else value.new_zeros(said.shape).masked_scatter(counted, value) for value in values
        )
        return FusedCausalLMOutput(
            log_probs=log_probs,
            entropy=entropy,
            mean_logits=mean_logits,
            aux_loss=getattr(outputs, "aux_loss", None),
        )

    model.forward = forward


def _trainer(model: PreTrainedModel, tail: Tail) -> Any:
    """TRL's trainer, which takes rows as they are encoded, reads the head of a model by its tail, and is silent."""
    from trl import KTOTrainer

    class Trainer(FiniteSteps, KTOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            # TRL's would put an end token behind replies that were cut, and find other tokens where texts meet.
            return dataset

        def _precompute_ref_logps(self, *arguments: Any) -> Any:
            # The first thing that reads the head, once TRL has prepared it.
            _score_by(tail, model)
            return super()._precompute_ref_logps(*arguments)

        def _send_telemetry(self) -> None:
            pass

        def create_model_card(self, *_: Any, **__: Any) -> None:
            pass

    return Trainer


class _Metrics(MetricsFile):
    """TRL's measures under its own names, but for two that mean something else in ours."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        names = {"kl": "kto_kl", "entropy": "reply_entropy"}
        renamed = {names.get(name, name): value for name, value in (logs or {}).items()}
        super().on_log(args, state, control, renamed, **kwargs)


def kto_trainer(
    loaded: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Example],
    encoding: Encoding,
    arguments: dict[str, Any],
    beta: float,
) -> tuple[Any, str]:
    """TRL's `KTOTrainer` on rows as `encode_rows` makes them: imitate rows are desirable, avoid rows undesirable.

    The reference is the model as it is now. Its log-probabilities are taken here, once. TRL takes rows in the same
    order in every epoch, drawn with the seed, and trains without dropout.

    Args:
        loaded: Model to train.
        tokenizer: Of the model.
        rows: Rows of both kinds.
        encoding: How they become tokens; `turns` must be `last`.
        arguments: For `trl.KTOConfig`: what transformers' `TrainingArguments` take.
        beta: How dear distance from the reference is.

    Returns:
        The trainer, and what became of the rows. `kto.json` in its folder has the counts and weights.

    Raises:
        UserError: A kind of rows is missing, rows have weights, or the logits are not made from the output head alone.

    Source: Ethayarajh et al. 2024 (arXiv 2402.01306), Eq. 7.
    """
    require_kto()
    from datasets import Dataset
    from trl import KTOConfig

    fit_padding(loaded, tokenizer)
    refuse_adapted_head(loaded)
    tail = learn_tail(loaded, tokenizer(QUESTION).input_ids)
    encoded, report = encode_rows(rows, tokenizer, encoding)
    if not report.imitate or not report.avoid:
        raise UserError(f"train.method kto needs desirable and undesirable rows: {report}")
    if "weight" in encoded[0]:
        raise UserError("data.imitate: rows have a weight, which train.method kto does not know: drop the field")
    random.Random(arguments["seed"]).shuffle(encoded)
    desirable, undesirable = kto_weights(report.imitate, report.avoid)
    settings = KTOConfig(
        **arguments,
        beta=beta,
        desirable_weight=desirable,
        undesirable_weight=undesirable,
        max_length=encoding.max_length,
        precompute_ref_log_probs=True,
    )
    base = loaded.get_base_model() if isinstance(loaded, PeftModel) else loaded
    trainer = _trainer(base, tail)(
        model=loaded,
        args=settings,
        train_dataset=Dataset.from_list(kto_rows(encoded, settings.per_device_train_batch_size)),
        processing_class=tokenizer,
        callbacks=[_Metrics(Path(settings.output_dir) / "metrics.jsonl")],
    )
    if isinstance(loaded, PeftModel):
        # The copy that was the reference has done its work; it would be saved in every checkpoint.
        loaded.delete_adapter("ref")
    write_json(
        Path(settings.output_dir) / "kto.json",
        {
            "desirable": report.imitate,
            "undesirable": report.avoid,
            "desirable_weight": desirable,
            "undesirable_weight": undesirable,
            "beta": beta,
        },
    )
    return trainer, f"{report}; weights: {desirable:.3g} desirable (imitate), {undesirable:.3g} undesirable (avoid)"
