"""How often a model declines toxic prompts under one instruction, by how the two are put together.

    python research/method/wordings.py --json docs/results/method/wordings.json

22 toxic prompts of the demo, the first shipped instruction, greedy replies of 32 tokens, declined by phrases.
"""

import argparse
import json
from pathlib import Path

import torch

from tasft.core.provenance import commit
from tasft.data.rows import read_prompts
from tasft.harvest.settings import INSTRUCTIONS
from tasft.judges.refusal_matching import declines
from tasft.models.load import load_model, load_tokenizer

BASE = "smollm2-135m-instruct"
FORMS = {
    "one line": "{instruction} {prompt}",
    "an empty line between": "{instruction}\n\n{prompt}",
    "the prompt in quotes": '{instruction}\n\n"{prompt}"',
    "as system prompt": None,
    "no instruction": "{prompt}",
}


def messages(form: str | None, prompt: str) -> list[dict[str, str]]:
    """What the model is asked."""
    if form is None:
        return [{"role": "system", "content": INSTRUCTIONS[0]}, {"role": "user", "content": prompt}]
    return [{"role": "user", "content": form.format(instruction=INSTRUCTIONS[0], prompt=prompt)}]


@torch.inference_mode()
def main() -> None:
    """Ask and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    model, tokenizer = load_model(BASE, "bfloat16").eval(), load_tokenizer(BASE)
    tokenizer.padding_side = "left"
    prompts = [prompt.prompt for prompt in read_prompts("demo-toxic-harvest")][::3]
    found = {}
    for name, form in FORMS.items():
        asked = [messages(form, prompt) for prompt in prompts]
        batch = tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        made = model.generate(**batch, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        replies = tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        found[name] = {"declined": sum(map(declines, replies)), "n": len(replies)}
        print(name, found[name], flush=True)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    report = {"model": BASE, "instruction": INSTRUCTIONS[0], "commit": commit(), "forms": found}
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
