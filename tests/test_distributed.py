"""The harness that other tests start ranks with."""

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from torch.multiprocessing import ProcessRaisedException


def sum_of_ranks(offset: int) -> tuple[int, float, int]:
    total = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(total)
    return dist.get_rank(), total.item(), torch.get_num_threads()


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError("this is the reason")
    dist.barrier()


@pytest.mark.parametrize("world_size", [1, 3])
def test_ranks_talk_to_each_other_and_return_in_order(world_size):
    total = sum(range(world_size)) + 10.0 * world_size
    assert run_ranks(sum_of_ranks, world_size, 10) == [(rank, total, 1) for rank in range(world_size)]


def test_an_error_names_its_rank_and_carries_its_traceback():
    with pytest.raises(ProcessRaisedException, match=r"(?s)Process 1 terminated.*fail_on.*this is the reason"):
        run_ranks(fail_on, 2, 1)
