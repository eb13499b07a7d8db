"""Fine-tuning and the comparison with Adam."""

import json
from dataclasses import replace

import pytest
import torch

from bench.paper import adam, defaults, finetune, training
from bench.paper import data as paper_data
from bench.paper.config import Config

TINY = ["--dataset", "digits", "--train-size", "60", "--epochs", "2", "--batch-size", "20", "--seeds", "0"]
CONFIG = Config(
    **(defaults.SMALL | {"dataset": "digits", "train_size": 60, "epochs": 2, "batch_size": 20}),
    device="cpu",
    extra={"pretraining": {"train_size": 100, "epochs": 1, "lr": 0.1}},
    freeze_batchnorm=True,
)


@pytest.fixture(scope="module")
def digits():
    return paper_data.load("digits")


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_halves_share_no_class(digits):
    even, odd = (finetune.half(digits, parity) for parity in (finetune.EVEN, finetune.ODD))
    assert len(even.train.labels) + len(odd.train.labels) == len(digits.train.labels)
    for part, first in ((even, 0), (odd, 1)):
        assert part.classes == 5
        assert part.test.labels.unique().tolist() == [0, 1, 2, 3, 4]
        assert torch.equal(part.test.images[part.test.labels == 2], digits.test.images[digits.test.labels == 4 + first])
    assert finetune.half(digits._replace(classes=7), finetune.EVEN).classes == 4


def test_statistics_stay_while_the_weights_go(digits, tmp_path):
    context = training.Context(digits, tmp_path)
    images = paper_data.split(finetune.half(digits, finetune.EVEN), CONFIG)
    start = finetune.with_new_head(CONFIG, images, finetune._pretrained(CONFIG, context))
    for optimizer, options in (("sgd", {}), ("sam", {"rho": 0.1})):
        config = replace(CONFIG, optimizer=optimizer, options=options)
        trained = training.train(config, context, images=images, weights=start)
        for name, value in trained.model.state_dict().items():
            same = "running" in name or "num_batches" in name
            assert torch.equal(value, start[name]) == same, name


def test_the_head_is_new_and_the_rest_is_the_checkpoint(digits):
    images = paper_data.split(digits, CONFIG)
    other = training.Training(replace(CONFIG, seed=7), paper_data.split(finetune.half(digits, finetune.EVEN), CONFIG))
    weights = other.model.state_dict()
    start = finetune.with_new_head(CONFIG, images, weights)
    assert start["head.weight"].shape == (10, 128)
    assert all(torch.equal(start[name], weights[name]) for name in start if not name.startswith("head."))
    del weights["norm.weight"]
    with pytest.raises(ValueError, match=r"Invalid checkpoint for model='small': norm\.weight differs"):
        finetune.with_new_head(CONFIG, images, weights)


def test_finetune_from_its_own_first_model(tmp_path, capsys):
    argv = [*TINY, "--results", str(tmp_path), "--pretrain-size", "200", "--pretrain-epochs", "2"]
    assert finetune.main(argv) == 0
    rows = rows_of(tmp_path / "paper_finetune.jsonl")
    assert [row["method"] for row in rows] == ["SGD", "SGD, 2x epochs", "SAM", "SAM, rho=0.01", finetune.SCRATCH]
    assert [row["passes"] for row in rows] == [2, 4, 4, 4, 4]
    assert [row["config"]["freeze_batchnorm"] for row in rows] == [True, True, True, True, False]
    assert len(list((tmp_path / "checkpoints" / "finetune").glob("*.weights.pt"))) == 1
    assert (tmp_path / "paper_finetune.png").stat().st_size > 10_000
    assert "| SAM | 4 |" in finetune.section(rows)
    assert finetune.main([*argv, "--paper", "--dataset", "cifar10"]) == 1


def test_finetune_from_a_file(tmp_path, digits):
    weights = training.Training(CONFIG, paper_data.split(digits, CONFIG)).model.state_dict()
    torch.save(weights, tmp_path / "weights.pt")
    argv = [*TINY, "--results", str(tmp_path), "--checkpoint", str(tmp_path / "weights.pt"), "--rhos"]
    assert finetune.main(argv) == 0
    rows = rows_of(tmp_path / "paper_finetune.jsonl")
    assert len(rows) == 4
    assert not (tmp_path / "checkpoints").exists()


def test_adam_and_sam_on_it(tmp_path):
    assert adam.main([*TINY, "--results", str(tmp_path), "--model", "small", "--adam-lr", "0.003"]) == 0
    rows = rows_of(tmp_path / "paper_adam.jsonl")
    assert [(r["method"], r["config"]["optimizer"]) for r in rows] == [
        ("Adam", "adam"),
        ("Adam, 2x epochs", "adam"),
        ("SAM with Adam", "sam-adam"),
        ("SAM", "sam"),
    ]
    assert [row["config"]["lr"] for row in rows] == [0.003, 0.003, 0.003, 0.1]
    assert [len(row["history"]) for row in rows] == [2, 4, 2, 2]
    assert (tmp_path / "paper_adam.png").stat().st_size > 10_000
    assert "| SAM with Adam | 4 |" in adam.section(rows)
