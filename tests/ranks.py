"""A function on several gloo ranks of this machine."""

import os
import socket

import torch


def on_ranks(world_size, function, *args):
    """function(*args) on so many ranks, forked from here, since importing torch once more takes longer than a test."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.start_processes(_rank, (world_size, port, function, args), world_size, start_method="fork")


def _rank(rank, world_size, port, function, args):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    function(*args)
