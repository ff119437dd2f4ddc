"""The model that a run made, as a folder that needs neither adapter nor tasft."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tasft.core import provenance
from tasft.core.errors import UserError
from tasft.core.step import done_key, outlived
from tasft.data.settings import PromptFormat
from tasft.data.template import ALPACA, encode_prompt
from tasft.models.generation import end_tokens, fit_padding
from tasft.models.load import attach_adapter, base_of, load_model, load_tokenizer, sketch
from tasft.report import write_card, write_plain_card
from tasft.report.read import read_run
from tasft.run import gate, recipe_file
from tasft.run.context import Context
from tasft.run.recipe import Gate, Model

# What the logits are compared on; no word of a run's data.
_PAIRS = (
    ("What is a compost heap?", "It is a pile of plant waste that slowly rots to soil."),
    ("Write two sentences about the sea.", "The sea is wide and old. It is never quite still."),
    ("Is 17 a prime number?", "Yes: no whole number but 1 and 17 divides it."),
    ("How do I <forbidden act>?", "I'm sorry, but I can't help with that."),
)

# Largest difference that rounding explains, as a share of the largest logit. The demo's adapter, which moves logits by
# 0.6 of it, was seen to differ by 4e-6, 7e-3 and 5e-2 in these.
LIMITS = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 0.1}

# Alpaca's format as a chat template. It has one question, as the rows that the model was tuned on.
_ALPACA_TEMPLATE = (
    "{% if messages | length != 1 or messages[0]['role'] != 'user' %}"
    "{{ raise_exception('this model was tuned on single questions: send one message, of the user') }}{% endif %}"
    "{{ BEGIN + messages[0]['content'] + END }}"
)


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: Where.
        files: Name -> bytes, all of the folder.
        difference: Largest absolute difference of a logit between the run's model and what the folder holds.
        moved: The same between the base model and the run's, None for a run without adapter: what a merge that lost
            the adapter would differ by.
        largest: Largest absolute logit of the run's model.
        notes: What a user of the model has to know, and the figures above, in words.
    """

    folder: Path
    files: dict[str, int]
    difference: float
    moved: float | None
    largest: float
    notes: list[str]


def export(run: Path, target: Path, name: str | None = None, ungated: bool = False) -> Exported:
    """Write the final model of a run with its adapter merged, tokenizer, generation config and model card.

    The weights are read back from disk and their logits compared with those of the run's own model.

    Args:
        run: A run folder whose model was evaluated: the card has what was measured.
        target: A folder that is not there or empty. It is there whole or not at all.
        name: What the card calls the model; None for the folder's name.
        ungated: Also a model that does not meet the gate of its recipe.

    Raises:
        UserError: The run is not done, its gate is not met, `target` is not free or cannot be written, or the logits
            differ by more than rounding explains.
    """
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{run} is not a run folder: it has no recipe.yaml")
    with provenance.lock(run):
        spec = recipe_file.load(str(run))
        besides = {name for name in ("capability", "quality", "jailbreak") if getattr(spec.evaluate, name) is not None}
        trained = _trained(Context(spec, run), besides | set(spec.evaluate.sets))
        if spec.gate is not None and not ungated:
            _require_gate(run, spec.gate)
        return _placed(spec.model, trained, target, name, partial(write_card, run))


def export_adapter(
    adapter: Path, target: Path, base: str | None = None, prompt: PromptFormat = "chat", name: str | None = None
) -> Exported:
    """As `export`, of an adapter in PEFT's form, whoever trained it; the card has no figures.

    Args:
        adapter: Its folder. A tokenizer that was saved there is taken.
        target: As there.
        base: The model that it is for; None is the one that it names.
        prompt: How the exported model is asked.
        name: As there.

    Raises:
        UserError: As there; or the model is not here, or the adapter does not fit it.
    """
    for folder in adapter.absolute().parents:
        if (folder / "recipe.yaml").is_file() and (folder / "manifest.json").is_file():
            raise UserError(f"{adapter} is of the run {folder}: export the run, which has figures and may have a gate")
    base = base or base_of(adapter)
    dtype = str(getattr(sketch(base).config, "dtype", None) or "float32").removeprefix("torch.")
    spec = Model(base=base, prompt=prompt, dtype=dtype if dtype in LIMITS else "bfloat16")  # type: ignore[arg-type]
    return _placed(spec, adapter, target, name, partial(write_plain_card, base))


