"""The job of make train, and what all training has: data, models, the clock, checkpoints."""
