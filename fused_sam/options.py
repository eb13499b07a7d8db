"""Every option of `FusedSAM` with its range, and `EXCLUDES`, the one table of what does not go together."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from fused_sam.ops.groups import host_number

FUSED = (SGD, Adam, AdamW)
Adaptive: TypeAlias = bool | Literal["weights"]
Direction: TypeAlias = Literal["gradient", "momentum"]


class Range(NamedTuple):
    """What an option may be: one clause for messages and docs, and whether a value is that."""

    text: str
    allows: Callable[[Any], bool]


def _is_integer(x: Any) -> bool:
    return isinstance(x, numbers.Integral) and not isinstance(x, bool)


def _is_number(x: Any) -> bool:
    return isinstance(x, numbers.Real) and not isinstance(x, bool)


_NOT_NEGATIVE = Range(">= 0 and finite", lambda x: 0.0 <= x < math.inf)
_POSITIVE_OR_NONE = Range("> 0 and finite, or None", lambda x: x is None or 0.0 < float(x) < math.inf)
_FLAG = Range("True or False", lambda x: isinstance(x, bool))
_COUNT = Range("an integer >= 1", lambda x: _is_integer(x) and x >= 1)
RANGES = {
    "rho": _NOT_NEGATIVE,
    "adaptive": Range("True, False or 'weights'", lambda x: x in (False, True, "weights")),
    "p": Range(">= 1, possibly inf", lambda x: x >= 1),
    "eta": _NOT_NEGATIVE,
    "max_grad_norm": _POSITIVE_OR_NONE,
    "interval": _COUNT,
    "start": Range("an integer >= 0", lambda x: _is_integer(x) and x >= 0),
    "stop": Range("None or an integer > start", lambda x: x is None or _is_integer(x)),
    "direction": Range(f"one of {list(get_args(Direction))}", lambda x: x in get_args(Direction)),
    "ascent_steps": _COUNT,
    "second_order": _FLAG,
    "looksam_alpha": _POSITIVE_OR_NONE,
    "decay_in_ascent": _FLAG,
    "master_weights": _FLAG,
    "telemetry": _FLAG,
}


def _require(name: str, value: Any) -> None:
    if not RANGES[name].allows(value):
        raise ValueError(f"Invalid {name}={value!r}. Must be {RANGES[name].text}.")


@dataclass
class Options:
    """The options of `FusedSAM` that are no parameter group's, as its arguments; the base optimizer's class as one.

    Raises:
        TypeError, ValueError: for a value out of range, or for two options that exclude each other.
    """

    base_optimizer: type[Optimizer] = SGD
    p: float = 2.0
    replay_rng: bool = False
    capturable: bool = False
    max_grad_norm: float | None = None
    interval: int = 1
    start: int = 0
    stop: int | None = None
    direction: Direction = "gradient"
    ascent_steps: int = 1
    second_order: bool = False
    looksam_alpha: float | None = None
    decay_in_ascent: bool = False
    master_weights: bool = False
    telemetry: bool = False

    def __post_init__(self) -> None:
        for name in ("max_grad_norm", "looksam_alpha"):
            value = getattr(self, name)
            if value is not None and not _is_number(value):
                raise TypeError(f"Invalid {name}={value!r}. Must be a number > 0, or None.")
        for name in RANGES:
            if name != "stop" and hasattr(self, name):
                _require(name, getattr(self, name))
        start, stop = self.start, self.stop
        if not RANGES["stop"].allows(stop) or (stop is not None and stop <= start):
            raise ValueError(f"Invalid {stop=}. Must be None or an integer > {start=}: no step would be perturbed.")
        self.p = float(self.p)
        refuse(self)


def check_group(group: dict[str, Any]) -> None:
    """Refuse values out of range in what a parameter group says of the ascent."""
    rho, adaptive, eta, decay_in_ascent = group["rho"], group["adaptive"], group["eta"], group["decay_in_ascent"]
    if type(rho) is not float:
        if not isinstance(rho, Tensor | numbers.Real) or (isinstance(rho, Tensor) and rho.numel() != 1):
            raise TypeError(f"Invalid {rho=}. Must be a number, or a tensor of one element.")
        rho = host_number(rho)  # what is on another device is not waited for
    if isinstance(rho, float) and not 0.0 <= rho < math.inf:
        _require("rho", group["rho"])
    if adaptive is not False:
        _require("adaptive", adaptive)
    if not 0.0 <= eta < math.inf:
        _require("eta", eta)
    if decay_in_ascent is not False:
        _require("decay_in_ascent", decay_in_ascent)
        # Without "params" it is the constructor's defaults, before the base has added its own.
        if "params" in group and "weight_decay" not in group:
            raise ValueError(f"Invalid {decay_in_ascent=}. The base optimizer must have a weight_decay.")


def check_new_group(group: dict[str, Any], is_decoupled: bool) -> None:
    """Refuse what `check_group` does, and what cannot become wrong later. Few bases refuse NaN themselves."""
    check_group(group)
    for name, value in group.items():
        value = host_number(value) if isinstance(value, Tensor) and value.numel() == 1 else value
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"Invalid {name}=nan. Must be a number.")
    if group["decay_in_ascent"] and is_decoupled:
        raise ValueError("Invalid decay_in_ascent=True. Must be False: decoupled decay is no part of the loss.")
    if group.get("differentiable"):
        raise ValueError("Invalid differentiable=True. Must be False: the weights are written in place.")


def given_once(usual: dict[str, Any], same: dict[str, Any], base_options: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the base: of the ``usual`` ones those that are not None, and all others.

    Raises:
        ValueError: for one that comes in two ways.
    """
    options = {name: value for name, value in usual.items() if value is not None} | same
    for name in options.keys() & base_options.keys():
        raise ValueError(f"Invalid {name}={options[name]!r} and {name}={base_options[name]!r}. Must be given once.")
    return {**options, **base_options}


