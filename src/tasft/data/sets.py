"""Named sets of prompts and templates: what for, under which licence, where they are, and how to know them again."""

from collections import ChainMap
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Literal

from tasft.core.errors import UserError
from tasft.core.provenance import file_hash
from tasft.core.suggest import did_you_mean

Kind = Literal["toxic", "benign", "templates"]


@dataclass(frozen=True)
class NamedSet:
    """A published set of prompts, or of templates that prompts are put into.

    Attributes:
        kind: Whether its prompts should be refused or answered; or templates.
        prompts: How many there are.
        licence: As its publisher states it.
        file: Name of its file, here and in a data folder.
        url: Where the file comes from; None for one that is shipped.
        sha256: Of the file's bytes; None for a shipped one, and where we never had the published file in our hands.
        column: Field with the prompt.
        topic: Field with its type; empty for none.
        only: Field and value of the rows that belong to the set; None takes all.
        about: What it is, and its source.
    """

    kind: Kind
    prompts: int
    licence: str
    file: str
    url: str | None
    sha256: str | None
    column: str
    topic: str = ""
    only: tuple[str, str] | None = None
    about: str = ""


_GITHUB = "https://raw.githubusercontent.com"
_STL = f"{_GITHUB}/vinid/safety-tuned-llamas/36a4b8d5c2177ed165bf61f59b590161394f7f12/data/evaluation"
_ADVERSARIA = f"{_GITHUB}/busycalibrating/AdversariaLLM/f970939273ea17b491fadf6001fddc36ed3ae3ff/data/behavior_datasets"
_XSTEST = f"{_GITHUB}/paul-rottger/exaggerated-safety/d7bb5bd738c1fcbc36edd83d5e7d1b71a3e2d84d"
_HUB = "https://huggingface.co/datasets"


def _stl(kind: Kind, prompts: int, name: str, sha256: str, about: str) -> NamedSet:
    url = f"{_STL}/{name}.json"
    about = f"{about} (Bianchi et al. 2024, arXiv 2309.07875)"
    return NamedSet(kind, prompts, "CC BY-NC 4.0", f"{name}.json", url, sha256, "instructions", about=about)


def _xstest(kind: Kind, prompts: int, label: str, about: str) -> NamedSet:
    return NamedSet(
        kind,
        prompts,
        "CC BY 4.0",
        "xstest_prompts.csv",
        f"{_XSTEST}/xstest_prompts.csv",
        "11783fb294ed017473ee53c207d71f2161c7672c8d0b037501e78387f801cb5a",
        "prompt",
        "type",
        ("label", label),
        f"{about} (Röttger et al. 2024, arXiv 2308.01263)",
    )


def _hub(kind: Kind, prompts: int, licence: str, path: str, column: str, topic: str, about: str) -> NamedSet:
    return NamedSet(kind, prompts, licence, path.rpartition("/")[2], f"{_HUB}/{path}", None, column, topic, about=about)


def _shipped(kind: Kind, prompts: int, name: str, about: str, only: tuple[str, str] | None = None) -> NamedSet:
    return NamedSet(kind, prompts, "Apache-2.0", f"{name}.jsonl", None, None, "prompt", "topic", only, about)


