"""What a process gives up before it runs code that nobody has read: rlimits, capabilities, files, system calls.

`Confinement` is prepared once, by the zygote; `enter` is called by each of its children and cannot be taken back.
The seccomp filter is a list of what is allowed: reading files, memory, threads, clocks. There are no new processes,
no programs, no sockets, no signals to others and nothing that changes a file, so that the limits of one process
are the limits of the sample. Landlock, where it is the tier, says which files can be read. The numbers are those
of x86_64, the only machine that this is written for; others get no sandbox.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import struct
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SECCOMP_MODE_FILTER = 2
CAPSET, LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 126, 444, 445, 446
AUDIT_ARCH_X86_64 = 0xC000003E
LOAD, JUMP_EQUAL, JUMP_ABOVE, JUMP_FROM, JUMP_SET, RETURN = 0x20, 0x15, 0x25, 0x35, 0x45, 0x06
ALLOW, KILL = 0x7FFF0000, 0x80000000

ALLOWED = {
    "read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8, "mmap": 9,
    "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15,
    "pread64": 17, "readv": 19, "writev": 20, "access": 21, "select": 23, "sched_yield": 24, "mremap": 25,
    "madvise": 28, "nanosleep": 35, "getitimer": 36, "alarm": 37, "setitimer": 38, "getpid": 39, "exit": 60,
    "uname": 63, "getdents": 78, "getcwd": 79, "gettimeofday": 96, "getrlimit": 97,
    "getrusage": 98, "sysinfo": 99, "times": 100, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108,
    "getppid": 110, "sigaltstack": 131, "gettid": 186, "time": 201, "futex": 202, "sched_getaffinity": 204,
    "getdents64": 217, "set_tid_address": 218, "restart_syscall": 219, "clock_gettime": 228, "clock_getres": 229,
    "clock_nanosleep": 230, "exit_group": 231, "newfstatat": 262, "faccessat": 269,
    "pselect6": 270, "ppoll": 271, "set_robust_list": 273, "getrandom": 318, "statx": 332, "rseq": 334,
    "faccessat2": 439,
}  # fmt: skip
OPEN, IOCTL, CLONE, FCNTL, OPENAT, CLONE3 = 2, 16, 56, 72, 257, 435
CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | 0x400000  # the last is __O_TMPFILE
CLONE_THREAD = 0x10000
FCNTL_COMMANDS = (0, 1, 2, 3, 1030)  # duplicate, get and set close-on-exec, get flags
IOCTL_COMMANDS = (0x5401, 0x5413, 0x5450, 0x5451)  # is it a terminal, how wide, close-on-exec

READ_FILE, READ_DIR = 1 << 2, 1 << 3
FS_RIGHTS = ((1, 13), (2, 14), (3, 15), (5, 16))
"""Landlock's ABI and how many kinds of access it can forbid."""


class Unconfined(Exception):
    """A limit that this machine does not have."""