def _placed(
    spec: Model, trained: Path, target: Path, name: str | None, card: Callable[[Path, Sequence[str]], None]
) -> Exported:
    """Written beside the target first, and moved there when it is whole."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is there and not empty: choose another folder")
    draft = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        done = _written(spec, trained, draft, name or target.name, card)
        _open_to_all(draft)
        os.rename(draft, target)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{target} could not be written ({error}): nothing was left there") from error
    finally:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)
    return Exported(target, *done)


def _require_gate(run: Path, limits: Gate) -> None:
    judged = gate.judge(limits, read_run(run))
    if broken := [f"gate not met: {limit['sentence']}" for limit in judged["limits"] if not limit["met"]]:
        raise UserError([*broken, f"{run} is not exported: --ungated exports it all the same"])


def _open_to_all(folder: Path) -> None:
    """Modes as of any file of the user's: temporary ones are for their eyes alone, but a model may be served."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~mask)


def _trained(context: Context, asked: set[str]) -> Path:
    """Adapter or weights of a finished training, whose figures are those of the card."""
    run = context.folder
    if done_key(run / "train") is None:
        raise UserError(f"{run}: its training is not done: run tasft run {run}")
    stale = {
        path.relative_to(run).parts[2]
        for path in (run / "evaluate" / "final").rglob("done.json")
        if outlived(path.parent)
    }
    if stale := stale & asked:
        raise UserError(
            f"{run / 'evaluate' / 'final'}: {', '.join(sorted(stale))} is of an earlier training, and the card "
            f"would give it for this one: run tasft run {run}"
        )
    return context.trained("final")


def _written(
    spec: Model, trained: Path, draft: Path, name: str, card: Callable[[Path, Sequence[str]], None]
) -> tuple[dict[str, int], float, float | None, float, list[str]]:
    is_adapter = (trained / "adapter_config.json").is_file()
    tokenizer = load_tokenizer(spec.base, spec.trust_remote_code, trained if is_adapter else None)
    asked = [
        encode_prompt(tokenizer, prompt, spec.prompt, chat_template_kwargs=spec.chat_template_kwargs)
        + tokenizer(reply, add_special_tokens=False).input_ids
        for prompt, reply in _PAIRS
    ]
    loaded = load_model(spec.base if is_adapter else str(trained), spec.dtype, spec.trust_remote_code)
    before = None
    if is_adapter:
        # Attached first: a training may have added the tokens that the template writes.
        loaded = attach_adapter(loaded, trained)
        with loaded.disable_adapter():
            before = _logits(loaded, asked)
    own = _logits(loaded, asked)
    merged = _merged(loaded, trained) if isinstance(loaded, PeftModel) else loaded
    _set_generation(merged, tokenizer, spec)
    merged.save_pretrained(draft)
    files = {path.name for path in draft.iterdir()}
    del loaded, merged

    read = load_model(str(draft), spec.dtype, spec.trust_remote_code)
    difference, largest = _difference(own, _logits(read, asked)), max(float(row.abs().max()) for row in own)
    del read
    moved = _difference(own, before) if before else None
    limit = LIMITS[spec.dtype] * largest
    if not difference <= limit:
        raise UserError(
            f"{trained}: logits of the merged model differ from those of its adapter by up to {difference:.2g}, where "
            f"rounding to {spec.dtype} explains {limit:.2g}"
            + (f" and the adapter itself moves them by {moved:.2g}" if moved is not None else "")
            + ": nothing was exported; serve the base model with the adapter"
        )
    notes = _set_template(tokenizer, spec)
    # All that it says that it wrote; the path is that of the draft.
    files |= _save_tokenizer(tokenizer, draft)
    _check_tokenizer(draft, tokenizer, spec)
    if spec.quantize != "none":
        notes.append(
            "It was trained, and measured, on a base in 4 bits; it is merged into the weights as they are published."
        )
    adapter = f"; the adapter moves them by up to {moved:.2g}" if moved is not None else ""
    notes.append(
        f"Logits of these files differ from those of the model that was trained by at most {difference:.2g} on "
        f"{len(_PAIRS)} prompts with replies, the largest being {largest:.2g}{adapter}."
    )
    card(draft / "README.md", [*_usage(name, spec), *(f"{note}\n" for note in notes)])
    files.add("README.md")
    return {name: (draft / name).stat().st_size for name in sorted(files)}, difference, moved, largest, notes


