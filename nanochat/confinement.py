"""
The walls of the sandbox (execution.py), which a process raises around itself:

    limits    memory, CPU time, size and number of files; it dies with its parent
    landlock  no file but the standard library, /dev/null and the working folder (Linux 5.13, newer)
    seccomp   no system call except those of SYSCALLS and ARGUMENTS (x86_64 and aarch64): threads,
              but no processes
"""

import ctypes
import os
import struct
import sys

WALLS = ("limits", "landlock", "seccomp")
MAX_FILE_BYTES = 16 * 1024**2  # that a program may write
MAX_OPEN_FILES = 32


def _call_libc(name, *arguments):
    """Call a function of libc that returns -1 and sets errno if it fails: OSError. Linux only."""
    if sys.platform != "linux":
        raise OSError(f"{name} needs Linux")
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    # ctypes would pass an int as 32 bits
    words = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result = function(*words)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name} {arguments[0]} was refused")
    return result


# -----------------------------------------------------------------------------
# Resource limits


def _set_limits(timeout, max_memory_bytes, parent_pid):
    if sys.platform == "linux":
        _call_libc("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS: the other walls need it
        _call_libc("prctl", 1, 9)  # PR_SET_PDEATHSIG: SIGKILL, when the thread that started us ends
        if os.getppid() != parent_pid:  # it ended before that call
            os._exit(1)

    import resource  # not at the top: it exists on POSIX systems only
    limits = {
        "CORE": 1,  # byte: too little for a core file. With 0 a program that collects them gets one
        "NOFILE": MAX_OPEN_FILES,
        "FSIZE": MAX_FILE_BYTES,
        "CPU": int(timeout) + 2,  # seconds
        "AS": max_memory_bytes,  # last, since macOS refuses it
    }
    if sys.platform != "linux":  # there it would forbid threads, too, and seccomp forbids processes
        limits = {"NPROC": 1, **limits}
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


# -----------------------------------------------------------------------------
# Landlock (linux/landlock.h): deny every right on files, then allow a few in some folders

# version of the interface -> rights on files that it knows, bytes of the struct that it takes
LANDLOCK_VERSIONS = {1: (13, 8), 2: (14, 8), 3: (15, 8), 4: (15, 16), 5: (16, 16)}
LANDLOCK_NEWEST = (16, 24)

WRITE_FILE = 0x2
READ_FILE = 0x4
READ_DIR = 0x8
REMOVE_FILE = 0x20
MAKE_FILE = 0x100
TRUNCATE = 0x4000


def _restrict_files(folder):
    # The struct has three words of rights to deny: on files, on TCP, and on processes outside
    # (sockets, signals)
    # landlock_create_ruleset: with these arguments it returns its version
    version = _call_libc("syscall", 444, None, 0, 1)
    num_rights, struct_bytes = LANDLOCK_VERSIONS.get(version, LANDLOCK_NEWEST)
    every_right = (1 << num_rights) - 1
    denied = struct.pack("QQQ", every_right, 3, 3)[:struct_bytes]
    ruleset = _call_libc("syscall", 444, denied, len(denied), 0)

    # What is allowed. No folders and links in the working folder, so that the parent can add up its
    # size quickly
    library = [
        *sys.path,
        sys.base_prefix + "/lib",
        "/lib",
        "/lib64",
        "/usr/lib",
        "/usr/lib64",
        "/etc/ld.so.cache",
    ]
    rights = dict.fromkeys(library, READ_FILE | READ_DIR)
    rights["/dev/null"] = READ_FILE | WRITE_FILE
    rights[folder] = READ_FILE | READ_DIR | WRITE_FILE | REMOVE_FILE | MAKE_FILE | TRUNCATE
    for path, allowed in rights.items():
        if not os.path.exists(path):
            continue
        if not os.path.isdir(path):
            allowed &= ~READ_DIR  # on a file it would be an error
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", allowed & every_right, fd)
        _call_libc("syscall", 445, ruleset, 1, rule, 0)  # landlock_add_rule: a path, all below
        os.close(fd)

    _call_libc("syscall", 446, ruleset, 0)  # landlock_restrict_self
    os.close(ruleset)


# -----------------------------------------------------------------------------
# seccomp: a filter in the kernel's BPF (linux/seccomp.h, linux/bpf_common.h) that looks at every
# system call

# The only system calls that a program may make: `name x86_64 aarch64`, `-` where the architecture
# has no such call. What Landlock does not see stays off the list: chmod, chown, utime, truncate,
# setrlimit, kill.
SYSCALLS = """
read 0 63, write 1 64, open 2 -, close 3 57, stat 4 -, fstat 5 80, lstat 6 -, poll 7 -, lseek 8 62,
mmap 9 222, mprotect 10 226, munmap 11 215, brk 12 214, rt_sigaction 13 134, rt_sigprocmask 14 135,
rt_sigreturn 15 139, pread64 17 67, pwrite64 18 68, readv 19 65, writev 20 66, access 21 -,
pipe 22 -, select 23 -, sched_yield 24 124, mremap 25 216, madvise 28 233, dup 32 23, dup2 33 -,
pause 34 -, nanosleep 35 101, getitimer 36 102, alarm 37 -, setitimer 38 103, getpid 39 172,
sendfile 40 71, exit 60 93, uname 63 160, fsync 74 82, fdatasync 75 83, ftruncate 77 46,
getcwd 79 17, chdir 80 49, fchdir 81 50, rename 82 -, unlink 87 -, readlink 89 -, umask 95 166,
gettimeofday 96 169, getrusage 98 165, sysinfo 99 179, times 100 153, getuid 102 174,
getgid 104 176, geteuid 107 175, getegid 108 177, getppid 110 173, sigaltstack 131 132,
gettid 186 178, time 201 -, futex 202 98, sched_getaffinity 204 123, getdents64 217 61,
restart_syscall 219 128, clock_gettime 228 113, clock_getres 229 114, clock_nanosleep 230 115,
exit_group 231 94, openat 257 56, newfstatat 262 79, unlinkat 263 35, renameat 264 38,
readlinkat 267 78, faccessat 269 48, pselect6 270 72, ppoll 271 73, set_robust_list 273 99,
dup3 292 24, pipe2 293 59, renameat2 316 276, getrandom 318 278, statx 332 291, rseq 334 293,
faccessat2 439 439
"""

# Of these calls only some: `name x86_64 aarch64` -> which argument, its allowed values
ARGUMENTS = {
    # commands up to F_SETLKW, and F_DUPFD_CLOEXEC. F_SETOWN (8) would send signals to any process
    "fcntl 72 25": (1, (*range(8), 1030)),
    # TCGETS (is it a terminal?), FIONCLEX, FIOCLEX. Others change a file's flags
    "ioctl 16 29": (1, (0x5401, 0x5450, 0x5451)),
    # the flags with which glibc and musl start a thread. Without CLONE_THREAD it is a process
    "clone 56 220": (0, (0x3D0F00, 0x7D0F00)),
}
CLONE3 = 435  # on both architectures. A filter cannot see its flags; where it is missing, libc
              # takes clone

# machine -> column in SYSCALLS and ARGUMENTS, AUDIT_ARCH constant (linux/audit.h)
ARCHITECTURES = {"x86_64": (1, 0xC000003E), "aarch64": (2, 0xC00000B7)}

# Instructions, and what a filter can return
LOAD_WORD = 0x20
IF_EQUAL = 0x15
RETURN = 0x06
ALLOW = 0x7FFF0000
FAIL_WITH_EPERM = 0x00050001
FAIL_WITH_ENOSYS = 0x00050026
KILL_PROCESS = 0x80000000


def seccomp_filter(machine):
    """
    The filter as instructions (code, jump if true, jump if false, constant). Jumps count
    instructions.
    """
    column, architecture = ARCHITECTURES[machine]

    # Other architectures' numbers mean other calls (32-bit code by int 0x80). The x32 calls set bit
    # 30 of the number, so they are on no list
    program = [
        (LOAD_WORD, 0, 0, 4),  # the architecture, by its offset in struct seccomp_data
        (IF_EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, KILL_PROCESS),
        (LOAD_WORD, 0, 0, 0),  # the number of the call
    ]
    for entry in SYSCALLS.replace("\n", " ").split(","):
        number = entry.split()[column]
        if number != "-":
            program.append((IF_EQUAL, 0, 1, int(number)))
            program.append((RETURN, 0, 0, ALLOW))

    program += [(IF_EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, FAIL_WITH_ENOSYS)]

    # Of a call in ARGUMENTS the argument is looked at, else these instructions are jumped over
    for entry, (argument, values) in ARGUMENTS.items():
        number = int(entry.split()[column])
        checks = [(LOAD_WORD, 0, 0, 16 + 8 * argument)]  # its offset in struct seccomp_data
        for value in values:
            checks.append((IF_EQUAL, 0, 1, value))
            checks.append((RETURN, 0, 0, ALLOW))
        checks.append((RETURN, 0, 0, FAIL_WITH_EPERM))
        program += [(IF_EQUAL, 0, len(checks), number), *checks]

    program.append((RETURN, 0, 0, FAIL_WITH_EPERM))
    return program


def _restrict_system_calls():
    machine = os.uname().machine
    if machine not in ARCHITECTURES or struct.calcsize("P") != 8:
        raise OSError(f"no table of system calls for {machine}")
    instructions = [struct.pack("HBBI", *instruction) for instruction in seccomp_filter(machine)]
    code = ctypes.create_string_buffer(b"".join(instructions))
    program = struct.pack("HP", len(instructions), ctypes.addressof(code))
    sock_fprog = ctypes.create_string_buffer(program)
    _call_libc("prctl", 22, 2, sock_fprog)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


# -----------------------------------------------------------------------------
# All of them


def raise_walls(timeout, max_memory_bytes, parent_pid):
    """Raise the walls that this system has. Returns their names, for the parent."""
    steps = {
        "limits": lambda: _set_limits(timeout, max_memory_bytes, parent_pid),
        "landlock": lambda: _restrict_files(os.getcwd()),
        "seccomp": _restrict_system_calls,
    }
    walls = []
    for name, raise_wall in steps.items():
        try:
            raise_wall()
            walls.append(name)
        except (AttributeError, ImportError, OSError, ValueError):
            pass
    return walls
