"""Judges: what says whether a reply harms or declines.

`JUDGES` maps a kind to a factory. A new judge is one class and one line here.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from tasft.core.errors import UserError
from tasft.core.parts import registered
from tasft.core.suggest import did_you_mean
from tasft.judges.base import Judge, JudgeSettings, Pair, Verdict
from tasft.judges.refusal_matching import RefusalMatching


# Recipes are checked against the names alone: heavy packages are imported only when a judge is wanted.
def _classifier(settings: JudgeSettings) -> Judge:
    from tasft.judges.classifier import Classifier

    settings.only()
    return Classifier()


def _refusal_matching(settings: JudgeSettings) -> Judge:
    settings.only()
    return RefusalMatching()


def _guard(settings: JudgeSettings) -> Judge:
    from tasft.judges.guards import GUARDS
    from tasft.judges.questions import AskingJudge

    return AskingJudge(settings.only("model", "server", "batch_size"), GUARDS[settings.kind])


def _stl_deberta(settings: JudgeSettings) -> Judge:
    from tasft.judges.classifiers import StlDeberta

    return StlDeberta(settings.only("model", "batch_size"))


def _openai_moderation(settings: JudgeSettings) -> Judge:
    from tasft.judges.moderation import OpenAIModeration

    return OpenAIModeration(settings.only("model", "server"))


def _llm_judge(settings: JudgeSettings) -> Judge:
    from tasft.judges.questions import AskingJudge
    from tasft.judges.rubrics import rubric

    return AskingJudge(settings.only("model", "server", "rubric", "batch_size"), rubric(settings.rubric))


def _panel(settings: JudgeSettings, declared: Mapping[str, JudgeSettings]) -> Judge:
    from tasft.judges.panel import Panel

    if inner := [name for name in settings.of if name in declared and declared[name].kind == "panel"]:
        raise UserError(f"judge panel: {', '.join(inner)}: a panel cannot hold another panel")
    return Panel(settings.only("of", "agree"), lambda name: load_judge(name, declared))


def _own(settings: JudgeSettings) -> Judge:
    from tasft.judges.own import OwnJudge

    if settings.kind == "python" and settings.target is None:
        raise UserError("judge python: say where it is: target: mypkg.judges:Mine")
    return OwnJudge(settings.only("options", *(["target"] if settings.kind == "python" else [])))


JUDGES: dict[str, Callable[..., Judge]] = {
    **dict.fromkeys(registered("judges"), _own),
    "classifier": _classifier,
    "refusal_matching": _refusal_matching,
    "qwen3guard": _guard,
    "wildguard": _guard,
    "llama_guard": _guard,
    "harmbench": _guard,
    "stl_deberta": _stl_deberta,
    "openai_moderation": _openai_moderation,
    "llm_judge": _llm_judge,
    "panel": _panel,
    "python": _own,
}


def load_judge(name: str, declared: Mapping[str, JudgeSettings] | None = None) -> Judge:
    """The judge of a name: one of those that are declared, or a kind with its usual settings.

    Raises:
        UserError: There is none of that name, or what it needs is missing.
    """
    settings = (declared or {}).get(name) or JudgeSettings.of_name(name)
    if settings.kind not in JUDGES:
        raise UserError(
            f"no judge is called {settings.kind!r}; use one of {', '.join(JUDGES)}{did_you_mean(settings.kind, JUDGES)}"
        )
    judge = _panel(settings, declared or {}) if settings.kind == "panel" else JUDGES[settings.kind](settings)
    judge.name = name.rpartition(":")[2]  # Of python:mypkg.judges:Mine what can name a file.
    if settings.calibration is not None:
        from tasft.judges.fitted import Fitted

        return Fitted(judge, settings.kind, Path(settings.calibration))
    return judge


__all__ = ["JUDGES", "Judge", "JudgeSettings", "Pair", "Verdict", "load_judge"]
