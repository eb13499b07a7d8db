"""The choice of backend, what the user is told about it, and `python -m fused_sam`."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys

import pytest
import torch
from helpers import PATIENCE

from fused_sam import FusedSAM, backends
from fused_sam.__main__ import main


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter of its own, with the environment variables given."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("FUSED_SAM_")} | environment
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=PATIENCE)


WITHOUT_NATIVE = "import sys; sys.modules['fused_sam._native'] = None; import torch, fused_sam; "


def test_every_backend_here_is_usable() -> None:
    states = backends.available()
    states.pop("interpreted", None)  # of the tests' own making
    assert list(states) == ["native", "triton", "eager"]
    optional = states.pop("triton")
    assert optional == "ok" if importlib.util.find_spec("triton") else "not installed" in optional
    assert states == {"native": "ok", "eager": "ok"}


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"backend='cudnn'.*'eager', .*'native', 'triton'\]"):
        FusedSAM([torch.zeros(1)], backend="cudnn")


def test_a_backend_that_does_not_take_the_device_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"'native'.*not for meta tensors"):
        backends.for_device("meta", "native")


def test_the_environment_chooses_unless_the_argument_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_SAM_BACKEND", "eager")
    assert FusedSAM([torch.zeros(1)], lr=0.1).backend == "eager"
    assert FusedSAM([torch.zeros(1)], lr=0.1, backend="native").backend == "native"
    monkeypatch.setenv("FUSED_SAM_BACKEND", "nativ")
    with pytest.raises(ValueError, match="backend='nativ'"):
        FusedSAM([torch.zeros(1)], lr=0.1)


def test_without_the_native_core_eager_steps_in_and_asking_for_native_says_what_to_run() -> None:
    done = run_python(
        WITHOUT_NATIVE
        + "import logging; logging.basicConfig(level=logging.INFO)\n"
        + "p = torch.ones(3, requires_grad=True); o = fused_sam.FusedSAM([p], lr=0.5)\n"
        + "o.step(lambda: (p.sum().backward(), p.sum())[1]); print(p.tolist(), fused_sam.backends.available())\n"
        + "fused_sam.FusedSAM([torch.zeros(1)], backend='native')"
    )
    assert "[0.5, 0.5, 0.5]" in done.stdout
    assert "pip install" in done.stdout
    assert done.stderr.count("backend 'eager' chosen for cpu tensors") == 1
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode != 0
    assert last.startswith("RuntimeError: backend='native' was asked for but cannot be used")
    assert "Usable: ['eager']" in last
    assert "FUSED_SAM_NATIVE=ON pip install" in last


@pytest.mark.filterwarnings("ignore:No parameter has a gradient")
def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    backends.for_device.cache_clear()
    with caplog.at_level(logging.INFO, logger="fused_sam"):
        for _ in range(3):
            FusedSAM([torch.zeros(2, requires_grad=True)], lr=0.1).step(lambda: None)
    assert [r.getMessage() for r in caplog.records].count("backend 'native' chosen for cpu tensors") == 1


def test_an_instruction_set_this_machine_lacks_is_refused_by_name_and_another_is_used() -> None:
    done = run_python(
        """
import os, sys
from fused_sam import _native
from fused_sam.__main__ import main
try:
    _native.isa()
except ValueError as error:
    print(error)
os.environ["FUSED_SAM_CPU_ISA"] = "portable"
sys.exit(main([]))
""",
        FUSED_SAM_CPU_ISA="sse9",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Invalid FUSED_SAM_CPU_ISA='sse9'. Must be one of: " in done.stdout
    assert "kernels      portable" in done.stdout
    assert done.stdout.count("ok, one step checked") == 2


def test_the_report_checks_a_step_on_each_backend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its status is 1 where one computes a wrong step, and where the one asked for is not there."""
    monkeypatch.setattr(backends, "REGISTRY", [x for x in backends.REGISTRY if x.name != "interpreted"])
    assert main([]) == 0
    report = capsys.readouterr().out
    assert report.count("ok, one step checked") == sum(state == "ok" for state in backends.available("cpu").values())
    assert torch.__version__ in report
    with monkeypatch.context() as patch:
        patch.setattr("fused_sam.backends.eager.Batch.restore", lambda self: None)
        assert main([]) == 1
    assert "WRONG" in capsys.readouterr().out
    monkeypatch.setenv("FUSED_SAM_BACKEND", "nativ")
    assert main([]) == 1
    assert "Invalid backend='nativ'" in capsys.readouterr().out


OLDER_TORCH = """
import torch, sys
del torch.Tensor.__dlpack_c_exchange_api__
del torch._C._storage_Use_Count
import fused_sam
from fused_sam.cli.doctor import step_error
assert step_error("native") < 1e-6, step_error("native")
base = torch.randn(4, 6)
for make in (lambda: torch.randn(2, 3, 5, 7).to(memory_format=torch.channels_last), lambda: base[:, ::2].detach()):
    p = make().requires_grad_()
    w, optimizer = p.detach().clone(), fused_sam.FusedSAM([p], lr=0.5, rho=0.1, backend="native")
    p.grad = torch.full(p.shape, 2.0)
    optimizer.first_step(zero_grad=True)
    assert torch.allclose(p, w + 0.1 / p.numel() ** 0.5), "ascent"
    p.grad = torch.full(p.shape, 3.0)
    optimizer.step()
    assert torch.allclose(p, w - 1.5), "update"
try:
    p.grad = torch.zeros(4, 3).to_sparse()
    optimizer.first_step()
except ValueError as error:
    print(error)
"""


def test_a_torch_without_the_exchange_protocol_is_read_through_its_attributes() -> None:
    done = run_python(OLDER_TORCH)
    assert done.returncode == 0, done.stderr
    assert "layout torch.sparse_coo is not supported" in done.stdout
