"""How a process may end, in the middle of a step or of writing a checkpoint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fused_sam import backends

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="by Linux's signals and limits")


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "faulthandler", "-c", script, *arguments]
    root = Path(__file__).parent.parent
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)


# Children that write checkpoints, each of one number all over, until they are killed; then one that runs out of disk.
CHECKPOINTS = """
import os, resource, signal, sys, time
from pathlib import Path
import torch
from bench.training import checkpoint

folder = Path(sys.argv[1])
path = folder / "checkpoint.pt"
torch.set_num_threads(1)

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(type(error).__name__, flush=True)
        os._exit(0)
    return pid

def save(n, size=1 << 20):
    checkpoint.save({"finished": [n], "running": {"w": torch.full((size,), float(n))}}, path)

def whole():
    state = torch.load(path, weights_only=True)
    assert (state["running"]["w"] == state["finished"][0]).all()
    return state["finished"][0]

def for_ever():
    n = whole()
    while True:
        n += 1
        save(n)

def beyond_the_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    save(-1)

save(0)
last = unfinished = i = 0
while i < 15 or not last or not unfinished:  # however slow the machine is
    pid = child(for_ever)
    time.sleep(0.03 + 0.0077 * i)
    i += 1
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    unfinished += len(list(folder.glob("*.part*")))
    for part in folder.glob("*.part*"):
        part.unlink()
    last = whole()
os.waitpid(child(beyond_the_disk), 0)
assert whole() == last
assert [p.name for p in folder.iterdir()] == ["checkpoint.pt"]
"""


@pytest.mark.slow
def test_a_checkpoint_is_whole_whenever_its_writer_is_killed_or_out_of_disk(tmp_path: Path) -> None:
    done = run(CHECKPOINTS, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() in (["OSError"], ["RuntimeError"])


ENDS = """
import os, sys, torch
from fused_sam import FusedSAM

params = [torch.randn(n).requires_grad_() for n in (67, 100_003)]
opt = FusedSAM(params, rho=0.07, lr=0.13, momentum=0.87, backend="native")

def closure():
    for p in params:
        p.grad = torch.ones_like(p)
    if opt.perturbed:
        sys.exit(7)

if child := os.fork():
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    closure()
    opt.first_step(zero_grad=True)
    sys.exit(7)
opt.step(closure)
"""


@pytest.mark.skipif(backends.available().get("native") != "ok", reason="the native backend is not built")
def test_the_interpreter_may_end_in_mid_step() -> None:
    """In a closure, and between the two calls."""
    done = run(ENDS)
    assert (done.returncode, done.stderr) == (7, "")
