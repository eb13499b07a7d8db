"""A loop that knows only step() trains with MSAM; evaluation and checkpoints see w."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision_ops
from helpers import assert_same_bits, snapshot, state_tensors
from ranks import Ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import fused_sam
from fused_sam import FusedSAM
from fused_sam.distributed import data_parallel

BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.13, "momentum": 0.8, "weight_decay": 0.017}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.013, "betas": (0.8, 0.97), "weight_decay": 0.17}),
}


def net(device: str = "cpu") -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3)).to(device)


def batches(count: int, device: str = "cpu") -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(8, 5, generator=generator).to(device), torch.randint(3, (8,), generator=generator).to(device))
        for _ in range(count)
    ]


def msam(model: nn.Module, base: str = "SGD", **options: Any) -> FusedSAM:
    optimizer, given = BASES[base]
    return FusedSAM(model.parameters(), optimizer, rho=0.3, direction="momentum", **given, **options)


def backward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    F.cross_entropy(model(batch[0]), batch[1]).backward()


def by_hand(model: nn.Module, opt: FusedSAM, steps: int, accumulated: int = 1) -> None:
    device = next(model.parameters()).device.type
    for k in range(steps):
        opt.zero_grad()
        if opt.perturb_next:
            opt.first_step()
        for batch in batches(steps * accumulated, device)[k * accumulated : (k + 1) * accumulated]:
            backward(model, batch)
        opt.step()


def unknowing(model: nn.Module, opt: torch.optim.Optimizer, steps: int, accumulated: int = 1) -> None:
    device = next(model.parameters()).device.type
    for i, batch in enumerate(batches(steps * accumulated, device), start=1):
        backward(model, batch)
        if i % accumulated == 0:
            opt.step()
            opt.zero_grad()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("options", [{}, {"interval": 2, "start": 1}], ids=["every step", "every second"])
def test_a_loop_that_knows_only_step_trains_as_one_by_hand(
    base: str, accumulated: int, options: dict[str, Any], backend: str, device: str
) -> None:
    model, twin = net(device), net(device)
    opt, other = (msam(m, base, backend=backend, **options) for m in (model, twin))
    fused_sam.ascend_on_forward(model, opt)
    unknowing(model, opt, 5, accumulated)
    by_hand(twin, other, 5, accumulated)
    assert_same_bits(model.state_dict().values(), twin.state_dict().values())
    assert_same_bits(state_tensors(opt), state_tensors(other))
    plain = net(device)
    unknowing(plain, BASES[base][0](plain.parameters(), **BASES[base][1]), 5, accumulated)
    assert not torch.equal(plain[0].weight, model[0].weight)


def evaluate(model: nn.Module, opt: FusedSAM) -> None:
    model.eval()
    model(batches(1)[0][0])
    model.train()


def without_gradients(model: nn.Module, opt: FusedSAM) -> None:
    with torch.no_grad():
        nn.Sequential(model).forward(batches(1)[0][0])


SEES_W: dict[str, Callable[[nn.Module, FusedSAM], Any]] = {
    "eval": evaluate,
    "no_grad": without_gradients,
    "state_dict": lambda model, opt: model.state_dict(),
    "state_dict of a part": lambda model, opt: model[3].state_dict(),
    "optimizer's state_dict": lambda model, opt: opt.state_dict(),
    "copy of the optimizer": lambda model, opt: copy.deepcopy(opt),
}


@pytest.mark.parametrize("look", SEES_W)
def test_evaluation_and_checkpoints_see_w(look: str, backend: str) -> None:
    """Also in the middle of a step, which goes on with the gradients that there are."""
    model, twin = net(), net()
    opt, other = msam(model, backend=backend), msam(twin, backend=backend)
    fused_sam.ascend_on_forward(model, opt)
    for m, o, train in ((model, opt, unknowing), (twin, other, by_hand)):
        m[1].momentum = 0.0  # the evaluation under no_grad is no part of the statistics
        train(m, o, 3)
    at_w = snapshot(model.parameters())
    first, second, third = batches(3)
    backward(model, first)
    assert opt.perturbed
    SEES_W[look](model, opt)
    assert not opt.perturbed
    assert_same_bits(model.parameters(), at_w)
    backward(model, second)
    assert opt.perturbed
    SEES_W[look](model, opt)
    opt.step()
    opt.zero_grad()
    other.zero_grad()
    other.first_step()
    backward(twin, first)
    backward(twin, second)
    other.step()
    other.zero_grad()
    assert_same_bits(model.parameters(), twin.parameters())
    backward(model, third)
    opt.load_state_dict(copy.deepcopy(other.state_dict()))
    assert_same_bits(model.parameters(), twin.parameters())


def test_a_scaler_and_torch_compile_change_nothing(backend: str) -> None:
    model, twin = net(), net()
    opt, other = msam(model, backend=backend), msam(twin, backend=backend)
    handle = fused_sam.ascend_on_forward(model, opt)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    compiled = torch.compile(model, backend="eager")
    for x, y in batches(4):
        scaler.scale(F.cross_entropy(compiled(x), y)).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
    by_hand(twin, other, 4)
    assert_same_bits(model.parameters(), twin.parameters())
    handle.remove()
    backward(model, batches(1)[0])
    with pytest.raises(RuntimeError, match="needs first_step"):
        opt.step()


def test_a_closure_makes_the_only_pass(backend: str) -> None:
    """Gradients of micro-batches before it stay, also where an evaluation has gone back to w."""
    model, twin = net(), net()
    opt, other = msam(model, backend=backend), msam(twin, backend=backend)
    fused_sam.ascend_on_forward(model, types.SimpleNamespace(optimizer=opt))  # in a wrapper
    for m, o, train in ((model, opt, unknowing), (twin, other, by_hand)):
        train(m, o, 2)
    first, second = batches(2)
    backward(model, first)
    evaluate(model, opt)
    opt.step(lambda: backward(model, second))
    other.zero_grad()
    other.first_step()
    backward(twin, first)
    backward(twin, second)
    other.step()
    assert_same_bits(model.parameters(), twin.parameters())


def test_a_checkpoint_loaded_in_the_middle_of_a_step_stays(backend: str) -> None:
    model = net()
    opt = msam(model, backend=backend)
    fused_sam.ascend_on_forward(model, opt)
    best = copy.deepcopy(model.state_dict())
    unknowing(model, opt, 3)
    backward(model, batches(1)[0])
    model.load_state_dict(best)
    evaluate(model, opt)
    assert_same_bits(model.parameters(), [best[name] for name, _ in model.named_parameters()])


def with_two_ranks(unknowing_loop: bool) -> list[Tensor]:
    model = net()
    model[1] = nn.Identity()
    parallel = DistributedDataParallel(model)
    opt = msam(model)
    data_parallel(parallel, opt)
    if unknowing_loop:
        fused_sam.ascend_on_forward(parallel, opt)
    for batch in batches(6)[dist.get_rank() :: 2]:
        if opt.perturb_next and not unknowing_loop:
            opt.first_step()
        backward(parallel, batch)
        opt.step()
        opt.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


def test_ranks_average_the_only_pass(pair: Ranks) -> None:
    for weights in pair.run(with_two_ranks, True):
        assert_same_bits(weights, pair.run(with_two_ranks, False)[0])


def test_a_copy_of_the_model_is_free_of_it() -> None:
    model = net()
    opt = msam(model)
    fused_sam.ascend_on_forward(model, opt)
    unknowing(model, opt, 2)
    free = copy.deepcopy(model)
    backward(free, batches(1)[0])
    assert not opt.perturbed


def test_a_model_that_is_not_called_is_warned_of() -> None:
    model = net()
    opt = msam(model)
    fused_sam.ascend_on_forward(nn.Sequential(model), opt)
    with pytest.warns(UserWarning, match="No training forward of the model") as caught:
        unknowing(model, opt, 3)
    assert len(caught) == 1
    with pytest.raises(ValueError, match="Invalid direction='gradient' with ascend_on_forward"):
        fused_sam.ascend_on_forward(model, FusedSAM(model.parameters()))


def test_a_real_trainer(tmp_path: Path) -> None:
    """transformers.Trainer as it is, with accumulation, evaluation and checkpoints between."""
    torchvision_ops.import_or_reason()
    transformers = pytest.importorskip("transformers")

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.net(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    rows = [{"x": x, "labels": y} for x, y in TensorDataset(*map(torch.cat, zip(*batches(4), strict=True)))]
    model, twin = Classifier(), Classifier()
    opt, other = msam(model), msam(twin)
    fused_sam.ascend_on_forward(model, opt)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        max_grad_norm=0.0,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0)
    transformers.Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows[:8], optimizers=(opt, schedule)
    ).train()
    for _ in range(2):
        for k in (0, 2):
            other.first_step()
            for x, y in batches(4)[k : k + 2]:
                (twin(x, y)["loss"] / 2).backward()
            other.step()
            other.zero_grad()
    assert_same_bits(model.parameters(), twin.parameters())
