"""bench.imagenet from images to the row: training, interruption, resumption, refusals."""

from __future__ import annotations

import math
import os
import signal
import sys
import types
from unittest import mock

import pytest
from imagenet_images import CLASSES, FLAGS, STEPS, TRAIN, VALIDATION, checkpoint, rows, same, without_times, write_tree

from bench.imagenet import __main__ as imagenet
from bench.imagenet import trainer as imagenet_training

NET = ["--model", "shufflenet_v2_x0_5"]  # of the ones with BatchNorm the fastest on a CPU
DROPOUT_NET = ["--model", "mobilenet_v3_small"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("images"))


@pytest.fixture
def run(tree, tmp_path):
    """The command in a folder of the name given; returns its exit status."""

    def run(*flags, out="out"):
        return imagenet.main(["--data-dir", str(tree), *FLAGS, "--out", str(tmp_path / out), *flags])

    return run


def test_from_images_to_a_row(run, tmp_path, capsys):
    assert run("--model", "resnet18", "--epochs", "3", "--ema", "0.7", "--log-every", "2", "--warmup", "0.5") == 0
    shown = capsys.readouterr().out
    assert f"{TRAIN} images of {CLASSES} classes, 3 epochs, {STEPS} steps of 16 images" in shown
    assert "epoch 1 step 2  loss" in shown
    assert "of the average" in shown
    (row,) = rows(tmp_path / "out")
    assert (row["kind"], row["model"], row["rho"], row["device"]) == ("imagenet", "resnet18", 0.05, "cpu")
    assert [point["epoch"] for point in row["history"]] == [1, 2, 3]
    assert all(math.isfinite(value) for point in row["history"] for value in point.values())
    for loss in ("train_loss", "val_loss", "ema_val_loss"):
        assert len({point[loss] for point in row["history"]}) == 3  # of weights that have moved
    assert row["ema_val_loss"] != row["val_loss"]
    state = checkpoint(tmp_path / "out")
    assert state["model"]["bn1.num_batches_tracked"] == state["average"]["n_averaged"] == 3 * STEPS
    for name in ("top1", "top5", "ema_top1", "ema_top5"):
        counted = row[name] * VALIDATION / 100
        assert counted == pytest.approx(round(counted), abs=1e-6)
    assert row["top5"] == 100  # of three classes
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["checkpoint.pt", "results.jsonl"]


@pytest.mark.parametrize(
    ("flags", "passes"),
    [
        (["--direction", "momentum"], 1),
        (["--interval", "2", "--looksam-alpha", "0.7"], 1),
        (["--micro-batches", "2", "--m-sharpness", "micro", "--amp", "bf16", "--ascent-part", "0.5"], 2),
        (["--micro-batches", "2", "--amp", "fp16", "--adaptive", "weights", "--eta", "0.01", "--p", "inf"], 2),
    ],
    ids=["MSAM", "LookSAM", "micro", "fp16"],
)
def test_options_train_and_count_each_batch_once(run, tmp_path, flags, passes):
    """The statistics of BatchNorm, in all ways to make a step."""
    assert run(*NET, "--epochs", "1", "--nesterov", *flags) == 0
    state = checkpoint(tmp_path / "out")
    assert state["model"]["conv1.1.num_batches_tracked"] == passes * STEPS
    assert all(math.isfinite(v) for v in state["history"][0].values())


INTERRUPTED = {
    "SAM, in the first epoch": ([*DROPOUT_NET, "--ema", "0.7"], 2, signal.SIGINT),
    "SAM after an epoch": ([*NET, "--amp", "fp16", "--interval", "2"], STEPS, signal.SIGTERM),
}


@pytest.mark.parametrize("case", INTERRUPTED)
def test_resumed_run_equals_uninterrupted_run(run, tmp_path, monkeypatch, capsys, case):
    flags, step, signum = INTERRUPTED[case]
    assert run(*flags, out="whole") == 0

    made = []

    def train_step(self, *batch):
        original(self, *batch)
        made.append(batch)
        if len(made) == step:
            os.kill(os.getpid(), signum)

    original = imagenet_training.Trainer.train_step
    monkeypatch.setattr(imagenet_training.Trainer, "train_step", train_step)
    before = signal.getsignal(signum)
    assert run(*flags, out="parts") == 128 + signum
    assert signal.getsignal(signum) is before
    where = f"after step {(step - 1) % STEPS + 1} of epoch {(step - 1) // STEPS + 1}: saved"
    assert f"{signal.Signals(signum).name} {where}" in capsys.readouterr().out
    assert not (tmp_path / "parts" / "results.jsonl").exists()
    assert run(*flags, "--resume", out="parts") == 0
    assert len(made) == 2 * STEPS

    whole, parts = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts")
    assert without_times(parts.pop("history")) == without_times(whole.pop("history"))
    assert [name for name in whole if name != "seconds" and not same(whole[name], parts[name])] == []


