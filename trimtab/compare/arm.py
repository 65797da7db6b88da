"""An Arm: a label and the settings that stand behind it."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.errors import UsageError
from trimtab.workloads import Settings, Workload, parse_arm
from trimtab.workloads.session import Session
from trimtab.workloads.workload import seeded


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Args:
        label: what tables call it.
        settings: its settings; the seed is set by the comparison.
    """

    label: str
    settings: Settings

    @classmethod
    def parse(cls, text: str, defaults: Settings) -> Arm:
        """Read an arm as a command line gives it, such as `"adamw,lr=3e-2,with=qk-norm"`; the text is its label.

        Raises:
            UsageError: if the text is not an arm, or sets a seed.

        Example:
            >>> arm = Arm.parse("adamw,lr=0.1", Settings(lr=0.01, steps=10))
            >>> arm.label, arm.settings.lr
            ('adamw,lr=0.1', 0.1)
        """
        if any(part.partition("=")[0].strip() == "seed" for part in text.split(",")):
            raise UsageError(f"the arm {text!r} sets a seed: arms are paired over the same seeds, so leave it out.")
        return cls(text, parse_arm(text, defaults))

    def check(self, workload: Workload) -> None:
        """Try the arm out on a new model, so that what cannot run is refused before hours of training.

        Raises:
            UsageError: if a remedy finds nothing to change in the workload's model or batches, the optimizer refuses a
                value, or a batch is too large.
        """
        workload.batch(self.settings.seed, 0, self.settings.batch_size)
        with seeded(self.settings.seed):
            Session(workload, self.settings, {})
