"""One SAM step as a state machine: at w, ascend, at w + e, descend, at w."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import profiler
from torch.compiler import is_compiling

from fused_sam import dtensor, mistakes, ops, report, schedules
from fused_sam.ascent import Displacement, Perturbation
from fused_sam.backends.interface import InvalidTensor, Journal
from fused_sam.descent import Base, clipping, looksam
from fused_sam.ops import labels
from fused_sam.ops.lists import clear_grads
from fused_sam.options import Options, require_unscaled
from fused_sam.parameters import Parameters
from fused_sam.peers import Peers, SingleProcess
from fused_sam.report import Report

F = TypeVar("F", bound=Callable[..., Any])


_set_grad_enabled: Callable[[bool], None] = torch._C._set_grad_enabled  # torch's own is a class, and twice as slow
# Returns a false value unless torch.compile looks into the calls of this thread.
_compiles_calls: Callable[[], Any] = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: True)


def untraced(function: F, recorded: bool = False) -> F:
    """Return the function so that torch.compile does not look into it, nor autograd, unless it may be ``recorded``.

    A training step may be compiled as a whole; a graph ends where this is called. Traced, every line that reads tensors
    in C++ or changes what the step remembers would end a graph, with a warning, and every new learning rate would
    compile all anew. `torch.compiler.disable` is the same, but imports the compiler at once, which takes seconds;
    torch's own waits for the first call, as its optimizers do. It takes a tenth of a small step, as the decorator
    `torch.no_grad` does, and both are left out where nothing is compiled.
    """
    disable = getattr(torch, "_disable_dynamo", torch.compiler.disable)  # the former is torch's own, and may go
    disabled = disable(torch.no_grad()(function))

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if is_compiling() or _compiles_calls():  # the former where this is traced itself
            return disabled(*args, **kwargs)
        if recorded or not is_grad_enabled():
            return function(*args, **kwargs)
        _set_grad_enabled(False)
        try:
            return function(*args, **kwargs)
        finally:
            _set_grad_enabled(True)

    return cast(F, guarded)


def announced(step: Callable[..., Any]) -> Any:
    """Return a subclass's ``step`` so that a ``second_step`` within it knows: it would call that ``step`` again."""

    @functools.wraps(step)
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = self._step
        state.within += 1
        try:
            return step(self, *args, **kwargs)
        finally:
            state.within -= 1

    counted.announced = True  # type: ignore[attr-defined]
    counted.hooked = False  # type: ignore[attr-defined] # it may have come along from our own: torch is to wrap this one
    return counted


