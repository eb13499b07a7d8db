"""The choice of backend, what the user is told about it, and `python -m fused_sam`."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import PATIENCE
from torch import nn

from fused_sam import FusedSAM, ascend_on_forward, backends, ops
from fused_sam.__main__ import main
from fused_sam.backends import eager

ROOT = Path(__file__).parent.parent
X = torch.ones(5, 3)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter of its own, with the environment variables given."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("FUSED_SAM_")} | environment
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=PATIENCE)


WITHOUT_NATIVE = "import sys; sys.modules['fused_sam._native'] = None; import torch, fused_sam; "


def test_every_backend_here_is_usable() -> None:
    states = backends.available()
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
        + "p = torch.ones(3, requires_grad=True); o = fused_sam.FusedSAM([p], lr=0.25)\n"
        + "for _ in range(2): o.step(lambda: (p.sum().backward(), p.sum())[1])\n"
        + "print(p.tolist(), fused_sam.backends.available())\n"
        + "fused_sam.FusedSAM([torch.zeros(1)], backend='native')"
    )
    assert "[0.5, 0.5, 0.5]" in done.stdout
    assert "pip install" in done.stdout
    assert done.stderr.count("backend 'eager' chosen for cpu tensors") == 1
    (warning,) = [line for line in done.stderr.splitlines() if "UserWarning" in line]
    assert "FusedSAM's compiled core cannot be used" in warning
    assert "FUSED_SAM_NATIVE=ON pip install --force-reinstall --no-deps ." in warning
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode != 0
    assert last.startswith("RuntimeError: backend='native' was asked for but cannot be used")
    assert "Usable: ['eager']" in last
    assert "FUSED_SAM_NATIVE=ON pip install" in last


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


@pytest.fixture
def forgetful() -> Iterator[None]:
    """What is known of backends is found out anew, and again after the test."""
    for known in (backends._load, backends.for_device):
        known.cache_clear()
    yield
    for known in (backends._load, backends.for_device):
        known.cache_clear()


@pytest.mark.usefixtures("forgetful")
def test_the_first_choice_for_cuda_tensors_says_how_to_get_the_kernels_that_are_not_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once, and not to who has chosen another backend."""
    monkeypatch.setattr("fused_sam.backends.native.why_not", lambda device_type: "no CUDA part")
    monkeypatch.setattr("fused_sam.backends.native.lacks_cuda", lambda: True)
    backends.for_device("cuda", "eager")
    with pytest.warns(UserWarning, match="CUDA kernels are not in this install.*FUSED_SAM_CUDA=ON pip install"):
        chosen = backends.for_device("cuda")
    assert backends.for_device("cuda") is chosen


def a_closure(model: nn.Module) -> None:
    FusedSAM(model.parameters(), lr=0.5).step(lambda: model(X).sum().backward())


def two_calls(model: nn.Module) -> None:
    model(X).sum().backward()
    FusedSAM(model.parameters(), lr=0.5).first_step()


def a_list_of_tensors(model: nn.Module) -> None:
    ops.norm([X], [X], [ops.AscentGroup(size=1, rho=0.1, adaptive=False)])


def momentum_in_a_forward(model: nn.Module) -> None:
    opt = FusedSAM(model.parameters(), lr=0.5, momentum=0.9, direction="momentum")
    ascend_on_forward(model, opt)
    opt.state[model.weight]["momentum_buffer"] = torch.ones_like(model.weight)
    model(X)


