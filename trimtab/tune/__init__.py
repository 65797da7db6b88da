"""Tune hyper-parameters: find a learning rate, before anything is trained in earnest."""

from trimtab.tune.lr_range import LRRange, lr_range_test
from trimtab.tune.workload_range import workload_lr_range

__all__ = ["LRRange", "lr_range_test", "workload_lr_range"]
