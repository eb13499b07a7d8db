"""SGD, SAM, and the ways to make SAM cheaper, by the names that tables and pictures use."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from bench.paper.config import Config
from bench.records import Row


@dataclass(frozen=True)
class Method:
    """How a method makes its steps.

    Args:
        optimizer: a name in methods.STEPPERS.
        options: of FusedSAM, besides rho.
        ascent: the part of each batch that e is made from.
    """

    optimizer: str = "sam"
    options: dict[str, Any] = field(default_factory=dict)
    ascent: float | None = None

    def configure(self, base: Config, rho: float) -> Config:
        """A run with this method and radius, which SGD does without."""
        if self.optimizer == "sgd":
            return base
        return replace(base, optimizer=self.optimizer, options={"rho": rho} | self.options, ascent=self.ascent)


METHODS = {
    "SGD": Method("sgd"),
    "SAM": Method(),
    "SAM, e from a quarter": Method(ascent=0.25),
    "SAM, every 2nd step": Method(options={"interval": 2}),
    "SAM, every 5th step": Method(options={"interval": 5}),
    "LookSAM, every 5th step": Method(options={"interval": 5, "looksam_alpha": 0.7}),
    "MSAM": Method(options={"direction": "momentum"}),
}


def name_of(row: Row) -> str:
    """The method of a row, whatever its radius.

    Raises:
        ValueError: it is none of these.
    """
    config = row["config"]
    # Rows from before looksam_alpha had this name call it reuse.
    renamed = {"looksam_alpha" if name == "reuse" else name: value for name, value in config["options"].items()}
    options = {name: value for name, value in renamed.items() if name != "rho"}
    for name, method in METHODS.items():
        if (config["optimizer"], options, config["ascent"]) == (method.optimizer, method.options, method.ascent):
            return name
    raise ValueError(f"Invalid row with optimizer={config['optimizer']!r}, {options=}. Must be of savings.METHODS.")
