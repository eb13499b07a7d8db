"""Every experiment of bench/paper, small: its rows, its picture, its block of the page; and that a study goes on."""

from __future__ import annotations

import importlib
import json
import re
import runpy
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("scipy")
pytest.importorskip("sklearn")

from bench import records
from bench.paper import classification, finetune, flags, label_noise, runner, training
from bench.paper import data as paper_data
from bench.paper import tables as paper_tables
from bench.paper.config import Config

TINY = ["--dataset", "digits", "--train-size", "80", "--batch-size", "16", "--epochs", "1", "--seeds", "3"]
SMALL = flags.SMALL | {"dataset": "digits", "train_size": 96, "epochs": 3, "batch_size": 32}
CONFIG = Config(**SMALL, device="cpu")

LENGTHS = {"SGD": 1, "SGD, 2x epochs": 2, "SAM rho=0.3": 2}
# The experiment's own flags; passes of each method over its epochs of five steps; a line of the section.
EXPERIMENTS = {
    "adam": (
        ["--model", "small"],
        {"Adam": 1, "Adam, 2x epochs": 2, "SAM with Adam": 2, "SAM": 2},
        "| SAM with Adam | 2 |",
    ),
    "classification": (
        [],
        {"SGD": 1, "SGD, 2x epochs": 2, "SAM": 2},
        "| paper: cifar10, wrn-28-10 | SAM |  | 2.7 ± 0.1",
    ),
    "clean_labels": (
        ["--models", "mlp-12-5", "mixer-1-8", "--rhos", "0.3", "--validation", "0.25"],
        {f"{model}, {name}": n for model in ("mlp-12-5", "mixer-1-8") for name, n in LENGTHS.items()},
        "| mixer-1-8 | SGD, 2x epochs | 2 |",
    ),
    "cost": (
        ["--lengths", "1", "--noise-rates", "0.4"],
        {
            "SGD; 1 epochs, 40% label noise": 1,
            "SGD; 2 epochs, 40% label noise": 2,
            "SAM; 1 epochs, 40% label noise": 2,
            "SAM, e from a quarter; 1 epochs, 40% label noise": 1.25,
            "SAM, every 2nd step; 1 epochs, 40% label noise": 1.6,
            "SAM, every 5th step; 1 epochs, 40% label noise": 1.2,
            "LookSAM, every 5th step; 1 epochs, 40% label noise": 1.2,
            "MSAM; 1 epochs, 40% label noise": 1,
            "MSAM; 2 epochs, 40% label noise": 2,
        },
        "| SAM, e from a quarter | 1.25 |",
    ),
    "finetune": (
        ["--pretrain-size", "100", "--pretrain-epochs", "1"],
        {"SGD": 1, "SGD, 2x epochs": 2, "SAM": 2, "SAM, rho=0.01": 2, finetune.SCRATCH: 2},
        "| SAM | 2 |",
    ),
    "label_noise": (
        ["--rates", "0.8", "--asymmetric"],
        {"SGD": 2, "Mixup": 2, "Bootstrap + Mixup": 4, "SAM": 2, "Bootstrap + SAM": 4},
        "| SGD minus SAM |",
    ),
    "m_sharpness": (
        ["--m", "16", "5", "--rhos", "0.1", "0.3", "--examples", "24", "--measured-m", "3", "24"],
        {"SGD": 1} | {f"SAM m={m} rho={rho}": 2 for m in (16, 5) for rho in (0.1, 0.3)},
        "| m = 3, rho = 0.2 | ",
    ),
    "rho_grid": (
        ["--rhos", "0.3", "--noise-rates", "0.4", "--validation", "0.25"],
        {"SGD, 40% label noise": 1, "SAM rho=0.3, 40% label noise": 2},
        "| 0 (SGD) |",
    ),
    "second_dataset": (
        ["--noise-rates", "0.4"],
        {"SGD": 1, "SGD, 2x epochs": 2, "SAM": 2},
        "| 40% label noise | SGD, 2x epochs | 2 |",
    ),
    "spectra": (
        ["--model", "wrn-10-1-stride4", "--measurements", "1", "--examples", "2", "--lanczos-steps", "4"],
        {"SGD": 1, "SAM": 2},
        "| ours: wrn-10-1-stride4-groupnorm | ",
    ),
    "surfaces": (
        ["--points", "5", "--examples", "8", "--rho", "0.3"],
        {"SGD, 2x epochs": 2, "SAM, rho = 0.3": 2},
        "| SAM, rho = 0.3 | 2 |",
    ),
    "variants": (
        ["--rhos", "0.2", "--inf-rhos", "1e-3", "--random-rhos", "1", "--steps", "2", "--cosines", "1"],
        {"SGD": 1, "SAM rho=0.2": 2, "p=inf rho=0.001": 2, "random rho=1": 1, "2 ascent steps": 3, "second order": 3},
        "| with the term | ",
    ),
}


