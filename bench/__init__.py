"""Measurements: speed, host time and memory of the optimizer side of a SAM step, and a training run."""
