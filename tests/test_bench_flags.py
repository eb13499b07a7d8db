"""What `--help` of the tools in bench/ says of defaults."""

from __future__ import annotations

import importlib
import re
import runpy
from pathlib import Path

import pytest

from bench import flags
from bench.paper import data
from bench.paper import flags as paper_flags
from bench.paper.runner import Experiment

PAPER = Path(paper_flags.__file__).parent
EXPERIMENTS = {
    path.stem: found
    for path in sorted(PAPER.glob("*.py"))
    if isinstance(found := getattr(importlib.import_module(f"bench.paper.{path.stem}"), "EXPERIMENT", None), Experiment)
}


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """No line of help is broken."""
    monkeypatch.setenv("COLUMNS", "1000")


def shown(text: str) -> dict[str, str]:
    """The default of each flag that has one, from a page of help; of "--this, --no-this" it is that of --this."""
    entries = re.split(r"\n  (?=--)", re.sub(r"\n {4,}", " ", text))[1:]
    defaults = ((entry.split()[0].rstrip(","), re.search(r"\(default: (.*?)\)(?:\n|$)", entry)) for entry in entries)
    return {flag: found.group(1) for flag, found in defaults if found}


def test_every_default_that_says_something_is_shown(tmp_path: Path) -> None:
    made = flags.parser("tool", "What it does.\n\n    as it stands here", epilog="Last.")
    add = made.add_argument
    add("--zero", type=float, default=0.0, help="of it, 5 %% or so")
    add("--names", nargs="+", default=["a", "b"], help="of all")
    add("--file", type=Path, default=flags.ROOT / "bench" / "results", help="to read")
    add("--elsewhere", type=Path, default=tmp_path, help="to write")
    add("--words", type=int, default=3, help="in words (default: three)")
    add("--flag", action="store_true", help="nothing to say")
    add("--optional", help="nor here")
    text = made.format_help()
    assert "\n    as it stands here\n" in text
    assert "python -m bench.tool" in text
    said = {"--zero": "0.0", "--names": "a b", "--file": "bench/results", "--elsewhere": str(tmp_path)}
    assert shown(text) == said | {"--words": "three"}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_what_an_experiments_help_shows_is_what_its_runs_have(name: str) -> None:
    """Where nothing is given: most values are the data set's, the experiment's or the shared ones."""
    experiment = EXPERIMENTS[name]
    made = paper_flags.parser(name, experiment.description, experiment.add_arguments, experiment.defaults)
    args = made.parse_args([])
    defaults = shown(made.format_help())
    config = paper_flags.base_config(args, args.dataset, experiment.defaults)
    words = {"None": "the batch", "True": "yes", "False": "no", "0.0": "0"}
    for field in paper_flags.FLAGS:
        value = str(getattr(config, field))
        assert defaults[f"--{field.replace('_', '-')}"].partition(";")[0] == words.get(value, value)
    assert defaults["--rho"] == str(args.rho)
    assert config.augment in data.AUGMENTATIONS


TOOLS = ["imagenet", "training.fashion_mnist", "report", "ranks.counts", "ranks.overlap", "screenshot"]
TOOLS += ["gpu.step", "gpu.counters", "gpu.iteration", "gpu"]


@pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_has_help(tool: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["tool", "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_module(f"bench.{tool}", run_name="__main__", alter_sys=False)
    text = capsys.readouterr().out
    assert text.startswith(f"usage: python -m bench.{tool} ")
    assert tool == "screenshot" or shown(text)
