"""Train a ResNet on ImageNet with FusedSAM, or with SGD, on one device or on many.

    python -m bench.imagenet --data-dir DIR                                 one process
    torchrun --nproc-per-node=8 -m bench.imagenet --data-dir DIR            one for each GPU
    python -m bench.imagenet --synthetic --batch-size 256                   only measure throughput

DIR holds train/CLASS/*.jpeg and val/CLASS/*.jpeg, or with --dataset what torchvision has unpacked. The defaults are
the recipe of Foret et al. (ICLR 2021): batches of 4096 images, learning rate 1.0 on a cosine, label smoothing 0.1,
rho 0.05, a perturbation for each accelerator; with --finetune they are its recipe for that.
BatchNorm statistics come from the first pass of a SAM step only. Ctrl-C or SIGTERM saves the run at the end of the
step; the same command with --resume goes on from there, with the same images.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import fused_sam
from bench import flags, records
from bench.imagenet import datasets, finetune
from bench.imagenet.config import DTYPES, SAM_FLAGS, Config
from bench.imagenet.data import Files, Synthetic
from bench.imagenet.progress import TIMES, Reporter, timing
from bench.imagenet.ranks import Ranks, joined, ranks_on_this_machine
from bench.imagenet.signals import Interrupted, Requests
from bench.imagenet.trainer import CHECKPOINT, Trainer
from bench.training import checkpoint
from bench.training.run import check, chosen_backend, chosen_device, complain

WARM_UP = 5  # steps that are not measured
EVALUATIONS = 10  # in fine-tuning, whose epochs may be thousands of a step each
SCOPES = "each micro-batch has its own, a rank has one, all ranks have one, or every N ranks"


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = flags.parser("imagenet", __doc__, allow_abbrev=False)
    _add_task(parser.add_argument_group("images and model"))
    _add_training(parser.add_argument_group("training"))
    _add_sam(parser.add_argument_group("FusedSAM (docs/options.md)"))
    _add_machine(parser.add_argument_group("machine and files"))
    return parser


def _add_task(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--data-dir", type=Path, metavar="DIR", help="folder with train and val, or with what torchvision has unpacked")
    names = f"{datasets.FOLDERS}, a tree of class folders; or {', '.join(datasets.SOURCES)}"
    known = (datasets.FOLDERS, *datasets.SOURCES)
    add("--dataset", choices=known, default=datasets.FOLDERS, metavar="NAME", help=names)
    usual = "(default: crop for folders without --finetune, autoaugment for CIFAR, none for others)"
    about = f"random crops and flips, none or AutoAugment {usual}"
    add("--augment", choices=datasets.AUGMENTATIONS, help=about)
    add("--image-size", type=int, default=224, metavar="PIXELS", help="side of the crops")
    add("--model", default="resnet50", metavar="NAME", help="of torchvision: resnet101, vit_b_16, ...")
    source = f"start from this state_dict, or with {finetune.TORCHVISION} from its own; the last layer may be another"
    add("--weights", metavar="FILE", help=source)
    add("--freeze-batchnorm", action="store_true", help="normalise by the running statistics, and leave them alone")
    add("--finetune", action="store_true", help="the paper's settings for fine-tuning this model become the defaults")
    add("--synthetic", action="store_true", help="random images: print images/s and the parts of a step, and end")
    add("--steps", type=int, default=30, metavar="N", help=f"with --synthetic: measured after {WARM_UP} others")


def _add_training(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--optimizer", choices=("sam", "sgd"), default="sam", help="FusedSAM around SGD, or SGD alone")
    add("--epochs", type=int, default=90, metavar="N", help="the paper trains 100, 200 and 400")
    add("--batch-size", type=int, default=4096, metavar="N", help="images per step, over all ranks")
    add("--micro-batches", type=int, default=1, metavar="K", help="cut a rank's images in so many, for less memory")
    add("--lr", type=float, default=1.0, help="highest learning rate; goes down to 0 on half a cosine")
    add("--warmup", type=float, default=0.0, metavar="EPOCHS", help="epochs in which the learning rate rises from 0")
    add("--momentum", type=float, default=0.9, help="of SGD")
    add("--nesterov", action="store_true", help="Nesterov momentum")
    add("--weight-decay", type=float, default=1e-4, help="on all parameters")
    add("--label-smoothing", type=float, default=0.1, metavar="P", help="of the training loss")
    add("--ema", type=float, metavar="DECAY", help="also average the weights over the steps, and evaluate that")
    add("--amp", choices=tuple(DTYPES), default="off", help="autocast; fp16 with a GradScaler")
    add("--seed", type=int, default=0, help="of initial weights, order and augmentation")


def _add_sam(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--rho", type=float, default=0.05, help="radius of the perturbation")
    add("--adaptive", choices=("all", "weights"), default=False, help="adaptive SAM, of all parameters or weights only")
    add("--eta", type=float, default=0.0, help="added to |w| in adaptive SAM")
    add("--p", type=float, default=2.0, help="norm in which the perturbation has length rho; inf, too")
    add(
        "--m-sharpness",
        type=_scope,
        default="rank",
        metavar="micro|rank|world|N",
        help=f"who shares a perturbation: {SCOPES}",
    )
    add("--ascent-part", type=float, default=1.0, metavar="P", help="part of the images that the first pass takes")
    add("--interval", type=int, default=1, metavar="K", help="perturb every K-th step only")
    add("--looksam-alpha", type=float, metavar="ALPHA", help="LookSAM in the steps between")
    add("--direction", choices=("gradient", "momentum"), default="gradient", help="momentum: MSAM, one pass per step")
    add("--decay-in-ascent", action="store_true", help="weight decay in the first gradient, too (as the paper's code)")
    add("--max-grad-norm", type=float, metavar="NORM", help="clip the gradient of the base step")
    add("--backend", help="of FusedSAM (default: the best that works)")


def _add_machine(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="a rank takes the GPU of its number")
    workers = "processes that read images, per rank (default: its share of the cores, at most 8)"
    add("--workers", type=int, metavar="N", help=workers)
    add("--log-every", type=int, default=50, metavar="STEPS", help="look at the losses; the host waits for the device")
    out = "folder of checkpoint, row and curves (default: runs/imagenet/MODEL-OPTIMIZER)"
    add("--out", type=Path, metavar="DIR", help=out)
    every = "epochs between evaluations, each with a checkpoint (default: 1; with --finetune a tenth of all)"
    add("--evaluate-every", type=int, metavar="N", help=every)
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--results", type=Path, metavar="FILE", help="append the row here (default: results.jsonl in --out)")


def _scope(text: str) -> str | int:
    """Read --m-sharpness."""
    if text in ("micro", "rank", "world"):
        return text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"Invalid m_sharpness={text!r}. Must be micro, rank, world or a number >= 1.")
    return int(text)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return parsed and checked flags, with the defaults that depend on other flags filled in."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.finetune:
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        parser.set_defaults(**finetune.defaults(args.model, args.optimizer, ranks))
        args = parser.parse_args(argv)
    args.augment = args.augment or datasets.usual_augmentation(args.dataset, args.finetune)
    try:
        _check(args)
    except ValueError as error:
        parser.error(str(error))
    for name in SAM_FLAGS:
        if args.optimizer == "sgd" and getattr(args, name) != parser.get_default(name):
            parser.error(f"Invalid {name}={getattr(args, name)!r} with optimizer='sgd'. Must go with sam.")
    if args.synthetic == (args.data_dir is not None):
        parser.error("Invalid data_dir. Must be given, or else --synthetic.")
    args.adaptive = {"all": True}.get(args.adaptive, args.adaptive)
    args.device = chosen_device(args.device)
    if args.workers is None:
        args.workers = min((os.cpu_count() or 1) // ranks_on_this_machine(), 8)
    args.out = args.out or records.ROOT / "runs" / "imagenet" / f"{args.model}-{args.optimizer}"
    return args


def _check(args: argparse.Namespace) -> None:
    sizes = ("image_size", "steps", "epochs", "batch_size", "micro_batches", "log_every", "evaluate_every")
    check(args, ">= 1", lambda x: x >= 1, *sizes)
    epochs = math.inf if args.epochs is None else args.epochs
    check(args, f"in [0, {epochs}], the epochs", lambda x: 0 <= x <= epochs, "warmup")
    check(args, "in [0, 1)", lambda x: 0 <= x < 1, "label_smoothing", "ema")
    check(args, "in (0, 1]", lambda x: 0 < x <= 1, "ascent_part")
    check(args, "> 0 and finite", lambda x: 0 < x < math.inf, "max_grad_norm")


def prepare(args: argparse.Namespace, ranks: Ranks) -> Trainer:
    """Return the run with its images, and with the checkpoint if it resumes; refuses what cannot work."""
    data: Files | Synthetic
    if args.batch_size % (ranks.size * args.micro_batches):
        what = f"ranks times micro-batches, {ranks.size} x {args.micro_batches}"
        raise ValueError(f"Invalid batch_size={args.batch_size}. Must be a multiple of {what}.")
    if args.synthetic:
        data = Synthetic(args.image_size, args.batch_size, args.micro_batches, WARM_UP + args.steps, ranks)
    else:
        found = datasets.read(args.dataset, args.data_dir, args.image_size, args.augment)
        data = Files(*found, args.batch_size, args.micro_batches, ranks, args.seed, args.workers)
    if args.epochs is None:
        args.epochs = math.ceil(args.finetuning_steps / data.steps)
    usual = max(args.epochs // EVALUATIONS, 1) if args.finetune else 1
    flags = vars(args) | {"backend": chosen_backend(args.backend, args.device)}
    config = Config.of(flags, classes=data.classes, train_images=data.images, ranks=ranks.size)
    trainer = Trainer(config, ranks, data, args.log_every, args.evaluate_every or usual)
    path = args.out / CHECKPOINT
    if args.resume:
        trainer.load_state_dict(checkpoint.load(path, asdict(config)))
        if trainer.epoch == config.epochs:
            raise ValueError(f"Invalid --resume. Must be of a run that has not come to its end, as {path} has.")
    elif not args.synthetic and path.exists():
        raise FileExistsError(f"There is a run in {args.out}: --resume goes on with it, --out names another folder.")
    return trainer


def describe(trainer: Trainer, console: Console) -> None:
    """Print what is about to be trained."""
    config = trainer.config
    count = sum(p.numel() for p in trainer.model.parameters())
    images = f"{config.train_images:,} images of {config.classes} classes, {config.epochs} epochs"
    if isinstance(trainer.data, Synthetic):
        images = "random images"
    optimizer = "SGD"
    if config.optimizer == "sam":
        optimizer = f"SAM, rho {config.rho:g}, m-sharpness {config.m_sharpness}, backend {config.backend}"
    at_once = config.batch_size // (config.ranks * config.micro_batches)
    for line in (
        f"{config.model}, {count:,} parameters; {config.ranks} x {config.device}, amp {config.amp}; {optimizer}",
        f"{images}, {trainer.data.steps} steps of {config.batch_size} images, {at_once} at once on a rank",
    ):
        console.print(line, soft_wrap=True)


def row(trainer: Trainer, kind: str, measured: dict[str, Any]) -> records.Row:
    """Return the row for the file of results."""
    cuda = trainer.ranks.device.type == "cuda"
    header = records.gpu_header(kind) if cuda else records.header(kind)
    peak = torch.cuda.max_memory_allocated() if cuda else None
    return header | {"fused_sam": fused_sam.__version__, **asdict(trainer.config), "peak_bytes": peak, **measured}


def train(args: argparse.Namespace, trainer: Trainer, console: Console) -> dict[str, Any]:
    """Train what is left of the run; return what it came to."""
    first = trainer.ranks.rank == 0
    reporter = Reporter(console, args.out / "tensorboard" if first else None)
    requests = Requests()
    steps = trainer.config.epochs * trainer.data.steps
    with requests.heard(), reporter.bar(trainer.steps_made, steps):
        trainer.run(args.out, reporter, requests)
    return {**trainer.history[-1], "history": trainer.history}


def execute(args: argparse.Namespace, trainer: Trainer, console: Console) -> int:
    """Train or measure, and write the row."""
    describe(trainer, console)
    try:
        if args.synthetic:
            kind, figures = "imagenet_synthetic", trainer.measure(WARM_UP)
            measured = {name: figures[name] for name in ("images_per_second", *TIMES)}
            console.print(timing(measured), soft_wrap=True)
        else:
            kind, measured = "imagenet", train(args, trainer, console)
    except FloatingPointError as error:
        console.print(str(error), style="red", soft_wrap=True)
        return 1
    except Interrupted as stop:
        where = f"after step {trainer.step} of epoch {trainer.epoch + 1}"
        console.print(f"{stop} {where}: saved. The same command with --resume goes on.", soft_wrap=True)
        return 128 + stop.signum
    if trainer.ranks.rank == 0:
        path = args.results or args.out / "results.jsonl"
        records.write_rows([row(trainer, kind, measured)], path)
        console.print(f"Row: {path}", soft_wrap=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; 0 when it came to its end, 1 for what cannot work, 128 plus the signal that has stopped it."""
    args = parse_args(argv)
    with joined(args.device) as ranks:
        torch.backends.cudnn.benchmark = ranks.device.type == "cuda"
        console = Console(highlight=False, markup=False, quiet=ranks.rank > 0)
        try:
            trainer = prepare(args, ranks)
        except (TypeError, ValueError, RuntimeError, OSError) as error:
            return complain(error, f"rank {ranks.rank}: " if ranks.size > 1 else "")
        return execute(args, trainer, console)


if __name__ == "__main__":
    raise SystemExit(main())
