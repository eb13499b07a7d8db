"""bench.paper.cost and bench.paper.rho_grid: what is run, what is chosen, what is on the front."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import asdict, replace

import pytest
import torch

from bench.paper import cost, defaults, pareto, rho_grid, savings, summary
from bench.paper.config import Config

TINY = ["--dataset", "digits", "--train-size", "160", "--batch-size", "16", "--seeds", "0", "1"]
CONFIG = Config(**(defaults.SMALL | {"dataset": "digits", "epochs": 8}), device="cpu")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rows_of(folder, name):
    return [json.loads(line) for line in (folder / f"paper_{name}.jsonl").read_text().splitlines()]


def row(method, epochs, error, *, seconds=1.0, passes=1.0, rho=0.05, noise_rate=0.0, seed=0, unseen=0.0):
    task = replace(CONFIG, epochs=epochs, noise_rate=noise_rate, seed=seed, validation=0.5)
    result = {"test_error": error, "unseen_error": unseen, "seconds": seconds, "passes": passes, "seed": seed}
    about = {"machine": {"cpu": "a", "cores": 2, "isa": "b"}, "versions": {"commit": "c"}, "date": "2026-11-21T10:00"}
    return about | result | {"config": asdict(savings.METHODS[method].configure(task, rho))}


# what is run


def test_cost_runs_every_method_at_every_length_and_those_of_one_pass_twice_as_long():
    args = Namespace(lengths=[0.25, 1.0], noise_rates=[0.0, 0.3], methods=list(savings.METHODS), rho=0.04)
    runs = cost.grid(args, CONFIG)
    assert len({label for label, _ in runs}) == len({config.key for _, config in runs}) == len(runs)
    lengths = {}
    for label, config in runs:
        lengths.setdefault((label.split(";")[0], config.noise_rate), []).append(config.epochs)
        rho = config.options.get("rho")
        factor = cost.RADII.get(label.split(";")[0], 1.0) * (cost.NOISY if config.noise_rate else 1.0)
        assert rho is None if config.optimizer == "sgd" else rho == pytest.approx(0.04 * factor)
    for name in ("SGD", "MSAM"):
        assert lengths.pop((name, 0.3)) == lengths.pop((name, 0.0)) == [2, 8, 16]
    assert set(map(tuple, lengths.values())) == {(2, 8)}
    assert len(lengths) == 2 * (len(savings.METHODS) - 2)


def test_the_passes_of_every_method(tmp_path, capsys):
    arguments = [
        *TINY,
        "--seeds",
        "3",
        "--epochs",
        "2",
        "--lengths",
        "1",
        "--noise-rates",
        "0.4",
        "--results",
        str(tmp_path),
    ]
    assert cost.main(arguments) == 0
    rows = rows_of(tmp_path, "cost")
    assert [one["seed"] for one in rows] == 9 * [3]
    passes = {savings.name_of(one): one["passes"] for one in rows if one["config"]["epochs"] == 2}
    assert passes == {  # 10 steps an epoch, 16 images a step
        "SGD": 2,
        "SAM": 4,
        "SAM, e from a quarter": 2.5,
        "SAM, every 2nd step": 3,
        "SAM, every 5th step": 2.4,
        "LookSAM, every 5th step": 2.4,
        "MSAM": 2,
    }
    assert len({one["train_loss"] for one in rows}) == len(rows)
    assert (tmp_path / "paper_cost.png").stat().st_size > 20_000
    text = cost.section(rows)
    assert text.count("\n| ") == 1 + 1 + 7 - 1  # heading, rule and methods
    assert "| 40% label noise | passes an epoch | CPU s an epoch | 2 epochs: error, % | 4 epochs: error, % |" in text
    assert "| SAM, e from a quarter | 1.25 |" in text

    before = (tmp_path / "paper_cost.jsonl").read_bytes()
    assert cost.main(arguments) == 0
    assert (tmp_path / "paper_cost.jsonl").read_bytes() == before
    assert "9 runs, 9 of them already" in capsys.readouterr().out


def test_a_row_of_another_method_is_refused():
    strange = row("SAM", 1, 10.0)
    strange["config"]["options"] = {"rho": 0.1, "p": 3}
    with pytest.raises(ValueError, match=r"options=\{'p': 3\}\. Must be of savings"):
        savings.name_of(strange)


# points and fronts


def test_points_are_means_over_seeds():
    rows = [row("SAM", 4, error, seconds=s, passes=8.0, seed=s) for s, error in ((1, 10.0), (2, 13.0))]
    rows.append(row("SGD", 4, 14.0, seconds=0.5, passes=4.0))
    sgd, sam = pareto.points(rows)
    assert (sgd.method, sam.method, sam.epochs) == ("SGD", "SAM", 4)
    assert (sam.error.mean, sam.seconds.mean, sam.passes.mean, sam.error.count) == (11.5, 1.5, 8.0, 2)
    assert sam.error.half == pytest.approx(12.706 * 1.5, rel=1e-4)


@pytest.mark.parametrize("price", ["seconds", "passes"])
def test_front(price):
    def point(name, cost, error):
        prices = {"seconds": 99.0, "passes": 99.0} | {price: cost}
        spread = {key: summary.Interval(value, 0.1, 3) for key, value in (prices | {"error": error}).items()}
        return pareto.Point(name, 1, spread["seconds"], spread["passes"], spread["error"])

    found = [
        point("dear and good", 8.0, 5.0),
        point("cheap", 1.0, 20.0),
        point("as cheap and worse", 1.0, 21.0),
        point("undercut", 4.0, 12.0),
        point("middle", 3.0, 11.0),
        point("no better than middle", 5.0, 11.0),
    ]
    assert [p.method for p in pareto.front(found, price)] == ["cheap", "middle", "dear and good"]


def test_the_front_is_bold_in_the_table():
    rows = [row("SGD", 2, 20.0, seconds=1), row("SGD", 4, 15.0, seconds=2), row("MSAM", 2, 16.0, seconds=3)]
    lines = cost.section(rows).splitlines()
    assert lines[2] == "| SGD | 0.33 | 0.50 | **20.00** | **15.00** |"
    assert lines[3] == "| MSAM | 0.50 | 1.50 | 16.00 |  |"


# the radius


def test_rho_grid_holds_images_out_and_looks_at_the_test_set_apart(tmp_path):
    arguments = [*TINY, "--epochs", "1", "--rhos", "0.05", "0.3", "--validation", "0.25", "--results", str(tmp_path)]
    assert rho_grid.main([*arguments, "--noise-rates", "0", "0.4"]) == 0
    rows = rows_of(tmp_path, "rho_grid")
    assert [rho_grid.rho_of(one) for one in rows] == [0.0, 0.05, 0.3] * 4
    assert len({one["method"] for one in rows}) == 6
    for one in rows:
        assert one["test_error"] % 2.5 == 0  # of 40 images
        assert one["passes"] == (2 if rho_grid.rho_of(one) else 1)
        unseen = one["unseen_error"] / 100 * 359  # of all test images
        assert unseen == pytest.approx(round(unseen), abs=1e-6)
    assert (tmp_path / "paper_rho_grid.png").stat().st_size > 20_000

    assert rho_grid.main([*arguments, "--noise-rates", "0.4", "--method", "MSAM"]) == 0
    text = rho_grid.section(rows_of(tmp_path, "rho_grid"))
    assert "| 0 (SGD) |" in text
    assert text.count("| MSAM | 40% label noise | 0.05, 0.3 |") == 1


def test_the_part_that_is_held_out():
    args = Namespace(noise_rates=[0.2], rhos=[0.1], method="LookSAM, every 5th step", validation=None, paper=False)
    (_, sgd), (label, looksam) = rho_grid.grid(args, CONFIG)
    assert label == "LookSAM, every 5th step rho=0.1, 20% label noise"
    assert (sgd.optimizer, sgd.validation, sgd.noise_rate) == ("sgd", 0.5, 0.2)
    assert looksam.options == {"rho": 0.1, "interval": 5, "looksam_alpha": 0.7}
    args.paper = True
    assert {config.validation for _, config in rho_grid.grid(args, CONFIG)} == {0.1}


def test_the_radius_is_chosen_by_the_images_held_out_alone():
    rows = [row("SGD", 1, 1.0, unseen=1.0)]
    for rho, errors, unseen in (
        (0.05, (30, 20), 1.0),
        (0.1, (22, 24), 90.0),
        (0.2, (24, 22), 2.0),
        (0.5, (40, 9), 3.0),
    ):
        rows += [row("SAM", 1, error, rho=rho, seed=seed, unseen=unseen) for seed, error in enumerate(errors)]
    assert rho_grid.chosen(rows) == 0.1
    text = rho_grid.section([one | {"config": one["config"] | {"noise_rate": 0.4}} for one in rows])
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines()}
    assert "**23.00 ± " in lines["0.1"]
    assert "**90.00" in lines["0.1"]
    assert lines["0.1"].endswith("| 6.0 |")  # the paper's, table 8
    assert "**" not in lines["0.2"]
    assert lines["0.5"].endswith("| 40.9 |")