def require_no_clash(inner: Optimizer, ours: dict[str, Any]) -> None:
    """Refuse a base whose groups have a number of their own under a name of ours: one would be taken for the other."""
    for name in ours:
        if name in inner.defaults:
            raise ValueError(
                f"Invalid base_optimizer={type(inner).__name__}. Must have no {name!r} in its groups: it is FusedSAM's."
            )


def require_unscaled(groups: list[dict[str, Any]]) -> None:
    """Refuse gradients that a GradScaler has scaled where weight decay, which is not scaled, was added to them."""
    if any(group["decay_in_ascent"] and group["weight_decay"] != 0 for group in groups):
        raise RuntimeError(
            "decay_in_ascent under a GradScaler: the first gradient was scaled, the weight decay added to it was not. "
            "bf16 needs no scaler."
        )


class Case(NamedTuple):
    """A use of an option: its name, how the docs write it, and whether it is in force."""

    option: str
    text: str
    holds: Callable[[Options], bool]


CASES = (
    Case("second_order", "`second_order=True`", lambda o: o.second_order),
    Case("ascent_steps", "`ascent_steps` > 1", lambda o: o.ascent_steps > 1),
    Case("looksam_alpha", "`looksam_alpha`", lambda o: o.looksam_alpha is not None),
    Case("direction", '`direction="momentum"`', lambda o: o.direction == "momentum"),
    Case("master_weights", "`master_weights=True`", lambda o: o.master_weights),
    Case("telemetry", "`telemetry=True`", lambda o: o.telemetry),
    Case("capturable", "`capturable=True`", lambda o: bool(o.capturable)),
    Case("decay_in_ascent", "`decay_in_ascent=True`", lambda o: o.decay_in_ascent),
    Case("replay_rng", "`replay_rng=True`", lambda o: bool(o.replay_rng)),
    Case("p", "`p` other than 2", lambda o: o.p != 2),
    Case("interval", "`interval` > 1", lambda o: o.interval > 1),
    Case("start", "`start` > 0", lambda o: o.start > 0),
    Case("stop", "`stop`", lambda o: o.stop is not None),
    Case("base_optimizer", "a base optimizer that is not fused", lambda o: o.base_optimizer not in FUSED),
)
_CASES = {case.option: case for case in CASES}

# What is no option of FusedSAM: its users tell `refuse` where it is in force.
EVERY_STEP = "interval=1"
NO_MOMENTUM = "momentum=0"
CLOSURES = "a list of closures"
ASCENT_CLOSURE = "a closure for the ascent"
USE_GRADIENTS = "use_gradients=True"
DATA_PARALLEL = "data_parallel()"
NOT_WORLD = "m_sharpness other than 'world'"
SHARDED_STATE = "shard_state=True"
DTENSORS = "DTensor parameters"


