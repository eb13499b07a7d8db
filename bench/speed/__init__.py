"""Time and memory of the optimizer side of a step on the CPU."""
