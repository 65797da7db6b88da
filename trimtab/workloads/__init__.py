"""Small real training jobs, and the loop that trains them."""

from trimtab.workloads.branching import branch, branched
from trimtab.workloads.outcome import Outcome
from trimtab.workloads.settings import Settings, parse_arm
from trimtab.workloads.training import train
from trimtab.workloads.workload import Data, Workload, workload, workloads

__all__ = [
    "Data",
    "Outcome",
    "Settings",
    "Workload",
    "branch",
    "branched",
    "parse_arm",
    "train",
    "workload",
    "workloads",
]
