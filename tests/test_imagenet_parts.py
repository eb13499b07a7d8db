"""The parts of bench.imagenet: who gets which images, the arithmetic of a step, the learning rate."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from helpers import FLOAT64_RTOL
from imagenet_images import CLASSES, TRAIN, VALIDATION, write_tree
from imagenet_net import BATCH, CPU, Net, batch, config, make_trainer, train, train_on_this_rank
from torch import nn

from bench.imagenet import data as imagenet_data
from bench.imagenet import datasets
from bench.imagenet.ranks import Ranks
from fused_sam import FusedSAM

ALONE = Ranks(0, 1, CPU)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("images"))


def folders(tree, *, rank=0, ranks=1, micro_batches=1, seed=3, workers=0):
    found = datasets.read("folders", tree, 24, "crop")
    return imagenet_data.Files(*found, BATCH, micro_batches, Ranks(rank, ranks, CPU), seed, workers)


def test_ranks_share_every_batch_and_every_image_that_is_evaluated(tree):
    alone = list(folders(tree).training(1, 0))
    ranks = [folders(tree, rank=rank, ranks=3, micro_batches=2).training(1, 0) for rank in range(3)]
    assert len(alone) == TRAIN // BATCH
    for ((images, labels),), *shares in zip(alone, *ranks, strict=True):
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert images.shape == (BATCH, 3, 24, 24)
        assert [len(y) for share in shares for _, y in share] == [2] * 6
        assert torch.equal(images, torch.cat([x for share in shares for x, _ in share]))
        assert torch.equal(labels, torch.cat([y for share in shares for _, y in share]))

    evaluated = [torch.cat([y for _, y in folders(tree, rank=rank, ranks=2).validation()]) for rank in range(2)]
    assert [len(labels) for labels in evaluated] == [VALIDATION // 2 + 1, VALIDATION // 2]
    assert torch.cat(evaluated).bincount().tolist() == [VALIDATION // CLASSES] * CLASSES


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_images_follow_from_seed_and_epoch_alone(tree):
    def images(epoch, start=0, **options):
        torch.manual_seed(len(options))
        before = torch.get_rng_state()
        batches = [x for parts in folders(tree, **options).training(epoch, start) for x, _ in parts]
        assert torch.equal(torch.get_rng_state(), before)
        return torch.cat(batches)

    first = images(4)
    assert torch.equal(images(4, workers=2), first)
    assert torch.equal(images(4, start=2), first[2 * BATCH :])
    assert not torch.equal(images(5), first)
    assert not torch.equal(images(4, seed=2), first)


def test_validation_classes_have_to_be_those_of_training(tree, tmp_path):
    other = write_tree(tmp_path / "other")
    (other / "val" / "digit 1").rename(other / "val" / "digit 7")
    with pytest.raises(ValueError, match=r"Invalid class digit 1 in .*\. Must be a folder of both train and val\."):
        folders(other)
    with pytest.raises(FileNotFoundError):
        folders(tmp_path / "nowhere")


# The arithmetic of a step


def by_hand(options):
    """Weights after two steps, and the losses."""
    torch.manual_seed(0)
    net, (images, labels) = Net(), batch()
    images, parts = imagenet_data.Normalise(CPU)(images), options.get("micro_batches", 1)
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.1)

    def closure(index):
        def gradient():
            loss = loss_of(net(images[index]), labels[index])
            loss.backward()
            return loss

        return gradient

    shared = {"momentum": 0.9, "weight_decay": 1e-4}
    micro = torch.arange(BATCH).chunk(parts if options.get("m_sharpness") == "micro" else 1)
    whole = [closure(index) for index in micro]
    # Of every micro-batch the first half.
    first = [torch.cat([part[: len(part) // 2] for part in index.split(BATCH // parts)]) for index in micro]
    ascent = [closure(index) for index in first] if options.get("ascent_part") == 0.5 else None
    losses = []
    if options.get("optimizer") == "sgd":
        optimizer = torch.optim.SGD(net.parameters(), lr=0.3, **shared)
    else:
        optimizer = FusedSAM(net.parameters(), lr=0.3, rho=0.7, interval=options.get("interval", 1), **shared)
    schedule = config(**options).learning_rate
    for step in range(2):
        optimizer.param_groups[0]["lr"] = schedule(step / 2)
        if options.get("optimizer") == "sgd":
            losses.append(whole[0]())
            torch.nn.utils.clip_grad_norm_(net.parameters(), options.get("max_grad_norm") or math.inf)
            optimizer.step()
            optimizer.zero_grad()
        else:
            losses.append(optimizer.step(whole, ascent=ascent))
    return list(net.parameters()), torch.stack(losses).mean().item()


ONE_E = [
    {},
    {"micro_batches": 3},
    {"micro_batches": 3, "ascent_part": 0.5},
    {"micro_batches": 2, "interval": 2},
    {"micro_batches": 3, "optimizer": "sgd"},
    {"micro_batches": 3, "optimizer": "sgd", "max_grad_norm": 0.2},
]
SEVERAL = [
    {"micro_batches": 3, "m_sharpness": "micro"},
    {"micro_batches": 3, "m_sharpness": "micro", "ascent_part": 0.5},
]


@pytest.mark.parametrize(
    ("options", "scaled"), [*((o, False) for o in ONE_E + SEVERAL), *((o, True) for o in ONE_E)], ids=str
)
def test_a_step_is_that_of_the_optimizer(options, scaled):
    """For any cut into micro-batches; with one perturbation under a GradScaler, too."""
    weights, loss = train(make_trainer(ALONE, scaled, **options))
    expected, expected_loss = by_hand(options)
    torch.testing.assert_close(weights, expected, rtol=FLOAT64_RTOL, atol=FLOAT64_RTOL)
    assert loss == pytest.approx(expected_loss, rel=FLOAT64_RTOL)


MICRO = {"micro_batches": 2, "m_sharpness": "micro"}
SGD = {"optimizer": "sgd", "max_grad_norm": 0.2}


@pytest.mark.parametrize(
    ("on_two_ranks", "alone"),
    [
        ({"m_sharpness": "rank"}, MICRO),
        ({"m_sharpness": "rank", "micro_batches": 3}, MICRO),
        ({"m_sharpness": "rank", "micro_batches": 3, "scaled": True}, MICRO),
        ({"m_sharpness": "micro", "micro_batches": 3}, MICRO | {"micro_batches": 6}),
        ({"m_sharpness": "world", "micro_batches": 2}, {}),
        ({"m_sharpness": 2, "scaled": True}, {}),
        (SGD | {"micro_batches": 3}, SGD),
    ],
    ids=str,
)
def test_ranks_are_micro_batches_that_run_at_once(pair, on_two_ranks, alone):
    """Who shares a perturbation with whom, over ranks and in one process."""
    expected, expected_loss = train(make_trainer(ALONE, **alone))
    for weights, loss in pair.run(train_on_this_rank, **on_two_ranks):
        torch.testing.assert_close(weights, expected, rtol=FLOAT64_RTOL, atol=FLOAT64_RTOL)
        assert loss == pytest.approx(expected_loss, rel=FLOAT64_RTOL)


def test_the_average_of_the_weights_is_evaluated(monkeypatch):
    trainer = make_trainer(ALONE, ema=0.75)
    seen = []
    for _ in range(3):
        trainer.train_step([batch()])
        seen.append([p.detach().clone() for p in trainer.model.parameters()])
    for i, p in enumerate(trainer.average.parameters()):
        expected = 0.75 * (0.75 * seen[0][i] + 0.25 * seen[1][i]) + 0.25 * seen[2][i]
        torch.testing.assert_close(p, expected, rtol=FLOAT64_RTOL, atol=FLOAT64_RTOL)
    monkeypatch.setattr(trainer.data, "validation", lambda: [batch()], raising=False)
    of_average, of_model = trainer.evaluate(trainer.average), trainer.evaluate(trainer.model)
    assert of_average["val_loss"] != of_model["val_loss"]
    scores = trainer.model(trainer.normalise(batch()[0]))
    assert of_model["val_loss"] == pytest.approx(nn.functional.cross_entropy(scores.float(), batch()[1]).item())
    assert of_model["top1"] == pytest.approx(100 * (scores.argmax(1) == batch()[1]).double().mean().item())
    assert of_model["top5"] == 100


def test_learning_rate_rises_on_a_line_and_falls_on_half_a_cosine():
    schedule = dataclasses.replace(config(), epochs=10, warmup=2.0, lr=0.8).learning_rate
    assert [schedule(e) for e in (0, 0.5, 2, 6, 10)] == pytest.approx([0, 0.2, 0.8, 0.4, 0])
    assert dataclasses.replace(config(), lr=0.8, warmup=0.0).learning_rate(0) == 0.8
