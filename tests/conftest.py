"""What every test runs under: one torch thread and a Hypothesis profile that is the same on every machine."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings

# Two torch threads on a shared 2-core machine are many times slower than one, and sums would depend on the machine.
torch.set_num_threads(1)

settings.register_profile(
    "trimtab",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors],
)
settings.load_profile("trimtab")
