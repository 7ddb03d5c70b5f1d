"""Runs a function of a test module in several processes, joined by gloo."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

TIMEOUT = timedelta(seconds=60)


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """What a function at the top of a test module returns in each process of one gloo group, with one thread each."""
    # A server that has imported torch already forks a process in an instant; spawning one takes seconds.
    preload = ["densenet_dist.train.loop", "torch.utils.tensorboard", "torchvision.utils"]
    multiprocessing.get_context("forkserver").set_forkserver_preload(preload)
    # pytest's importlib mode gives test modules names that no other process can import: go by the file.
    home = sys.modules[function.__module__].__file__
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world_size, folder, home, function.__name__, args)
        start_processes(_rank_main, arguments, world_size, start_method="forkserver")
        return [pickle.loads(Path(folder, f"result-{rank}").read_bytes()) for rank in range(world_size)]


def _rank_main(rank: int, world_size: int, folder: str, home: str, name: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", f"file://{folder}/store", TIMEOUT, world_size, rank)
    try:
        spec = importlib.util.spec_from_file_location("test_module", home)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["test_module"] = module
        spec.loader.exec_module(module)
        result = getattr(module, name)(*args)
        Path(folder, f"result-{rank}").write_bytes(pickle.dumps(result))
        dist.barrier()  # nobody leaves while another still talks to it
    except RuntimeError as error:
        if "gloo" in str(error):
            time.sleep(5)  # it lost another rank, which is the one to report; this one is stopped meanwhile
        raise
    finally:
        dist.destroy_process_group()
