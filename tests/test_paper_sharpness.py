"""bench.paper: m-sharpness, spectra and variants, and what they measure with."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("scipy")
pytest.importorskip("sklearn")
import numpy as np
from scipy import stats

from bench.paper import association, defaults, m_sharpness, methods, models, second_order, spectra, summary, variants
from bench.paper.config import Config
from bench.training import data

CONFIG = Config(**defaults.SMALL, device="cpu")
TINY = ["--dataset", "digits", "--train-size", "48", "--batch-size", "16", "--seeds", "0"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rows_of(folder, name):
    return [json.loads(line) for line in (folder / f"paper_{name}.jsonl").read_text().splitlines()]


# association


def test_spearman_and_kendall_are_of_the_runs_given():
    generator = np.random.default_rng(3)
    x = generator.normal(size=30)
    y = x + generator.normal(size=30)
    found = association.spearman(x, y)
    assert found.value == pytest.approx(stats.spearmanr(x, y).statistic)
    assert found.low < found.value < found.high
    assert 0.1 < found.high - found.low < 0.8
    assert association.kendall(x, y) == pytest.approx(stats.kendalltau(x, y).statistic)
    assert tuple(association.spearman(x, -x)) == pytest.approx((-1, -1, -1))


def test_mutual_information_does_not_change_under_monotone_maps():
    generator = np.random.default_rng(4)
    x = generator.normal(size=40)
    y = x**2 + 0.1 * generator.normal(size=40)  # no rank correlation to speak of, and much information
    found = association.mutual_information(x, y)
    assert found == association.mutual_information(np.exp(5 * x), 3 * y - 1)
    assert found.value > 3 * found.chance > 0
    assert abs(association.kendall(x, y)) < 0.4


def test_unrelated_figures_stay_below_chance():
    generator = np.random.default_rng(5)
    pairs = [generator.normal(size=(2, 25)) for _ in range(60)]
    found = [association.mutual_information(x, y) for x, y in pairs]
    assert len({information.chance for information in found}) == 1
    assert sum(information.value > information.chance for information in found) <= 8


def test_association_of_few_runs():
    assert association.mutual_information([1, 2, 3], [3, 1, 2]) is None
    for few in ([1.0, 2.0], [1.0, 2.0, 3.0]):
        with pytest.raises(ValueError, match=r"Invalid x and y of \d and 2 values\. Must be as many, and at least 3"):
            association.spearman(few, [1.0, 2.0])


# networks without BatchNorm


@pytest.mark.parametrize("name", ["small", "resnet-8", "pyramidnet-20-30", "shake-shake-26-2x32d"])
def test_groupnorm_network_sees_one_image_at_a_time(name):
    torch.manual_seed(0)
    model = models.make(f"{name}-groupnorm", channels=1, classes=10, size=28).double()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert any(isinstance(module, nn.GroupNorm) for module in model.modules())
    model.eval()  # of Shake-Shake's random branches; GroupNorm has one mode
    images = torch.randn(3, 1, 28, 28, dtype=torch.float64)
    torch.testing.assert_close(model(images)[:1], model(images[:1]))


def test_unknown_network_without_batchnorm_is_refused():
    with pytest.raises(ValueError, match="Invalid model='tiny-groupnorm'"):
        models.make("tiny-groupnorm", channels=1, classes=10, size=28)


# the second-order term


def test_cosine_is_that_of_the_whole_gradient():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3)).double()
    x, y, rho = torch.randn(20, 5, dtype=torch.float64), torch.randint(3, (20,)), 0.3
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = second_order.cosine(model, x, y, rho)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    names, params = zip(*model.named_parameters())

    def loss(ws):
        return F.cross_entropy(torch.func.functional_call(model, dict(zip(names, ws)), (x,)), y)

    gradient = torch.autograd.grad(loss(params), params, create_graph=True)
    norm = torch.cat([g.flatten() for g in gradient]).norm()
    moved = [p + rho * g / norm for p, g in zip(params, gradient)]
    whole = torch.autograd.grad(loss(moved), params, retain_graph=True)
    part = torch.autograd.grad(loss(moved), moved)
    expected = F.cosine_similarity(*(torch.cat([g.flatten() for g in gs]) for gs in (whole, part)), dim=0)
    assert found == pytest.approx(float(expected), rel=1e-9)
    assert found < 0.999


# steppers


def steps_of(name, options, steps=2):
    """Displacements of the second pass and gradients at w, for each step."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    stepper = methods.make(model, replace(CONFIG, optimizer=name, options=options, lr=0.1))
    x, y = torch.randn(9, 6), torch.randint(3, (9,))
    found = []
    for _ in range(steps):
        before = [p.detach().clone() for p in model.parameters()]
        gradient = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        moved = []

        def loss_of(images, targets, before=before, moved=moved):
            moved.append(torch.cat([(p.detach() - w).flatten() for p, w in zip(model.parameters(), before)]))
            return F.cross_entropy(model(images), targets)

        loss, passes = stepper.step(loss_of, x, y)
        assert math.isfinite(loss)
        found.append((moved[-1], torch.cat([g.flatten() for g in gradient]), passes))
    return found


