"""README.md and the pages of docs/: every Python block runs, and every link leads somewhere."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import pages
import pytest
import torch
import torchvision_ops

import fused_sam
from fused_sam import analysis, distributed

BLOCKS = [block for page in pages.PAGES for block in pages.blocks(page)]
OTHERS = [*pages.ROOT.glob("[CS]*.md"), *(pages.ROOT / "docs" / "notebooks").glob("*.ipynb")]
TRAINERS = [block for block in BLOCKS if block.page.name == "trainers.md"]
LINK = re.compile(r"(?<!`)\]\(([^)\s]+)\)")
CODE = re.compile(r"^(```.*?^```$|    .*?$)", re.DOTALL | re.MULTILINE)


PUBLIC = {fused_sam: "fused_sam", analysis: "fused_sam.analysis", distributed: "fused_sam.distributed"}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a block writes goes to a folder of its own; what it compiles is traced, and not made into C++."""
    torchvision_ops.import_or_reason()  # trainers import it where it is installed
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


def test_there_are_blocks_in_every_page_that_shows_how() -> None:
    shown = {block.page.relative_to(pages.ROOT).as_posix() for block in BLOCKS}
    names = ("quickstart", "training", "variants", "distributed", "trainers", "migrating", "performance", "analysis")
    assert shown >= {"README.md", *(f"docs/{name}.md" for name in names)}


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True:UserWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # of torch.compile
@pytest.mark.parametrize("block", [b for b in BLOCKS if b not in TRAINERS], ids=lambda block: block.name)
def test_a_block_runs(block: pages.Block, tmp_path: Path) -> None:
    if "analysis" in block.code:
        for package in ("scipy", "matplotlib"):
            pytest.importorskip(package)
    with pages.given(block, tmp_path, pages.net()) as names:
        block.run(names)


@pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning", "ignore::FutureWarning")
@pytest.mark.parametrize("block", TRAINERS, ids=lambda block: block.name)
def test_a_block_for_a_trainer_trains_in_two_passes(block: pages.Block, tmp_path: Path) -> None:
    """What a step is: test_integrations.py."""
    model, sizes = pages.net(), []
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    old = pages.weights(model)
    with pages.given(block, tmp_path, model) as names:
        block.run(names)
    epochs = 2 if "lightning" in block.code else 1
    assert sizes == [pages.BATCH] * (2 * 4 * epochs)
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), old))


def test_the_api_page_has_every_public_name() -> None:
    page = (pages.ROOT / "docs" / "api.md").read_text()
    for module, path in PUBLIC.items():
        for name in module.__all__:
            what = getattr(module, name)
            if not isinstance(what, str):  # modules by what they hold
                assert re.search(rf"^::: {path}\.{name}\b", page, re.MULTILINE), name


def prose(page: Path) -> str:
    """The text of a page without code; of a notebook, what is written in it."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return CODE.sub("", text)


def anchors(page: Path) -> set[str]:
    """As GitHub and the site make them of headings."""
    heads = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", head.lower())) for head in heads}


@pytest.mark.parametrize("page", [*pages.PAGES, *OTHERS], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(prose(page)):
        file, _, anchor = target.partition("#")
        if ":" in file:
            continue
        there = page.parent / file if file else page
        assert there.is_file(), target
        if anchor and not anchor.startswith("fused_sam."):  # which the site makes of docstrings
            assert anchor in anchors(there), target
