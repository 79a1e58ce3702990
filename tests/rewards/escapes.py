"""What code tries that wants out of the sandbox, or a verdict that it has not earned. For test_sandbox_escapes.py.

An attempt is the body of a function: it raises OSError where the sandbox holds. `folder` is a folder of the
trainer's with a file `canary` in it, `call` is syscall(2), `libc` the C library.
"""

ATTEMPT = """
import contextlib, ctypes, os, resource, signal, socket, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)

def call(number, *values):
    return done(libc.syscall(ctypes.c_long(number), *values))

def done(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result

def no(condition):
    if not condition:
        raise OSError("there is nothing to be had")

def attempt(folder, canary):
{body}

def f(folder):
    try:
        attempt(folder, folder + "/canary")
    except (OSError, RuntimeError, ValueError, MemoryError) as error:
        return "contained"
    return "escaped"
"""

ATTEMPTS = {
    # files that are read
    "read a file of the user's": "open(canary).read()",
    "read /etc/passwd": "open('/etc/passwd').read()",
    "list the home folder": "os.listdir(os.path.expanduser('~')); os.listdir('/root'); os.listdir('/home')",
    "read the environment": "no('KLIMB_SECRET' in os.environ)",
    "read its own past in /proc": "open('/proc/self/environ', 'rb').read()",
    "read the environment of process 1": "open('/proc/1/environ', 'rb').read()",
    "read the memory of its parent": "open(f'/proc/{os.getppid()}/mem', 'rb').read(1)",
    "read the memory of its parent by a system call": "call(310, os.getppid(), None, 0, None, 0, 0)",
    "reach its descriptors by /proc": "os.open('/proc/self/fd/3', os.O_RDWR)",
    "take a descriptor of its parent's": "fd = call(434, os.getppid(), 0); call(438, fd, 3, 0)",
    "the link to what its parent runs": "os.readlink(f'/proc/{os.getppid()}/exe')",
    "climb by ..": "open('/usr/lib/' + '../' * 9 + canary).read()",
    # files that are written
    "overwrite a file": "open(canary, 'w').write('mine')",
    "append by openat2": "call(437, -100, canary.encode(), (ctypes.c_uint64 * 3)(0o2001, 0, 0), 24)",
    "write a new file": "open(folder + '/new', 'w')",
    "write to /tmp": "open('/tmp/klimb-escape', 'w')",
    "write to /dev/shm": "open('/dev/shm/klimb-escape', 'w')",
    "a file without a name": "os.open('/tmp', os.O_TMPFILE | os.O_RDWR)",
    "a file in memory": "os.memfd_create('escape')",
    "a file of 10 GB": "os.posix_fallocate(os.open('/tmp/klimb-escape', os.O_RDWR | os.O_CREAT), 0, 10 << 30)",
    "a sparse file": "os.truncate(canary, 1 << 40)",
    "many folders": "[os.mkdir(f'/tmp/klimb-escape-{i}') for i in range(1000)]",
    "a symbolic link": "os.symlink(canary, folder + '/new')",
    "a hard link": "os.link(canary, folder + '/new')",
    "rename": "os.rename(canary, folder + '/new')",
    "delete": "os.unlink(canary)",
    "change the mode": "os.chmod(canary, 0o777)",
    "change the owner": "os.chown(canary, 1, 1)",
    "change the time": "os.utime(canary, (0, 0))",
    "write into the import path": "open(os.path.dirname(os.__file__) + '/klimb_escape.py', 'w')",
    # processes
    "fork": "os.fork() or os._exit(0)",
    "vfork": "call(58)",
    "fork by clone": "call(56, 17, None, None, None, None) or os._exit(0)",
    "fork by clone3": "call(435, (ctypes.c_uint64 * 8)(0, 0, 0, 0, 17), 64) or os._exit(0)",
    "a fork bomb": "[os.fork() for _ in range(12)]",
    "a daemon": "os.setsid(); os.fork() or time.sleep(600)",
    "run a program": "subprocess.run(['/bin/true'])",
    "become a program": "os.execv('/bin/true', ['true'])",
    "a bomb of threads": "[threading.Thread(target=time.sleep, args=(60,), daemon=True).start() for _ in range(10000)]",
    # signals and tracing
    "kill everything": "os.kill(-1, signal.SIGKILL)",
    "kill its parent": "os.kill(os.getppid(), signal.SIGKILL)",
    "kill its group": "os.killpg(0, signal.SIGKILL)",
    "stop its neighbours": "for pid in range(os.getpid() - 20, os.getpid() + 20): os.kill(pid, signal.SIGSTOP)",
    "signal by a queue": "call(129, os.getppid(), 9, ctypes.create_string_buffer(128))",
    "signal by ownership of a descriptor": "import fcntl; fcntl.fcntl(3, fcntl.F_SETOWN, os.getppid())",
    "trace its parent": "done(libc.ptrace(16, os.getppid(), 0, 0))",
    "let itself be traced": "done(libc.ptrace(0, 0, 0, 0))",
    # the network
    "TCP": "socket.create_connection(('127.0.0.1', 1), timeout=1)",
    "UDP": "socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 53))",
    "a UNIX socket": "socket.socket(socket.AF_UNIX).connect('/run/klimb.sock')",
    "an abstract UNIX socket": "socket.socket(socket.AF_UNIX).bind(chr(0) + 'klimb')",
    "netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "names": "socket.getaddrinfo('example.com', 80)",
    # limits and rights
    "raise its memory": "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "lower the limits of its parent": "call(302, os.getppid(), 0, (ctypes.c_uint64 * 2)(0, 0), None)",
    "another user": "os.setuid(0)",
    "new namespaces": "call(272, 0x10000000)",
    "mount": "done(libc.mount(b'x', b'/tmp', b'tmpfs', 0, None))",
    "another root": "os.chroot('/tmp')",
    "programs for the kernel": "call(321, 0, None, 0)",
    "io_uring": "call(425, 8, ctypes.create_string_buffer(120))",
    "the kernel's keys": "call(248, b'user', b'x', b'y', 1, -3)",
    "faults for another": "call(323, 0)",
    "system calls of another numbering": "call(0x40000000 + 39)",
    "outlive its parent": "done(libc.prctl(1, 0, 0, 0, 0))",
    "gigabytes": "bytearray(1 << 31)",
    "gigabytes by mmap": "import mmap; mmap.mmap(-1, 1 << 31)",
}
"""Name -> body. The test is passed by returning "contained"."""

