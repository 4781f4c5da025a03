"""
Facts of a run that its report shows: when it started, its command, the code, the machine.
"""

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch


def get_process_start():
    """When this process, and so the stage, began: seconds since 1970, as recorded by the system."""
    if sys.platform == "linux":
        # the 20th field after the program's name (man 5 proc_pid_stat): clock ticks from boot to
        # the start
        fields = Path("/proc/self/stat").read_text("utf-8").rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - started
    else:
        # ps prints the age as [[days-]hours:]minutes:seconds
        parts = re.findall(r"\d+", first_line_of("ps", "-o", "etime=", "-p", str(os.getpid())))
        units = (1, 60, 3600, 86400)
        age = sum(int(part) * unit for part, unit in zip(reversed(parts), units, strict=False))
    return time.time() - age


def get_command(world_size):
    """
    The command line of this process. torchrun does not pass its own flags on: they are rebuilt.
    """
    # orig_argv: with the interpreter and its -m, which sys.argv has lost
    words = [os.path.basename(sys.orig_argv[0]), *sys.orig_argv[1:]]
    if world_size > 1 and "-m" in words:
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        nodes = "--standalone" if per_node == world_size else f"--nnodes={world_size // per_node}"
        module, *flags = words[words.index("-m") + 1:]
        words = ["torchrun", nodes, f"--nproc_per_node={per_node}", "-m", module, "--", *flags]
    return shlex.join(words)


def first_line_of(*command):
    """The first line that a program prints, or "" if the program is missing or fails."""
    folder = Path(__file__).parent  # so git finds this checkout, also if started elsewhere
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, cwd=folder)
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.strip().split("\n")[0] if result.returncode == 0 else ""


def get_environment():
    """Code, machine and packages of the run, for the report."""
    # equal GPUs share an entry: "8 x ..."
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    gpus = Counter(f"{device.name}, {device.total_memory / 2**30:.0f} GiB" for device in devices)

    # versions; the driver as its own tool states it
    software = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    if torch.version.cuda:
        software.append(f"CUDA {torch.version.cuda}")
    software.append(platform.platform())
    if devices:
        driver = first_line_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        software.append(f"driver {driver or 'unknown'}")
    installed = importlib.metadata.distributions()
    packages = {f"{package.metadata['Name']} {package.version}" for package in installed}
    return {
        "num_gpus": len(devices),
        "facts": {
            "Code": describe_code(),
            "GPU": ", ".join(f"{count} x {name}" for name, count in gpus.items()) or "none",
            "CPU": describe_cpu(),
            "Software": ", ".join(software),
        },
        "packages": sorted(packages, key=str.lower),
    }


def describe_code():
    """The commit, for example "commit 1a2b3c4 on main with local changes"."""
    commit = first_line_of("git", "rev-parse", "--short", "HEAD")
    if not commit:
        return "not a git checkout"
    branch = first_line_of("git", "rev-parse", "--abbrev-ref", "HEAD")
    changes = first_line_of("git", "status", "--porcelain", "--untracked-files=no")
    return f"commit {commit} on {branch}" + (" with local changes" if changes else "")


def describe_cpu():
    """Model, cores and memory, for example "AMD EPYC 9454, 2 cores, 24 GiB memory"."""
    # macOS has a command for the name, Linux a file
    name = first_line_of("sysctl", "-n", "machdep.cpu.brand_string")
    if os.path.exists("/proc/cpuinfo"):
        match = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text("utf-8"))
        name = match[1] if match else ""  # some ARM kernels name none

    # memory where the system can tell it
    parts = [name or platform.machine(), f"{os.cpu_count()} cores"]
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # bytes
        parts.append(f"{memory / 2**30:.0f} GiB memory")
    return ", ".join(parts)
