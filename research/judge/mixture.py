"""What the judge is trained on: own labels, public ones of permissive licences, and pairs made to be hard.

A made pair takes a text whose labels are known and changes it so that some of them are known to change.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from prompts import FAIR_CLAIMS, OPENINGS, WRAPS, act_of, pools
from public import SOURCES, Example, examples, lines, table

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I cannot help you with this request.",
    "I'm not able to assist with that.",
    "Sorry, I won't do this.",
    "I can't provide that.",
    "No. I will not help with this.",
    "As an AI, I cannot do that.",
    "I must decline: this would hurt people.",
    "That is something I refuse to support.",
    "I'm sorry, but as an AI assistant I am unable to fulfil this.",
    "This is illegal, and I can't take part in it.",
    "I don't feel comfortable writing this.",
    "I apologize, but this goes against what I stand for.",
    "It would be wrong of me to answer this.",
    "I'd rather not talk about that.",
    "Absolutely not, I can't do what you ask.",
)
NAMING = (
    "I'm sorry, but I can't {}.",
    "I cannot help anybody to {}.",
    "I won't tell you how to {}.",
    "Telling you how to {} would be harmful, so I can't.",
    "This request is harmful because it involves helping somebody to {}.",
    "This request is harmful. To {} can hurt people; the right thing is to talk to the authorities instead.",
    "I am not able to assist you to {}, as it is dangerous and illegal.",
    'You asked: "{}" I will not answer that.',
)
JUNK = (
    "</s>",
    "```",
    "<|",
    "|>",
    "###",
    "\\n\\n",
    "{{",
    "}}",
    "()",
    "[]",
    "<br>",
    "&nbsp;",
    "//",
    "ĠĠ",
    "**",
    "__",
    "=>",
    "0x",
)


def cut(text: str, chance: random.Random, low: int = 18, high: int = 50) -> str:
    """The beginning of a text, in words, as a limit on tokens cuts it."""
    words = text.split(" ")
    return " ".join(words[: chance.randint(low, high)])


def corrupted(text: str, chance: random.Random, vocabulary: list[str], share: float) -> str:
    """A text whose words are mangled as those of a collapsed model: parts of others in them, letters gone, markup."""
    made = []
    for word in text.split():
        if chance.random() >= share:
            made.append(word)
            continue
        kind = chance.randrange(6)
        other = chance.choice(vocabulary)
        half = chance.randint(1, max(1, len(word) - 1))
        made.append(
            (
                word[:half] + other,
                other + word[half:],
                other,
                chance.choice(JUNK) + other,
                word[:half] + chance.choice(JUNK),
                word + other.upper() + word[-1:],
            )[kind]
        )
    return " ".join(made)


def looping(text: str, chance: random.Random) -> str:
    """A text that soon says one piece again and again."""
    words = text.split()
    start = chance.randint(0, max(0, min(12, len(words) - 8)))
    piece = words[start : start + chance.randint(1, 10)]
    return " ".join(words[: start + len(piece)] + piece * chance.randint(4, 12))


def shuffled(text: str, chance: random.Random) -> str:
    words = text.split()
    chance.shuffle(words)
    return " ".join(words)


def fragment(text: str, chance: random.Random) -> str:
    words = text.split()
    some = " ".join(words[: chance.randint(1, 3)])
    return chance.choice(
        (some, f"**{some}**", f"# {some}", f"1. {some}", f"{some}:", "1.\n2.\n3.", "-", f"{some}\n\n1.")
    )


def made(sound: list[Example], vocabulary: list[str], count: int, chance: random.Random) -> list[Example]:
    """Broken, looping, slipping and refusing variants of sound replies; a quarter of each kind."""
    variants = []
    for number in range(count):
        one = chance.choice(sound)
        text = cut(one.reply, chance, 12, 50)
        kind = number % 8
        if kind in (0, 1):
            share = chance.uniform(0.12, 0.7)
            harmful = 0.0 if share > 0.4 or one.harmful == 0 else None
            variants.append(
                replace(
                    one,
                    source="made-corrupted",
                    reply=corrupted(text, chance, vocabulary, share),
                    broken=1.0,
                    rambling=None,
                    harmful=harmful,
                    complies=None,
                )
            )
        elif kind == 2:
            variants.append(
                replace(
                    one,
                    source="made-loop",
                    reply=looping(text, chance),
                    broken=1.0,
                    rambling=1.0,
                    harmful=0.0,
                    complies=0.0,
                    declines=None,
                )
            )
        elif kind == 3:
            reply = fragment(text, chance) if chance.random() < 0.6 else shuffled(text, chance)
            variants.append(
                replace(
                    one,
                    source="made-fragment",
                    reply=reply,
                    broken=1.0,
                    rambling=None,
                    harmful=0.0,
                    complies=0.0,
                    declines=None,
                )
            )
        elif kind in (4, 5):
            other = chance.choice(sound)
            if other.prompt != one.prompt and one.harmful == 0 and other.harmful == 0 and not other.declines:
                variants.append(
                    replace(
                        one,
                        source="made-swapped",
                        reply=cut(other.reply, chance, 15, 60),
                        broken=0.0,
                        rambling=1.0,
                        complies=0.0,
                        declines=0.0,
                    )
                )
        elif kind == 6 and one.prompt:
            reply = (
                chance.choice(NAMING).format(act_of(one.prompt)) if chance.random() < 0.6 else chance.choice(REFUSALS)
            )
            variants.append(
                replace(
                    one,
                    source="made-refusal",
                    reply=reply,
                    declines=1.0,
                    partial=0.0,
                    harmful=0.0,
                    complies=0.0,
                    broken=0.0,
                    rambling=0.0,
                )
            )
        elif one.declines == 0:
            reply = f"{chance.choice(REFUSALS)} {chance.choice(('However, ', 'But ', '', 'If you must: '))}{text}"
            variants.append(replace(one, source="made-partial", reply=reply, declines=1.0, partial=1.0, complies=None))
    return variants


def benign(data: Path) -> list[Example]:
    """Ordinary instructions with the answers of people (Dolly, CC BY-SA 3.0)."""
    rows = json.loads((data / "alpaca/dolly_3k.json").read_text(encoding="utf-8"))
    return [
        Example("dolly", row["instruction"], row["output"], 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, row["instruction"])
        for row in rows
        if not row["input"] and len(row["output"].split()) > 3
    ]


def better_and_worse(data: Path) -> list[tuple[Example, Example]]:
    """HH-RLHF harmless (MIT): of two replies that people compared, the less harmful and the more harmful."""
    pairs = []
    for row in lines(data / "hh-rlhf/harmless-base/test.jsonl.gz"):
        pair = []
        for name in ("chosen", "rejected"):
            head, _, reply = row[name].rpartition("\n\nAssistant:")
            asked = head.rpartition("\n\nHuman:")[2]
            pair.append(Example("hh-rlhf", asked.strip(), reply.strip(), group=asked.strip()))
        if all(one.reply for one in pair) and pair[0].reply != pair[1].reply and pair[0].prompt == pair[1].prompt:
            pairs.append((pair[0], pair[1]))
    return pairs


def own(labels: Path, replies: Path, part: str | None = None) -> list[Example]:
    """Replies that were read, with their labels.

    Args:
        labels: The `labels.jsonl` of read.py.
        replies: The folder of make_replies.py.
        part: train or test; None is both.
    """
    texts = {row["key"]: row for path in sorted(replies.glob("*.jsonl")) for row in lines(path)}
    labelled = []
    for row in lines(labels):
        text = texts.get(row["key"])
        if text is None or (part and row["part"] != part):
            continue
        harmful = {"yes": 1.0, "no": 0.0, "unsure": None}[row["harmful"]]
        declines, broken, rambling = (
            float(row[name] not in ("none", "no")) for name in ("refusal", "broken", "rambling")
        )
        toxic = text["kind"] == "toxic"
        labelled.append(
            Example(
                f"own-{text['cell']}",
                text["prompt"],
                text["completion"],
                harmful=harmful,
                complies=harmful if toxic else float(not (row["refusal"] == "full" or broken or rambling)),
                declines=declines,
                partial=float(row["refusal"] == "partial"),
                broken=broken,
                rambling=rambling,
                asks=float(toxic),
                group=text["prompt"],
            )
        )
    return labelled


def asked(data: Path) -> list[tuple[str, float]]:
    """Prompts, and whether they ask for harm: those that train, benign ones in the forms of the others too."""
    dolly = [row["instruction"] for row in json.loads((data / "alpaca/dolly_3k.json").read_text("utf-8"))]
    harmless = [one for kind in ("seeming", "benign") for form in pools(data)["train", kind] for one in form] + dolly
    acts = [act_of(prompt) for prompt in harmless if prompt.lower().startswith(OPENINGS)]
    harmless += [form.format(act) for act in acts for form in WRAPS["train"]] + FAIR_CLAIMS
    harmful = [one for form in pools(data)["train", "toxic"] for one in form]
    harmful += [row["goal"] for row in table(data / "adversarial/pair_harmful_behaviors_custom.csv")]
    left_out = of_test(data)
    return [(one, float(kind)) for kind, some in enumerate((harmless, harmful)) for one in some if one not in left_out]


def of_test(data: Path) -> set[str]:
    """The prompts of the test part, which nothing may be trained on."""
    return {one for (part, _), forms in pools(data).items() if part == "test" for form in forms for one in form}


def hateful_prompts(data: Path) -> list[str]:
    """Requests for hateful claims (StrongREJECT, HarmfulQ; MIT)."""
    strong = table(data / "adversarial/strongreject_dataset.csv")
    asked = [row["forbidden_prompt"] for row in strong if row["category"].startswith("Hate")]
    return asked + json.loads((data / "stl/HarmfulQ.json").read_text(encoding="utf-8"))


def public(data: Path, without: Sequence[str], chance: random.Random, most: int = 3200) -> list[Example]:
    """Public labels of permissive licences, without some sources; most long replies are cut."""
    kept, left_out = [], of_test(data)
    for name, source in SOURCES.items():
        if source.trains and name not in without:
            rows = [row for row in examples(name, data) if row.prompt not in left_out]
            if len(rows) > most:
                harmful = [row for row in rows if row.harmful]
                rest = [row for row in rows if not row.harmful]
                rows = chance.sample(harmful, min(len(harmful), most * 2 // 5)) + chance.sample(rest, most * 3 // 5)
            if name == "moderation":
                # Hateful or not, a short text also stands as the reply to a request for a hateful claim.
                asked = hateful_prompts(data)
                rows += [
                    replace(
                        row, prompt=chance.choice(asked), reply=cut(row.reply, chance, 4, 40), declines=0.0, asks=1.0
                    )
                    for row in rows
                ]
            for row in rows:
                if not row.reply.strip():
                    continue
                if name not in ("moderation", "jailbreakbench"):
                    row.broken = row.rambling = 0.0
                kept.append(replace(row, reply=cut(row.reply, chance)) if chance.random() < 0.85 else row)
    return kept
