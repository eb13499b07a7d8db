"""The command line: what each command prints and writes, what it refuses, and what it needs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pages
import pytest
import torch
import torch.nn.functional as F
from helpers import PATIENCE, snapshot
from torch import nn

from fused_sam import analysis
from fused_sam.cli.main import main

ROOT = Path(__file__).parent.parent

SUBJECTS = """
import torch
from torch import nn

def make(scale):
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double().eval()
    with torch.no_grad():
        net[2].weight.mul_(scale)
    batches = [(torch.randn(n, 3, dtype=torch.float64), torch.randint(3, (n,))) for n in (6, 5)]
    return net, nn.functional.cross_entropy, batches

def flat():
    return make(0.5)

def sharp():
    return make(4.0)

def seeded():
    return nn.Linear(3, 3), nn.functional.cross_entropy, (torch.randn(6, 3), torch.arange(6) % 3)

def failing():
    raise ValueError("of the user")

def not_three():
    return make(1.0)[:2]

number = 3
"""


@pytest.fixture
def subjects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of targets, importable; the current folder is its own."""
    (tmp_path / "subjects_of_the_cli.py").write_text(SUBJECTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield __import__("subjects_of_the_cli")
    del sys.modules["subjects_of_the_cli"]


FLAT, SHARP = "subjects_of_the_cli:flat", "subjects_of_the_cli:sharp"


def test_no_command_is_the_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    bare = capsys.readouterr().out
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out == bare
    assert "ok, one step checked" in bare


def test_it_needs_torch_alone_and_finds_modules_in_the_current_folder(tmp_path: Path) -> None:
    """As the installed command, whose own folder python searches instead."""
    (tmp_path / "mine.py").write_text(SUBJECTS)
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['scipy', 'matplotlib', 'rich', 'rich.progress']))\n"
        "sys.path[0] = '/nowhere'\n"
        "from fused_sam.cli.main import main\n"
        "sys.exit(main([]) or main(['sharpness', 'mine:flat']) or main(['spectrum', 'a:b']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 2, done.stderr
    assert "ok, one step checked" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("mine:flat")
    assert done.stderr.strip().endswith("This needs scipy: pip install '.[analysis]'")