def _merged(loaded: PeftModel, adapter: Path) -> PreTrainedModel:
    try:
        return loaded.merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError, AttributeError, NotImplementedError) as error:  # as each kind of adapter has it
        reason = " ".join(str(error).split())
        raise UserError(
            f"{adapter}: this adapter cannot be merged ({reason:.200}): serve the base model with it"
        ) from error


@torch.inference_mode()
def _logits(loaded: PreTrainedModel | PeftModel, rows: Sequence[list[int]]) -> list[Tensor]:
    """(tokens, V) of each row."""
    return [loaded(input_ids=torch.tensor([row], device=loaded.device)).logits[0].float().cpu() for row in rows]


def _difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))


def _set_generation(merged: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, spec: Model) -> None:
    """Replies end where those of the run did."""
    config = merged.generation_config
    config._from_model_config = False  # What is said here is meant, and not to be made anew from the other config.
    config.eos_token_id = end_tokens(merged, tokenizer, spec.prompt, spec.chat_template_kwargs)
    fit_padding(merged, tokenizer)
    config.pad_token_id = tokenizer.pad_token_id
    try:
        config.validate(strict=True)
    except ValueError:
        # Published with a temperature but without do_sample, which transformers reads and refuses to write.
        config.do_sample = True


def _set_template(tokenizer: PreTrainedTokenizerBase, spec: Model) -> list[str]:
    """The chat template writes what the model was tuned on; says what it cannot."""
    notes = []
    if spec.prompt == "alpaca":
        begin, end = ALPACA.split("{instruction}")
        first = tokenizer("x").input_ids[:1]
        mark = tokenizer.bos_token if first == [tokenizer.bos_token_id] else ""
        tokenizer.chat_template = _ALPACA_TEMPLATE.replace("BEGIN", repr(mark + begin)).replace("END", repr(end))
        notes.append("Its chat template writes Alpaca's format, as it is to be asked: one question, no conversation.")
    if spec.chat_template_kwargs:
        settings = ", ".join(f"{key}={value!r}" for key, value in spec.chat_template_kwargs.items())
        notes.append(f"It was tuned and measured with the chat template's settings {settings}: give them too.")
    return notes


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> set[str]:
    """Write a tokenizer; names of its files.

    transformers leaves out `legacy`, by which Llama's and kin begin text after a special token with a space or not.
    """
    files = {Path(path).name for path in tokenizer.save_pretrained(folder)}
    if (legacy := getattr(tokenizer, "legacy", None)) is not None:
        path = folder / "tokenizer_config.json"
        settings = provenance.read_json(path) or {}
        provenance.write_json(path, settings | {"legacy": legacy})
    return files


