"""What the experiments of bench/paper share: rows, resumption, methods, flags, summaries."""

import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from bench import records
from bench.paper import classification, defaults, flags, label_noise, methods, report, runner, summary, training
from bench.paper import data as paper_data
from bench.paper.config import Config

TINY = ["--dataset", "digits", "--train-size", "100", "--epochs", "1", "--batch-size", "50", "--seeds", "0", "1"]
CONFIG = Config(
    **(defaults.SMALL | {"dataset": "digits", "train_size": 96, "epochs": 3, "batch_size": 32}), device="cpu"
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rows_of(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"paper_{name}.jsonl").read_text().splitlines()]


def without_times(rows: list[dict]) -> list[dict]:
    history = [[{k: v for k, v in point.items() if k != "seconds"} for point in row["history"]] for row in rows]
    return [{**row, "history": h, "date": 0, "seconds": 0} for row, h in zip(rows, history, strict=True)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a small study that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    assert classification.main([*TINY, "--results", str(folder)]) == 0
    return folder


# runs and rows


def test_an_experiment_writes_a_row_for_each_run_and_a_picture(whole):
    rows = rows_of(whole, "classification")
    assert [(row["method"], row["seed"]) for row in rows] == [
        (method, seed) for seed in (0, 1) for method in ("SGD", "SGD, 2x epochs", "SAM")
    ]
    assert [row["passes"] for row in rows[:3]] == [1, 2, 2]
    assert rows[2]["config"]["options"] == {"rho": defaults.RHO}
    assert len({row["key"] for row in rows}) == 6
    for row in rows:
        assert row["kind"] == "paper"
        assert row["experiment"] == "classification"
        wrong = row["test_error"] / 100 * len(paper_data.load("digits").test.labels)
        assert wrong == pytest.approx(round(wrong), abs=1e-6)
        assert row["history"][-1]["test_error"] == row["test_error"]
    assert (whole / "paper_classification.png").stat().st_size > 10_000


def test_a_study_that_was_stopped_goes_on_to_the_same_rows(tmp_path, capsys, whole):
    done = []

    def stopped(config: Config, context: training.Context) -> dict:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(config)
        return training.execute(config, context)

    again = [*TINY, "--results", str(tmp_path)]
    interrupted = replace(classification.EXPERIMENT, execute=stopped)
    assert runner.main(interrupted, again) == 130
    assert len(rows_of(tmp_path, "classification")) == 2
    assert classification.main(again) == 0
    assert "2 of them already" in capsys.readouterr().out
    assert without_times(rows_of(whole, "classification")) == without_times(rows_of(tmp_path, "classification"))


@pytest.mark.parametrize("optimizer", ["sgd", "sam", "sam-adam"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path, monkeypatch, optimizer):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
    options = {"rho": 0.07, "interval": 2} if optimizer.startswith("sam") else {}
    config = replace(CONFIG, optimizer=optimizer, lr=0.02, options=options, mixup=0.5, measurements=3, augment="cutout")
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
    assert whole.passes == parts.passes


def test_a_run_that_diverges_is_named_and_the_others_go_on(tmp_path, capsys):
    def grid(args, base):
        return [("wild", replace(base, lr=1e30)), ("tame", base)]

    experiment = replace(classification.EXPERIMENT, grid=grid)
    assert runner.main(experiment, [*TINY, "--seeds", "0", "--results", str(tmp_path)]) == 1
    assert [row["method"] for row in rows_of(tmp_path, "classification")] == ["tame"]
    assert "wild, seed 0: Training stopped: loss is" in capsys.readouterr().out


def test_observers_enter_row_and_history(tmp_path):
    experiment = replace(
        classification.EXPERIMENT,
        observe=lambda t: {"norm": float(sum(p.detach().norm() for p in t.model.parameters()))},
        observe_during=lambda t: {"at": t.epoch},
        defaults={"measurements": 2},
    )
    assert runner.main(experiment, [*TINY, "--seeds", "0", "--results", str(tmp_path)]) == 0
    for row in rows_of(tmp_path, "classification"):
        assert row["norm"] > 0
        epochs = row["config"]["epochs"]
        assert [point["at"] for point in row["history"]] == ([1] if epochs == 1 else [epochs // 2, epochs])


# methods


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({"optimizer": "sgd"}, 1.0),
        ({"optimizer": "adam", "lr": 1e-3}, 1.0),
        ({"optimizer": "sam"}, 2.0),
        ({"optimizer": "sam", "ascent": 0.25}, 1.25),
        ({"optimizer": "sam", "micro_batch": 8}, 2.0),
        ({"optimizer": "sam", "options": {"rho": 0.1, "ascent_steps": 3}}, 4.0),
        ({"optimizer": "sam", "options": {"rho": 0.1, "second_order": True}}, 3.0),
        ({"optimizer": "sam", "options": {"rho": 0.1, "direction": "momentum"}}, 1.0),
        ({"optimizer": "sam", "options": {"rho": 0.1, "interval": 3}}, 4 / 3),
    ],
)
def test_passes_are_counted_as_they_are_made(changes, passes):
    config = replace(CONFIG, **changes, epochs=1)
    images = paper_data.split(paper_data.load("digits"), config)
    run = training.Training(config, images)
    examples = 0

    def count(module, args):
        nonlocal examples
        examples += len(args[0])

    run.model.register_forward_pre_hook(count)
    run.train_epoch()
    assert run.passes == pytest.approx(passes)
    forward = passes - 1 if config.options.get("second_order") else passes  # the third pass is backward only
    assert examples == pytest.approx(forward * 96)


def test_micro_batches_are_groups_of_their_own():
    run = training.Training(
        replace(CONFIG, optimizer="sam", micro_batch=12), paper_data.split(paper_data.load("digits"), CONFIG)
    )
    sizes = []
    run.model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    images, labels = next(iter(run.batches.epoch(0)))
    run.stepper.step(run.loss_of, images, labels)
    assert sizes == [12, 12, 12, 12, 8, 8]


def test_an_unknown_optimizer_is_refused():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Invalid optimizer='newton'"):
        methods.make(model, replace(CONFIG, optimizer="newton"))


# configurations and flags


@pytest.mark.parametrize(
    "change",
    [{"epochs": 0}, {"noise_rate": 1.0}, {"ascent": 0.0}, {"micro_batch": 33}, {"noise": "pink"}, {"mixup": -1.0}],
)
def test_a_configuration_that_cannot_be_is_refused(change):
    ((name, _),) = change.items()
    with pytest.raises(ValueError, match=f"Invalid {name}="):
        replace(CONFIG, **change)


def test_the_key_is_of_the_values_that_are_used():
    assert CONFIG.key == Config(**asdict(CONFIG)).key
    assert len({CONFIG.key, replace(CONFIG, seed=1).key, replace(CONFIG, options={"rho": 0.1}).key}) == 3


def base_of(argv: list[str], own: dict | None = None) -> tuple[Config, float]:
    args = flags.parse(flags.parser("test", "", None), argv)
    return flags.base_config(args, args.dataset, own or {}), args.rho


def test_flags_win_over_the_paper_and_the_paper_over_defaults():
    config, rho = base_of([])
    assert asdict(config) | defaults.SMALL == asdict(config)
    assert rho == defaults.RHO
    assert base_of([], {"rho": 0.3, "epochs": 5})[1] == 0.3
    paper, rho = base_of(["--dataset", "cifar100", "--paper"])
    assert (paper.model, paper.lr, paper.weight_decay, paper.batch_size, rho) == ("wrn-28-10", 0.1, 5e-4, 256, 0.1)
    mixed, rho = base_of(["--dataset", "cifar100", "--paper", "--lr", "0.3", "--epochs", "9", "--rho", "0.02"])
    assert (mixed.lr, mixed.epochs, mixed.weight_decay, rho) == (0.3, 9, 5e-4, 0.02)


def test_the_paper_trains_on_noise_in_its_own_way():
    own = dict(label_noise.EXPERIMENT.defaults)
    noisy, rho = base_of(["--dataset", "cifar10", "--model", "resnet-32", "--paper"], own)
    assert (noisy.noise_rate, noisy.epochs, rho) == (0.4, 200, 0.1)


def test_the_paper_has_no_hyperparameters_for_the_small_net(capsys, tmp_path):
    assert classification.main(["--dataset", "digits", "--paper", "--results", str(tmp_path)]) == 1
    assert "ValueError: Invalid model='small'" in capsys.readouterr().out


def test_held_out_images_are_not_trained_on_and_keep_their_labels():
    dataset = paper_data.load("digits")
    whole = paper_data.split(dataset, replace(CONFIG, noise_rate=0.5))
    part = paper_data.split(dataset, replace(CONFIG, noise_rate=0.5, validation=0.25))
    assert (len(part.train.labels), len(part.test.labels), len(whole.train.labels)) == (72, 24, 96)
    assert torch.equal(part.unseen.images, dataset.test.images)
    assert torch.equal(part.test.images, whole.train.images[72:])
    assert torch.equal(part.test.labels, whole.true_labels[72:])
    assert int((part.train.labels != part.true_labels).sum()) == 36


def test_a_part_of_the_test_set_is_the_same_part_for_every_seed():
    dataset = paper_data.load("digits")
    first, second = (paper_data.split(dataset, replace(CONFIG, test_size=50, seed=seed)) for seed in (0, 1))
    assert len(first.test.labels) == 50
    assert torch.equal(first.test.images, second.test.images)
    assert not torch.equal(first.train.images, second.train.images)


# label noise


def test_bootstrapping_trains_on_what_its_first_model_says(tmp_path, capsys):
    argv = [*TINY, "--seeds", "3", "--results", str(tmp_path), "--rates", "0.8", "--asymmetric", "0.3"]
    argv += ["--asymmetric-methods", *label_noise.METHODS]
    assert label_noise.main(argv) == 0
    rows = {(r["method"], r["config"]["noise"], r["config"]["noise_rate"]): r for r in rows_of(tmp_path, "label_noise")}
    assert len(rows) == 10
    assert rows["SAM", "symmetric", 0.8]["config"]["options"] == {"rho": 0.05}
    assert rows["SAM", "asymmetric", 0.3]["config"]["options"] == {"rho": 0.1}
    assert rows["Mixup", "symmetric", 0.8]["config"]["mixup"] == 1.0
    assert "symmetric 0.8" in capsys.readouterr().out
    for noise in (("symmetric", 0.8), ("asymmetric", 0.3)):
        assert [rows[(method, *noise)]["passes"] for method in label_noise.METHODS] == [2, 2, 4, 2, 4]
    assert (tmp_path / "paper_label_noise.png").stat().st_size > 10_000
    gained = rows["SGD", "asymmetric", 0.3]["test_error"] - rows["SAM", "asymmetric", 0.3]["test_error"]
    assert f"| SAM minus SGD | {gained:.2f} |" in label_noise.section(list(rows.values()))


def test_the_second_model_sees_the_first_ones_labels_and_no_others(tmp_path, monkeypatch):
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
    assert row["passes"] == 4
    label_noise.execute(config, context)
    assert len(seen) == 3  # the labels of the first model were kept


# summaries and pages


def test_interval_is_students():
    found = summary.interval([11.0, 12.5, 14.2])
    assert found.mean == pytest.approx(12.5666667)
    # t = 4.302653 for 2 degrees of freedom, s = 1.6010413
    assert found.half == pytest.approx(4.302653 * 1.6010413 / math.sqrt(3), rel=1e-6)
    assert str(summary.interval([3.0])) == "3.00"
    with pytest.raises(ValueError, match="Invalid values="):
        summary.interval([])


def test_every_experiment_has_help_and_a_block(capsys):
    experiments = report.experiments()
    assert {"classification", "label_noise"} <= {experiment.name for experiment in experiments}
    for experiment in experiments:
        made = flags.parser(experiment.name, experiment.description, experiment.add_arguments)
        assert "--seeds" in made.format_help()
        assert report.blocks()[f"paper:{experiment.name}"]([]) == report.NOTHING_YET


def test_the_page_has_a_block_for_every_experiment_and_no_picture_that_is_not_there():
    path = records.ROOT / "docs" / "paper.md"
    page = path.read_text(encoding="utf-8")
    for experiment in report.experiments():
        assert f"<!-- paper:{experiment.name}:start -->" in page
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", page):
        assert (path.parent / picture).is_file(), picture


def test_tables_stand_beside_the_papers_numbers(whole):
    section = report.blocks()["paper:classification"](rows_of(whole, "classification"))
    assert section.endswith("\n\n![Training from scratch](../bench/results/paper_classification.png)")
    assert "| SAM | 2 |" in section
    assert "| paper: cifar10, wrn-28-10 | SAM |  | 2.7 ± 0.1 |  |" in section
    assert "2 seeds" in section