SECRET = "klimb-secret-"

CHEATS = {
    "prints that it passed": "print('passed'); print('OK', flush=True)\ndef f(x): return None",
    "ends with 0 when it is loaded": "import os; os._exit(0)",
    "ends with 0 when it is called": "def f(x):\n    import os; os._exit(0)",
    "sys.exit(0)": "import sys; sys.exit(0)",
    "sys.exit(0) when it is called": "def f(x):\n    import sys; sys.exit(0)",
    "at exit": "import atexit, os\natexit.register(lambda: os._exit(0))\ndef f(x): return None",
    "equal to everything": "class E(str):\n    def __eq__(s, o): return True\n    __hash__ = str.__hash__\n"
    "def f(x): return E('')",
    "a list that equals everything": "class E(list):\n    def __eq__(s, o): return True\ndef f(x): return E([1])",
    "not comparable at all": "class E:\n    def __eq__(s, o): return True\ndef f(x): return E()",
    "patched builtins": "import builtins\nbuiltins.AssertionError = Exception\nbuiltins.isinstance = lambda *a: True\n"
    "builtins.str = lambda *a: 'x'\ndef f(x): return None",
    "patched modules": 'import json, sys\njson.dumps = lambda m: \'{"verdict": "ok"}\'\n'
    "for n in list(sys.modules): sys.modules[n] = None\ndef f(x): return None",
    "patched time": "import time\ntime.monotonic = time.time = lambda: 0.0\ndef f(x): return None",
    "its own harness, patched": "import sys\nfor n, m in list(sys.modules.items()):\n    if n.startswith('inside'):\n"
    "        m.encode = lambda v: True\n        m.MAX_FRAME = 1 << 40\ndef f(x): return None",
    "the grader's code, called": "import sys\ndef f(x):\n    g = sys.modules['inside.grader']\n"
    "    return g.write_frame(4, {'nonce': '', 'verdict': 'ok', 'passed': 1, 'failed': 0, 'why': ''})",
    "verdicts to every descriptor": "import json, os, struct\ndef f(x):\n"
    "    b = json.dumps({'verdict': 'ok', 'passed': 9, 'failed': 0, 'why': '', 'nonce': ''}).encode()\n"
    "    for fd in range(64):\n        try: os.write(fd, struct.pack('>I', len(b)) + b)\n        except OSError: pass",
    "garbage to every descriptor": "import os\nfor fd in range(64):\n    try: os.write(fd, b'\\xff' * 4096)\n"
    "    except OSError: pass\ndef f(x): return None",
    "closed descriptors": "import os; os.closerange(0, 64)\ndef f(x): return None",
    "what was asked, sent back": "import os\ndata = b''\ndef f(x):\n    os.write(4, b'\\0\\0\\0\\x02{}'); return x",
    "answers that were not asked for": "import json, os, struct\nb = json.dumps({'value': True}).encode()\n"
    "os.write(4, (struct.pack('>I', len(b)) + b) * 9)\ndef f(x): return None",
    "the tests, out of its own memory": f"import gc, sys\ndef f(x):\n    found = [s for s in map(str, gc.get_objects())"
    f" if {SECRET[:6]!r} + {SECRET[6:]!r} in s and 'gc.get' not in s]\n    return found[0] if found else None",
    "the tests, out of the frames above": "import sys\ndef f(x):\n    frame, seen = sys._getframe(), ''\n"
    "    while frame:\n        seen += str(frame.f_locals) + str(frame.f_globals.get('job')); frame = frame.f_back\n"
    f"    at = seen.find({SECRET!r})\n    return seen[at:at + 29] if at >= 0 else None",
    "a function of the test's, replaced": "def check(candidate): pass\ndef f(x): return None",
    "StopIteration, for a loop to end by": "def f(x): raise StopIteration",
    "an AssertionError": "def f(x): raise AssertionError",
    "an exception whose text fails": "class E(Exception):\n    def __str__(s): raise SystemExit\ndef f(x): raise E",
    "deep nesting": "def f(x):\n    a = []\n    for _ in range(100000): a = [a]\n    return a",
    "deep nesting by hand": "import os, struct\ndef f(x):\n    b = b'[' * 500000\n"
    "    os.write(4, struct.pack('>I', len(b)) + b)",
    "a frame of 4 GB": "import os\ndef f(x):\n    os.write(4, b'\\xff\\xff\\xff\\xff')",
    "an answer of 100 MB": "def f(x): return 'x' * 10**8",
    "an answer without end": "import itertools\ndef f(x): return itertools.count()",
    "an integer of a million digits": "def f(x): return 1 << 3_400_000",
    "a crash": "import ctypes\ndef f(x): ctypes.string_at(0)",
    "a bomb of memory": "def f(x):\n    a = [0]\n    while True: a += a",
    "source that breaks compilers": "f = " + "(" * 50_000,
    "no Python": "\0\ud800 def",
}
"""Name -> a module whose f(x) is asked for what it cannot know: the verdict has to be wrong."""