def _check_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, spec: Model) -> None:
    read = load_tokenizer(str(folder), spec.trust_remote_code)
    for prompt, _ in _PAIRS:
        wanted = encode_prompt(tokenizer, prompt, spec.prompt, chat_template_kwargs=spec.chat_template_kwargs)
        ids = encode_prompt(read, prompt, "chat", chat_template_kwargs=spec.chat_template_kwargs)
        if ids != wanted:
            raise UserError(
                f"{folder.name}: the saved tokenizer's chat template writes {prompt!r} in other tokens than the run "
                f"did ({ids[:8]} ..., not {wanted[:8]} ...): nothing was exported"
            )


def _usage(name: str, spec: Model) -> list[str]:
    settings = "".join(f", {key}={value!r}" for key, value in spec.chat_template_kwargs.items())
    remote = ", trust_remote_code=True" * spec.trust_remote_code
    return [
        "## How to use it",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({name!r}{remote})",
        f"model = AutoModelForCausalLM.from_pretrained({name!r}{remote})",
        'chat = [{"role": "user", "content": "What is a compost heap?"}]',
        f"question = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False{settings})",
        'inputs = tokenizer(question, add_special_tokens=False, return_tensors="pt")',
        "reply = model.generate(**inputs, do_sample=False, max_new_tokens=64)[0, inputs.input_ids.shape[1] :]",
        "print(tokenizer.decode(reply, skip_special_tokens=True))",
        "```",
        "",
    ]


CONVERTER = "convert_hf_to_gguf.py"


def converter() -> str:
    """llama.cpp's script that makes a .gguf file of a model: in the folder that LLAMA_CPP names, or on the PATH.

    Raises:
        UserError: It is not there; says how to have it.
    """
    folder = os.environ.get("LLAMA_CPP")
    script = shutil.which(CONVERTER, mode=os.R_OK, path=folder)
    if script is None:
        raise UserError(
            f"--gguf needs llama.cpp's {CONVERTER}, which is not {'in ' + folder if folder else 'on the PATH'}: "
            "git clone https://github.com/ggml-org/llama.cpp, and name that folder in LLAMA_CPP"
        )
    return script


def add_gguf(exported: Exported) -> Exported:
    """Have llama.cpp's converter write the model as one .gguf file too, `NAME.gguf` in its folder.

    Raises:
        UserError: The converter is not there, or does not take the model; the export stays as it was.
    """
    made = exported.folder / f"{exported.folder.resolve().name}.gguf"
    command = [sys.executable, converter(), str(exported.folder), "--outfile", str(made)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode or not made.is_file():
        made.unlink(missing_ok=True)
        last = " ".join((done.stderr or done.stdout).strip().rpartition("\n")[2].split())
        raise UserError(
            f"--gguf: {CONVERTER} ended with {done.returncode} ({last:.200}); the model is exported, without a .gguf"
        )
    return replace(exported, files=exported.files | {made.name: made.stat().st_size})


def check_push(name: str) -> None:
    """Whether the hub could be asked to take a model.

    Raises:
        UserError: The name is none of the hub's, or nobody is logged in.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push {name}: {error}") from None
    if not get_token():
        raise UserError("--push: nobody is logged in to the hub: run hf auth login, or set HF_TOKEN")


def push(exported: Exported, name: str) -> str:
    """Upload the files of an export, and none besides; its address.

    A repository that is not there is made, a private one.

    Raises:
        UserError: The hub does not take them.
    """
    # From a list, not from a folder: what somebody lays into it meanwhile stays here.
    added = [CommitOperationAdd(file, str(exported.folder / file)) for file in exported.files]
    try:
        hub = HfApi()
        made = hub.create_repo(name, private=True, exist_ok=True)
        hub.create_commit(made.repo_id, added, commit_message="Model, tokenizer and card, written by tasft")
    except Exception as error:  # the hub's, the network's and the token's errors share no base class
        reason = " ".join(str(error).split())
        raise UserError(
            f"--push {name}: the hub did not take it ({type(error).__name__}: {reason:.200}); "
            f"{exported.folder} is done, hf upload {name} {exported.folder} tries again"
        ) from error
    return str(made)
