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
        # 20th field after the program's name (man 5 proc_pid_stat): clock ticks from boot to start
        stat = Path("/proc/self/stat").read_text("utf-8")
        fields = stat.rpartition(")")[2].split()
        ticks_per_s = os.sysconf("SC_CLK_TCK")
        started = int(fields[19]) / ticks_per_s
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - started
    else:
        # ps prints the age as [[days-]hours:]minutes:seconds
        pid = str(os.getpid())
        elapsed = first_line_of("ps", "-o", "etime=", "-p", pid)
        parts = re.findall(r"\d+", elapsed)
        age = 0
        for part, seconds in zip(reversed(parts), (1, 60, 3600, 86400), strict=False):
            age += int(part) * seconds
    return time.time() - age


def get_command(world_size):
    """
    The command line of this process. torchrun does not pass on its own flags: they are rebuilt.
    """
    # orig_argv has the interpreter and its -m, which sys.argv has lost
    words = list(sys.orig_argv)
    words[0] = os.path.basename(words[0])

    if world_size > 1 and "-m" in words:
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        # every node of a run has the same number of processes
        num_nodes = world_size // per_node
        nodes = "--standalone" if num_nodes == 1 else f"--nnodes={num_nodes}"
        start = words.index("-m") + 1
        module, *flags = words[start:]
        words = [
            "torchrun",
            nodes,
            f"--nproc_per_node={per_node}",
            "-m",
            module,
            "--",
            *flags,
        ]
    return shlex.join(words)


def first_line_of(*command):
    """The first line that a program prints, or "" if the program is missing or fails."""
    folder = Path(__file__).parent  # so git finds this checkout, also if started elsewhere
    try:
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=10,  # seconds
            cwd=folder,
        )
    except (OSError, subprocess.SubprocessError):  # missing, or too slow
        return ""
    if result.returncode != 0:
        return ""
    return result.stdout.strip().split("\n")[0]


def get_environment():
    """Code, machine and packages of the run, for the report."""
    # GPUs of one kind share an entry: "8 x ..."
    num_gpus = torch.cuda.device_count()
    names = []
    for i in range(num_gpus):
        device = torch.cuda.get_device_properties(i)
        gib = device.total_memory / 2**30
        names.append(f"{device.name}, {gib:.0f} GiB")
    gpus = [f"{count} x {name}" for name, count in Counter(names).items()]

    # versions; the driver's from its own tool
    software = [
        f"Python {platform.python_version()}",
        f"torch {torch.__version__}",
    ]
    if torch.version.cuda:
        software.append(f"CUDA {torch.version.cuda}")
    software.append(platform.platform())
    # the driver limits which CUDA versions run
    if num_gpus:
        driver = first_line_of(
            "nvidia-smi",
            "--query-gpu=driver_version",
            "--format=csv,noheader",
        )
        software.append(f"driver {driver or 'unknown'}")

    # a set, since a package may be found twice
    packages = set()
    for package in importlib.metadata.distributions():
        name = package.metadata["Name"]
        packages.add(f"{name} {package.version}")
    return {
        "num_gpus": num_gpus,
        "facts": {
            "Code": describe_code(),
            "GPU": ", ".join(gpus) or "none",
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
    text = f"commit {commit} on {branch}"
    # new files that git does not know do not count
    changes = first_line_of("git", "status", "--porcelain", "--untracked-files=no")
    if changes:
        text += " with local changes"
    return text


def describe_cpu():
    """Model, cores and memory, for example "AMD EPYC 9454, 2 cores, 24 GiB memory"."""
    # macOS has a command for the name, Linux a file
    name = first_line_of("sysctl", "-n", "machdep.cpu.brand_string")
    if os.path.exists("/proc/cpuinfo"):
        cpuinfo = Path("/proc/cpuinfo").read_text("utf-8")
        match = re.search(r"model name\s*: (.*)", cpuinfo)
        name = match[1] if match else ""  # some ARM kernels name none

    # memory where the system can tell it
    parts = [
        name or platform.machine(),
        f"{os.cpu_count()} cores",
    ]
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" in names:
        num_pages = os.sysconf("SC_PHYS_PAGES")
        memory = num_pages * os.sysconf("SC_PAGE_SIZE")  # bytes
        parts.append(f"{memory / 2**30:.0f} GiB memory")
    return ", ".join(parts)
