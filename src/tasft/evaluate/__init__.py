"""Evaluation of a model on prompt sets, tasks and attacks."""