def test_a_signal_in_an_evaluation_stops_a_run_that_has_not_come_to_its_end(run, tmp_path, monkeypatch):
    def evaluate(self, model):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, model)

    original = imagenet_training.Trainer.evaluate
    monkeypatch.setattr(imagenet_training.Trainer, "evaluate", evaluate)
    flags = [*NET, "--optimizer", "sgd"]
    assert run(*flags) == 128 + signal.SIGTERM
    assert [checkpoint(tmp_path / "out")[name] for name in ("epoch", "step")] == [1, 0]
    assert run(*flags, "--resume") == 0
    assert [point["epoch"] for point in rows(tmp_path / "out")[0]["history"]] == [1, 2]


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_the_checkpoint(run, tmp_path, capsys):
    assert run(*NET, "--optimizer", "sgd", "--lr", "1e30") == 1
    assert "Training stopped: loss is nan in step 2 of epoch 1. Lower --lr or --rho." in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_runs_that_are_there_are_neither_overwritten_nor_mistaken(run, tmp_path, capsys):
    flags = [*NET, "--optimizer", "sgd", "--epochs", "1"]
    assert run(*flags, "--resume") == 1
    assert "No checkpoint to resume from" in capsys.readouterr().out
    assert run(*flags) == 0
    assert run(*flags) == 1
    assert f"There is a run in {tmp_path / 'out'}: --resume goes on with it" in capsys.readouterr().out
    assert run(*flags, "--resume", "--weight-decay", "0.5") == 1
    assert "Invalid weight_decay=0.5. Must be 0.0001 as in" in capsys.readouterr().out
    assert run(*flags, "--resume") == 1
    assert "Invalid --resume. Must be of a run that has not come to its end" in capsys.readouterr().out


def test_synthetic_images_measure_and_train_nothing(tmp_path, capsys):
    flags = ["--synthetic", "--steps", "2", "--image-size", "32", "--batch-size", "4", "--device", "cpu"]
    assert imagenet.main([*flags, *NET, "--out", str(tmp_path)]) == 0
    assert "images/s  (forward" in capsys.readouterr().out
    (row,) = rows(tmp_path)
    assert row["kind"] == "imagenet_synthetic"
    step = sum(row[f"{part}_ms"] for part in ("forward", "backward", "optimizer", "data"))
    assert row["images_per_second"] == pytest.approx(4 / (step / 1e3))
    assert min(row["forward_ms"], row["backward_ms"], row["optimizer_ms"]) > 0
    assert [p.name for p in tmp_path.iterdir()] == ["results.jsonl"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "0"], "Invalid batch_size=0. Must be >= 1."),
        (["--warmup", "3"], "Invalid warmup=3.0. Must be in [0, 2], the epochs."),
        (["--label-smoothing", "1"], "Invalid label_smoothing=1.0. Must be in [0, 1)."),
        (["--ema", "1"], "Invalid ema=1.0. Must be in [0, 1)."),
        (["--ascent-part", "0"], "Invalid ascent_part=0.0. Must be in (0, 1]."),
        (["--optimizer", "sgd", "--max-grad-norm", "-1"], "Invalid max_grad_norm=-1.0. Must be > 0 and finite."),
        (["--m-sharpness", "half"], "Invalid m_sharpness='half'. Must be micro, rank, world or a number >= 1."),
        (["--optimizer", "sgd", "--rho", "0.1"], "Invalid rho=0.1 with optimizer='sgd'. Must go with sam."),
        (["--synthetic"], "Invalid data_dir. Must be given, or else --synthetic."),
        (["--resum"], "--resum"),
        # Before a step, by main: in one line.
        (["--batch-size", "64"], "Invalid batch_size=64. Must be <= 48, the images to train on."),
        (["--micro-batches", "3"], "Invalid batch_size=16. Must be a multiple of ranks times micro-batches, 1 x 3."),
        (["--m-sharpness", "2"], "Invalid m_sharpness=2. Must divide the number of ranks, 1."),
        (["--amp", "fp16", "--m-sharpness", "micro"], "Invalid m_sharpness='micro' with amp='fp16'."),
        (["--amp", "fp16", "--decay-in-ascent"], "Invalid decay_in_ascent=True with amp='fp16'."),
        (["--looksam-alpha", "2", "--interval", "2", "--m-sharpness", "micro"], "Invalid looksam_alpha=2.0 with m_sh"),
        (["--direction", "momentum", "--ascent-part", "0.5"], "Invalid ascent_part=0.5 with direction='momentum'."),
        (["--rho", "-1"], "Invalid rho=-1.0. Must be >= 0"),
        (["--looksam-alpha", "0.7"], "looksam_alpha=0.7"),
        (["--backend", "none"], "Invalid backend='none'"),
        (["--model", "resnet51"], "Invalid model='resnet51'. Must be a classifier in torchvision.models"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_cannot_work_is_refused_before_a_step(run, tmp_path, capsys, flags, message):
    try:
        status = run(*NET, *flags)
    except SystemExit as stop:  # flags that cannot be read
        status = stop.code
    shown = capsys.readouterr()
    assert status == (2 if shown.err else 1)
    assert message in shown.out + shown.err
    assert shown.out.count("\n") == (not shown.err)
    assert not (tmp_path / "out").exists()


def test_curves_go_to_tensorboard_where_there_is_one(run, monkeypatch, capsys, tmp_path):
    writer = mock.MagicMock()
    flags = [*NET, "--log-every", "2"]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=writer))
    assert run(*flags, out="with") == 0
    assert "TensorBoard" not in capsys.readouterr().out
    writer.assert_called_once_with(str(tmp_path / "with" / "tensorboard"))
    points = [call.args for call in writer.return_value.add_scalar.call_args_list]
    for name, steps in (("train/loss", [2, 3, 5, 6]), ("train/loss_gap", [2, 3, 5, 6]), ("validation/top1", [3, 6])):
        assert [step for other, value, step in points if other == name and value] == steps
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert run(*flags, "--optimizer", "sgd", "--epochs", "1", out="without") == 0
    assert "TensorBoard is not installed: no curves" in capsys.readouterr().out
