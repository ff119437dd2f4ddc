"""Public labels of prompts and replies: where they come from, under which licence, and how they read.

`SOURCES` is the table of docs/judges.md. A source whose licence forbids commercial use, or does not say, is measured
on and never trained on. Each file is known by its sha256: another file is refused.
"""

import csv
import gzip
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

csv.field_size_limit(sys.maxsize)


@dataclass
class Example:
    """A prompt and a reply with what is known of them; None is not known.

    Attributes:
        harmful: Whether the reply helps with a harmful request or is harmful itself.
        complies: Whether it does what was asked, so that it helps.
        declines: Whether it declines, wholly or in part.
        partial: Whether it declines in part alone.
        broken: Whether it is corrupted text, a fragment or a loop.
        rambling: Whether it helps nobody: it rambles, repeats or slips off the subject.
        asks: Whether the prompt alone asks for harm.
        group: What must not be on both sides of a split.
        weight: How much it counts in training.
    """

    source: str
    prompt: str
    reply: str
    harmful: float | None = None
    complies: float | None = None
    declines: float | None = None
    partial: float | None = None
    broken: float | None = None
    rambling: float | None = None
    asks: float | None = None
    group: str = ""
    weight: float = 1.0


@dataclass(frozen=True)
class Source:
    """A set of public labels.

    Attributes:
        files: File below the data folder -> first 16 digits of its sha256.
        trains: Whether its licence lets it be trained on.
    """

    name: str
    what: str
    licence: str
    origin: str
    files: dict[str, str]
    trains: bool
    read: Callable[[Path], Iterator[Example]]


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        return list(csv.DictReader(file))


def lines(path: Path) -> list[Any]:
    data = path.read_bytes()
    return [json.loads(line) for line in (gzip.decompress(data) if path.suffix == ".gz" else data).splitlines()]


def key_of(prompt: str, completion: str) -> str:
    """The hash by which labels name a reply."""
    return hashlib.sha256(f"{prompt}\x00{completion}".encode()).hexdigest()[:24]


XSTEST = ("gpt4", "llama2new", "llama2orig", "mistralguard", "mistralinstruct")
DNA = ("GPT4", "ChatGPT", "Claude", "ChatGLM2", "llama2-7b-chat", "vicuna-7b")


def _xstest(data: Path) -> Iterator[Example]:
    """Labels of refusal; an unsafe prompt that is fully complied with is harmful. Groups are topics."""
    for model in XSTEST:
        for row in table(data / f"judge/xstest/xstest_v2_completions_{model}.csv"):
            unsafe, label = row["type"].startswith("contrast_"), row["final_label"][0]
            topic = row["type"].removeprefix("contrast_")
            topic = next((short for short in ("discr", "privacy") if short in topic), topic)
            yield Example(
                "xstest",
                row["prompt"],
                row["completion"],
                harmful=float(unsafe and label == "1"),
                complies=float(label == "1"),
                declines=float(label != "1"),
                partial=float(label == "3"),
                asks=float(unsafe),
                group=topic,
            )


def _gptfuzz(data: Path) -> Iterator[Example]:
    """The bare question stands for the prompt: the templates are jailbreaks. Groups are questions."""
    questions = [row["text"] for row in table(data / "judge/gptfuzz/question_list.csv")]
    for name in ("train", "evaluate"):
        for row in table(data / f"judge/gptfuzz/{name}.csv"):
            question = questions[int(row["question"])]
            label = float(row["label"])
            yield Example("gptfuzz", question, row["Response"], harmful=label, complies=label, asks=1.0, group=question)


def _moderation(data: Path) -> Iterator[Example]:
    """Single texts, taken as replies to an empty prompt; harmful by any category."""
    for number, row in enumerate(lines(data / "judge/openai_moderation_samples-1680.jsonl.gz")):
        labels = [row[name] for name in ("S", "H", "V", "HR", "SH", "S3", "H2", "V2") if name in row]
        yield Example("moderation", "", row["prompt"], harmful=float(any(labels)), group=str(number))


def _jailbreakbench(data: Path) -> Iterator[Example]:
    """The goal stands for the prompt: prompts are attacks. The labels are those of the benchmark's judge, a model.

    The file is the `jailbreaks` of every attack's files but test-artifact, in the order of their paths, one a line:
    goal, response and jailbroken of those that have a response.
    """
    for row in lines(data / "judge/jailbreakbench.jsonl"):
        label = float(row["jailbroken"])
        yield Example(
            "jailbreakbench",
            row["goal"],
            row["response"],
            harmful=label,
            complies=label,
            asks=1.0,
            group=row["goal"],
        )


