"""Evaluation of a model on named prompt sets."""

from tasft.evaluate.safety import answer, judge_answers

__all__ = ["answer", "judge_answers"]
