"""SAM steps in transformers.Trainer."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from fused_sam.integrations.accelerate import no_sync_of
from fused_sam.integrations.passes import MicroBatches


class SAMTrainer(Trainer):
    """A Trainer whose optimizer is a FusedSAM.

    It is given as ``optimizers=(FusedSAM(...), None)`` or ``optimizer_cls_and_kwargs=(FusedSAM, {...})``. All
    micro-batches of a step (``gradient_accumulation_steps``) are run again at w + e; what the Trainer then clips and
    logs the norm of is the gradient there, and the loss that it logs is that at w. With ``direction="momentum"`` there
    is one run, at w + e. Other trainers can be mixed in: ``class Mine(SAMTrainer, Seq2SeqTrainer)``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._micro_batches: MicroBatches | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Do as `Trainer.train`; whatever ends it, the weights are at w.

        Raises:
            TypeError: at the first step, if the optimizer is no FusedSAM.
        """
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._micro_batches is not None:
                self._micro_batches.forget()
                self._micro_batches.sam.restore()

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Do as `Trainer.training_step`, and after the last micro-batch of a step make all of them again at w + e."""
        micro_batches = self._micro_batches = MicroBatches.of(self.optimizer, self._micro_batches)
        accelerator = self.accelerator
        whole = functools.partial(super().training_step, model, *args, **kwargs)
        return micro_batches.run(whole, accelerator.sync_gradients, no_sync_of(accelerator, model))
