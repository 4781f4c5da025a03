"""
Shared by all stages: the set-up of a process with its device and rank; and all of files.py, errors
and folders. Importing this module does nothing; `compute_init` sets a process up.
"""

import contextlib
import ctypes
import importlib.util
import os
import re
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from nanochat.files import (  # noqa: F401, most modules take these from here
    AT_FAILURE,
    UserError,
    discard,
    exit_with,
    get_base_dir,
    get_data_dir,
    get_data_root,
    run_script,
    write_text,
)

HAS_TRITON = importlib.util.find_spec("triton") is not None  # it compiles kernels for GPUs
IGNORE = -1  # the target where there is no loss

# -----------------------------------------------------------------------------
# Ranks: torchrun sets RANK, LOCAL_RANK, WORLD_SIZE; without it this is rank 0 of 1


def get_dist_info():
    """(ddp_rank, ddp_local_rank, ddp_world_size) of this process."""
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    return rank, local_rank, world_size


def print0(*args, **kwargs):
    """Print on rank 0 only."""
    if get_dist_info()[0] == 0:
        print(*args, **kwargs, flush=True)


# -----------------------------------------------------------------------------
# Set-up of a process


def compute_init(device_type="", seed=42):
    """
    Set up this process: device, ranks, seeds, matmul precision. Under torchrun it starts the
    process group (NCCL on GPUs, gloo elsewhere). device_type '' = detect.

    Returns (ddp_rank, ddp_local_rank, ddp_world_size, device).
    """
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed={seed}: need 0 or more, below 2^63", "--seed=42")

    # Device
    ddp_rank, ddp_local_rank, ddp_world_size = get_dist_info()
    device = choose_device(device_type, ddp_local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 in the matmuls that stay in float32
    if device.type == "cpu":
        keep_freed_memory()
        torch.set_num_threads(choose_num_threads(torch.get_num_threads()))
    torch.manual_seed(seed)

    # Ranks
    if ddp_world_size > 1 and not dist.is_initialized():
        start_process_group("nccl" if device.type == "cuda" else "gloo")
    return ddp_rank, ddp_local_rank, ddp_world_size, device


def start_process_group(backend):
    """
    Join the other ranks. torchrun 2.15 keeps one store through all its restarts, and a rank that
    comes first would find there the address of a rank that has died. So on one machine each restart
    has its own part of the store. Machines count restarts each for itself: see
    dev/cluster/README.md.
    """
    _, _, ddp_world_size = get_dist_info()
    restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    one_machine = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) == ddp_world_size
    if not one_machine or restart == 0:
        dist.init_process_group(backend)
        return
    store, rank, world_size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"restart{restart}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def choose_num_threads(default):
    """
    Threads for this process on a CPU. The user's OMP_NUM_THREADS counts. Without it: no more than
    `default`, torch's own number, and no more than this rank's share of the cores that may be used.
    """
    _, _, world_size = get_dist_info()
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))  # of this machine
    asked = os.environ.get("OMP_NUM_THREADS")
    if ranks_here > 1 and asked == "1":  # torchrun sets it unless the user has
        asked = None
        default = usable_cores()
    if asked:
        return default  # torch has read it
    return max(1, min(default, usable_cores() // ranks_here))


@contextlib.contextmanager
def one_thread():
    """For work on a CPU that takes less time than to wake other threads: they stay asleep."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def usable_cores(cgroups=Path("/sys/fs/cgroup"), membership=Path("/proc/self/cgroup")):
    """
    Cores that this process may use, at least 1: of the machine's, those that its affinity and the
    quota of its control group (a container's limit) allow.
    """
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on a Mac
        cores = len(os.sched_getaffinity(0))

    # each is "<microseconds> <period>" or "max <period>"
    for limit in _group_limits("cpu.max", cgroups, membership):
        quota, period = limit.split()
        if quota != "max":
            cores = min(cores, ceil_div(int(quota), int(period)))
    return max(1, cores)


def usable_memory(cgroups=Path("/sys/fs/cgroup"), membership=Path("/proc/self/cgroup")):
    """
    Bytes of memory that this process and others may use together: the machine's, or less if its
    control group has a limit. sys.maxsize where the system does not say.
    """
    memory = sys.maxsize
    with contextlib.suppress(AttributeError, OSError, ValueError):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in _group_limits("memory.max", cgroups, membership):
        if limit.strip() != "max":
            memory = min(memory, int(limit))
    return memory


def _group_limits(name, cgroups, membership):
    """Yield what the file `name` of each control group holds, from this process's to the root's."""
    group = ""
    with contextlib.suppress(OSError):
        found = re.search(r"^0::/(.*)$", membership.read_text("utf-8"), re.MULTILINE)
        group = found[1] if found else ""
    folder = cgroups / group
    for path in (folder, *folder.parents):
        with contextlib.suppress(OSError):
            yield (path / name).read_text("utf-8")


def choose_device(device_type, local_rank):
    """The torch.device of this process. '' = a GPU if there is one, else Apple's, else the CPU."""
    # the first one is the default
    usable = ["cpu"]
    if torch.backends.mps.is_available():
        usable.insert(0, "mps")
    if torch.cuda.is_available():
        usable.insert(0, "cuda")
    device_type = device_type or usable[0]
    if device_type not in usable:
        raise UserError(f"device_type={device_type} is not available here",
                        f"use one of {', '.join(usable)}")
    if device_type != "cuda":
        return torch.device(device_type)

    # one GPU per process
    num_gpus = torch.cuda.device_count()
    if local_rank >= num_gpus:
        raise UserError(
            f"process {local_rank} of this machine has no GPU: there are {num_gpus}",
            f"torchrun --nproc_per_node={num_gpus}, or NPROC={num_gpus} bash speedrun.sh")
    return torch.device("cuda", local_rank)


def compute_cleanup():
    """
    Leave the process group, if there is one. All ranks at once, or one may abort (dev/LOG.md).
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def keep_freed_memory():
    """
    Ask glibc to keep large freed blocks instead of returning them to the system. On a CPU every
    training step frees and takes the same buffers, and new pages cost more time than the arithmetic
    on them. Costs up to 1 GB of memory. Does nothing where the C library has no mallopt.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
    mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
    mallopt(-2, 2**26)  # M_TOP_PAD


# -----------------------------------------------------------------------------
# Facts about the device


def compiles(device, setting=None):
    """
    Whether to torch.compile: never on a CPU, which has cpu_kernels.py. None = on a GPU with Triton.
    """
    if device.type == "cpu":
        return False
    if setting is not None:
        return setting
    return device.type == "cuda" and HAS_TRITON


def synchronize(device):
    """Wait for a GPU's queued work, so that a clock read afterwards counts it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def is_finite(tensor):
    """Whether all numbers of a tensor are finite."""
    # a sum is not finite if one of them is not, and needs no memory; the sum itself may overflow
    return bool(tensor.sum().isfinite() or tensor.isfinite().all())


def copy_to_cpu(name, tensor):
    """A copy on the CPU of the tensor of that name, which the next step may overwrite."""
    return tensor.to("cpu", copy=True)


def peak_memory_bytes(device):
    """Most memory used so far: on CUDA by PyTorch's allocator, elsewhere by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # POSIX only
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def ceil_div(a, b):
    """a / b, rounded up."""
    return -(-a // b)
