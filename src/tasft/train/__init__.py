"""The trainer, what a step holds, and the baselines."""