NAMED: dict[str, NamedSet] = {
    "i-malicious": _stl(
        "toxic",
        100,
        "I-MaliciousInstructions",
        "7a2bc751d49983800848050282aa2a84b3faa7044c3178228c49dd68df7d679f",
        "malicious instructions",
    ),
    "i-cona": _stl(
        "toxic",
        178,
        "I-CoNa",
        "e07d92e376198e60ac1004902dc3fec46513ac70b08d855b4101288b8270d62a",
        "instructions that ask for hate speech",
    ),
    "i-controversial": _stl(
        "toxic",
        40,
        "I-Controversial",
        "0590fc6ee97a39c6a43adc21fe5a4ccbf546ea52e89a32757db6ea3d46ce65c4",
        "instructions on controversial topics",
    ),
    "harmfulq": NamedSet(
        "toxic",
        200,
        "MIT",
        "HarmfulQ.json",
        f"{_GITHUB}/SALT-NLP/chain-of-thought-bias/e92a0efeb94e64eb68586d5c04a25af1415282d2/data/dangerous-q/toxic_outs.json",
        "b40b0193d063cb5d742e6d0e070dde119e0291619830c65653ca19bdc84fdd10",
        "prompt",
        about="toxic questions that a language model wrote (Shaikh et al. 2023, arXiv 2212.08061)",
    ),
    "q-harm": _stl(
        "toxic",
        100,
        "Q-Harm",
        "ecc1d19030d41ad550a1e69996dc424074e3e45fb2fa5e8e44b46f294aea295a",
        "harmful questions from HH-RLHF: of these prompts some are in that data set, too",
    ),
    "i-physical-unsafe": _stl(
        "toxic",
        100,
        "I-PhysicalSafetyUnsafe",
        "16324a2f1ded933e8c7a9f6c7d3924130f76260d03f9df2205e0a25c02de8aae",
        "physically unsafe advice, from SafeText",
    ),
    "i-physical-safe": _stl(
        "benign",
        100,
        "I-PhysicalSafetySafe",
        "34c874532623e405fb574f0fa8d6b86cbecce0e3340f67b146a6a6bc2453bed6",
        "physically safe advice, from SafeText",
    ),
    "i-alpaca": _stl(
        "benign",
        50,
        "I-Alpaca",
        "30db84ee303df15b653566437ccf1a2fc837caac99a570915d720f65f041fe6d",
        "benign instructions of Alpaca",
    ),
    "harmbench": NamedSet(
        "toxic",
        200,
        "MIT",
        "harmbench_behaviors_text_all.csv",
        f"{_ADVERSARIA}/harmbench_behaviors_text_all.csv",
        "2745611872be3b2eab141e39bb328b8c1140dc3cd8d0a49da6174260d9ccbfb9",
        "Behavior",
        "SemanticCategory",
        ("FunctionalCategory", "standard"),
        "its standard behaviours; the contextual ones need a context, the copyright ones a test of their own "
        "(Mazeika et al. 2024, arXiv 2402.04249)",
    ),
    "strongreject": NamedSet(
        "toxic",
        313,
        "MIT; some questions under their original licences",
        "strongreject_dataset.csv",
        f"{_ADVERSARIA}/strongreject_dataset.csv",
        "4dd70357e4ff8b5d0ba5ebafecab5d6dd5633ce8046e3dd1c8bd93e64de44381",
        "forbidden_prompt",
        "category",
        about="forbidden questions (Souly et al. 2024, arXiv 2402.10260)",
    ),
    "advbench": NamedSet(
        "toxic",
        520,
        "MIT",
        "harmful_behaviors.csv",
        f"{_GITHUB}/llm-attacks/llm-attacks/main/data/advbench/harmful_behaviors.csv",
        None,
        "goal",
        about="harmful behaviours (Zou et al. 2023, arXiv 2307.15043)",
    ),
    "advbench-50": NamedSet(
        "toxic",
        50,
        "MIT",
        "pair_harmful_behaviors_custom.csv",
        f"{_GITHUB}/patrickrchao/JailbreakingLLMs/6379ef705a0fc745530f7d895963510c021b496a/data/harmful_behaviors_custom.csv",
        "66af8279f7690e1b83f8edeeeef0ff5c9da099e994ef54ecc14bdaf5fa759de2",
        "goal",
        "category",
        about="the part of AdvBench that PAIR was tested on (Chao et al. 2023, arXiv 2310.08419)",
    ),
    "jailbreakbench": _hub(
        "toxic",
        100,
        "MIT",
        "JailbreakBench/JBB-Behaviors/resolve/main/data/harmful-behaviors.csv",
        "Goal",
        "Category",
        "misuse behaviours (Chao et al. 2024, arXiv 2404.01318)",
    ),
    "jailbreakbench-benign": _hub(
        "benign",
        100,
        "MIT",
        "JailbreakBench/JBB-Behaviors/resolve/main/data/benign-behaviors.csv",
        "Goal",
        "Category",
        "harmless behaviours on the same topics (Chao et al. 2024, arXiv 2404.01318)",
    ),
    "xstest-safe": _xstest("benign", 250, "safe", "safe prompts that only look unsafe, of ten types"),
    "xstest-unsafe": _xstest("toxic", 200, "unsafe", "their unsafe contrasts, of eight types"),
    "or-bench-hard": _hub(
        "benign",
        1319,
        "CC BY 4.0",
        "bench-llm/or-bench/resolve/main/or-bench-hard-1k.csv",
        "prompt",
        "category",
        "OR-Bench-Hard-1K: seemingly toxic prompts that many models refuse (Cui et al. 2024, arXiv 2405.20947)",
    ),
    "or-bench-toxic": _hub(
        "toxic",
        655,
        "CC BY 4.0",
        "bench-llm/or-bench/resolve/main/or-bench-toxic.csv",
        "prompt",
        "category",
        "OR-Bench-Toxic: toxic prompts (Cui et al. 2024, arXiv 2405.20947)",
    ),
    "demo-toxic-heldout": _shipped("toxic", 40, "demo-toxic-heldout", "of the demo, for its result"),
    "demo-toxic-validation": _shipped("toxic", 40, "demo-toxic-validation", "of the demo, for its settings"),
    "demo-toxic-harvest": _shipped("toxic", 100, "demo-toxic-harvest", "of the demo, trained on"),
    "demo-benign-heldout": _shipped("benign", 40, "demo-benign-heldout", "of the demo, for its result"),
    "demo-plain-heldout": _shipped("benign", 30, "demo-plain-heldout", "plain ones of the demo, for its result"),
    "demo-benign-validation": _shipped("benign", 40, "demo-benign-validation", "of the demo, for its settings"),
    "demo-benign-train": _shipped("benign", 806, "demo-benign-train", "of the demo, trained on"),
    "try-toxic": _shipped("toxic", 4, "demo-toxic-harvest", "a topic of the demo, to try", ("topic", "malware")),
    "try-benign": _shipped("benign", 9, "demo-benign-train", "a topic of the demo, to try", ("topic", "science")),
}
# No sets to evaluate on: an attack puts prompts into them.
TEMPLATES: dict[str, NamedSet] = {
    "jailbreak-wrappers": _shipped(
        "templates",
        3,
        "jailbreak-wrappers",
        "a line of ours for each of prefix injection, refusal suppression and style injection (Wei et al. 2023, arXiv "
        "2307.02483)",
    ),
    "gptfuzz-templates": NamedSet(
        "templates",
        77,
        "MIT, of the repository; collected from jailbreakchat.com",
        "GPTFuzzer.csv",
        f"{_GITHUB}/sherdencooper/GPTFuzz/1eddeb565740ae311b5f4950492b011a6f866fe7/datasets/prompts/GPTFuzzer.csv",
        "e4abf25343b4adb991dd8ddc6189c038f26a6e74064d792cced69f56f71577fc",
        "text",
        about="jailbreak templates that people wrote (Yu et al. 2023, arXiv 2309.10253)",
    ),
}
KNOWN = ChainMap(TEMPLATES, NAMED)
GROUPS = {
    "paper": ("i-malicious", "i-cona", "i-controversial", "harmfulq"),
    "xstest": ("xstest-safe", "xstest-unsafe"),
    "or-bench": ("or-bench-hard", "or-bench-toxic"),
}
"""Several sets by one name. `paper` are the 518 prompts on which TA-SFT was evaluated."""


