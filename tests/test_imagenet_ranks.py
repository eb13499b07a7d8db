"""bench.imagenet under torchrun, two processes on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import PATIENCE
from imagenet_images import FLAGS, STEPS, VALIDATION, checkpoint, rows, same, without_times, write_tree

import fused_sam

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("torch has no gloo", allow_module_level=True)

TESTS = Path(__file__).parent
ROOT = TESTS.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
RUN = ["--model", "shufflenet_v2_x0_5", "--micro-batches", "2", "--ema", "0.7", "--log-every", "2"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("images"))


@pytest.fixture
def run(tree, tmp_path):
    """The command on two ranks; returns its exit status and what it has said."""

    def run(*flags, out="out", **environment):
        # The package that is tested here, wherever it is installed.
        paths = os.pathsep.join([str(Path(fused_sam.__file__).parent.parent), str(ROOT), str(TESTS)])
        environment |= {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "WEIGHTS": str(tmp_path / f"{out}-weights")}
        command = [*TORCHRUN, str(TESTS / "imagenet_job.py"), "--data-dir", str(tree), *FLAGS, *RUN]
        done = subprocess.run(
            [*command, "--out", str(tmp_path / out), *flags],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        return done.returncode, done.stdout + done.stderr

    return run


def weights(tmp_path, out):
    return [torch.load(tmp_path / f"{out}-weights.{rank}", weights_only=True) for rank in range(2)]


@pytest.mark.slow
def test_ranks_agree(run, tmp_path):
    status, shown = run("--epochs", "1")
    assert status == 0, shown
    assert shown.count("epoch 1: training loss") == 1
    assert "Warning" not in shown
    first, second = weights(tmp_path, "out")
    assert same(first, second)
    (row,) = rows(tmp_path / "out")
    assert (row["ranks"], row["m_sharpness"]) == (2, "rank")
    counted = row["top1"] * VALIDATION / 100
    assert counted == pytest.approx(round(counted), abs=1e-6)


@pytest.mark.skipif("FUSED_SAM_SOAK" not in os.environ, reason="three runs of two processes: make soak")
def test_ranks_go_on_where_a_signal_to_one_of_them_stopped_all(run, tmp_path):
    status, shown = run(out="whole")
    assert status == 0, shown
    status, shown = run(out="parts", STOP_RANK="1", STOP_STEP="1")
    assert status != 0
    assert "SIGTERM after step 2 of epoch 1: saved." in shown
    assert (checkpoint(tmp_path / "parts")["epoch"], checkpoint(tmp_path / "parts")["step"]) == (0, 2)
    status, shown = run("--resume", out="parts")
    assert status == 0, shown

    # Running statistics have been averaged once more, in between.
    trained, resumed = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts")
    moving = {name for name in trained["model"] if "running" in name}
    for name, value in trained["model"].items():
        if name in moving:
            torch.testing.assert_close(resumed["model"][name], value)
        else:
            assert same(resumed["model"][name], value), name
    assert same(resumed["optimizer"], trained["optimizer"])
    assert trained["model"]["conv1.1.num_batches_tracked"] == 2 * 2 * STEPS
    for a, b in zip(without_times(resumed["history"]), without_times(trained["history"]), strict=True):
        assert a == pytest.approx(b)
