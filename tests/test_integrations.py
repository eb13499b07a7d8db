"""`fused_sam.integrations`: a step in each trainer is what it is in a loop by hand, of the same micro-batches."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision_ops
from helpers import snapshot
from torch import Tensor, nn
from trainer_loops import (
    BATCH,
    BATCHES,
    EPOCHS,
    Case,
    FailureError,
    Net,
    by_hand,
    data,
    lightning_trainer,
    loader,
    sam,
    train,
    transformers_trainer,
)

from fused_sam import FusedSAM

TRAINERS = ["transformers", "lightning", "accelerate", "timm"]
every_trainer = pytest.mark.parametrize("trainer", TRAINERS)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning", "ignore::FutureWarning")


@pytest.fixture(scope="module", autouse=True)
def _torchvision() -> None:
    """Trainers import it where it is installed."""
    torchvision_ops.import_or_reason()


@pytest.fixture(autouse=True)
def _one_precision_for_each() -> Iterator[None]:
    """Accelerate keeps it for the process."""
    yield
    with contextlib.suppress(ImportError):
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


STEPS: dict[str, tuple[dict[str, Any], Case]] = {
    "one micro-batch": ({}, Case(1)),
    "three micro-batches": ({"adaptive": True, "eta": 0.01}, Case(3)),
    "Adam": ({"base_optimizer": torch.optim.AdamW, "lr": 0.03}, Case(2)),
    "interval": ({"interval": 2, "start": 1}, Case(2)),
    "momentum": ({"direction": "momentum"}, Case(3)),
    "momentum, interval": ({"direction": "momentum", "interval": 2}, Case(2)),
    "three ascents": ({"ascent_steps": 3}, Case(2)),
    "LookSAM": ({"looksam_alpha": 0.7, "interval": 2}, Case(2)),
    "clipped": ({}, Case(3, clip=0.2)),
    "clipped, interval": ({"interval": 2}, Case(2, clip=0.2)),
    "bf16": ({}, Case(2, precision="bf16")),
    "fp16": ({}, Case(2, precision="fp16")),
    "fp16, clipped": ({}, Case(3, clip=0.2, precision="fp16")),
    "fp16, overflows": ({}, Case(2, precision="fp16", scale=2.0**19)),
    "fp16, interval": ({"interval": 2}, Case(2, precision="fp16")),
    "fp16, momentum": ({"direction": "momentum"}, Case(2, clip=0.2, precision="fp16")),
}


@every_trainer
@pytest.mark.parametrize("step", STEPS)
def test_a_step_is_that_of_a_loop_by_hand(trainer: str, step: str, tmp_path: Path) -> None:
    options, case = STEPS[step]
    if trainer == "lightning" and case.precision == "fp16":  # it clips no gradients that its optimizer unscales
        options, case = {**options, "max_grad_norm": case.clip}, case._replace(clip=None)
    net, twin = Net(), Net()
    seen = train(trainer, net, sam(net, **options), case._replace(folder=tmp_path))
    weights = by_hand(twin, sam(twin, **options), case, actual=trainer == "transformers")
    # timm's loop makes a forward at w whatever the direction.
    of_passes = net.losses[1::2] if trainer == "timm" and "direction" in options else net.losses
    assert of_passes == twin.losses
    assert snapshot(net.parameters()) == weights[-1] != weights[0]
    if step == "three micro-batches":
        at_w = [loss for start in (0, 6, 10, 16) for loss in net.losses[start : start + (3 if start in (0, 10) else 2)]]
        assert seen == pytest.approx(at_w, rel=1e-6)  # divided and multiplied by three


@every_trainer
@pytest.mark.parametrize("direction", ["gradient", "momentum"])
def test_an_exception_in_any_pass_leaves_the_weights_at_w(trainer: str, direction: str, tmp_path: Path) -> None:
    case, forwards = Case(2, folder=tmp_path), 4 if direction == "gradient" or trainer == "timm" else 2
    twin = Net()
    weights = by_hand(twin, sam(twin, direction=direction), case, actual=trainer == "transformers")
    for forward in range(forwards):
        net = Net(fail_at=forwards + forward + 1)
        opt = sam(net, direction=direction)
        with pytest.raises(FailureError):
            train(trainer, net, opt, case)
        assert not opt.perturbed
        assert snapshot(net.parameters()) == weights[1]
        assert trainer == "timm" or all(p.grad is None for p in net.parameters())  # a forward of the loop's own


@pytest.mark.parametrize("trainer", ["transformers", "lightning", "accelerate"])
def test_dropout_is_the_same_in_both_passes(trainer: str, tmp_path: Path) -> None:
    for replay_rng in (True, False):
        net = Net(dropout=0.5)
        train(trainer, net, sam(net, rho=0.0, replay_rng=replay_rng), Case(3, folder=tmp_path))
        assert (net.losses[:3] == net.losses[3:6]) == replay_rng
        assert (net.losses[6:8] == net.losses[8:10]) == replay_rng


@every_trainer
def test_another_optimizer_is_refused(trainer: str, tmp_path: Path) -> None:
    net = Net()
    with pytest.raises(TypeError, match=r"^Invalid optimizer of class \w+\. Must be a FusedSAM\.$"):
        train(trainer, net, torch.optim.SGD(net.parameters(), lr=0.1), Case(folder=tmp_path))


class TestTransformers:
    def test_the_loss_of_all_tokens_of_a_step(self, tmp_path: Path) -> None:
        """`num_items_in_batch` is that of the step in both passes; the optimizer is made by the Trainer."""
        pytest.importorskip("transformers")
        counts: list[int] = []

        class Logits(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = Net()

            def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
                return {"logits": self.net.body(x)}

        def loss_of(outputs: dict[str, Tensor], labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
            counts.append(int(num_items_in_batch))
            return F.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch

        made = FusedSAM, {"lr": 0.13, "momentum": 0.8, "rho": 0.07}
        model = Logits()
        trainer = transformers_trainer(
            model, Case(2, folder=tmp_path), optimizer_cls_and_kwargs=made, compute_loss_func=loss_of
        )
        trainer.train()
        assert counts == ([2 * BATCH] * 8 + [BATCH] * 2) * EPOCHS
        twin = Net()
        by_hand(twin, sam(twin, weight_decay=0.0), Case(2), actual=True)
        for p, q in zip(model.parameters(), twin.parameters()):
            torch.testing.assert_close(p, q)  # sums are divided once, and not means twice

    @pytest.mark.parametrize("direction", ["gradient", "momentum"])
    def test_whatever_ends_training_leaves_the_weights_at_w(self, direction: str, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        case, twin = Case(2, folder=tmp_path), Net()
        weights = by_hand(twin, sam(twin, direction=direction), case, actual=True)

        class Ends(transformers.TrainerCallback):
            def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                control.should_training_stop = state.global_step == 1

        class Fails(transformers.TrainerCallback):
            def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == 1:
                    raise FailureError

        for callback in (Ends, Fails):
            net = Net()
            opt = sam(net, direction=direction)
            constant = torch.optim.lr_scheduler.ConstantLR(opt, 1.0)
            trainer = transformers_trainer(net, case, optimizers=(opt, constant), callbacks=[callback()])
            with contextlib.suppress(FailureError):
                trainer.train()
            assert trainer.state.global_step == 1
            assert snapshot(net.parameters()) == weights[1]
            assert not opt.perturbed
        trainer.remove_callback(Fails)
        net.losses.clear()
        trainer.train()
        assert len(net.losses) == BATCHES * EPOCHS * (2 if direction == "gradient" else 1)


class TestLightning:
    def fit(self, case: Case, hooks: dict[str, Any], opt_options: dict[str, Any], **options: Any) -> Any:
        """Return the module after training; ``hooks`` are its methods."""
        lightning = pytest.importorskip("pytorch_lightning")
        from fused_sam.integrations.lightning import SAMModule

        class Module(SAMModule, lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.net = Net()
                self.opt = sam(self.net, **opt_options)

            def training_step(self, batch: list[Tensor], index: int) -> Tensor:
                return self.net(*batch)["loss"]

            def configure_optimizers(self) -> FusedSAM:
                return self.opt

        module = type("Mine", (Module,), hooks)()
        lightning_trainer(case, **options).fit(module, loader(), loader() if "validation_step" in hooks else None)
        return module

    @pytest.mark.parametrize("direction", ["gradient", "momentum"])
    def test_between_micro_batches_the_weights_are_at_w(self, direction: str) -> None:
        """Also for a validation that calls training_step, which keeps no batches for a step."""

        def validation_step(self: Any, batch: list[Tensor], index: int) -> None:
            assert not self.opt.perturbed
            self.training_step(batch, index)
            assert not self.opt.perturbed

        options = {"direction": direction}
        module = self.fit(Case(3), {"validation_step": validation_step}, options, val_check_interval=1)
        twin = Net()
        assert snapshot(module.net.parameters()) == by_hand(twin, sam(twin, **options), Case(3))[-1]

    def test_a_training_step_of_a_subclass_may_call_that_of_its_base_and_return_none(self) -> None:
        def training_step(self: Any, batch: list[Tensor], index: int) -> dict[str, Any] | None:
            return None if index % 2 else {"loss": super(type(self), self).training_step(batch, index), "index": index}

        module = self.fit(Case(2), {"training_step": training_step}, {})
        assert len(module.net.losses) == 2 * 3 * EPOCHS
        assert not module.opt.perturbed

    @pytest.mark.filterwarnings("ignore:No parameter has a gradient")
    @pytest.mark.parametrize("precision", ["fp32", "fp16"])
    def test_steps_without_a_loss_change_nothing(self, precision: str) -> None:
        module = self.fit(Case(2, precision=precision), {"training_step": lambda self, batch, index: None}, {})
        assert not module.opt.perturbed
        assert snapshot(module.parameters()) == snapshot(Net().parameters())

    def test_an_epoch_that_is_left_within_a_step_leaves_nothing_to_the_next(self) -> None:
        """`training_step` is decorated, and takes no index: Lightning sees that through our wrapper."""

        def decorated(step: Callable[..., Any]) -> Callable[..., Any]:
            return functools.wraps(step)(lambda *args: step(*args))

        @decorated
        def training_step(self: Any, batch: list[Tensor]) -> Tensor:
            return self.net(*batch)["loss"]

        def on_train_batch_start(self: Any, batch: Any, index: int) -> int | None:
            super(type(self), self).on_train_batch_start(batch, index)
            return -1 if index == 3 else None

        module = self.fit(Case(2), {"training_step": training_step, "on_train_batch_start": on_train_batch_start}, {})
        assert len(module.net.losses) == (4 + 1) * EPOCHS

    def test_a_copy_of_the_module_within_a_step_is_free_of_it(self) -> None:
        copies = []

        def keep_a_copy(self: Any) -> None:
            opt, self.opt = self.opt, None  # the test's own
            copies.append(copy.deepcopy(self))
            self.opt = opt

        def on_train_batch_start(self: Any, batch: list[Tensor], index: int) -> None:
            super(type(self), self).on_train_batch_start(batch, index)
            keep_a_copy(self)

        def on_before_optimizer_step(self: Any, optimizer: Any) -> None:
            assert optimizer.perturbed
            keep_a_copy(self)

        hooks = {"on_train_batch_start": on_train_batch_start, "on_before_optimizer_step": on_before_optimizer_step}
        module = self.fit(Case(2), hooks, {})
        assert snapshot(module.net.parameters()) == by_hand(twin := Net(), sam(twin), Case(2))[-1]
        batch = next(iter(loader()))
        for copied in copies:
            assert copied.training_step(batch, 0).requires_grad
            assert snapshot(module.net.parameters()) != snapshot(copied.net.parameters())

    def test_manual_optimization_is_left_alone(self) -> None:
        def training_step(self: Any, batch: list[Tensor], index: int) -> None:
            self.automatic_optimization = False
            self.optimizers().step(closure=lambda: self.manual_backward(self.net(*batch)["loss"]))

        def on_fit_start(self: Any) -> None:
            self.automatic_optimization = False

        module = self.fit(Case(1), {"training_step": training_step, "on_fit_start": on_fit_start}, {})
        twin = Net()
        assert snapshot(module.net.parameters()) == by_hand(twin, sam(twin), Case(1))[-1]

    def test_what_cannot_be_run_twice_is_refused(self) -> None:
        def training_step(self: Any, dataloader_iter: Any) -> None: ...

        def on_train_batch_start(self: Any, batch: Any, index: int) -> None: ...

        with pytest.raises(TypeError, match=r"^Invalid training_step\(dataloader_iter\)"):
            self.fit(Case(2), {"training_step": training_step}, {})
        with pytest.raises(RuntimeError, match=r"must call super\(\)\.$"):
            self.fit(Case(2), {"on_train_batch_start": on_train_batch_start}, {})


def test_accelerate_goes_on_after_an_exception_with_a_whole_step() -> None:
    accelerate = pytest.importorskip("accelerate")
    from fused_sam.integrations.accelerate import SAMStep

    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    net, twin, batches = Net(fail_at=3), Net(), list(loader())
    model, optimizer = accelerator.prepare(net, sam(net))
    with pytest.raises(TypeError, match=r"^Invalid optimizer of class FusedSAM\. Must be what accelerator"):
        SAMStep(accelerator, model, optimizer.optimizer, lambda model, batch: model(*batch)["loss"])
    step = SAMStep(accelerator, model, optimizer, lambda model, batch: model(*batch)["loss"])
    step(batches[3])
    with pytest.raises(FailureError):
        step(batches[4])
    for batch in batches[:2]:
        step(batch)
    assert snapshot(net.parameters()) == by_hand(twin, sam(twin), Case(2))[1]
    net(*batches[0])["loss"].backward()
    optimizer.optimizer.first_step()
    with pytest.raises(RuntimeError, match=r"^A micro-batch while the weights are perturbed\."):
        step(batches[0])


class TestTimm:
    def scaler(self) -> Any:
        pytest.importorskip("timm")
        from fused_sam.integrations.timm import SAMScaler

        return SAMScaler("cpu", enabled=False)

    def test_a_forward_of_another_batch_is_refused(self) -> None:
        net = Net()
        opt, scaler, old = sam(net), self.scaler(), snapshot(net.parameters())

        def epoch() -> None:
            for number, (x, y) in enumerate(loader(), start=1):

                def forward() -> Tensor:
                    return net(x, y)["loss"]  # noqa: B023 that is the mistake

                scaler(forward(), opt, need_update=number == 2, forward=forward)

        with pytest.raises(RuntimeError, match=r"^forward reads 'x', which has changed since"):
            epoch()
        assert snapshot(net.parameters()) == old

    def test_gradients_that_the_loop_drops_take_no_part(self) -> None:
        net, twin = Net(), Net()
        opt, scaler = sam(net), self.scaler()
        for number, (x, y) in zip((0, 1, 2), [data()[8:16], *loader()]):
            forward = functools.partial(lambda x, y: net(x, y)["loss"] / 2, x, y)
            scaler(forward(), opt, need_update=number == 2, forward=forward)
            if number == 0:
                opt.zero_grad()
        assert snapshot(net.parameters()) == by_hand(twin, sam(twin), Case(2))[1]

    def test_arguments_that_do_not_go_with_sam_are_refused(self) -> None:
        net = Net()
        scaler, loss = self.scaler(), net(*data()[:8])["loss"]
        for options, arguments, message in [
            ({}, {"create_graph": True}, "create_graph=True"),
            ({}, {"clip_grad": 0.2}, "parameters=None with clip_grad=0.2"),
            ({"replay_rng": True}, {}, "replay_rng=True"),
        ]:
            with pytest.raises(ValueError, match=f"^Invalid {message}"):
                scaler(loss, sam(net, **options), **arguments, forward=lambda: loss)
