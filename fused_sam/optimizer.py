"""FusedSAM: the torch.optim contract and the two-pass state machine. The arithmetic is in `fused_sam.ops`."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from fused_sam import (
    ascents,
    backends,
    bases,
    closures,
    descents,
    masters,
    ops,
    param_groups,
    schedule,
)
from fused_sam.backends import memory
from fused_sam.distributed import shards
from fused_sam.distributed.alone import Alone
from fused_sam.distributed.peers import Peers
from fused_sam.dynamo import untraced
from fused_sam.ops import lists
from fused_sam.options import positive_or_none
from fused_sam.telemetry import Report


class FusedSAM(Optimizer):
    r"""Sharpness-Aware Minimization (Foret et al., ICLR 2021) around a base optimizer.

    A step evaluates the gradient twice: :math:`g = \nabla L(w)`, then at the perturbed weights,

    .. math::
        \epsilon = \rho \, T \, \mathrm{sign}(x) \left(\frac{|x|}{\lVert x \rVert_q}\right)^{q-1}, \quad
        x = T g, \quad \frac1p + \frac1q = 1, \qquad
        w \leftarrow \mathrm{base\_step}\big(w, \nabla L(w + \epsilon)\big),

    which is :math:`\rho \, T^2 g / \lVert T g \rVert_2` for p = 2 (eq. 2 of the paper). :math:`T = 1`, or
    :math:`T = |w| + \eta` elementwise with ``adaptive`` (ASAM, Kwon et al. 2021). The norm is one number over all
    parameter groups; the displacement of group k is scaled by its own ``rho``, so groups with ``rho=0`` are not
    perturbed but count in the norm. Groups with ``perturb=False`` do neither, and cost nothing in the ascent. In groups
    with ``maximize`` e is the opposite: the worst point of an objective to be maximised is where it is least.

    Drop-in for the two-call class that is in common use, and for :class:`torch.optim.SGD`::

        optimizer = FusedSAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)

        loss_fn(model(x), y).backward()
        optimizer.first_step(zero_grad=True)      # w -> w + e
        loss_fn(model(x), y).backward()
        optimizer.step()                          # back to w, then SGD with the gradient taken at w + e

    Args:
        params: parameters, named parameters, or dicts of parameter groups, which may set ``rho``, ``adaptive``,
            ``eta``, ``perturb`` and ``decay_in_ascent``.
        base_optimizer: class of the base optimizer. ``torch.optim.SGD``, ``Adam`` and ``AdamW`` run fused with the
            restore, any other class runs its own ``step``.
        rho: radius of the perturbation, >= 0. With 0 a step is the base optimizer's, bit for bit.
        adaptive: elementwise scale-invariant perturbation; ``"weights"`` leaves tensors of fewer than two dimensions,
            biases and the scales of normalisation layers, at T = 1.
        p: 1 <= p <= inf, of the p-norm in which the perturbation has length rho. With inf no norm is taken, and an
            element whose gradient is NaN stays; with 1 the largest element of T g alone moves, of equal ones the first.
        eta: added to ``|w|`` in adaptive groups, >= 0.
        backend: ``"native"``, ``"triton"`` or ``"eager"``; None takes ``FUSED_SAM_BACKEND`` from the environment, else
            the best.
        replay_rng: in the closure form, start both passes from the same random state (same dropout masks).
        capturable: allow steps to be captured in a CUDA graph, after at least one step outside of it. Of ``rho`` and
            ``lr``, tensors on the device are read at every replay and numbers are captured as they are. Also given to
            base optimizers that have such an option.
        max_grad_norm: clip the gradient that the base step gets to this 2-norm over all parameters, > 0, as
            `torch.nn.utils.clip_grad_norm_` does, on the device and without a pass of its own over the gradients
            (Pascanu et al. 2013). None does not clip.
        interval: perturb every ``interval``-th step only, >= 1; the others are steps of the base optimizer, with one
            gradient. ``perturb_next`` says which comes.
        start: the first step to be perturbed, counted from 0.
        stop: the step from which on none is perturbed; None for never.
        direction: ``"gradient"``, or ``"momentum"``: e = -rho m / ||m||_2 along the momentum m of the base optimizer,
            towards where it is about to go (MSAM, Becker et al. 2024). A step then takes one gradient, at w + e:
            ``first_step()``, backward, ``step()``, or a closure, which is called once. Needs p = 2.
        ascent_steps: steps of projected gradient ascent that make e, >= 1 (appendix C.6), each with a gradient of its
            own: a closure is called ``ascent_steps`` + 1 times, and ``first_step`` is due as often as ``perturb_next``
            says. From the second on they run in torch operations.
        second_order: take the gradient of L(w + e(w)) whole, with the term that SAM drops (appendix C.4). For study, in
            the closure form, with a closure that calls ``loss.backward(create_graph=True)``.
        reuse: LookSAM's alpha, > 0 (Liu et al. 2022): the steps between the perturbed ones, of which ``interval`` must
            leave some, go by g + alpha ||g|| / ||g_v|| g_v, where g_v is the part of the last SAM gradient that is
            orthogonal to g. None does not.
        decay_in_ascent: take the gradient of the loss plus ``weight_decay`` / 2 ||w||^2 for the ascent too, as the
            paper's own code does: g + weight_decay * w, with the group's ``weight_decay``; g - weight_decay * w in
            groups with ``maximize``. Not for decay that is decoupled from the loss (AdamW).
        master_weights: keep w of fp16 and bf16 parameters in fp32 (``"master"`` in their state), and all other state of
            theirs in fp32. The parameters are w or w + e, rounded. For SGD, Adam and AdamW.
        telemetry: measure what ``last`` does not hold otherwise. For debugging: it copies w and the first gradient.
        **base_options: arguments of the base optimizer (``lr``, ``momentum``, ...).

    Raises:
        TypeError: if ``base_optimizer`` is not a class of optimizer, or does not know one of the options.
        ValueError: for a hyperparameter out of range, or parameters that overlap in memory.
        RuntimeError: if the backend asked for cannot be used.
    """

    # torch.amp.GradScaler then always calls step(), with grad_scale and found_inf set on the optimizer. It must: were
    # the call skipped on overflow, the weights would stay at w + e.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        base_optimizer: type[Optimizer] = SGD,
        rho: float = 0.05,
        adaptive: bool | str = False,
        *,
        p: float = 2.0,
        eta: float = 0.0,
        backend: str | None = None,
        replay_rng: bool = False,
        capturable: bool = False,
        max_grad_norm: float | None = None,
        interval: int = 1,
        start: int = 0,
        stop: int | None = None,
        direction: str = "gradient",
        ascent_steps: int = 1,
        second_order: bool = False,
        reuse: float | None = None,
        decay_in_ascent: bool = False,
        master_weights: bool = False,
        telemetry: bool = False,
        **base_options: Any,
    ) -> None:
        if not (isinstance(base_optimizer, type) and issubclass(base_optimizer, Optimizer)):
            raise TypeError(f"Invalid {base_optimizer=}. Must be a subclass of torch.optim.Optimizer.")
        ascent = {"rho": rho, "adaptive": adaptive, "eta": eta, "perturb": True, "decay_in_ascent": decay_in_ascent}
        param_groups.check_ascent(ascent)
        ops.dual_exponent(p)
        self.p = float(p)
        self._backend = backends.requested(backend)
        self.replay_rng = replay_rng
        self.capturable = capturable
        self.max_grad_norm = positive_or_none("max_grad_norm", max_grad_norm)
        self._schedule = schedule.Schedule(interval, start, stop)
        if capturable and not self._schedule.always:
            raise ValueError(f"Invalid {capturable=} with {interval=}, {start=}, {stop=}. A graph replays one step.")
        self.second_order = second_order
        self.reuse = positive_or_none("reuse", reuse)
        if not isinstance(telemetry, bool):
            raise ValueError(f"Invalid {telemetry=}. Must be True or False.")
        self.telemetry = telemetry
        #: What the last step saw, a `fused_sam.telemetry.Report` of tensors on the device.
        self.last = Report()
        if capturable and "capturable" in inspect.signature(base_optimizer).parameters:
            base_options["capturable"] = True
        self._ascent: ascents.Displacement | None = None
        self._journal: ops.Journal = []  # of a step at w
        self._peers: Peers = Alone()
        self._cleared = False  # by zero_grad, since the last step: what gradients there are then no step has seen
        self._warned = False
        # The base checks its own options and arranges its own groups, whatever their form; we adopt both.
        inner = base_optimizer(params, **base_options)
        self._base = bases.make_base(inner)
        self._along = ascents.make_ascent(
            inner, direction, ascent_steps, second_order, self.reuse, self.p, interval, decay_in_ascent
        )
        if second_order and master_weights:
            raise ValueError(f"Invalid {second_order=} with {master_weights=}. Autograd sees the rounded weights only.")
        self._masters = bases.make_masters(self._base, master_weights)
        super().__init__(inner.param_groups, {**inner.defaults, **ascent})
        if not self._schedule.always:
            self.param_groups[0].setdefault(schedule.KEY, 0)

    @property
    def perturbed(self) -> bool:
        """Whether the weights are at w + e: between ``first_step`` and ``step``, ``second_step`` or ``restore``."""
        return self._ascent is not None

    @property
    def perturb_next(self) -> bool:
        """Whether ``first_step`` is due: with ``interval``, ``start`` or ``stop`` some steps go without, else none.

        Where it is False a step takes one gradient: backward, then ``step()``, which calls a closure once.
        """
        if self._ascent is not None:
            return self._ascent.steps < self._along.steps
        return self._schedule.due(self.param_groups)

    @property
    def direction(self) -> str:
        """``"gradient"`` or ``"momentum"``: what the perturbation follows."""
        return self._along.direction

    @property
    def backend(self) -> str | None:
        """The backend that was asked for; None: the best for each device."""
        return self._backend

    @torch.no_grad()
    def step(self, closure: closures.Closures | None = None, *, ascent: closures.Closures | None = None) -> Any:
        r"""With a closure, a whole SAM step; without, the second half of one that ``first_step`` began.

        The closure runs forward and backward and returns the loss. It is called at w and again at w + e, with gradients
        zeroed before each call; once only, at w, in a step that is not perturbed (``interval``). An exception in it,
        KeyboardInterrupt included, leaves the weights at w.

        A list of k closures, each for m examples of its own, makes one step of m-sharpness (section 4.1 of the paper:
        smaller m generalises better). Every closure is called at w and at a perturbation of its own, and the base step
        takes the mean of the second gradients, which is in ``p.grad`` then:

        .. math:: g = \frac{1}{k} \sum_i \nabla L_i(w + \epsilon_i), \qquad
            \epsilon_i = \rho \, \nabla L_i(w) / \lVert \nabla L_i(w) \rVert_2.

        A gradient that is None for some closures counts as zero there. The mean takes one more gradient-sized buffer.

        ``ascent`` is called at w instead of the closure, and may be for a part of the examples only: with a quarter of
        them a step costs about as much as 1.25 steps of SGD. With a list of closures it is a list as long.

        Returns:
            The loss at w, of ``ascent`` where there is one; None without a closure. With a list, the mean of the
            losses, detached; the list of what the closures returned if that is not tensors of one element, or numbers.
            With ``direction="momentum"``, which evaluates no loss at w, the loss at w + e.

        Raises:
            RuntimeError: without a closure, if there was no ``first_step`` in a step that is to be perturbed; with one,
                if there was, or under a GradScaler.
            TypeError: for what is neither a callable nor a list or tuple of callables.
            ValueError: for an empty list, or an ``ascent`` that does not go with the closure.
        """
        if closure is not None:
            return closures.step(self, closure, ascent)
        if ascent is not None:
            raise ValueError(f"Invalid {ascent=} without a closure. Must go with one.")
        if self.perturb_next:
            if not self._makes_state_only():
                raise RuntimeError(
                    "step() needs first_step() before it, or a closure: SAM takes two gradients per step."
                )
            try:
                self._peers.base_step(self, self._journal, None, None)
            finally:
                self.restore()
            masters.note(self)
            return None
        descents.descend(self)
        self._cleared = False
        return None

    def _makes_state_only(self) -> bool:
        """Whether a step without an ascent is torch.distributed.checkpoint's: with lr 0, before the first, so that
        there is state to load into."""
        rates = [ops.host_number(group["lr"]) for group in self.param_groups]
        return not self.state and all(isinstance(lr, float) and lr == 0.0 for lr in rates)

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """w -> w + e, with the gradients present. Parameters without one stay where they are.

        ``zero_grad=True`` sets the gradients to None, and their memory then holds w until the second half: no memory is
        taken. Otherwise they are left as they are and w is kept in memory of its own.

        Raises:
            RuntimeError: if the weights are perturbed already, or in a step that is not to be perturbed
                (``perturb_next``), or with ``second_order``; nothing is changed then.
            ValueError: for a gradient that is sparse, complex or does not match its parameter; nothing is changed then.
        """
        if self.second_order:
            raise RuntimeError("second_order=True needs the closure form: step(closure).")
        self._ascend(zero_grad)

    def second_step(self, zero_grad: bool = False) -> None:
        """``step()`` under the name that goes with ``first_step``; then sets the gradients to None if asked."""
        self.step()
        if zero_grad:
            self.zero_grad()

    @untraced
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As `torch.optim.Optimizer.zero_grad`."""
        if set_to_none:
            lists.clear_grads(self._flat_params())
        else:
            super().zero_grad(set_to_none)
        self._peers.cleared()
        self._cleared = set_to_none

    @untraced
    @torch.no_grad()
    def restore(self) -> None:
        """Back to w, bit for bit, without an update. Does nothing if the weights are not perturbed."""
        self._peers.reset()
        ops.roll_back(self._journal)
        if self._ascent is None:
            return
        ops.roll_back(self._ascent.journal)
        self._ascent = None
        masters.note(self)

    @untraced
    def _ascend(self, take_grads: bool) -> None:
        if not self.perturb_next:
            if self._ascent is not None:
                raise RuntimeError(
                    "first_step() twice: the weights are perturbed already. Call step() or restore() first."
                )
            raise RuntimeError(
                f"first_step() in a step that is not perturbed ({self._schedule}): call step() with the gradient there "
                "is. perturb_next tells these steps."
            )
        params = self._flat_params()
        self._require_capturable(params)
        self._cleared = False
        try:
            self._along.step(self, params, take_grads)
        except ops.InvalidTensor as error:
            raise self._named(error) from None

    def _require_capturable(self, params: list[Tensor]) -> None:
        if not self.capturable and ops.is_capturing(params):
            raise RuntimeError("Capturing a step in a CUDA graph needs FusedSAM(..., capturable=True).")

    def _flat_params(self) -> list[Tensor]:
        """The parameters of all groups, in order."""
        params: list[Tensor] = []
        for group in self.param_groups:
            params += group["params"]
        return params

    def _named(self, error: ops.InvalidTensor) -> ValueError:
        """The refusal of a tensor, with the parameter named as the user knows it."""
        index = error.index
        for k, group in enumerate(self.param_groups):
            if index < len(group["params"]):
                name = group["param_names"][index] if "param_names" in group else f"{index} of group {k}"
                return ValueError(
                    f"Invalid parameter {name} (shape {list(group['params'][index].shape)}): {error.reason}."
                )
            index -= len(group["params"])
        raise AssertionError("index beyond the last group")

    def add_param_group(self, param_group: dict) -> None:
        """As `torch.optim.Optimizer.add_param_group`; ``rho`` and ``adaptive`` default to the constructor's."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            param_groups.check_ascent(group)
            if group["decay_in_ascent"] and bases.is_decoupled(self._base, group):
                raise ValueError("Invalid decay_in_ascent=True. Must be False: decoupled decay is no part of the loss.")
            if group.get("differentiable"):
                raise ValueError("Invalid differentiable=True. Must be False: the weights are written in place.")
            params = shards.local_parts(self._flat_params())
            memory.require_disjoint([p for p in params if p.layout == torch.strided])
            peers = self._peers.adopt(group["params"])
            peers.require_supported(self)
            self._peers = peers
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`: the base optimizer's keys, plus each group's ``rho`` and ``adaptive``,
        and in the first group the number of steps made if not all of them are perturbed (``sam_step``).

        Raises:
            RuntimeError: while the weights are perturbed, since the model's own state would be saved at w + e; or if
                this rank has a part of the state only.
        """
        self._require_unperturbed("state_dict()")
        self._peers.require_whole_state("state_dict()")
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.load_state_dict`; takes checkpoints of the base optimizer, too."""
        self._require_unperturbed("load_state_dict()")
        super().load_state_dict(param_groups.with_missing(state_dict, self.param_groups))
        masters.load(self._masters, state_dict, self.state, self.param_groups)
        self._peers.loaded(self)

    def _require_unperturbed(self, what: str) -> None:
        if self._ascent is not None:
            raise RuntimeError(f"{what} while the weights are perturbed. Call step() or restore() first.")

    def __getstate__(self) -> dict[str, Any]:
        self._require_unperturbed("Copying or pickling")
        self._peers.require_whole_state("Copying or pickling")
        ours = {key: getattr(self, key) for key in _COPIED}
        fresh: dict[str, Any] = {"_ascent": None, "_journal": [], "_peers": self._peers.copied(), "last": Report()}
        return {**super().__getstate__(), **ours, **fresh}


# What a copy takes along, beside what torch.optim.Optimizer does.
_COPIED = (
    *("_along", "_backend", "_base", "_cleared", "_masters", "_schedule", "_warned"),
    *("capturable", "max_grad_norm", "p", "replay_rng", "reuse", "second_order", "telemetry"),
)