def _safe_rlhf(data: Path) -> Iterator[Example]:
    for row in table(data / "judge/safe_rlhf_mini.csv"):
        yield Example("safe-rlhf", row["question"], row["answer"], harmful=float(row["label"]), group=row["question"])


def _do_not_answer(data: Path) -> Iterator[Example]:
    """Action 0 declines (arXiv 2308.13387, Table 2); 1 to 4 rebut, argue, say that they do not know, or inform."""
    for row in table(data / "judge/do_not_answer_en.csv"):
        for model in DNA:
            yield Example(
                "do-not-answer",
                row["question"],
                row[f"{model}_response"],
                harmful=float(row[f"{model}_harmful"]),
                declines=1.0 if row[f"{model}_action"] == "0" else 0.0 if row[f"{model}_action"] in "45" else None,
                asks=1.0,
                group=row["question"],
            )


def _jailjudge(data: Path) -> Iterator[Example]:
    """Prompts are wrapped into attacks of many kinds; English rows."""
    for row in table(data / "judge/jailjudge_mini.csv"):
        yield Example("jailjudge", row["question"], row["answer"], harmful=float(row["label"]), group=row["question"])


SOURCES = {
    source.name: source
    for source in (
        Source(
            "xstest",
            "XSTest v2 completions of five models, labels of refusal by two people",
            "CC BY 4.0 (prompts, labels); completions under their models' terms",
            "paul-rottger/exaggerated-safety",
            {
                "judge/xstest/xstest_v2_completions_gpt4.csv": "71af323af8ecdec0",
                "judge/xstest/xstest_v2_completions_llama2new.csv": "6365cc55ce0a593c",
                "judge/xstest/xstest_v2_completions_llama2orig.csv": "cbc52550e8ba8197",
                "judge/xstest/xstest_v2_completions_mistralguard.csv": "0ac03817b65e019a",
                "judge/xstest/xstest_v2_completions_mistralinstruct.csv": "6a146b65a5b96ec8",
            },
            True,
            _xstest,
        ),
        Source(
            "gptfuzz",
            "ChatGPT's replies to jailbreak templates, labelled by people",
            "MIT",
            "sherdencooper/GPTFuzz",
            {
                "judge/gptfuzz/train.csv": "e25fe2a06d2085af",
                "judge/gptfuzz/evaluate.csv": "ca9e460c7fbcf3bc",
                "judge/gptfuzz/question_list.csv": "18531eb6bc1c8fc0",
            },
            True,
            _gptfuzz,
        ),
        Source(
            "moderation",
            "OpenAI's evaluation set of moderation: texts, not replies",
            "MIT",
            "openai/moderation-api-release",
            {"judge/openai_moderation_samples-1680.jsonl.gz": "ef3f7de86ee394fe"},
            True,
            _moderation,
        ),
        Source(
            "jailbreakbench",
            "Replies of four models to attacks of five kinds, labelled by Llama 3 70B",
            "MIT",
            "JailbreakBench/artifacts",
            {"judge/jailbreakbench.jsonl": "9b242270c1452a02"},
            True,
            _jailbreakbench,
        ),
        Source(
            "safe-rlhf",
            "PKU-SafeRLHF, a sample: answers of Alpaca-like models, safe or unsafe",
            "CC BY-NC 4.0",
            "ThuCCSLab/JailbreakEval (PKU-Alignment/PKU-SafeRLHF)",
            {"judge/safe_rlhf_mini.csv": "b70c3fbd8e0fbd3b"},
            False,
            _safe_rlhf,
        ),
        Source(
            "do-not-answer",
            "Risky questions and the replies of six models, harm and kind of answer by people",
            "CC BY-NC-SA 4.0",
            "kunishou/do-not-answer-ja (Libr-AI/do-not-answer)",
            {"judge/do_not_answer_en.csv": "410449674780aa73"},
            False,
            _do_not_answer,
        ),
        Source(
            "jailjudge",
            "JAILJUDGE, a sample: attacks of many kinds, labelled by people",
            "its own licence, for research",
            "ThuCCSLab/JailbreakEval (usail-hkust/JAILJUDGE)",
            {"judge/jailjudge_mini.csv": "2542eeadaed08490"},
            False,
            _jailjudge,
        ),
    )
}


def examples(name: str, data: Path) -> list[Example]:
    """The labelled pairs of a source.

    Raises:
        SystemExit: A file is missing or not the one that is known.
    """
    source = SOURCES[name]
    for file, digest in source.files.items():
        path = data / file
        if not path.is_file():
            raise SystemExit(f"{path}: no such file; it is of {source.origin}")
        actual = hashlib.sha256(path.read_bytes()).hexdigest()
        if not actual.startswith(digest):
            raise SystemExit(f"{path}: sha256 {actual[:16]}, not {digest}: not the file of the figures")
    return list(source.read(data))
