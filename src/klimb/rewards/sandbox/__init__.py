"""Where code of the policy's is run: no network, no files of yours, no other process, bounded time and memory.

The strongest tier that this machine has is taken, once an escape test has failed in it::

    bubblewrap    own namespaces and file system (bwrap), with the filter of system calls and the rlimits below
    landlock      Landlock for the files, a seccomp filter of what is allowed, rlimits
    unsafe_local  rlimits and a deadline. Against accidents only; it has to be asked for

What the code can do in the first two: compute, with threads and the standard library, read the files of the Python that
runs it, and print. It cannot write a file, start a process or a program, open a socket, or signal another process; the
names and sizes of files are hidden by bubblewrap alone. Errors of the kernel are not guarded against.
"""

from klimb.rewards.sandbox.run import Kind, Sandbox, Verdict
from klimb.rewards.sandbox.tiers import open_sandbox

__all__ = ["Kind", "Sandbox", "Verdict", "open_sandbox"]