def expanded(names: list[str]) -> list[str]:
    """Names of sets, each once, with those of groups in place of the group's.

    Raises:
        UserError: Names every one that there is not.
    """
    unknown = [name for name in names if name not in NAMED and name not in GROUPS]
    if unknown:
        known = (*GROUPS, *NAMED)
        raise UserError(
            [
                f"no prompt set is called {name!r}; use some of {', '.join(known)}{did_you_mean(name, known)}"
                for name in unknown
            ]
        )
    return list(dict.fromkeys(member for name in names for member in GROUPS.get(name, (name,))))


def locate(name: str, data_dir: str | None) -> Path:
    """The file of a named set: the package's own, one in a data folder, or one that is downloaded once.

    Args:
        name: In `KNOWN`.
        data_dir: Where the file is looked for by its name, in all folders below. Of several the one with the expected
            hash is taken. None downloads it.

    Raises:
        UserError: It is not there or cannot be had; says from where and to where.
    """
    known = KNOWN[name]
    if known.url is None:
        return Path(str(resources.files("tasft.data") / "prompts" / known.file))
    if data_dir is None:
        return _downloaded(name, known.file, known.url)
    if not Path(data_dir).is_dir():
        raise UserError(f"data_dir: {data_dir} is not a folder")
    paths = sorted(Path(data_dir).rglob(known.file))
    if not paths:
        raise UserError(f"{name}: no {known.file} below {data_dir}: download {known.url} and put it there by that name")
    return next((path for path in paths if _hash(path) == known.sha256), paths[0])


def differences(name: str, path: Path, prompts: int) -> list[str]:
    """What a reader of figures on a set must know of its file: that it is not the published one, or may not be.

    Args:
        name: In `KNOWN`.
        path: What `locate` gave.
        prompts: How many prompts were read from it.
    """
    known = KNOWN[name]
    notes: list[str] = []
    if known.url is None:
        return notes
    if known.sha256 is None:
        notes.append(f"{name}: no hash of the published file is known here, so {path} could not be compared with it")
    elif _hash(path) != known.sha256:
        notes.append(f"{name}: {path} is not the published file: its sha256 is {_hash(path)}, not {known.sha256}")
    if prompts != known.prompts:
        notes.append(f"{name}: {path} has {prompts} prompts, not {known.prompts} as published")
    return notes


@cache
def _hash(path: Path) -> str:
    return file_hash(path)


def _downloaded(name: str, file: str, url: str) -> Path:
    from torch import hub  # its folder is where users expect downloads, and its function leaves no half file

    path = Path(hub.get_dir()) / "tasft" / file
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            hub.download_url_to_file(url, str(path), progress=False)
        except OSError as error:
            raise UserError(
                f"{name}: {url} could not be downloaded ({error}): download it on another machine, put it as {file} "
                "into some folder, and name that folder by data.data_dir or --data-dir"
            ) from None
    return path
