"""What a command is about to do: how many runs, how many passes over their images, and how long that takes here."""

from __future__ import annotations

import time
from collections.abc import Sequence

from bench.paper import methods
from bench.paper.config import Config
from bench.paper.training import Context, Training

TIMED_STEPS = 3  # after a first one, which is slower


def passes_of_training(config: Config) -> float:
    """Return the forward-backward passes of a training by itself."""
    options, extra = config.options, 0.0
    if config.optimizer.startswith("sam") and options.get("direction") != "momentum":
        part = 1.0 if config.ascent is None else config.ascent
        extra = part * options.get("ascent_steps", 1) + float(options.get("second_order", False))
        extra /= options.get("interval", 1)
    return config.epochs * (1.0 + extra)


def passes(config: Config) -> float:
    """Return the forward-backward passes of a run, and of the choice of its alpha.

    Those of what is trained before it, to start from, do not count: several runs share that.
    """
    trainings = (2 if config.bootstrap else 1) + len(config.extra.get("alphas", ()))
    return passes_of_training(config) * trainings


def seconds_of_a_pass(config: Config, context: Context) -> float:
    """Time some steps of a run that is thrown away; return what a pass over all of its images takes."""
    run = Training(config, context.split(config), make_stepper=methods.make)
    run.model.train()
    batches, spent, made = iter(run.batches.epoch(0)), 0.0, 0.0
    for number, (images, targets) in zip(range(1 + TIMED_STEPS), batches, strict=False):
        start = time.perf_counter()
        loss, took = run.stepper.step(run.loss_of, images, targets)
        loss.item()  # waits for the device
        if number or len(run.batches) == 1:
            spent, made = spent + time.perf_counter() - start, made + took
    return spent / made * len(run.batches)


def text(configs: Sequence[Config], context: Context) -> str:
    """Return the plan for these runs in one line; the rate is measured once for each network and size."""
    rates: dict[tuple[str, int, int], float] = {}
    hours = 0.0
    for config in configs:
        kind = config.model, config.train_size, config.batch_size
        if kind not in rates:
            rates[kind] = seconds_of_a_pass(config, context)
        hours += passes(config) * rates[kind] / 3600
    total = sum(passes(config) for config in configs)
    rate = "/".join(f"{seconds:.3g}" for seconds in rates.values())
    size = f"{len(configs)} runs, {total:,.0f} passes over the training images"
    return f"Plan: {size}, {rate} s each here: {hours:.1f} hours"