def test_random_direction_has_length_rho_and_changes():
    (first, gradient, passes), (second, _, _) = steps_of("random", {"rho": 0.7})
    assert passes == 1
    for e in (first, second):
        assert float(e.norm()) == pytest.approx(0.7, rel=1e-4)
    assert abs(F.cosine_similarity(first, gradient, dim=0)) < 0.8
    assert abs(F.cosine_similarity(first, second, dim=0)) < 0.8


def test_inf_norm_moves_every_weight_by_rho():
    for e, gradient, passes in steps_of("sam-inf", {"rho": 0.03}):
        torch.testing.assert_close(e, 0.03 * gradient.sign(), atol=1e-6, rtol=0)
        assert passes == 2


# m_sharpness


def test_m_sharpness(tmp_path, capsys):
    flags = [*TINY, "--epochs", "4", "--m", "16", "5", "--rhos", "0.1", "0.3", "--noise-rate", "0", "--examples", "24"]
    flags += ["--measured-m", "3", "24", "--results", str(tmp_path)]
    assert m_sharpness.main(flags) == 0
    rows = rows_of(tmp_path, "m_sharpness")
    assert [row["method"] for row in rows] == [
        "SGD",
        "SAM m=16 rho=0.1",
        "SAM m=16 rho=0.3",
        "SAM m=5 rho=0.1",
        "SAM m=5 rho=0.3",
    ]
    assert [row["config"]["micro_batch"] for row in rows] == [None, 16, 16, 5, 5]
    for row in rows:
        assert row["config"]["model"] == "small-groupnorm"
        assert row["gap"] == pytest.approx(row["test_error"] - row["train_error"])  # without noise
        assert [(one["rho"], one["m"]) for one in row["sharpness"]] == [(0.05, 3), (0.05, 24), (0.2, 3), (0.2, 24)]
        assert all(math.isfinite(one["sharpness"]) for one in row["sharpness"])
    assert (tmp_path / "paper_m_sharpness.png").stat().st_size > 10_000
    section = m_sharpness.section(rows)
    assert "| m = 16 | " in section
    assert "| m = 3, rho = 0.2 | " in section
    assert m_sharpness.main(flags) == 0
    assert "5 runs, 5 of them already" in capsys.readouterr().out


def test_gap_is_of_test_labels_with_the_noise_of_training():
    labels = torch.arange(40) % 10
    training = SimpleNamespace(
        config=replace(CONFIG, noise_rate=0.25),
        images=SimpleNamespace(test=data.Images(torch.zeros(40, 8, 8, dtype=torch.uint8), labels), classes=10),
        # a model that is always right
        evaluate=lambda images: (100 * float((images.labels != labels).double().mean()), 0.0),
    )
    assert m_sharpness.noisy_test_error(training) == pytest.approx(25)