def rows_of(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"paper_{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_makes_rows_a_picture_and_a_section(name, tmp_path, capsys):
    own, passes, line = EXPERIMENTS[name]
    experiment = importlib.import_module(f"bench.paper.{name}").EXPERIMENT
    command = [*TINY, *own, "--results", str(tmp_path)]
    assert runner.main(experiment, command) == 0
    rows = rows_of(tmp_path, name)
    assert {row["method"]: row["passes"] for row in rows} == passes
    for row in rows:
        assert (row["kind"], row["experiment"], row["seed"]) == ("paper", name, 3)
        assert row["key"] == Config(**row["config"]).key
        assert row["history"][-1]["test_error"] == row["test_error"]
        wrong = row.get("unseen_error", row["test_error"]) / 100 * 359  # images of the test set
        assert name == "finetune" or wrong == pytest.approx(round(wrong), abs=1e-6)
    assert (tmp_path / f"paper_{name}.png").stat().st_size > 10_000
    assert line in runner.blocks()[f"paper:{name}"](rows)
    before = (tmp_path / f"paper_{name}.jsonl").read_bytes()
    assert runner.main(experiment, command) == 0
    assert (tmp_path / f"paper_{name}.jsonl").read_bytes() == before
    assert f"{len(rows)} runs, {len(rows)} of them already" in capsys.readouterr().out


def test_the_page_has_a_block_for_every_experiment_and_no_picture_that_is_not_there():
    path = records.ROOT / "docs" / "paper.md"
    page = path.read_text(encoding="utf-8")
    assert {experiment.name for experiment in runner.experiments()} == set(EXPERIMENTS)
    for name in EXPERIMENTS:
        assert f"<!-- paper:{name}:start -->" in page
        assert runner.blocks()[f"paper:{name}"]([]) == runner.NOTHING_YET
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", page):
        assert (path.parent / picture).is_file(), picture


# runs that stop


def without_times(rows: list[dict]) -> list[dict]:
    history = [[{k: v for k, v in point.items() if k != "seconds"} for point in row["history"]] for row in rows]
    return [{**row, "history": h, "date": 0, "seconds": 0} for row, h in zip(rows, history, strict=True)]


def test_a_study_that_was_stopped_goes_on_to_the_same_rows(tmp_path):
    def stopped(config, context):
        if config.optimizer == "sam":
            raise KeyboardInterrupt
        return training.execute(config, context)

    whole, parts = ([*TINY, "--results", str(tmp_path / name)] for name in ("whole", "parts"))
    assert runner.main(classification.EXPERIMENT, whole) == 0
    assert runner.main(replace(classification.EXPERIMENT, execute=stopped), parts) == 130
    assert len(rows_of(tmp_path / "parts", "classification")) == 2
    assert runner.main(classification.EXPERIMENT, parts) == 0
    first, second = (without_times(rows_of(tmp_path / name, "classification")) for name in ("whole", "parts"))
    assert first == second


@pytest.mark.parametrize("optimizer", ["sgd", "sam", "sam-adam"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path, monkeypatch, optimizer):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
    options = {"rho": 0.07, "interval": 2} if optimizer.startswith("sam") else {}
    changes = {"optimizer": optimizer, "options": options, "plateau": 1 if optimizer == "sam-adam" else 0}
    config = replace(CONFIG, **changes, lr=0.02, mixup=0.5, measurements=3, augment="cutout")
    dataset = paper_data.load("digits")
    whole = training.train(config, training.Context(dataset, tmp_path / "whole"))

    def stop(config: Config, epoch: int) -> None:
        torch.rand(5)  # the random state of the next process is another
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.train(config, training.Context(dataset, tmp_path / "parts", stop))
    assert len(list((tmp_path / "parts").iterdir())) == 1
    parts = training.train(config, training.Context(dataset, tmp_path / "parts"))
    assert not list((tmp_path / "parts").iterdir())
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, parts.model.state_dict()[name]), name
    assert [p["test_error"] for p in whole.history] == [p["test_error"] for p in parts.history]
    assert (whole.passes, whole.test_losses) == (parts.passes, parts.test_losses)


@pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")
def test_with_the_papers_values_the_plan_comes_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paper_tables, "hyperparameters", lambda *args, **options: {"rho": 0.1, "accelerators": 2})
    assert runner.main(classification.EXPERIMENT, [*TINY, "--paper", "--results", str(tmp_path)]) == 0
    assert "Plan: 3 runs, 5 passes over the training images, " in capsys.readouterr().out
    runpy.run_module("bench.paper", run_name="__main__")
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[2].removeprefix("bench.paper.") for line in listed] == sorted(EXPERIMENTS)


