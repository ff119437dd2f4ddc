"""Evaluation of a model on prompt sets."""

from tasft.evaluate.safety import MEASURES, answer, judge_answers
from tasft.evaluate.states import Asked, steps_of

__all__ = ["MEASURES", "Asked", "answer", "judge_answers", "steps_of"]
