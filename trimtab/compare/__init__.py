"""Prove that a remedy helped: paired comparisons, learning-rate sweeps and the claims of Cards, run again."""

from trimtab.compare.arm import Arm
from trimtab.compare.comparison import ArmResult, Comparison, compare
from trimtab.compare.jobs import Job, Progress, run_folder, run_jobs
from trimtab.compare.lr_sensitivity import Sensitivity, log_grid, sensitivity
from trimtab.compare.lr_sweep import Curve, Sweep, sweep
from trimtab.compare.pairs import Paired, paired
from trimtab.compare.reproduction import Reproduction, reproduce
from trimtab.compare.sizes import Size
from trimtab.compare.studies import StudyComparison, compare_study, study_function, study_options

__all__ = [
    "Arm",
    "ArmResult",
    "Comparison",
    "Curve",
    "Job",
    "Paired",
    "Progress",
    "Reproduction",
    "Sensitivity",
    "Size",
    "StudyComparison",
    "Sweep",
    "compare",
    "compare_study",
    "log_grid",
    "paired",
    "reproduce",
    "run_folder",
    "run_jobs",
    "sensitivity",
    "study_function",
    "study_options",
    "sweep",
]