def test_a_run_that_diverges_is_named_and_the_others_go_on(tmp_path, capsys):
    def grid(args, base):
        return [("wild", replace(base, lr=1e30)), ("tame", base)]

    experiment = replace(classification.EXPERIMENT, grid=grid)
    assert runner.main(experiment, [*TINY, "--results", str(tmp_path)]) == 1
    assert [row["method"] for row in rows_of(tmp_path, "classification")] == ["tame"]
    assert "wild, seed 3: Training stopped: loss is" in capsys.readouterr().out


# what only some experiments do


def test_bootstrapping_trains_on_what_its_first_model_says(tmp_path, monkeypatch):
    config = replace(CONFIG, noise_rate=0.5, bootstrap=True, epochs=2)
    context = training.Context(paper_data.load("digits"), tmp_path)
    seen = []
    train = training.train

    def spy(config: Config, context: training.Context, images=None) -> training.Training:
        seen.append((config, images))
        return train(config, context, images=images)

    monkeypatch.setattr(label_noise.training, "train", spy)
    row = label_noise.execute(config, context)
    (first, nothing), (second, relabelled) = seen
    assert (first.bootstrap, nothing, second.bootstrap) == (False, None, True)
    trained = train(first, context)
    predicted = trained.logits(trained.images.train.images).argmax(dim=1)
    assert torch.equal(relabelled.train.labels, predicted)
    agreement = 100 * float((predicted == trained.images.true_labels).double().mean())
    assert row["right_labels"] == pytest.approx(agreement)


