"""Recipes and sweeps of the paper's experiments, written from one table of what the paper says.

    python research/paper.py                        # writes recipes/paper/
    python research/paper.py ROWS.jsonl.gz NAME=TOKENIZER ...    # T_imitate: docs/results/paper-tokens.json

The paper's weights belong to its way of dividing the loss: in each micro-batch of 3 rows, sums over tokens by the rows
of that kind. `per_group` divides each term by its own count over the whole step, so that a weight means the same for
any data. One is translated into the other by

    weight = tuned * (1 - (1 - s)^3) / (1 - s^3) * T_avoid / T_imitate        s = avoid / (avoid + imitate)

(without T_avoid for nlcl, whose penalty is one number for each response). There are 20,000 rows to imitate, and 3,335
more where contrastive rows are mixed in. T are mean lengths of responses in the model's own tokens. The paper gives
neither. T_imitate is measured, of Alpaca's outputs; T_avoid is known after a harvest only, and taken to be the same.

Source: Lu, Sinha, Varakantham 2024, arXiv 2412.06843.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parents[1] / "recipes" / "paper"
TOKENS = Path(__file__).parents[1] / "docs" / "results" / "paper-tokens.json"

IMITATE = 20_000
MICRO = 3
SIZES = (1000, 500, 300, 100)
# 5 prompts for each toxic word, 3,335 in all. Who wrote them is not stated: here the model itself does.
CONTRASTIVE_ROWS = 3_335
CONTRASTIVE = ", harvest.contrastive: {words: 667, per_word: 5}"


class Model(NamedTuple):
    """A model of the paper, its epochs, and the tuned weights for each size.

    `tokens` is the mean length of Alpaca's outputs with their end token, by the tokenizer of the model, over rows drawn
    at random (AlpaGasus, random_9k): docs/results/paper-tokens.json.
    """

    hub: str
    epochs: int
    tokens: float
    emd: tuple[float, ...]
    nlcl: tuple[float, ...]


MODELS = {
    "llama-7b": Model("huggyllama/llama-7b", 3, 63.3, (0.83, 1.70, 4.00, 9.00), (3.80, 4.00, 14.5, 20)),
    "llama-13b": Model("huggyllama/llama-13b", 3, 63.3, (0.70, 0.99, 2.20, 7.10), (5.50, 12.0, 15.0, 55)),
    "mistral-7b": Model("mistralai/Mistral-7B-v0.3", 4, 63.3, (0.50, 0.60, 1.05, 3.10), (2.40, 3.40, 5.60, 25)),
    "llama-3.1-8b": Model("meta-llama/Meta-Llama-3.1-8B", 3, 56.9, (0.49, 0.78, 1.30, 3.80), (2.50, 3.50, 5.50, 16)),
}

RECIPE = """\
# The paper's experiment on {hub} (Lu, Sinha, Varakantham 2024, arXiv 2412.06843): SFT, harvest, TA-SFT, evaluation.
# Needs a large GPU, the model and data from the hub, a key for OpenAI, and in data/ the files that `tasft check` names.
# `paper-{name}-rows.yaml` beside it has a cell for each row of the paper's tables.
name: paper-{name}
model:
  base: {hub}                        # paper, section 4.1
  prompt: alpaca                     # paper, as STL
  dtype: bfloat16                    # ours; not stated
  lora: {{r: 8, lora_alpha: 16, lora_dropout: 0.05, target_modules: [q_proj, v_proj]}}   # paper
data:
  imitate: {{source: "hub:tatsu-lab/alpaca?split=train", rows: 20000}}    # paper: 20,000 random rows of Alpaca
  toxic_prompts: hh-rlhf-red-team    # paper: red-team prompts of HH-RLHF
  # Ours: what a benign reply looks like, for coherence; none of them is trained on by themselves.
  benign_prompts: "hub:tatsu-lab/alpaca?split=train[:200]#instruction"
  data_dir: data
judges:
  deberta: {{kind: stl_deberta}}       # paper: mean score, 0 to 5
  # Paper: a mean judge score of 1 to 10 for its attack; by whom is not stated.
  rated: {{kind: llm_judge, rubric: pair, server: {{urls: ["https://api.openai.com/v1"], model: gpt-4o-mini}}}}
sft:                                 # paper: as below
  epochs: {epochs}
  batch_size: 96
  micro_batch_size: 3
  learning_rate: 1e-4
harvest:
  rows: 1000                         # paper: 1000, 500, 300, 100
  judge: openai_moderation           # paper
  self_imitate: false                # paper: the rows to imitate are Alpaca's
  max_new_tokens: 256                # ours; how answers were drawn is not stated
train:
  start: base                        # paper: a fresh adapter, on the whole mixture
  epochs: {epochs}                          # paper: 3, Mistral 4
  batch_size: 96                     # paper: micro-batches of 3, 32 of them
  micro_batch_size: 3
  learning_rate: 1e-4                # paper; that it decays linearly to 0 is ours, and not stated
  # Ours: each step has its share of rows to avoid. The paper shuffles all rows together (sampling: uniform).
  sampling: stratified
  # Ours: each term is divided by its own count. The paper's way is `paper`, with the weights of its table 4.
  normalization: per_group
  # Ours: the end token of a harmful answer is not penalised. The paper's sums run over all of its tokens.
  penalize_eos: false
  max_length: 512                    # ours; not stated
  kl_rows: 16                        # ours: so many rows to imitate are held out, to watch the divergence
  save_steps: 100                    # ours
