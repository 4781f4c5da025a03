"""
All collectives. With one rank each of them returns its input, so one process runs the same code as
many. `common.compute_init` starts the process group.
"""

import torch
import torch.distributed as dist

from nanochat.common import UserError


def world_size():
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """Number of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def all_reduce_sum(tensor):
    """Sum over ranks, in place; returns the tensor."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def reduce_scatter_sum(full):
    """(world * n, ...) on every rank -> this rank's (n, ...) of the sum over ranks."""
    if world_size() == 1:
        return full
    # callers pad the first dimension to a multiple of the ranks
    shard = torch.empty_like(full[: full.size(0) // world_size()])
    dist.reduce_scatter_tensor(shard, full, op=dist.ReduceOp.SUM)
    return shard


def all_gather(shard):
    """This rank's (n, ...) -> (world * n, ...) of all ranks, in rank order."""
    if world_size() == 1:
        return shard
    # the ranks' parts one after the other in the first dimension
    full = shard.new_empty(world_size() * shard.size(0), *shard.shape[1:])
    dist.all_gather_into_tensor(full, shard.contiguous())
    return full


def gather_objects(items):
    """The lists of all ranks joined in rank order, on every rank. For small picklable things."""
    if world_size() == 1:
        return items
    # entry r is the list of rank r
    parts = [None] * world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def from_rank0(function):
    """function() of rank 0, on every rank. Its result must be small and picklable."""
    result = [function() if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(result)
    return result[0]


# -----------------------------------------------------------------------------
# Do all ranks hold the same?

HASH_CHUNK = 2**22  # elements hashed at a time, since the hash takes 16 bytes for each
HASH_ADDEND = 0x9E3779B1  # any large odd number
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes -> dtype


def fingerprint(tensor):
    """
    A hash of a tensor's bits, a 0-d int64 tensor on the same device. The bits of each element, as a
    number x, give x (x + HASH_ADDEND) modulo 2^64. With a sum of x alone, a last bit more in one
    element and one less in another would go unseen.
    """
    flat = tensor.detach().reshape(-1)
    bits = flat.view(INTEGERS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for chunk in bits.split(HASH_CHUNK):
        x = chunk.long()
        mixed = x + HASH_ADDEND
        mixed *= x
        total = 31 * total + mixed.sum()
    return total


def find_drift(named_tensors):
    """
    What differs between ranks of tensors [(name, tensor)] that should be the same on all of them to
    the last bit, as the start of a sentence; None if nothing does. Collective: 8 bytes a tensor
    from each rank.
    """
    if world_size() == 1:
        return None
    named_tensors = list(named_tensors)
    hashes = torch.stack([fingerprint(tensor) for _, tensor in named_tensors])  # (n,)
    by_rank = all_gather(hashes[None])  # (world, n)
    differs = by_rank != by_rank[0]
    names = [name for (name, _), other in zip(named_tensors, differs.any(dim=0), strict=True) if other]
    if not names:
        return None
    ranks = differs.any(dim=1).nonzero().flatten().tolist()
    more = f" and {len(names) - 1} others" if len(names) > 1 else ""
    return f"{names[0]}{more} on rank {', '.join(map(str, ranks))} differ from rank 0"


class FailedElsewhere(UserError):
    """Another rank failed in `run_together`."""


def run_together(function, device):
    """
    Call function() on every rank. An error on one rank becomes an error on all, so that none waits
    for it in the next collective.
    """
    # Keep an error until all ranks have come this far
    result = None
    failure = None
    try:
        result = function()
    except Exception as error:  # of any kind: the other ranks must know
        failure = error

    # One flag per rank: the sum says whether any failed
    flag = torch.tensor(float(failure is not None), device=device)
    if all_reduce_sum(flag).item() > 0:
        raise failure or FailedElsewhere("it failed on another rank")
    return result


def barrier():
    """Wait for all ranks."""
    if world_size() > 1:  # there is no group for one rank
        dist.barrier()


def rank_slice(num_rows, ddp_rank, ddp_world_size):
    """
    This rank's part of a step's rows, as a slice. Parts differ by at most one row: that is no
    problem, since losses are summed and divided by the targets of all ranks.
    """
    # rounded down at both ends, so neighbours meet
    start = num_rows * ddp_rank // ddp_world_size
    end = num_rows * (ddp_rank + 1) // ddp_world_size
    return slice(start, end)
