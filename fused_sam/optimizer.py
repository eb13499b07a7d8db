"""FusedSAM: the torch.optim contract. The state machine is in `fused_sam.step`, the arithmetic in `fused_sam.ops`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

from torch import Tensor
from torch.autograd import _profiler_enabled
from torch.compiler import is_compiling
from torch.optim import SGD, Optimizer
from torch.optim.optimizer import ParamsT, _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from fused_sam import backends, closures, dtensor, schedules
from fused_sam.ascent import make_perturbation
from fused_sam.callers import warn
from fused_sam.descent import Maker, checkpoints, make_base, make_inner
from fused_sam.ops import masters
from fused_sam.options import Adaptive, Direction, Options, check_group, check_new_group, given_once, require_no_clash
from fused_sam.parameters import Parameters, listed
from fused_sam.peers import SingleProcess
from fused_sam.shared import SharedStep
from fused_sam.step import Step, announced, untraced

T = TypeVar("T")


class FusedSAM(SharedStep):
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
        base_optimizer: class of the base optimizer, its name (``"torch.optim.AdamW"``), or a callable that returns its
            instance. ``torch.optim.SGD``, ``Adam`` and ``AdamW`` run fused with the restore, any other class runs its
            own ``step``.
        rho: radius of the perturbation, >= 0. With 0 a step is the base optimizer's, bit for bit.
        adaptive: elementwise scale-invariant perturbation; ``"weights"`` leaves tensors of fewer than two dimensions,
            biases and the scales of normalisation layers, at T = 1.
        lr: learning rate of the base optimizer. None, here and in the five that follow: the base's own default.
        momentum: that of the base optimizer (SGD).
        weight_decay: that of the base optimizer.
        nesterov: that of the base optimizer (SGD).
        betas: those of the base optimizer (Adam, AdamW).
        eps: that of the base optimizer (Adam, AdamW).
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
        looksam_alpha: LookSAM's alpha, > 0 (Liu et al. 2022): the steps between the perturbed ones, of which
            ``interval`` must leave some, go by g + alpha ||g|| / ||g_v|| g_v, where g_v is the part of the last SAM
            gradient that is orthogonal to g. None does not.
        decay_in_ascent: take the gradient of the loss plus ``weight_decay`` / 2 ||w||^2 for the ascent too, as the
            paper's own code does: g + weight_decay * w, with the group's ``weight_decay``; g - weight_decay * w in
            groups with ``maximize``. Not for decay that is decoupled from the loss (AdamW).
        master_weights: keep w of fp16 and bf16 parameters in fp32 (``"master"`` in their state), and all other state of
            theirs in fp32. The parameters are w or w + e, rounded. For SGD, Adam and AdamW.
        telemetry: measure what ``last`` does not hold otherwise. For debugging: it copies w and the first gradient.
        reuse: the old name of ``looksam_alpha``.
        base_options: arguments of the base optimizer, among them those that have the name of one of ours
            (``max_grad_norm``, ``p``).
        **same: likewise, for all other names (``dampening``, ``amsgrad``, ...).

    Raises:
        TypeError: if ``base_optimizer`` makes no optimizer, or does not know one of the options.
        ValueError: for a value out of range, options that exclude each other, or parameters that overlap in memory.
        RuntimeError: if the backend asked for cannot be used.
    """

    # torch.amp.GradScaler then always calls step(), with grad_scale and found_inf set on the optimizer. It must: were
    # the call skipped on overflow, the weights would stay at w + e.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: Maker | str = SGD,
        rho: float | Tensor = 0.05,
        adaptive: Adaptive = False,
        *,
        lr: float | Tensor | None = None,
        momentum: float | None = None,
        weight_decay: float | None = None,
        nesterov: bool | None = None,
        betas: tuple[float | Tensor, ...] | None = None,
        eps: float | None = None,
        p: float = 2.0,
        eta: float = 0.0,
        backend: backends.Name | None = None,
        replay_rng: bool = False,
        capturable: bool = False,
        max_grad_norm: float | None = None,
        interval: int = 1,
        start: int = 0,
        stop: int | None = None,
        direction: Direction = "gradient",
        ascent_steps: int = 1,
        second_order: bool = False,
        looksam_alpha: float | None = None,
        decay_in_ascent: bool = False,
        master_weights: bool = False,
        telemetry: bool = False,
        reuse: float | None = None,
        base_options: dict[str, Any] | None = None,
        **same: Any,
    ) -> None:
        ascent = {"rho": rho, "adaptive": adaptive, "eta": eta, "perturb": True, "decay_in_ascent": decay_in_ascent}
        check_group(ascent)
        if reuse is not None:
            warn("reuse= is now looksam_alpha=, and will go.", DeprecationWarning)
            looksam_alpha = reuse
        passes = interval, start, stop, direction, ascent_steps, second_order, looksam_alpha
        rest = decay_in_ascent, master_weights, telemetry
        asked = backends.requested(backend)
        usual: dict[str, Any] = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        usual |= {"nesterov": nesterov, "betas": betas, "eps": eps}
        # The base checks its own options and arranges its own groups, whatever their form; we adopt both.
        inner = make_inner(base_optimizer, listed(params), given_once(usual, same, base_options or {}), capturable)
        options = Options(type(inner), p, replay_rng, capturable, max_grad_norm, *passes, *rest)
        require_no_clash(inner, ascent)
        parameters = Parameters([], {}, asked, masters.Masters() if master_weights else None)
        self._step = Step(parameters, options, make_perturbation(options, inner), make_base(inner), SingleProcess())
        super().__init__(inner.param_groups, {**inner.defaults, **ascent})
        self.state.update(inner.state)
        if not self._step.always:
            self.param_groups[0].setdefault(schedules.STEP, 0)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.step is not FusedSAM.step and not hasattr(cls.step, "announced"):  # its own, or a mixin's
            cls.step = announced(cls.step)  # type: ignore[method-assign]

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(
        self, closure: Callable[[], T], *, ascent: Callable[[], T] | None = None, use_gradients: bool = False
    ) -> T: ...
    @overload
    def step(self, closure: Sequence[closures.Closure], *, ascent: Sequence[closures.Closure] | None = None) -> Any: ...
    def step(
        self,
        closure: closures.Closures | None = None,
        *,
        ascent: closures.Closures | None = None,
        use_gradients: bool = False,
    ) -> Any:
        r"""Make a whole SAM step with a closure; without, the second half of one that ``first_step`` began.

        The closure runs forward and backward and returns the loss. It is called at w and again at w + e, with gradients
        zeroed before each call; once only, at w, in a step that is not perturbed (``interval``). After ``first_step``
        it is called once, at w + e, without zeroing, and the step is finished: wrappers give a closure that does
        nothing. An exception in it, KeyboardInterrupt included, leaves the weights at w.

        A list of k closures, each for m examples of its own, makes one step of m-sharpness (section 4.1 of the paper:
        smaller m generalises better). Every closure is called at w and at a perturbation of its own, and the base step
        takes the mean of the second gradients, which is in ``p.grad`` then:

        .. math:: g = \frac{1}{k} \sum_i \nabla L_i(w + \epsilon_i), \qquad
            \epsilon_i = \rho \, \nabla L_i(w) / \lVert \nabla L_i(w) \rVert_2.

        A gradient that is None for some closures counts as zero there. The mean takes one more gradient-sized buffer.

        ``ascent`` is called at w instead of the closure, and may be for a part of the examples only: with a quarter of
        them a step costs about as much as 1.25 steps of SGD. With a list of closures it is a list as long.

        ``use_gradients`` takes what is in ``p.grad`` for the gradient at w: after a backward before the step the
        closure is called at w + e only, and not at all in a step that is not perturbed.

        Returns:
            The loss at w, of ``ascent`` where there is one; None without a closure. With a list, the mean of the
            losses, detached; the list of what the closures returned if that is not tensors of one element, or numbers.
            Where the closure is not called at w (``direction="momentum"``, after ``first_step``, ``use_gradients``),
            the loss at w + e.

        Raises:
            RuntimeError: without a closure, if there was no ``first_step`` in a step that is to be perturbed; with one
                under a GradScaler; after ``first_step`` with a list, an ``ascent``, or when another one is due.
            TypeError: for what is neither a callable nor a list or tuple of callables.
            ValueError: for an empty list, an ``ascent`` that does not go with the closure, or ``use_gradients`` with
                either.
        """
        # torch wraps the `step` of a subclass itself. Else only a hook or a profiler has anything to see.
        hooks = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
        hooks = hooks or _global_optimizer_pre_hooks or _global_optimizer_post_hooks
        observed = (hooks or _profiler_enabled()) and type(self).step is FusedSAM.step
        if observed or is_compiling():
            given: dict[str, Any] = {} if ascent is None else {"ascent": ascent}
            given |= {"use_gradients": True} if use_gradients else {}
            return self._observed_step(*(() if closure is None else (closure,)), **given)
        return self._make_step(closure, ascent, use_gradients)

    # torch would wrap it, which takes a seventh of a small step. `_observed_step` is wrapped instead.
    step.hooked = True  # type: ignore[attr-defined]

    def _make_step(
        self,
        closure: closures.Closures | None = None,
        ascent: closures.Closures | None = None,
        use_gradients: bool = False,
    ) -> Any:
        # A GradScaler's, only while it calls. Asked for by name, what is not there would go through __getattr__.
        found_inf = self.__dict__.get("found_inf")
        if closure is not None:
            return closures.run(self._step, closure, self.zero_grad, ascent, found_inf is not None, use_gradients)
        if ascent is not None or use_gradients:
            raise ValueError(f"Invalid {ascent=}, {use_gradients=} without a closure. Must go with one.")
        self._step.descend(self.__dict__.get("grad_scale"), found_inf)
        return None

    _observed_step = Optimizer.profile_hook_step(_make_step)

    def first_step(self, zero_grad: bool = False) -> None:
        """Go from w to w + e, with the gradients present. Parameters without one stay where they are.

        ``zero_grad=True`` sets the gradients to None, and their memory then holds w until the second half: no memory is
        taken. Otherwise they are left as they are and w is kept in memory of its own.

        Raises:
            RuntimeError: if the weights are perturbed already, or in a step that is not to be perturbed
                (``perturb_next``), or with ``second_order``; nothing is changed then.
            ValueError: for a gradient that is sparse, complex or does not match its parameter; nothing is changed then.
        """
        step = self._step
        if step.options.second_order:
            raise RuntimeError("second_order=True needs the closure form: step(closure).")
        step.ascend(zero_grad)

    @Optimizer.profile_hook_step
    def plain_step(self) -> None:
        """Make one step of the base optimizer, with the gradients that there are, whatever step is due.

        For a loop that decides as it runs: a warm-up without SAM, a step after an outlier.

        Raises:
            RuntimeError: while the weights are perturbed.
        """
        self._step.require_unperturbed("plain_step()")
        self._opt_called = True  # which a scheduler asks for
        self._step.descend(plain=True)

    @property
    def base_optimizer(self) -> Optimizer:
        """Return the base optimizer, on our groups and our state: for schedulers and loops that ask for it.

        Its ``step()`` is `plain_step`, after a closure if there is one; it loads and adds groups as we do.
        """
        ours = self.plain_step, self.load_state_dict, self.add_param_group
        return self._step.base.exposed(self._step.parameters, *ours)

    def second_step(self, zero_grad: bool = False) -> None:
        """Call ``step()``, the outermost there is, once; then set the gradients to None if asked.

        Within a subclass's ``step``, which has been called already, make the second half of the step here.
        """
        if self._step.within:
            self._step.descend(self.__dict__.get("grad_scale"), self.__dict__.get("found_inf"))
        else:
            self.step()
        if zero_grad:
            self.zero_grad()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do as `torch.optim.Optimizer.zero_grad`."""
        if set_to_none:
            self._step.clear_gradients()
        else:
            self._zero_gradients()

    @untraced
    def _zero_gradients(self) -> None:
        super().zero_grad(set_to_none=False)
        self._step.peers.cleared()
        self._step.cleared = False

    def restore(self) -> None:
        """Go back to w, bit for bit, without an update. Does nothing if the weights are not perturbed."""
        self._step.restore()

    def add_param_group(self, param_group: dict) -> None:
        """Do as `torch.optim.Optimizer.add_param_group`; ``rho`` and ``adaptive`` default to the constructor's."""
        step, there = self._step, len(self.param_groups)
        try:
            if any(group is param_group for group in step.base.inner.param_groups):
                super().add_param_group(param_group)  # the base has arranged it in its constructor
            else:
                listed([*self.param_groups, param_group])
                step.base.add_param_group(step.parameters, param_group)
            added = self.param_groups[there:]
            for group in added:
                for name, default in self.defaults.items():
                    group.setdefault(name, default)
                check_new_group(group, step.base.is_decoupled(group))
            step.parameters.require_disjoint(dtensor.local_parts)
            step.add_parameters([p for group in added for p in group["params"]])
        except BaseException:
            del self.param_groups[there:]
            raise

    def state_dict(self) -> dict[str, Any]:
        """Do as `torch.optim.Optimizer.state_dict`: the base optimizer's keys, each group's ``rho`` and ``adaptive``,
        and in the first group the number of steps made if not all of them are perturbed (``sam_step``).

        Raises:
            RuntimeError: while the weights are perturbed, since the model's own state would be saved at w + e; or if
                this rank has a part of the state only.
        """
        self._step.require_unperturbed("state_dict()")
        self._step.peers.require_whole_state("state_dict()")
        own = self._step.base.state_dict(self._step.parameters)
        return super().state_dict() if own is None else own

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do as `torch.optim.Optimizer.load_state_dict`; takes checkpoints of the base optimizer, too."""
        step = self._step
        step.require_unperturbed("load_state_dict()")
        if {"state", "param_groups"} <= state_dict.keys():
            state_dict = checkpoints.adapted(state_dict, self.param_groups)
        step.base.require_loadable(state_dict)
        if not step.base.has_format:
            super().load_state_dict(state_dict)
        step.base.load(step.parameters, state_dict)
        masters.load(step.parameters.masters, state_dict, self.state, self.param_groups)
        step.peers.loaded(step.parameters)
