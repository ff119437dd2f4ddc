"""Base models, tokenizers and adapters."""

import json
import os
import shutil
import textwrap
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tasft.core.errors import UserError
from tasft.core.hashes import caches, known_hash
from tasft.models.bundled import BUNDLED


@dataclass(frozen=True)
class Place:
    """Where `from_pretrained` finds a model: a folder or hub name, and a GGUF file in it if that is what it is."""

    name: str
    gguf_file: str | None = None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `from_pretrained`."""
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}

    def weights(self) -> dict[str, Any]:
        """Keyword arguments for a model with its weights. Packed ones cannot be trained, and compute in float32."""
        dequantised = {} if self.gguf_file is None else {"quantization_config": GgufConfig(dequantize=True)}
        return self.arguments() | dequantised


def locate(base: str, trust_remote_code: bool = False) -> Place:
    """Find a model without loading a weight.

    Args:
        base: A name in `BUNDLED`, a folder, a `.gguf` file, or a name on the hub.
        trust_remote_code: Passed on to transformers.

    Raises:
        UserError: It is not there; says what would bring it.
    """
    if base in BUNDLED:
        return _unpacked(base)
    path = Path(base)
    if base.endswith(".gguf"):
        if not os.path.isfile(path):
            raise UserError(f"model.base: {base:.100}: no such file")
        # From the root: a bare folder name would be looked up on the hub, too.
        return Place(str(path.parent.absolute()), path.name)
    if os.path.isfile(path):
        raise UserError(f"model.base: {base} is a file: name the folder that it is in, or a .gguf file")
    if is_folder := os.path.isdir(path):
        if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
            raise UserError(
                f"model.base: {base} is an adapter, not a model: name the model that it is for, or merge it"
            )
        if not (path / "config.json").is_file():
            raise UserError(f"model.base: {base} is a folder without config.json: not a saved model")
    try:
        AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    except Exception as error:  # hub, cache and parsing errors share no base class
        if is_folder or "trust_remote_code" in str(error):
            raise _unread(base, "config.json", error) from error
        raise UserError(
            f"model.base: {base:.100} is neither a folder, a .gguf file, one of {', '.join(BUNDLED)}, nor a model that "
            f"the hub gives here ({_reason(error)})"
        ) from error
    if is_folder:
        _check_weights(path)
    return Place(base)


def _kept(name: str) -> Path:
    """Where a bundled model is kept unpacked; another version of transformers may read its file in another way."""
    return caches() / f"{name}-{BUNDLED[name].sha256[:12]}-transformers-{transformers.__version__}"


def _unpacked(name: str) -> Place:
    """A bundled model as a saved one, in the user's cache: a GGUF file with many words is read for a minute.

    Raises:
        UserError: It is not installed, or another file than the one that was tested.
    """
    packed, folder = Place(str(BUNDLED[name].found()), BUNDLED[name].file), _kept(name)
    if not _is_whole(folder):
        print(f"unpacking {name} into {folder} ...", flush=True)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            # Beside it first: what is broken off must not look like the whole.
            with TemporaryDirectory(dir=folder.parent) as draft:
                model = AutoModelForCausalLM.from_pretrained(
                    packed.name, dtype=torch.float32, trust_remote_code=False, **packed.weights()
                )
                model.save_pretrained(f"{draft}/model")
                tokenizer = AutoTokenizer.from_pretrained(packed.name, trust_remote_code=False, **packed.arguments())
                tokenizer.save_pretrained(f"{draft}/model")
                shutil.rmtree(folder, ignore_errors=True)
                os.rename(f"{draft}/model", folder)
        except OSError:  # The cache cannot be written, or another process was first.
            return Place(str(folder)) if _is_whole(folder) else packed
    return Place(str(folder))


def _is_whole(folder: Path) -> bool:
    with suppress(UserError):
        _check_weights(folder)
        return (folder / "tokenizer.json").is_file()
    return False


def _reason(error: BaseException) -> str:
    """What a library says, on one line."""
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 200, placeholder=' ...')}"


def _unread(base: str, what: str, error: BaseException) -> UserError:
    """Why transformers does not read a part of a model."""
    if "trust_remote_code" in str(error):
        return UserError(
            f"model.base: {base:.100} comes with code of its own: read it, and set model.trust_remote_code to run it"
        )
    for path in sorted(Path(base).glob("*.json")) if os.path.isdir(base) else ():
        try:
            whole = isinstance(json.loads(path.read_bytes()), dict)
        except (OSError, ValueError):
            whole = False
        if not whole:
            return UserError(f"model.base: {path}: not JSON, or not an object: copy or download it again")
    return UserError(f"model.base: {base:.100}: its {what} is not read by transformers ({_reason(error)})")


def _check_weights(folder: Path) -> None:
    """Look at the heads of the files of weights, which say how long each must be.

    Raises:
        UserError: A file is missing or damaged.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    files = [single]
    if not single.is_file() and index.is_file():
        try:
            files = sorted({folder / name for name in json.loads(index.read_text("utf-8"))["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"model.base: {index}: no index of weights: copy or download it again") from None
    if missing := [str(path) for path in files if not path.is_file()]:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"; {pickles[0]} is a pickle, which may run code: save the model as safetensors" if pickles else ""
        raise UserError(
            f"model.base: {', '.join(missing[:3])}: no such file{hint or ': copy or download the model again'}"
        )
    for path in files:
        try:
            check_tensors(path)
        except UserError as error:
            raise UserError(f"model.base: {error}: copy or download the model again") from None


def check_tensors(path: Path) -> None:
    """Look at the head of a safetensors file, which says how long it must be.

    Raises:
        UserError: It is damaged.
    """
    try:
        with safe_open(path, "pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: damaged or cut short ({error!s:.100})") from None


def is_finite(weight: torch.Tensor) -> bool:
    """Whether all values are finite numbers; of a weight that is shared out, those that this process holds."""
    local = weight.to_local() if hasattr(weight, "to_local") else weight
    return not local.is_floating_point() or bool(local.isfinite().all())


def _not_finite(weights: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """What is wrong with weights of which some are no numbers; None if all are finite."""
    broken = [name for name, weight in weights if not is_finite(weight)]
    return f"weights that are not finite numbers: {', '.join(broken[:3])}" if broken else None


def check_trained(folder: Path) -> None:
    """See that the weights in a folder, if there are any, are whole and finite; none is loaded for good.

    Raises:
        UserError: They are damaged, or are not finite numbers: the training that made them diverged.
    """
    for path in sorted(folder.glob("*.safetensors")):
        check_tensors(path)
        with safe_open(path, "pt") as file:
            broken = _not_finite((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
        if broken:
            raise UserError(f"{path}: {broken}; {DIVERGED}")


DIVERGED = "the training diverged: lower its learning_rate and train again"


_READ = frozenset(
    """
    config.json generation_config.json adapter_config.json tokenizer.json tokenizer_config.json special_tokens_map.json
    added_tokens.json chat_template.json vocab.json vocab.txt merges.txt tekken.json
    """.split()  # noqa: SIM905
)
_READ_SUFFIXES = frozenset({".model", ".tiktoken", ".spm", ".jinja", ".py"})


def _files_read(folder: Path) -> list[Path]:
    """Files of a saved model or adapter that are read when it is loaded."""
    index = folder / "model.safetensors.index.json"
    weights = {"model.safetensors", "adapter_model.safetensors"}
    if index.is_file() and not (folder / "model.safetensors").is_file():
        with suppress(ValueError, KeyError, TypeError, AttributeError):  # `locate` says what is wrong with it.
            weights |= {index.name, *json.loads(index.read_bytes())["weight_map"].values()}
    templates = (folder / "additional_chat_templates").glob("*.jinja")
    return sorted(
        path
        for path in (*folder.iterdir(), *templates)
        if path.name in _READ | weights or path.suffix in _READ_SUFFIXES
        if path.name[0] != "." and path.is_file()
    )


def fingerprint(base: str) -> list[tuple[str, str]] | str | None:
    """What tells a model from others by content, wherever it is; None for a hub's, which has no files here.

    Returns:
        The hash of a bundled model or a GGUF file; name and hash of each file of a saved one that is read.
    """
    if base in BUNDLED:
        return BUNDLED[base].sha256
    path = Path(base)
    if not path.is_dir():
        return known_hash(path) if path.is_file() else None
    return [(str(file.relative_to(path)), known_hash(file)) for file in _files_read(path)] or None


def has_tokenizer(adapter: Path | None) -> bool:
    """Whether a tokenizer was saved with an adapter."""
    return adapter is not None and (adapter / "tokenizer_config.json").is_file()


def load_tokenizer(base: str, trust_remote_code: bool = False, adapter: Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model, or the one that was saved with an adapter for it; with a padding token.

    Raises:
        UserError: It is not there, or comes with code that is not trusted.
    """
    place = Place(str(adapter)) if has_tokenizer(adapter) else locate(base, trust_remote_code)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            place.name, trust_remote_code=trust_remote_code, **place.arguments()
        )
    except Exception as error:  # those of every format of a tokenizer
        raise _unread(base, "tokenizer", error) from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.base: the tokenizer of {base:.100} has no end token: name its eos_token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def sketch(base: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model without weights, to see what it is made of.

    Raises:
        UserError: It is no causal language model, or its settings make none.
    """
    place = locate(base, trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(place.name, trust_remote_code=trust_remote_code, **place.arguments())
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # those of every architecture
        raise UserError(
            f"model.base: {base:.100}: its config.json makes no causal language model ({_reason(error)})"
        ) from error


def load_model(
    base: str, dtype: str = "float32", trust_remote_code: bool = False, quantize: str = "none"
) -> PreTrainedModel:
    """A causal language model in evaluation mode, on the GPU if there is one.

    Args:
        base: As `locate` takes it.
        dtype: Name of a torch dtype.
        trust_remote_code: Passed on to transformers.
        quantize: none, or 4bit: the frozen weights under an adapter in NF4 (QLoRA, Dettmers et al. 2023), products
            in `dtype`. The output head, which the losses read, is left as it is.

    Raises:
        UserError: It does not load, or is to be quantised without a GPU or bitsandbytes.
    """
    place = locate(base, trust_remote_code)
    quantization = _four_bits(dtype) if quantize == "4bit" else {}
    model: PreTrainedModel
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            place.name,
            dtype=getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            # A pickle can run code.
            use_safetensors=None if place.gguf_file else True,
            # What does not fit is named below.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **quantization,
            **place.weights(),
        )
    except Exception as error:  # those of every architecture and format of weights
        raise UserError(f"model.base: {base:.100} does not load ({_reason(error)})") from error
    # transformers draws anew what it does not find.
    for what, keys in (("missing", loaded["missing_keys"]), ("of another shape", loaded["mismatched_keys"])):
        if names := sorted(key if isinstance(key, str) else key[0] for key in keys):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(
                f"model.base: {base:.100}: by its config.json, weights are {what}: {', '.join(names[:3])}{more}; copy "
                "or download the model again"
            )
    model.config.return_dict = True  # Its config.json may say that it answers with tuples.
    if broken := _not_finite(model.named_parameters()):
        raise UserError(f"model.base: {base:.100}: {broken}; copy or download the model again")
    if quantization:
        return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _four_bits(dtype: str) -> dict[str, Any]:
    if not torch.cuda.is_available() or find_spec("bitsandbytes") is None:
        raise UserError("model.quantize: 4bit needs a GPU and bitsandbytes: pip install bitsandbytes, or say none")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    return {"quantization_config": config, "device_map": {"": torch.cuda.current_device()}}


def base_of(adapter: Path) -> str:
    """The model that a saved adapter is for, as `locate` takes it.

    Raises:
        UserError: The adapter does not say.
    """
    try:
        base = PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    except Exception as error:  # those of JSON and of every kind of adapter
        raise UserError(f"{adapter / 'adapter_config.json'}: no settings of an adapter ({_reason(error)})") from None
    if not base:
        raise UserError(f"{adapter / 'adapter_config.json'}: base_model_name_or_path is empty: write the model there")
    for name, bundled in BUNDLED.items():
        # The folder that it is loaded from is all that the adapter remembers: unpacked, or of the file.
        if base in (str(bundled.folder), str(_kept(name))):
            return name
    if Path(base).is_absolute() and not os.path.exists(base):
        raise UserError(
            f"{adapter / 'adapter_config.json'}: its model is {base:.100}, which is not here: name the model by --base"
        )
    return str(base)


def check_targets(model: PreTrainedModel, targets: list[str]) -> None:
    """See that an adapter can be put on modules of these names.

    Raises:
        UserError: As `add_lora`.
    """
    head = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if module is model.get_output_embeddings() or module is model.get_input_embeddings()
    }
    if head & set(targets):
        raise UserError(
            f"model.lora.target_modules: {', '.join(sorted(head & set(targets)))} is the output head or the embedding, "
            "which the losses read directly; leave it out, or train in full with model.lora=null"
        )
    leaves = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    missing = sorted(set(targets) - leaves)
    if missing:
        raise UserError(
            f"model.lora.target_modules: this model has no {', '.join(missing)}; "
            f"it has {', '.join(sorted(leaves - head))}"
        )


def add_lora(
    model: PreTrainedModel,
    *,
    r: int,
    lora_alpha: int,
    lora_dropout: float,
    target_modules: list[str],
    layers_to_transform: list[int] | None = None,
) -> PeftModel:
    """A fresh LoRA adapter; the model computes what it did before until the adapter is trained.

    Raises:
        UserError: `target_modules` names the output head (its penalty would not see the adapter) or no module;
            `layers_to_transform` names a layer that the model has not.
    """
    check_targets(model, target_modules)
    layers = model.config.get_text_config().num_hidden_layers
    if beyond := [number for number in layers_to_transform or [] if number >= layers]:
        raise UserError(
            f"model.lora.layers_to_transform: {beyond[0]} is none of the model's {layers} layers, 0 to {layers - 1}"
        )
    config = LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=target_modules,
        layers_to_transform=layers_to_transform,
        task_type="CAUSAL_LM",
    )
    adapted: PeftModel = get_peft_model(model, config)
    return adapted


def attach_adapter(model: PreTrainedModel, adapter: Path, trainable: bool = False) -> PeftModel:
    """The model with a saved adapter on it; `detach` gives the model back as it was.

    Raises:
        UserError: Its weights are missing or damaged, or not for this model.
    """
    path = adapter / "adapter_model.safetensors"
    if not path.is_file():
        pickles = sorted(file.name for file in adapter.glob("adapter_model*.bin"))
        hint = f"; {pickles[0]} is a pickle, which may run code: save the adapter as safetensors" if pickles else ""
        raise UserError(f"{path}: no such file{hint}")
    check_trained(adapter)
    try:
        _fit_vocabulary(model, path)
        return PeftModel.from_pretrained(model, str(adapter), is_trainable=trainable)
    except Exception as error:  # those of every kind of adapter
        raise UserError(f"{adapter}: this adapter does not fit the model ({_reason(error)})") from error


def _fit_vocabulary(model: PreTrainedModel, weights: Path) -> None:
    """Resize head and embedding to those that an adapter holds whole, of a training that added tokens."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = {name for name, module in model.named_modules() if any(module is end for end in ends)}
    keys = {f"base_model.model.{name}{inner}.weight" for name in names for inner in ("", ".base_layer")}
    with safe_open(weights, "pt") as file:
        sizes = {file.get_slice(key).get_shape()[0] for key in keys & set(file.keys())}
    if sizes and max(sizes) != ends[0].weight.shape[0]:
        model.resize_token_embeddings(max(sizes), mean_resizing=False)


def detach(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model without its adapter."""
    return model.unload() if isinstance(model, PeftModel) else model


def saved(run: Path, state: str) -> Path:
    """The folder with the adapter or the weights of a run in a state: sft, final, or a checkpoint of train.

    Raises:
        UserError: It is not there.
    """
    if state.startswith("checkpoint-"):
        places = [run / "train" / state]
    else:
        trained = run / ("train" if state == "final" else state)
        places = [trained / "adapter", trained / "model"]
    for folder in places:
        if folder.is_dir():
            return folder
    raise UserError(
        f"{run}: there is no model {state!r}: tasft run {run} makes it; if it was removed by hand, remove the rest of "
        f"{places[0].parent} first"
    )
