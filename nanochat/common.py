"""
What every stage shares: errors, folders, set-up of device and ranks, collectives, schedules, batch arithmetic.
Importing this module does nothing; `compute_init` sets a process up.
"""

import ctypes
import importlib.util
import os
import re
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

HAS_TRITON = importlib.util.find_spec("triton") is not None  # it compiles kernels for GPUs
IGNORE = -1  # a target without a token: no loss there

# -----------------------------------------------------------------------------
# Errors a user can cause, and how a script ends on one


class UserError(ValueError):
    """A wrong setting, file, row, checkpoint or environment: one line that names the thing, the value, what was
    needed, and a hint with a command that works. `run_script` prints it and exits 2, without a traceback."""

    def __init__(self, message, hint=None):
        super().__init__(message if hint is None else f"{message}\nhint: {hint}")


def run_script(main):
    """
    Run a script's main(). A mistake of the user's, or a file that cannot be read or written, ends in `error:` and
    `hint:` lines and exit code 2.
    """
    try:
        main()
    except UserError as error:
        _exit_with(error)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the flush at exit fails once more
        sys.exit(128 + signal.SIGPIPE)
    except (MemoryError, RuntimeError) as error:  # torch says of a CPU's memory, in a RuntimeError, that it is out
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        _exit_with(UserError(f"out of memory: {str(error).splitlines()[0] if str(error) else 'nothing is left'}",
                             "take less at once or a smaller model: --device_batch_size, --max_seq_len, --depth"))
    except OSError as error:
        _exit_with(UserError(str(error), "check that the path is right and writable and the disk not full: df -h"))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _exit_with(error):
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


# -----------------------------------------------------------------------------
# Places


def get_base_dir():
    """Where artifacts go: $NANOCHAT_BASE_DIR, default ~/.cache/nanochat. Created when missing."""
    base_dir = Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat")
    try:
        base_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"NANOCHAT_BASE_DIR={base_dir} cannot be a folder: {error.strerror}",
                        "export NANOCHAT_BASE_DIR=~/nanochat_files") from error
    return base_dir


def get_data_dir():
    """The local data mirror $NANOCHAT_DATA_DIR as a Path, or None when unset."""
    data_dir = os.environ.get("NANOCHAT_DATA_DIR")
    if not data_dir:
        return None
    if not Path(data_dir).is_dir():
        raise UserError(f"NANOCHAT_DATA_DIR={data_dir} is not a folder", "unset it, or point it at a data mirror")
    return Path(data_dir)


def get_data_root():
    """Where the files of the chat stages are: in the local mirror, if there is one, else in the base directory."""
    return get_data_dir() or get_base_dir()


def write_text(path, text):
    """
    A whole file or none, also after a crash or a power cut: written under a temporary name, then renamed. Makes the
    folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# -----------------------------------------------------------------------------
# Ranks: torchrun sets RANK, LOCAL_RANK, WORLD_SIZE; without it this is rank 0 of 1


def get_dist_info():
    """(ddp_rank, ddp_local_rank, ddp_world_size) of this process."""
    return tuple(int(os.environ.get(name, default)) for name, default in
                 (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))


def print0(*args, **kwargs):
    """Print on rank 0 only."""
    if get_dist_info()[0] == 0:
        print(*args, **kwargs, flush=True)


# -----------------------------------------------------------------------------
# Process set-up


def autodetect_device_type():
    """'cuda' where a GPU is, else 'mps' (Apple), else 'cpu'."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def compute_init(device_type="", seed=42):
    """
    Set up this process: device, ranks, seeds, matmul precision. Starts the process group under torchrun (NCCL on
    GPUs, gloo elsewhere). device_type '' = detect.

    Returns (ddp_rank, ddp_local_rank, ddp_world_size, device).
    """
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed={seed}: need 0 or more, below 2^63", "--seed=42")
    device_type = device_type or autodetect_device_type()
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not available.get(device_type):
        usable = [name for name, ok in available.items() if ok]
        raise UserError(f"device_type={device_type} is not available here", f"use one of {', '.join(usable)}")
    ddp_rank, ddp_local_rank, ddp_world_size = get_dist_info()
    if device_type == "cuda" and ddp_local_rank >= torch.cuda.device_count():
        num_gpus = torch.cuda.device_count()
        raise UserError(f"process {ddp_local_rank} of this machine has no GPU: there are {num_gpus}",
                        f"torchrun --nproc_per_node={num_gpus}, or NPROC={num_gpus} bash speedrun.sh")
    device = torch.device(device_type, ddp_local_rank) if device_type == "cuda" else torch.device(device_type)
    if device_type == "cpu":
        keep_freed_memory()
        _share_cores(ddp_world_size)
    if device_type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
    torch.manual_seed(seed)
    if ddp_world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    return ddp_rank, ddp_local_rank, ddp_world_size, device