HANGS = {
    "a loop": "def f(x):\n    while True: pass",
    "a loop when it is loaded": "while True: pass",
    "a loop in C": "def f(x): return sum(iter(int, 1))",
    "sleep": "import time\ndef f(x): time.sleep(3600)",
    "deaf to signals": "import signal, time\nfor s in range(1, 32):\n"
    "    if s not in (9, 19): signal.signal(s, signal.SIG_IGN)\n"
    "def f(x):\n    while True:\n        try: time.sleep(1)\n        except BaseException: pass",
    "an answer that is begun": "import os, time\ndef f(x):\n    os.write(4, b'\\0\\0\\1\\0{'); time.sleep(3600)",
    "a flood of output": "import sys\ndef f(x):\n    while True:\n"
    "        print('x' * 10**6); print('y' * 10**6, file=sys.stderr)",
    "a lock": "import threading\ndef f(x):\n    l = threading.Lock(); l.acquire(); l.acquire()",
    "a pattern that backtracks": "import re\ndef f(x): return re.match('(a+)+$', 'a' * 99 + 'b')",
    "a stack without end": "import sys; sys.setrecursionlimit(10**9)\ndef f(x): return f(x)",
    "threads that spin": "import threading\ndef spin():\n    while True: pass\ndef f(x):\n"
    "    [threading.Thread(target=spin).start() for _ in range(4)]",
}
"""Name -> a module whose f(x) never comes back: timeout, or wrong where a limit on CPU came first."""