def test_m_sharpness_refuses_groups_larger_than_what_it_measures_on(capsys):
    assert m_sharpness.main([*TINY, "--examples", "32", "--measured-m", "64"]) == 1
    assert "Invalid measured_m=[64]. Must be at most 32" in capsys.readouterr().out


# spectra


def test_spectra(tmp_path):
    flags = [*TINY, "--model", "resnet-8", "--epochs", "2", "--measurements", "1", "--examples", "4"]
    flags += ["--lanczos-steps", "4", "--probes", "2", "--rho", "0.2"]
    assert spectra.main([*flags, "--results", str(tmp_path)]) == 0
    rows = rows_of(tmp_path, "spectra")
    assert [row["method"] for row in rows] == ["SGD", "SAM"]
    assert rows[1]["config"]["options"] == {"rho": 0.2}
    for row in rows:
        assert [point["epoch"] for point in row["history"]] == [2]
        for found in [point["eigenvalues"] for point in row["history"]] + [row["unseen_eigenvalues"]]:
            assert len(found) == 5
            assert found == sorted(found, reverse=True)
        for point in row["history"]:
            assert len(point["nodes"]) == 8
            assert sum(point["weights"]) == pytest.approx(1, rel=1e-4)
            assert max(point["nodes"]) <= point["eigenvalues"][0] * 1.001
            assert point["loss"] > 0
    assert (tmp_path / "paper_spectra.png").stat().st_size > 10_000
    section = spectra.section(rows)
    assert "| epoch 2 | " in section
    assert "| epoch 300 | 24.2 | 11.4 | 1.0 | 2.6 |" in section


# variants


def test_variants(tmp_path):
    flags = [*TINY, "--epochs", "2", "--rho", "0.1", "--rhos", "0.2", "--inf-rhos", "1e-3", "--random-rhos", "1"]
    flags += ["--steps", "2", "--cosines", "2", "--results", str(tmp_path)]
    assert variants.main(flags) == 0
    rows = {row["method"]: row for row in rows_of(tmp_path, "variants")}
    assert list(rows) == [
        "SGD",
        "SAM rho=0.1",
        "SAM rho=0.2",
        "p=inf rho=0.001",
        "random rho=1",
        "2 ascent steps",
        "second order",
    ]
    assert [row["passes"] for row in rows.values()] == [2, 4, 4, 4, 2, 6, 6]
    for row in rows.values():
        assert row["config"]["validation"] == 0.1
        compared = row["config"]["extra"] == {"rho": 0.1}
        assert ("sharpness" in row) == compared
        assert all(("cosine" in point) == compared for point in row["history"])
    assert rows["second order"]["train_loss"] != rows["SAM rho=0.1"]["train_loss"]
    assert -1 <= rows["second order"]["history"][0]["cosine"] < 1
    assert (tmp_path / "paper_variants.png").stat().st_size > 10_000
    section = variants.section(list(rows.values()))
    assert "| p = inf | 0.001 | **" in section
    assert "| with the term | " in section


def test_variants_choose_by_the_images_held_out():
    def row(optimizer, held_out, unseen, **options):
        return {
            "config": {"optimizer": optimizer, "options": options, "extra": {}},
            "test_error": held_out,
            "unseen_error": unseen,
        }

    rows = [row("sam", 30, 10, rho=0.1), row("sam", 20, 40, rho=0.1), row("sam", 24, 30, rho=0.2)]
    rows += [row("sam", 24, 31, rho=0.2), row("sam", 1, 1, rho=0.1, ascent_steps=2), row("sam-inf", 3, 3, rho=0.01)]
    groups = variants.norms(rows)
    assert list(groups) == ["p = 2", "p = inf"]
    assert {rho: len(same) for rho, same in groups["p = 2"].items()} == {0.1: 2, 0.2: 2}
    assert variants.chosen(groups["p = 2"]) == 0.2
    assert summary.of(groups["p = 2"][0.2], "unseen_error").mean == 30.5
