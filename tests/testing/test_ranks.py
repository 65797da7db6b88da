"""run_ranks returns results by rank, and reports a rank that raises, dies or hangs."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from trimtab.testing import run_ranks
from trimtab.testing.ranks import RankError


def test_results_come_by_rank():
    def work(rank):
        x = torch.full((2,), float(rank))
        dist.all_reduce(x)
        return {"rank": rank, "sum": x, "size": dist.get_world_size()}

    results = run_ranks(work, world_size=3)
    assert [result["rank"] for result in results] == [0, 1, 2]
    assert all(result["size"] == 3 and result["sum"].tolist() == [3.0, 3.0] for result in results)


def test_a_failure_is_shown_with_its_traceback_while_others_wait():
    def work(rank):
        if rank == 1:
            raise KeyError("the reason")
        dist.barrier()

    start = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)rank 1 raised.*the reason"):
        run_ranks(work, timeout=50)
    assert time.monotonic() - start < 25  # far from the limit: rank 0 was not waited for


def test_a_dead_rank_is_reported():
    with pytest.raises(RankError, match="rank 0 died with exit code 7"):
        run_ranks(lambda rank: os._exit(7) if rank == 0 else time.sleep(20), timeout=50)


def test_a_hanging_rank_is_killed():
    with pytest.raises(RankError, match="rank 1 had not finished"):
        run_ranks(lambda rank: time.sleep(30 * rank), timeout=2)


def test_leaves_no_process_group_behind():
    run_ranks(lambda rank: None)
    assert not dist.is_initialized()