class Step:
    """The steps of an optimizer, of which there is one at a time. All who share the optimizer share this.

    Attributes:
        parameters: what is stepped.
        options: those of `FusedSAM`.
        perturbation: the way to w + e.
        base: the step at w.
        peers: what other processes have to do with it.
        displacement: how far the weights are from w; None at w.
        last: what the last step saw.
        once: the warnings that have been given.
        cleared: whether zero_grad was called since the last step: no step has seen the gradients that there are.
        unscaled: whether the weights were perturbed when a GradScaler unscaled gradients, since the last step.
        within: how many calls of a subclass's ``step`` are running.
        forwards: how many forwards of the model have moved the weights since the last step; None where ``first_step``
            is to be called (`fused_sam.integrations.forward`).
    """

    def __init__(
        self, parameters: Parameters, options: Options, perturbation: Perturbation, base: Base, peers: Peers
    ) -> None:
        self.parameters = parameters
        self.options = options
        self.perturbation = perturbation
        self.base = base
        self.peers = peers
        self.schedule = schedules.Schedule(options.interval, options.start, options.stop)
        self.always = self.schedule == schedules.Schedule()
        self.displacement: Displacement | None = None
        self.last = Report()
        self.cleared = False
        self.once = mistakes.Once()
        self.within = 0
        self.forwards: int | None = None
        self.unscaled: set[bool] = set()
        self._journal: Journal = []  # of a step at w

    def __getstate__(self) -> dict[str, Any]:
        fresh: dict[str, Any] = {"displacement": None, "last": Report(), "within": 0, "unscaled": set(), "_journal": []}
        return {**self.__dict__, **fresh, "forwards": None, "peers": self.peers.copied()}

    @property
    def is_ascent_due(self) -> bool:
        """Return whether `ascend` comes next."""
        if self.displacement is not None:
            return self.displacement.ascents < self.perturbation.ascents
        return self.always or self.schedule.due(self.parameters.groups)

    @property
    def is_gradient_due(self) -> bool:
        """Return whether the next backward is one for an ascent. Along the momentum there is none."""
        return self.perturbation.takes_gradient and self.is_ascent_due

    @untraced
    def ascend(self, take_grads: bool) -> None:
        """Go from w to w + e, or make the next step of an ascent of several.

        With ``take_grads`` the gradients become None, and their memory may hold w.
        """
        if not self.is_ascent_due:
            raise self._not_due()
        parameters, displacement = self.parameters, self.displacement
        self.cleared = False
        try:
            if displacement is None:
                parameters.begin(self.options.capturable)
                displacement = Displacement()
                self.displacement = displacement
            if self.perturbation.takes_gradient:
                self.peers.average_first(parameters)
            if profiler._is_profiler_enabled:
                with labels.ascent(self.peers) as peers:
                    self.perturbation.displace(parameters, displacement, peers, take_grads)
            else:
                self.perturbation.displace(parameters, displacement, self.peers, take_grads)
            torch.clear_autocast_cache()  # copies of w in 16 bits: the second pass may be in the block of the first
            if displacement.first is None and self.perturbation.takes_gradient:
                self.once.warn(mistakes.NO_FIRST)
        except BaseException as error:
            # A warning may be an error, too.
            if displacement is not None and (displacement.ascents == 0 or displacement.first is None):
                self.return_to_w()
            if isinstance(error, InvalidTensor):
                raise parameters.named(error) from None
            raise

    @untraced
    def descend(
        self,
        grad_scale: Tensor | None = None,
        found_inf: Any = None,
        seen: Report | None = None,
        plain: bool = False,
    ) -> None:
        """Make the base step at w with the gradients there are, after a restore where the weights are perturbed.

        ``grad_scale`` and ``found_inf`` are a GradScaler's. ``seen`` is the report of the passes; None: made here.
        ``plain``: without an ascent before it, and without LookSAM's part.
        """
        displacement = self.displacement
        at_w_or_on_the_way = displacement is None or displacement.ascents < self.perturbation.ascents
        if at_w_or_on_the_way and not plain and self.is_ascent_due:
            if self.forwards is None:
                self._make_state()
                return
            if self.forwards == 0:
                self.once.warn(mistakes.NO_FORWARD)
        parameters, options, peers = self.parameters, self.options, self.peers
        journal = self._journal if displacement is None else displacement.journal
        if displacement is None:
            parameters.begin(options.capturable)
        try:
            peers.average_second(parameters)
            if displacement is not None:
                self._look_at_second(displacement, found_inf is not None and grad_scale is None)
            if found_inf is not None:
                found_inf = self._overflow(found_inf)
            seen = self.make_report() if seen is None else seen
            if options.looksam_alpha is not None and not plain:
                self._reuse(options.looksam_alpha, found_inf, journal)
            if options.max_grad_norm is not None or options.telemetry:
                norm = peers.grad_norm(parameters)
                seen = seen._replace(second_grad_norm=norm)
                if options.max_grad_norm is not None:
                    grad_scale = clipping.grad_scale(norm, options.max_grad_norm, grad_scale)
            if schedules.STEP in parameters.groups[0]:
                schedules.count(parameters.groups, journal)
            with peers.stage(parameters, journal) as (mine, moves):
                update = labels.update(self.base.update) if profiler._is_profiler_enabled else self.base.update
                update(mine, moves, grad_scale, found_inf)
        except InvalidTensor as error:
            raise parameters.named(error) from None
        finally:
            self.unscaled.clear()
            self.return_to_w()
        if displacement is None and parameters.masters is not None:
            parameters.note_masters()
        self.last = seen
        self.cleared = False
        if self.forwards:
            self.forwards = 0
        peers.finish(parameters)

    def return_to_w(self) -> None:
        """Undo what a step has begun, bit for bit; nothing where one has been made."""
        self.peers.reset()
        if self._journal:
            ops.roll_back(self._journal)
        torch.clear_autocast_cache()
        displacement = self.displacement
        if displacement is None:
            return
        if displacement.journal:
            ops.roll_back(displacement.journal)
        if displacement.first is not None and displacement.first.hook is not None:
            displacement.first.forget()
        self.displacement = None
        if self.parameters.masters is not None:
            self.parameters.note_masters()

    restore = untraced(return_to_w)

    def _clear_gradients(self) -> None:
        """Set all gradients to None."""
        for group in self.parameters.groups:
            clear_grads(group["params"])
        self.peers.cleared()
        self.cleared = True

    clear_gradients = untraced(_clear_gradients, recorded=True)  # it computes nothing

    def make_report(self, loss: Any = None, loss_perturbed: Any = None) -> Report:
        """Return what is known once both gradients have been taken, and before the base step."""
        displacement = self.displacement
        if displacement is None:
            return Report(loss=None if loss is None else report.reported(loss))
        norm, probe, radius, cosine = None, displacement.probe, None, None
        if displacement.norms:
            norm = displacement.norms[-1]
            norm = norm[0] if norm.dim() > 0 else norm  # for p = 1 it says where, too
        if loss is not None:
            loss = report.reported(loss)
        if loss_perturbed is not None:
            loss_perturbed = report.reported(loss_perturbed)
        if probe is not None:
            radius, cosine = probe.radius, probe.cosine(self.parameters.tensors())
        return Report(norm, loss, loss_perturbed, None, radius, cosine)

    def add_parameters(self, params: list[Tensor]) -> None:
        """Tell the other processes of new parameters.

        Raises:
            ValueError: for parameters that these peers do not know how to step, or with options that do not go with
                them.
        """
        peers = self.peers
        if isinstance(peers, SingleProcess) and any(map(dtensor.is_sharded, params)):
            peers = dtensor.Shards()
        peers.add_parameters(params)
        peers.require_supported(self.options)
        if peers is not self.peers:
            self.peers, self.parameters.local = peers, dtensor.local_parts

    def require_unperturbed(self, what: str) -> None:
        """Refuse what would see the weights at w + e; go back to w where the next forward moves them again."""
        if self.forwards is not None:
            self.return_to_w()
        if self.displacement is not None:
            raise RuntimeError(f"{what} while the weights are perturbed. Call step() or restore() first.")

    def _not_due(self) -> RuntimeError:
        if self.displacement is not None:
            return RuntimeError(
                "first_step() twice: the weights are perturbed already. Call step() or restore() first."
            )
        return RuntimeError(
            f"first_step() in a step that is not perturbed ({self.schedule}): call step() with the gradient there is. "
            "perturb_next tells these steps."
        )

    def _make_state(self) -> None:
        """Make state to load into, without an ascent: torch.distributed.checkpoint steps with lr 0 before the first.

        Raises:
            RuntimeError: in any other step.
        """
        parameters = self.parameters
        rates = [ops.host_number(group.get("lr", 1.0)) for group in parameters.groups]
        if self.displacement or parameters.state or not all(isinstance(lr, float) and lr == 0.0 for lr in rates):
            raise RuntimeError("step() needs first_step() before it, or a closure: SAM takes two gradients per step.")
        parameters.refresh_masters()
        try:
            with self.peers.stage(parameters, self._journal) as (mine, moves):
                self.base.update(mine, moves, None, None)
        finally:
            self.return_to_w()
        parameters.note_masters()

    def _look_at_second(self, displacement: Displacement, is_unscaled: bool) -> None:
        """Refuse or warn of mistakes in the second gradients, which a GradScaler says it has unscaled."""
        if is_unscaled:
            mistakes.require_unscaled_second(self.unscaled)
        mistake = mistakes.look_at_second(displacement.first, self.parameters.groups)
        if mistake is not None:
            self.once.warn(mistake)

    def _overflow(self, found_inf: Any) -> Tensor | None:
        """Return a GradScaler's flag, nonzero too where a gradient of the ascent was not finite on any rank."""
        displacement = self.displacement
        # The scaler sets a plain 0 where there is no gradient to look at.
        flag = found_inf if isinstance(found_inf, Tensor) else None
        of_ascent = None if displacement is None else displacement.overflow()
        if flag is None or of_ascent is None:
            flag = of_ascent if flag is None else flag
        else:
            flag = torch.maximum(flag, of_ascent.to(flag))
        flag = self.peers.any_overflow(flag, self.parameters)
        if displacement is not None:
            require_unscaled(self.parameters.groups)
        return flag

    def _reuse(self, alpha: float, found_inf: Tensor | None, journal: Journal) -> None:
        """Keep a part of this gradient for LookSAM, or add the kept part to it."""
        if self.displacement is not None:
            assert self.displacement.grads is not None
            looksam.keep(self.parameters, self.displacement.grads, found_inf, journal)
        elif not self.schedule.is_over(self.parameters.groups):
            looksam.apply(self.parameters, alpha)
