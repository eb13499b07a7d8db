"""How long Hypothesis searches: HYPOTHESIS_PROFILE=ci (the same cases every time), long, or soak."""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("ci", max_examples=40, stateful_step_count=15, deadline=None, derandomize=True)
# Of each of seven tests, 105,000 in all: an hour of one core and more.
settings.register_profile("soak", max_examples=15_000, stateful_step_count=20, deadline=None, print_blob=True)
settings.register_profile("long", max_examples=3000, stateful_step_count=40, deadline=None, print_blob=True)
# On the emulator, where a step takes some ten times as long: make test, make ptx.
settings.register_profile("few", max_examples=5, stateful_step_count=10, deadline=None, derandomize=True)
settings.register_profile("hundreds", max_examples=300, stateful_step_count=20, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
