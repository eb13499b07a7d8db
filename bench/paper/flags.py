"""The command line that all experiments share, and the configuration that comes out of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import flags, records
from bench.paper import data, models, tables
from bench.paper.config import Config

FLAGS = ("model", "augment", "shift", "train_size", "test_size")
FLAGS += ("epochs", "batch_size", "micro_batch", "lr", "plateau", "momentum", "weight_decay")
# Details of the paper's released code: a value of the configuration, and what it is.
DETAILS = {
    "decay_in_loss": "weight decay is part of the loss, and so of both gradients, each at its own weights",
    "reflect": "crops see the image's mirror beyond its border, and not black",
    "uniform_head": "the last layer's first weights are uniform in 1 / sqrt(classes)",
    "true_gradient": "Shake-Shake and ShakeDrop: SAM's first gradient has the shares of the forward",
    "mask_per_image": "ShakeDrop: drop a branch for each image apart, not for a batch",
    "rounded_widths": "PyramidNet: round channels, not down",
}
FLAGS += ("clip", *DETAILS)
# Where nothing else is said, runs are small enough for two CPU cores: one of SGD takes seven to eight seconds of one
# core, one of SAM twice as many, and the net has the room to learn wrong labels by heart in that time.
SEEDS, PAPER_SEEDS = (0, 1, 2), (0, 1, 2, 3, 4)

# Fashion-MNIST, and digits where it cannot be had.
SMALL: dict[str, Any] = {
    "dataset": "fashion-mnist",
    "train_size": 1_000,
    "model": "small",
    "augment": "basic",
    "shift": 1,
    "epochs": 30,
    "batch_size": 64,
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 5e-4,
}

# What a data set of colour images changes in it: all of the data, and the paper's padding by four pixels.
CIFAR: dict[str, Any] = {"train_size": 50_000, "model": "wrn-28-10", "shift": 4, "epochs": 200, "batch_size": 256}
SVHN = CIFAR | {"train_size": 604_388}
DATASETS: dict[str, dict[str, Any]] = {
    "fashion-mnist": {},
    "digits": {},
    "cifar10": CIFAR,
    "cifar100": CIFAR,
    "svhn": SVHN,
}

RHO = 0.05
EPILOG = """Other data sets have other defaults, and so has --paper.
A command that is given again runs only what is missing, and goes on with a run that was interrupted."""

Adder = Callable[[argparse._ArgumentGroup], None]


def parser(name: str, description: str, add_own: Adder | None, own: Mapping[str, Any]) -> argparse.ArgumentParser:
    """Return the flags of one experiment, whose ``own`` defaults it has beside the shared ones."""
    made = flags.parser(f"paper.{name}", description, epilog=EPILOG)
    if add_own is not None:
        add_own(made.add_argument_group("this experiment"))
    values = {"test_size": 0, "rho": RHO, "seeds": SEEDS} | SMALL | dict(own)
    _add_task(_layered(made.add_argument_group("data and model"), values), values["dataset"])
    _add_training(_layered(made.add_argument_group("training"), values), values["seeds"])
    _add_details(made.add_argument_group("details of the paper's code"))
    _add_machine(made.add_argument_group("machine and files"))
    return made


def _layered(group: argparse._ArgumentGroup, values: Mapping[str, Any]) -> Callable[..., Any]:
    """Return what adds a flag, with a default of its own or one of the values for `base_config` to fill in."""

    def add(flag: str, help: str, **options: Any) -> None:
        name = flag.lstrip("-").replace("-", "_")
        if "default" not in options and name in values and "(default:" not in help:
            value = values[name]
            help = f"{help} (default: {0 if value == 0 else value})"
        group.add_argument(flag, help=help, **options)

    return add


def _add_task(add: Callable[..., Any], dataset: str) -> None:
    add("--dataset", choices=tuple(DATASETS), default=dataset, help="of images")
    add("--data-dir", type=Path, help="folder of its files: idx files, or what torchvision unpacks for CIFAR and SVHN")
    add("--train-size", type=int, metavar="N", help="training images, drawn by the seed")
    add("--test-size", type=int, metavar="N", help="test images, always the same; 0 for all")
    add("--model", metavar="NAME", help=f"one of {', '.join(models.NAMES)}, such as wrn-28-10")
    add("--augment", choices=data.AUGMENTATIONS, help="what is done to the training images")
    add("--shift", type=int, metavar="PIXELS", help="largest random shift")


def _add_training(add: Callable[..., Any], usual_seeds: Sequence[int]) -> None:
    add("--paper", action="store_true", help="the paper's hyperparameters for this data set, model and length")
    add("--epochs", type=int, metavar="N", help="the shortest runs' epochs")
    add("--batch-size", type=int, metavar="N", help="images per step")
    m = "images that share a perturbation, the paper's m (default: the batch; with --paper an eighth of it)"
    add("--micro-batch", type=int, metavar="M", help=m)
    add("--lr", type=float, help="first learning rate of the cosine schedule")
    plateau = "in the cosine's place: halve the rate after N epochs in a row without a lower test loss"
    add("--plateau", type=int, metavar="N", help=f"{plateau}; 0: the cosine (default: 0)")
    add("--momentum", type=float, help="of SGD")
    add("--weight-decay", type=float, help="on all parameters")
    add("--rho", type=float, help="radius of the perturbation, where the experiment does not say itself")
    seeds = f"one set of runs for each (default: {_words(usual_seeds)}; with --paper {_words(PAPER_SEEDS)})"
    add("--seeds", type=int, nargs="+", metavar="N", help=seeds)


def _words(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))


def _add_details(group: argparse._ArgumentGroup) -> None:
    clip = "largest norm of the gradient that the base step gets, 0 for any (default: 0; with --paper 5)"
    group.add_argument("--clip", type=float, metavar="NORM", help=clip)
    for name, text in DETAILS.items():
        usual = "yes" if Config.__dataclass_fields__[name].default else "no; with --paper yes"
        about = {"action": argparse.BooleanOptionalAction, "help": f"{text} (default: {usual})"}
        group.add_argument(f"--{name.replace('_', '-')}", **about)


def _add_machine(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--device", default="cpu", help="cpu or cuda")
    add("--threads", type=int, default=1, metavar="N", help="of the CPU")
    add("--results", type=Path, default=records.ROOT / "runs" / "paper", metavar="FOLDER", help="of rows and picture")
    add("--record", action="store_true", help="rows and picture go to bench/results, where the pages are made from")


def base_config(args: argparse.Namespace, dataset: str, own: Mapping[str, Any]) -> Config:
    """Return the configuration that an experiment's runs start from; also fills in `args.rho` and `args.seeds`.

    Later ones win: the shared defaults, the experiment's, the data set's, the paper's with --paper, the flags. The
    paper's accelerators are micro-batches here, unless the experiment has a `micro_batch` of its own. Its `paper_model`
    is the network of --paper.
    """
    values = SMALL | dict(own) | DATASETS[dataset]
    paper_model = values.pop("paper_model", values["model"])
    given = {name: getattr(args, name) for name in FLAGS if getattr(args, name) is not None}
    if args.paper:
        values["model"] = paper_model
        asked = values | given
        noise_rate = asked.get("noise_rate", 0.0)
        values |= tables.hyperparameters(dataset, asked["model"], epochs=args.epochs, noise_rate=noise_rate)
        share = (values | given)["batch_size"] // values.pop("accelerators")
        values["micro_batch"] = own.get("micro_batch", max(share, 1))
    usual_seeds = values.pop("seeds", SEEDS)
    args.seeds = args.seeds or list(PAPER_SEEDS if args.paper else usual_seeds)
    rho = values.pop("rho", RHO)
    args.rho = rho if args.rho is None else args.rho
    return Config(**(values | given | {"dataset": dataset, "device": args.device}))


def parse(made: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Return parsed flags; set the number of threads."""
    args = made.parse_args(argv)
    if args.threads < 1:
        made.error(f"Invalid threads={args.threads}. Must be >= 1.")
    args.checkpoints = args.results / "checkpoints"
    if args.record:
        args.results = records.RESULTS
    torch.set_num_threads(args.threads)
    return args
