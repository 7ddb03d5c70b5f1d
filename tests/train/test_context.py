"""The world of a process: alone, or one of those that torchrun started."""

import os
import socket
import subprocess
import sys

import pytest
import torch

from densenet_dist.errors import EnvironmentProblem
from densenet_dist.train.context import choose_device

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@without_gpu
def test_a_gpu_that_is_not_there_is_an_error_with_a_way_out():
    with pytest.raises(EnvironmentProblem, match=r"(?s)cluster\.device=cuda, but torch sees no GPU.*doctor") as caught:
        choose_device("cuda")
    assert caught.value.exit_code == 3
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")


def test_the_ranks_of_torchrun_find_each_other(tmp_path):
    code = (
        "import sys, torch, torch.distributed as dist\n"
        "from densenet_dist.train.context import LocalContext\n"
        "from densenet_dist.run_folder import RunFolder\n"
        "context = LocalContext.from_environment(RunFolder(sys.argv[1], 'run'), 'cpu', print, timeout_s=60)\n"
        "total = torch.tensor([10.0 + context.rank])\n"
        "dist.all_reduce(total)\n"
        "context.report({'rank': context.rank, 'of': context.world_size, 'sum': total.item()})\n"
        "dist.destroy_process_group()\n"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # What torchrun tells its processes.
    told = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code, str(tmp_path)],
            env={**os.environ, **told, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=120)[0].strip() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert outputs == ["{'rank': 0, 'of': 2, 'sum': 21.0}", ""]