evaluate:
  sets: [i-malicious, i-cona, i-controversial, harmfulq, xstest-safe, xstest-unsafe]   # paper: 518 prompts, and XSTest
  judges: [deberta, openai_moderation, refusal_matching]    # paper, and phrases for refusals
  max_new_tokens: 256                # ours
  checkpoints: true                  # paper, figures 2 and 3
  capability: {{tasks: [boolq, piqa, openbookqa], limit: null}}                        # paper, table 5
  # Paper: AlpacaEval's 805 prompts, GPT-4o mini as annotator.
  quality:
    prompts: data/text_davinci_003_model_outputs.json
    annotator: {{config: weighted_alpaca_eval_gpt-4o-mini-2024-07-18}}
  # Paper: about 46 prompts; which attack is not stated.
  jailbreak: {{set: harmfulq, limit: 46, judge: rated, prefix: "Sure, here is", pair: {{}}}}
"""

HEAD = """\
# Every row of the paper's tables for {hub}: SFT, KTO; STL, NLCL and EMD with 1000 to 100 rows to avoid, and those
# of its figure 5: EMD and NLCL with and without contrastive rows, each also with twice the weight. What departs from
# the paper is marked in paper-{name}.yaml, whose rows these are.
# Written by research/paper.py, which says how weights are translated; the arithmetic stands beside each, from the tuned
# weights of the paper's table 4. Alpaca's outputs are {tokens} of this model's tokens long in the mean. Where the
# harvest's answers are longer or shorter, multiply emd by the ratio of their mean lengths. The contrastive rows are
# counted as 3,335; where fewer are kept, their cells' weights are a little small. STL learns the responses that its
# authors publish, to their prompts, as in the paper; for the same prompts in both arms set data.toxic_prompts to that
# file and rows to harvested, as recipes/small does.
name: paper-{name}-rows
base: paper-{name}.yaml
pairs:
  - {{train.method: sft}}
  - {{train.method: kto, harvest.rows: 1000}}
"""


def factor(avoid: int, imitate: int = IMITATE) -> float:
    """What a weight is multiplied by, before lengths: from means over micro-batches to means over kinds."""
    s = avoid / (avoid + imitate)
    return (1 - (1 - s) ** MICRO) / (1 - s**MICRO)


def recipe(name: str) -> str:
    model = MODELS[name]
    return RECIPE.format(name=name, hub=model.hub, epochs=model.epochs)


def sweep(name: str) -> str:
    model = MODELS[name]
    lines = [HEAD.format(name=name, hub=model.hub, tokens=model.tokens)]
    for rows in SIZES:
        responses = f"{{source: data/safety_only_data_Instructions.json, rows: {rows}}}"
        lines.append(f"  - {{train.method: stl, data.safe_responses: {responses}}}\n")
    for penalty, divisor, shown in (("nlcl", model.tokens, f" / {model.tokens}"), ("emd", 1.0, "")):
        most = getattr(model, penalty)[0]
        for rows, tuned, more in (
            *((rows, tuned, "") for rows, tuned in zip(SIZES, getattr(model, penalty), strict=True)),
            (SIZES[0], most, CONTRASTIVE),
            (SIZES[0], 2 * most, ""),
            (SIZES[0], 2 * most, CONTRASTIVE),
        ):
            times = factor(rows, IMITATE + (CONTRASTIVE_ROWS if more else 0))
            weight = tuned * times / divisor
            cell = f"{{train.penalty: {penalty}, harvest.rows: {rows}, train.penalty_weight: {weight:.3g}{more}}}"
            lines.append(f"  - {cell:<84} # {tuned:g} * {times:.4f}{shown}\n")
    return "".join(lines)


def written() -> dict[Path, str]:
    """Text of every file."""
    return {
        FOLDER / f"paper-{name}{kind}.yaml": make(name)
        for name in MODELS
        for kind, make in (("", recipe), ("-rows", sweep))
    }


def measured(path: str, tokenizers: Mapping[str, str]) -> dict[str, Any]:
    """Mean tokens of the field `output`, an end token included, by each tokenizer: name -> hub name or folder."""
    from transformers import AutoTokenizer

    from tasft.core.provenance import commit, file_hash
    from tasft.core.stats import mean
    from tasft.data.files import read_rows

    # Drawn at random from Alpaca, where the file says which rows were.
    rows = [
        row for _, row in read_rows(Path(path)) if "alpagasus/random_9k" in row.get("sources", "alpagasus/random_9k")
    ]
    found = {}
    for name, place in tokenizers.items():
        tokenizer = AutoTokenizer.from_pretrained(place)
        lengths = [len(tokenizer(row["output"], add_special_tokens=False).input_ids) + 1.0 for row in rows]
        found[name] = {"vocabulary": len(tokenizer), **asdict(mean(lengths))}
    return {"rows": Path(path).name, "sha256": file_hash(Path(path)), "commit": commit(), "tokens": found}


if __name__ == "__main__":
    if sys.argv[1:]:
        result = measured(sys.argv[1], dict(word.split("=", 1) for word in sys.argv[2:]))
        TOKENS.write_text(json.dumps(result, indent=1) + "\n")
        sys.exit()
    FOLDER.mkdir(exist_ok=True)
    for path, text in written().items():
        path.write_text(text, encoding="utf-8")