def test_mixup_takes_the_alpha_that_is_best_on_images_held_out(tmp_path):
    args = flags.parse(flags.parser("label_noise", "", label_noise.add_arguments, {}), ["--alpha", "9", "1"])
    named = label_noise._methods(replace(CONFIG, noise_rate=0.5, seed=3, epochs=1), 0.1, args.alpha)
    context = training.Context(paper_data.load("digits"), tmp_path)
    row = label_noise.execute(named["Bootstrap + Mixup"], context)
    held_out = {}
    for alpha in (1.0, 9.0):
        config = replace(named["Mixup"], mixup=alpha, validation=0.1, extra={})
        held_out[alpha] = training.train(config, context).result()["test_error"]
    assert row["alpha"] == min(held_out, key=held_out.get)
    assert row["passes"] == 2 * named["Mixup"].epochs  # of the chosen one; not of the choice
    direct = replace(named["Mixup"], mixup=row["alpha"], extra={})
    assert label_noise.execute(named["Mixup"], context)["test_error"] == training.execute(direct, context)["test_error"]


def test_fine_tuning_keeps_the_statistics_and_makes_a_new_head(tmp_path):
    digits = paper_data.load("digits")
    config = replace(CONFIG, freeze_batchnorm=True, extra={"pretraining": {"train_size": 100, "epochs": 1, "lr": 0.1}})
    context = training.Context(digits, tmp_path)
    coarse = finetune.coarse(digits)
    assert torch.equal(coarse.train.images, digits.train.images)
    assert torch.equal(coarse.test.labels, digits.test.labels // 2)
    images = context.split(config)
    pretrained = finetune._pretrained(config, context)
    assert len(pretrained["head.bias"]) == coarse.classes == 5
    start = finetune.with_new_head(config, images, pretrained)
    assert all(torch.equal(start[name], pretrained[name]) for name in start if not name.startswith("head."))
    sam = replace(config, optimizer="sam", options={"rho": 0.1})
    for name, value in training.train(sam, context, images=images, weights=start).model.state_dict().items():
        same = "running" in name or "num_batches" in name
        assert torch.equal(value, start[name]) == same, name
    del pretrained["norm.weight"]
    with pytest.raises(ValueError, match=r"Invalid checkpoint for model='small': norm\.weight differs"):
        finetune.with_new_head(config, images, pretrained)


def base_of(*argv: str, own: dict | None = None) -> tuple[Config, float]:
    own = own or {}
    args = flags.parse(flags.parser("test", "", None, own), argv)
    return flags.base_config(args, args.dataset, own), args.rho


def test_flags_win_over_the_paper_and_the_paper_over_defaults(capsys, tmp_path):
    config, rho = base_of()
    assert asdict(config) | flags.SMALL == asdict(config)
    assert rho == flags.RHO
    assert base_of(own={"rho": 0.3, "epochs": 5})[1] == 0.3
    mixed, rho = base_of("--dataset", "cifar100", "--paper", "--lr", "0.3", "--epochs", "9")
    assert (mixed.model, mixed.lr, mixed.epochs, mixed.weight_decay, rho) == ("wrn-28-10", 0.3, 9, 5e-4, 0.1)
    noise = dict(label_noise.EXPERIMENT.defaults)
    noisy, rho = base_of("--dataset", "cifar10", "--model", "resnet-32", "--paper", own=noise)
    assert (noisy.noise_rate, noisy.epochs, rho) == (0.4, 200, 0.1)
    assert (config.micro_batch, config.clip, config.reflect, config.decay_in_loss) == (None, 0.0, False, False)
    assert (mixed.micro_batch, mixed.clip, mixed.reflect, mixed.decay_in_loss) == (32, 5.0, True, True)
    other, _ = base_of("--dataset", "cifar100", "--paper", "--micro-batch", "17", "--no-reflect", "--clip", "0")
    assert (other.micro_batch, other.reflect, other.clip, other.uniform_head) == (17, False, 0.0, True)
    assert base_of("--dataset", "cifar100", "--paper", "--batch-size", "80")[0].micro_batch == 10
    assert base_of("--dataset", "cifar100", "--paper", own={"micro_batch": None})[0].micro_batch is None
    assert runner.main(classification.EXPERIMENT, ["--dataset", "digits", "--paper", "--results", str(tmp_path)]) == 1
    assert "ValueError: Invalid model='small'" in capsys.readouterr().out