@pytest.mark.parametrize("command", [[], ["doctor"], ["sharpness"], ["spectrum"], ["landscape"]])
def test_help_says_what_a_command_does(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 120
    assert all(word in said for word in (command or ["doctor", "sharpness", "spectrum", "landscape"]))
    if command and command[0] in ("sharpness", "spectrum", "landscape"):
        assert "TARGET" in said
        assert "docs/analysis.md" in said


def test_sharpness_prints_and_writes_what_the_library_finds(
    subjects: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ["--rho", "0.02", "0.07", "--m", "4", "--p", "3", "--adaptive", "weights", "--eta", "0.1"]
    options += ["--steps", "3", "--step-size", "0.05", "--json", "found.json"]
    assert main(["sharpness", FLAT, SHARP, *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["target", "rho", "sharpness", "loss", "groups", "examples"]
    content = json.loads((tmp_path / "found.json").read_text())
    assert content["options"]["m"] == 4
    assert content["torch"] == torch.__version__
    rows = content["results"]
    assert [(row["target"], row["rho"]) for row in rows] == [(t, r) for t in (FLAT, SHARP) for r in (0.02, 0.07)]
    for line, row in zip(lines[1:], rows, strict=True):
        model, loss_fn, data = (subjects.flat if row["target"] == FLAT else subjects.sharp)()
        expected = analysis.sharpness(
            model, loss_fn, data, rho=row["rho"], m=4, p=3, adaptive="weights", eta=0.1, steps=3, step_size=0.05
        )
        assert {name: row[name] for name in expected._fields} == expected._asdict()
        assert float(line.split()[2]) == pytest.approx(expected.sharpness, rel=1e-5)
    assert rows[3]["sharpness"] > rows[1]["sharpness"] > rows[0]["sharpness"] > 0


def test_the_defaults_are_the_librarys_and_infinity_is_written_as_a_string(subjects: Any, tmp_path: Path) -> None:
    assert main(["sharpness", FLAT, "--json", "a.json"]) == 0
    assert main(["sharpness", FLAT, "--p", "inf", "--adaptive", "all", "--json", "b.json"]) == 0
    plain, other = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert plain["results"][0]["sharpness"] == analysis.sharpness(*subjects.flat()).sharpness
    assert other["options"]["p"] == "inf"
    expected = analysis.sharpness(*subjects.flat(), p=math.inf, adaptive=True).sharpness
    assert other["results"][0]["sharpness"] == expected


def test_spectrum_prints_and_writes_what_the_library_finds(
    subjects: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("scipy")
    pytest.importorskip("matplotlib")
    options = ["--k", "5", "--which", "LM", "--tol", "1e-8", "--probes", "4", "--lanczos-steps", "7", "--seed", "3"]
    assert main(["spectrum", FLAT, SHARP, *options, "--json", "found.json", "--plot", "found.png"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["target", "lambda_1"]
    rows = json.loads((tmp_path / "found.json").read_text())["results"]
    for line, row, make in zip(lines[1:], rows, (subjects.flat, subjects.sharp), strict=True):
        hessian = analysis.Hessian(*make())
        values = analysis.eigenvalues(hessian, 5, which="LM", tol=1e-8, seed=3)
        trace = analysis.trace(hessian, 4, seed=3)
        density = analysis.density(hessian, 4, steps=7, seed=3)
        assert row["eigenvalues"] == values.values.tolist()
        assert row["ratio"] == values.ratio
        assert (row["trace"], row["trace_standard_error"]) == (trace.trace, trace.standard_error)
        assert row["density"]["density"] == density.density.tolist()
        assert (row["weights"], row["products"]) == (31, hessian.products)
        assert [float(x) for x in line.split()[1:6]] == pytest.approx(row["eigenvalues"], rel=1e-5)
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")


def test_the_density_is_computed_where_it_is_asked_for(
    subjects: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("scipy")
    for options, there in (([], False), (["--density"], True)):
        assert main(["spectrum", FLAT, "--k", "2", *options, "--json", "found.json"]) == 0
        (row,) = json.loads((tmp_path / "found.json").read_text())["results"]
        assert ("density" in row) is there
        assert row["ratio"] is None
        assert capsys.readouterr().out.splitlines()[1].split()[3] == "-"


@pytest.mark.parametrize(
    ("options", "shape", "picture"),
    [
        (["--points", "5", "--span", "0.7"], (5, 5), "found.png"),
        (["--points", "4", "--style", "contour", "--ceiling", "2"], (4, 4), "found.pdf"),
        (["--points", "7", "--dim", "1", "--vectors"], (7,), "found.svg"),
    ],
)
def test_landscape_prints_draws_and_writes_what_the_library_finds(
    options: list[str],
    shape: tuple[int, ...],
    picture: str,
    subjects: Any,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    pytest.importorskip("matplotlib")
    assert main(["landscape", FLAT, SHARP, *options, "--seed", "2", "--json", "a.json", "--plot", picture]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = json.loads((tmp_path / "a.json").read_text())["results"]
    for line, row, make in zip(lines[1:], rows, (subjects.flat, subjects.sharp), strict=True):
        model, loss_fn, data = make()
        loss = torch.tensor(row["loss"], dtype=torch.float64)
        assert loss.shape == shape
        span = 0.7 if "--span" in options else 1.0
        assert [axis[0] for axis in row["coordinates"]] == [-span] * len(shape)
        assert [axis[-1] for axis in row["coordinates"]] == [span] * len(shape)
        if shape[0] % 2:
            middle = tuple(n // 2 for n in shape)
            assert float(loss[middle]) == float(analysis.sharpness(model, loss_fn, data, rho=0.0).loss)
        found = [float(x) for x in line.split()[1:3]]
        assert found == pytest.approx([float(loss.min()), float(loss.max())], rel=1e-5)
        seeds = (2,) if len(shape) == 1 else (4, 5)
        directions = [
            analysis.random_direction(model.parameters(), seed=s, vectors="--vectors" in options) for s in seeds
        ]
        expected = analysis.landscape(model, loss_fn, data, directions, row["coordinates"])
        assert torch.equal(expected.loss, loss)
    assert (tmp_path / picture).stat().st_size > 1000


def test_targets_are_called_under_the_seed(subjects: Any, tmp_path: Path) -> None:
    losses = []
    for seed in ("7", "7", "8"):
        assert main(["sharpness", "subjects_of_the_cli:seeded", "--seed", seed, "--json", "a.json"]) == 0
        losses.append(json.loads((tmp_path / "a.json").read_text())["results"][0]["loss"])
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("rich", [True, False])
def test_progress_goes_to_stderr_with_and_without_rich(
    rich: bool, subjects: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich.progress", None)
    assert main(["sharpness", FLAT, "--steps", "2"]) == 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 2
    assert f"{FLAT} rho=0.05" in said.err
    assert ("6/6" if rich else "6 batches in") in said.err  # two batches, two passes up and one at the end


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sharpness", "subjects"], "Invalid target 'subjects'. Must be module:function."),
        (["sharpness", ":flat"], "Invalid target ':flat'. Must be module:function."),
        (["sharpness", "nowhere_to_be_found:flat"], "There is no module nowhere_to_be_found here."),
        (["sharpness", "subjects_of_the_cli:missing"], "There must be a function missing in subjects_of_the_cli."),
        (["sharpness", "subjects_of_the_cli:number"], "There must be a function number in subjects_of_the_cli."),
        (["sharpness", "subjects_of_the_cli:not_three"], "Must be (model, loss_fn, data)"),
        (["sharpness", FLAT, "--m", "7"], "Invalid m=7. Must be at most the size of a batch; the first has 6"),
        (["spectrum", FLAT, "--k", "31"], "Invalid k=31. Must be an integer >= 1 and less than"),
        (["spectrum", FLAT, "--tol", "0", "--max-products", "1"], "of k=5 eigenvalues found"),
    ],
)
def test_what_the_library_refuses_is_one_line(
    arguments: list[str], message: str, subjects: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("scipy")
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert not said.out
    last = said.err.splitlines()[-1]
    assert message in last
    assert f" {arguments[0]}: " in last


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sharpness"], "TARGET"),
        (["sharpness", FLAT, "--rho", "-0.1"], "invalid value '-0.1'. Must be a number >= 0."),
        (["sharpness", FLAT, "--rho", "nan"], "invalid value 'nan'. Must be a number >= 0."),
        (["sharpness", FLAT, "--p", "0.5"], "invalid value '0.5'. Must be a number >= 1."),
        (["sharpness", FLAT, "--m", "0"], "invalid value '0'. Must be an integer >= 1."),
        (["sharpness", FLAT, "--m", "2.5"], "invalid value '2.5'. Must be an integer >= 1."),
        (["sharpness", FLAT, "--step-size", "0"], "invalid value '0'. Must be a number > 0."),
        (["sharpness", FLAT, "--json", "no_such_folder/a.json"], "Must be in a folder that exists."),
        (["landscape", FLAT, "--plot", "a.gif"], "invalid picture 'a.gif'. Must end in one of .pdf, .png, .svg."),
        (["landscape", FLAT, "--dim", "3"], "invalid choice: "),
        (["sharpen"], "invalid choice: "),
    ],
)
def test_arguments_out_of_range_are_refused_before_a_target_is_loaded(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_an_error_in_the_users_code_keeps_its_traceback(subjects: Any) -> None:
    with pytest.raises(ValueError, match="of the user"):
        main(["sharpness", "subjects_of_the_cli:failing"])


def test_the_commands_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("scipy", "matplotlib"):
        pytest.importorskip(package)
    page = pages.ROOT / "docs" / "analysis.md"
    _, targets = pages.blocks(page)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "nets.py").write_text(targets.code)
    commands = [line.split()[1:] for line in page.read_text().splitlines() if line.startswith("    fused-sam ")]
    assert [command[0] for command in commands] == ["sharpness", "spectrum", "landscape"]
    shorter = {"sharpness": [], "spectrum": ["--probes", "2"], "landscape": ["--points", "3"]}
    for command in commands:
        assert main([*command, *shorter[command[0]]]) == 0
    del sys.modules["nets"]
    assert {file.name for file in tmp_path.iterdir()} >= {"spectrum.png", "spectrum.json", "landscape.png"}


def test_a_target_is_left_as_it_was(subjects: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net, _, data = subjects.flat()
    net.train()
    w = snapshot(net.parameters())
    monkeypatch.setattr(subjects, "flat", lambda: (net, F.cross_entropy, data))
    pytest.importorskip("scipy")
    for command in (["sharpness"], ["spectrum"], ["landscape", "--points", "3"]):
        assert main([command[0], FLAT, *command[1:]]) == 0
    assert snapshot(net.parameters()) == w
    assert all(m.training for m in net.modules() if isinstance(m, nn.Module))
