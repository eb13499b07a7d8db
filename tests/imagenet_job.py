"""`python -m bench.imagenet` as the tests run it in processes of its own.

torchvision may need help (torchvision_ops.py). Every rank writes the weights that it ends with to WEIGHTS, and the rank
STOP_RANK gets a SIGTERM in the step STOP_STEP.
"""

import os
import signal

import torch
import torchvision_ops

from bench.imagenet import __main__ as imagenet
from bench.imagenet import data as imagenet_data
from bench.imagenet import trainer as imagenet_training


class Watched(imagenet_training.Trainer):
    """A run that the tests can look into."""

    def train_step(self, parts: list[imagenet_data.Batch]) -> None:
        super().train_step(parts)
        if (os.environ.get("STOP_RANK"), os.environ.get("STOP_STEP")) == (str(self.ranks.rank), str(self.step)):
            os.kill(os.getpid(), signal.SIGTERM)

    def save(self, out: os.PathLike) -> None:
        super().save(out)
        torch.save(self.model.state_dict(), f"{os.environ['WEIGHTS']}.{self.ranks.rank}")


if __name__ == "__main__":
    torchvision_ops.import_or_reason()
    imagenet.Trainer = Watched
    raise SystemExit(imagenet.main())