class Confinement:
    """tier: "bubblewrap", "landlock", or "unsafe_local", which has rlimits only. Raises Unconfined."""

    def __init__(self, tier: str, readable: Sequence[str], memory: int) -> None:
        self.tier = tier
        self._memory = memory
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._ruleset: int | None = None
        if tier == "unsafe_local":
            return
        if sys.platform != "linux" or platform.machine() != "x86_64" or struct.calcsize("P") != 8:
            raise Unconfined(f"{sys.platform} on {platform.machine()} has no filter of system calls here")
        if tier == "landlock":
            self._ruleset = self._landlock(readable)
        self._filter = ctypes.create_string_buffer(assembled())

    @property
    def descriptors(self) -> list[int]:
        """What has to stay open until `enter`."""
        return [] if self._ruleset is None else [self._ruleset]

    def moved(self, first: int) -> None:
        """`descriptors` are `first`, `first` + 1, … from now on."""
        if self._ruleset is not None:
            self._ruleset = first

    def limit(self, cpu: int) -> None:
        """The limits of this process, in seconds and bytes. Before anything that may fail for their sake."""
        wanted = {
            resource.RLIMIT_CPU: cpu, resource.RLIMIT_AS: self._memory, resource.RLIMIT_FSIZE: 0,
            resource.RLIMIT_NOFILE: 32, resource.RLIMIT_CORE: 0,
        }  # fmt: skip
        for limit, value in wanted.items():
            try:
                resource.setrlimit(limit, (value, value))
            except (ValueError, OSError):  # macOS knows no RLIMIT_AS
                if self.tier != "unsafe_local":
                    raise

    def enter(self) -> None:
        """Give up everything else, for good. Raises Unconfined: the process must not go on then."""
        if self.tier == "unsafe_local":
            return
        self._prctl(PR_SET_DUMPABLE, 0)
        self._prctl(PR_SET_NO_NEW_PRIVS, 1)
        header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
        self._syscall("the capabilities cannot be dropped", CAPSET, header, nothing)
        if self._ruleset is not None:
            self._syscall("Landlock refused", LANDLOCK_RESTRICT, self._ruleset, 0)
            os.close(self._ruleset)
        program = ctypes.create_string_buffer(
            struct.pack("HxxxxxxQ", (len(self._filter) - 1) // 8, ctypes.addressof(self._filter))
        )
        self._prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(program))

    def die_with_parent(self, signal: int) -> None:
        if sys.platform == "linux":
            self._prctl(PR_SET_PDEATHSIG, signal)

    def _landlock(self, readable: Sequence[str]) -> int:
        """The descriptor of a ruleset: what is not below `readable` cannot be opened, and nothing be changed."""
        abi = self._libc.syscall(LANDLOCK_CREATE, None, 0, 1)
        if abi < 1:
            raise Unconfined("this kernel is without Landlock (Linux 5.13, and `landlock` among the security modules)")
        files = (1 << max(bits for known, bits in FS_RIGHTS if known <= abi)) - 1
        attributes = struct.pack("QQQ", files, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
        size = 24 if abi >= 6 else 16 if abi >= 4 else 8
        ruleset = self._syscall("Landlock refused", LANDLOCK_CREATE, attributes[:size], size, 0)
        for path in readable:
            try:
                place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                rights = READ_FILE | (READ_DIR if os.path.isdir(path) else 0)
                rule = struct.pack("=Qi", rights, place)
                self._syscall("Landlock refused", LANDLOCK_ADD, ruleset, 1, rule, 0)
            finally:
                os.close(place)
        return ruleset

    def _prctl(self, option: int, *values: int) -> None:
        padded = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
        if self._libc.prctl(option, *padded) != 0:
            raise Unconfined(f"prctl {option}: {os.strerror(ctypes.get_errno())}")

    def _syscall(self, what: str, number: int, *values: int | bytes) -> int:
        done = int(self._libc.syscall(ctypes.c_long(number), *values))
        if done < 0:
            raise Unconfined(f"{what}: {os.strerror(ctypes.get_errno())}")
        return done


def assembled() -> bytes:
    """The filter as struct sock_filter[]. Another architecture kills; what is not allowed fails with EPERM."""
    lines = [(LOAD, 0, 0, 4), (JUMP_EQUAL, 1, 0, AUDIT_ARCH_X86_64), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    for number, flags in ((OPEN, 1), (OPENAT, 2)):
        lines += _case(number, [_argument(flags), (JUMP_SET, 0, 1, CHANGES), _fails(errno.EACCES), _fails(0)])
    lines += _case(CLONE, [_argument(0), (JUMP_SET, 1, 0, CLONE_THREAD), _fails(errno.EPERM), _fails(0)])
    lines += _case(CLONE3, [_fails(errno.ENOSYS)])  # glibc tries clone then, whose flags a filter can read
    for number, commands in ((FCNTL, FCNTL_COMMANDS), (IOCTL, IOCTL_COMMANDS)):
        tests = [test for command in commands for test in ((JUMP_EQUAL, 0, 1, command), _fails(0))]
        lines += _case(number, [_argument(1), *tests, _fails(errno.EPERM)])
    lines += _among(_ranges(sorted(ALLOWED.values())))
    return b"".join(struct.pack("HBBI", *line) for line in lines)


Line = tuple[int, int, int, int]


def _case(number: int, lines: list[Line]) -> list[Line]:
    """`lines` where the system call is `number`. Each of them ends with a return."""
    return [(JUMP_EQUAL, 0, len(lines), number), *lines]


def _ranges(numbers: Sequence[int]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for number in numbers:
        first = found.pop()[0] if found and found[-1][1] == number - 1 else number
        found.append((first, number))
    return found


def _among(ranges: list[tuple[int, int]]) -> list[Line]:
    """Allows what is in `ranges`, by halves: the kernel goes through the filter for every number when it is set."""
    if len(ranges) == 1:
        ((first, last),) = ranges
        return [(JUMP_FROM, 0, 2, first), (JUMP_ABOVE, 1, 0, last), _fails(0), _fails(errno.EPERM)]
    half = len(ranges) // 2
    below = _among(ranges[:half])
    return [(JUMP_FROM, len(below), 0, ranges[half][0]), *below, *_among(ranges[half:])]


def _argument(index: int) -> Line:
    return (LOAD, 0, 0, 16 + 8 * index)


def _fails(number: int) -> Line:
    """Return with this errno; 0 allows."""
    return (RETURN, 0, 0, 0x00050000 | number if number else ALLOW)