def a_scaler_and_a_scheduler(model: nn.Module) -> None:
    opt, scaler = FusedSAM(model.parameters(), lr=0.5, interval=2, start=1), torch.amp.GradScaler("cpu")
    torch.optim.lr_scheduler.ConstantLR(opt)
    scaler.scale(model(X).sum()).backward()
    scaler.step(opt)


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize(
    "way",
    [a_closure, two_calls, a_list_of_tensors, momentum_in_a_forward, a_scaler_and_a_scheduler],
    ids=lambda way: way.__name__,
)
def test_missing_kernels_are_warned_of_at_the_line_of_the_user(
    way: Callable[[nn.Module], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_load", lambda backend: ImportError() if backend.name == "native" else eager)
    with pytest.warns(UserWarning, match="compiled core cannot be used") as caught:
        way(nn.Linear(3, 2, bias=False))
    (warning,) = caught
    assert warning.filename == __file__
    assert warning.lineno in {line for *_, line in way.__code__.co_lines()}


@pytest.mark.usefixtures("forgetful")
@pytest.mark.filterwarnings("ignore:FusedSAM's compiled core")
@pytest.mark.parametrize(
    "error", [RuntimeError("no driver\nat all"), OSError("libfoo.so"), AttributeError("triton.jit")]
)
@pytest.mark.parametrize("name", ["native", "triton"])
def test_a_backend_that_raises_when_it_is_imported_is_a_line_and_the_next_one_steps_in(
    name: str, error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    def broken(module: str) -> Any:
        if module == f"fused_sam.backends.{name}":
            raise error
        return importlib.import_module(module)

    monkeypatch.setattr(backends, "importlib", SimpleNamespace(import_module=broken))
    monkeypatch.setattr("fused_sam.cli.doctor.environment", dict)
    said = f"{type(error).__name__}: {error!s}".replace("\n", " ")
    assert backends.available()[name].startswith(f"{said} (to get it: ")
    with pytest.raises(RuntimeError, match=re.escape(f"backend={name!r} was asked for but cannot be used: {said}. ")):
        FusedSAM([torch.zeros(1)], backend=name)
    p = torch.ones(3, requires_grad=True)
    FusedSAM([p], lr=0.5).step(lambda: p.sum().backward())
    assert p.tolist() == [0.5, 0.5, 0.5]
    assert main(["doctor"]) == 0
    report = capsys.readouterr().out
    assert re.search(rf"^cpu   {name} +{re.escape(said)} \(to get it: ", report, re.MULTILINE)
    assert f"cpu   in use: {'eager' if name == 'native' else 'native'}" in report


@pytest.mark.usefixtures("forgetful")
def test_a_backend_that_fails_later_is_a_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where it is asked for a device, the next one steps in; in the step that is to be checked, the status is 1."""

    def fails(*_: object) -> None:
        raise OSError("no such\ndevice")

    with monkeypatch.context() as patch:
        patch.setattr("fused_sam.backends.native.why_not", fails)
        assert backends.for_device("cpu").__name__ == "fused_sam.backends.eager"
        assert main([]) == 0
        assert (
            "native       it fails where it is asked for cpu tensors: OSError: no such device"
            in capsys.readouterr().out
        )
    backends.for_device.cache_clear()
    monkeypatch.setattr("fused_sam.backends.eager.Batch.norm", fails)
    assert main([]) == 1
    report = capsys.readouterr().out
    assert "eager        FAILED: OSError: no such device" in report
    assert "native       ok, one step checked" in report


@pytest.mark.parametrize("error", ["ImportError('No module named torch')", "OSError('libcudart.so: cannot open')"])
def test_without_torch_a_command_says_so_in_one_line(error: str, tmp_path: Path) -> None:
    """A program gets the error itself."""
    (tmp_path / "torch.py").write_text(f"raise {error}\n")
    script = tmp_path / "fused-sam"  # as pip writes it
    script.write_text("import sys\nfrom fused_sam.cli.main import main\nsys.exit(main())\n")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=PATIENCE)

    reason = error.replace("('", ": ").replace("')", "")
    for command, name in ((["-m", "fused_sam"], "python -m fused_sam"), ([str(script)], "fused-sam")):
        for arguments in ([], ["doctor"], ["sharpness", "nets:sgd"]):
            done = run(*command, *arguments)
            assert (done.returncode, done.stdout) == (1, "")
            assert done.stderr == f"{name}: torch cannot be imported ({reason}). To get it: pip install torch\n"
    done = run("-c", "import fused_sam")
    assert done.stderr.splitlines()[-1] == reason


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
