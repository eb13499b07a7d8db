"""How far a step has come on its way to w + e, and back."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fused_sam.backends.interface import Journal, TensorList
from fused_sam.mistakes import First
from fused_sam.report import Probe


@dataclass
class Displacement:
    """What is known between the passes. The weights are at w + e exactly where the journal says so.

    Attributes:
        norms: what the steps of the ascent were scaled by, the last one last; nothing for p = inf.
        of_gradients: whether they are norms of gradients.
        probe: what telemetry measures; None without.
        grads: a copy of the first gradients, where they are wanted after the second pass; None otherwise.
        backups: where w is, if later steps of the ascent have to read it.
        first: what is to be known of the first gradients when the second come; None without any.
        ascents: how many steps of the ascent have been made.
        journal: what there is to undo.
    """

    norms: list[Tensor] = field(default_factory=list)
    of_gradients: bool = True
    probe: Probe | None = None
    grads: TensorList | None = None
    backups: TensorList | None = None
    first: First | None = None
    ascents: int = 0
    journal: Journal = field(default_factory=list)

    def overflow(self) -> Tensor | None:
        """Return 1 where a gradient of the ascent was not finite, else 0; float32, shape []. None without a norm.

        e does not depend on the loss scale, so these gradients are never unscaled: their norm tells.
        """
        if not self.norms or not self.of_gradients:
            return None
        values = [norm.flatten()[0] for norm in self.norms]
        return (~torch.isfinite(values[0] if len(values) == 1 else torch.stack(values).sum())).float()
