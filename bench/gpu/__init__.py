"""Measurements on a GPU: python -m bench.gpu runs them all in ten minutes."""