def compute_cleanup():
    """Leave the process group, if `compute_init` joined one, all ranks at once: else one may abort (dev/LOG.md)."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def keep_freed_memory():
    """
    Ask glibc to keep large freed blocks instead of returning them: on a CPU every training step frees and takes
    the same buffers, and faulting fresh pages in costs more than the arithmetic on them. Costs up to 1 GB of
    resident memory. A no-op where the C library has no mallopt.
    """
    try:
        libc = ctypes.CDLL(None)
        for option, value in ((-3, 2**30), (-1, 2**30), (-2, 2**26)):  # M_MMAP_THRESHOLD, M_TRIM_, M_TOP_PAD
            libc.mallopt(option, value)
    except (AttributeError, OSError, TypeError):
        pass


def _share_cores(world_size):
    """torchrun sets OMP_NUM_THREADS=1; on a CPU the ranks of a machine share its cores instead."""
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if world_size > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world_size))


def synchronize(device):
    """Wait for a GPU's queued work, so that a clock read afterwards is honest. A no-op on CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory_bytes(device):
    """Most memory in use so far: the GPU's allocator on CUDA, the resident set of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # POSIX only
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# Dense bf16 peak in FLOP/s, from the vendors' data sheets (SXM parts unless named; without sparsity). The first
# name that fits counts.
PEAK_FLOPS = {"B200": 2.25e15, "H200 NVL": 835e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12,
              "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L4": 121e12,
              "A10G": 70e12, "RTX 5090": 209e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


def get_peak_flops(device, dtype):
    """
    (FLOP/s, 'data sheet' | 'measured'): what MFU is a fraction of. Known GPUs in 16 bits come from the table,
    anything else is timed on a matrix product of the dtype that training uses.
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        for key, flops in PEAK_FLOPS.items():
            if re.search(rf"\b{key}\b", name) and "Laptop" not in name:  # those have fewer units of the same name
                return flops, "data sheet"
    best_flops, size = 0.0, 1024
    a, out = torch.ones(2, size, size, device=device, dtype=dtype)
    end = time.perf_counter() + 0.5
    while best_flops == 0 or time.perf_counter() < end:  # the best of half a second: others share the machine
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, a, out=out)
        synchronize(device)
        seconds = time.perf_counter() - start
        best_flops = max(best_flops, 2 * size**3 / seconds)
        if seconds < 0.02 and size < 8192:  # too small to keep the device busy
            size *= 2
            a, out = torch.ones(2, size, size, device=device, dtype=dtype)
    return best_flops, "measured"


# -----------------------------------------------------------------------------
# Compilation, arithmetic


def compiles(device, setting=None):
    """Whether to torch.compile: never on a CPU, which has cpu_kernels.py; None = on a GPU with Triton."""
    if device.type == "cpu":
        return False
    return setting if setting is not None else device.type == "cuda" and HAS_TRITON


def ceil_div(a, b):
    """a / b, rounded up."""
    return -(-a // b)
