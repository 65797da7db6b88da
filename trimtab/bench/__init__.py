"""The benchmark: an arm against baselines that were tuned as hard as it was, over a suite of small training jobs."""

from trimtab.bench.baselines import BASELINES
from trimtab.bench.benchmark import Benchmark, bench
from trimtab.bench.judgement import Judgement, Speed, TaskVerdict, judge, profiles
from trimtab.bench.protocol import FULL, QUICK, Budget, Measured, Result
from trimtab.bench.spaces import Contender
from trimtab.bench.suite import SUITE, Task, task, tasks

__all__ = [
    "BASELINES",
    "FULL",
    "QUICK",
    "SUITE",
    "Benchmark",
    "Budget",
    "Contender",
    "Judgement",
    "Measured",
    "Result",
    "Speed",
    "Task",
    "TaskVerdict",
    "bench",
    "judge",
    "profiles",
    "task",
    "tasks",
]