class Exclusion(NamedTuple):
    """A row of the table: the option does not go with another, or with a setting."""

    option: str
    other: str
    reason: str


_STATE = "Each rank has a part of the state, and"
_WHOLE = "Every rank must have them whole."
EXCLUDES = (
    Exclusion("second_order", "ascent_steps", "The term is that of a single step."),
    Exclusion("second_order", "looksam_alpha", "LookSAM takes SAM's own gradient apart."),
    Exclusion("second_order", "master_weights", "Autograd sees the rounded weights only."),
    Exclusion("second_order", DATA_PARALLEL, "The averaging of gradients cuts their graph."),
    Exclusion("second_order", DTENSORS, _WHOLE),
    Exclusion("second_order", USE_GRADIENTS, "The closure makes the first gradient, with its graph."),
    Exclusion("looksam_alpha", EVERY_STEP, "Must have interval > 1: there is no step between."),
    Exclusion("looksam_alpha", CLOSURES, "Must be one closure."),
    Exclusion("looksam_alpha", NOT_WORLD, "Must be 'world': what is reused must be the same on all ranks."),
    Exclusion("looksam_alpha", SHARDED_STATE, f"{_STATE} what is reused is added to the gradients of all parameters."),
    Exclusion("looksam_alpha", DTENSORS, _WHOLE),
    Exclusion("direction", "ascent_steps", "It needs the gradient at w."),
    Exclusion("direction", "second_order", "It needs the gradient at w."),
    Exclusion("direction", "looksam_alpha", "It needs the gradient at w."),
    Exclusion("direction", "p", "Must be p = 2."),
    Exclusion("direction", "decay_in_ascent", "The momentum holds the weight decay already."),
    Exclusion("direction", NO_MOMENTUM, "There must be a momentum to follow."),
    Exclusion("direction", ASCENT_CLOSURE, "It takes no gradient at w."),
    Exclusion("direction", USE_GRADIENTS, "It takes no gradient at w."),
    Exclusion("direction", SHARDED_STATE, f"{_STATE} e follows the momentum of all parameters."),
    Exclusion("ascent_steps", DTENSORS, _WHOLE),
    Exclusion(
        "master_weights",
        "base_optimizer",
        "Must be torch.optim.SGD, Adam or AdamW: any other steps the 16-bit weights itself.",
    ),
    Exclusion("master_weights", SHARDED_STATE, f"{_STATE} w + e is made of the masters of all parameters."),
    Exclusion(
        "master_weights",
        DTENSORS,
        "fully_shard has fp32 weights of its own: MixedPrecisionPolicy(param_dtype=...).",
    ),
    Exclusion("replay_rng", USE_GRADIENTS, "The random state at their forward is not known."),
    Exclusion("telemetry", SHARDED_STATE, f"{_STATE} it looks at whole gradients."),
    Exclusion("telemetry", DTENSORS, _WHOLE),
    Exclusion("capturable", "interval", "A graph replays one step."),
    Exclusion("capturable", "start", "A graph replays one step."),
    Exclusion("capturable", "stop", "A graph replays one step."),
    Exclusion("capturable", SHARDED_STATE, f"{_STATE} a step works on memory of its own."),
    Exclusion(
        "base_optimizer", SHARDED_STATE, f"{_STATE} only SGD, Adam and AdamW are known to go element by element."
    ),
)


def refuse(options: Options, *settings: str) -> None:
    """Raise ValueError for an option in force that excludes another one, or one of the settings in force."""
    if options.interval == 1:
        settings = (*settings, EVERY_STEP)
    for option, other, reason in EXCLUDES:
        if not _CASES[option].holds(options):
            continue
        if other in settings:
            raise ValueError(f"Invalid {_given(options, option)} with {other}. {reason}")
        if other in _CASES and _CASES[other].holds(options):
            raise ValueError(f"Invalid {_given(options, option)} with {_given(options, other)}. {reason}")


def _given(options: Options, name: str) -> str:
    """Return an option as it was given."""
    value = getattr(options, name)
    return f"{name}={value.__name__ if isinstance(value, type) else repr(value)}"
