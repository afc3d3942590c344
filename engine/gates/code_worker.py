"""The program that runs generated code, shut off from the machine.

It reads one JSON object on standard input, {"program": TEXT, "cpu_seconds": N, "wall_seconds": N,
"memory_bytes": N, "folder": PATH}, and writes one on standard output: {"outcome": "passed"},
{"outcome": "failed", "message": ..}, or {"outcome": "no isolation", "message": ..} where the
system does not allow to shut the program off, in which case it was not run.

A program is run in a child process in Linux namespaces of its own: no network but an empty one (not
even the loopback device is up), no other process to see or signal, no shared memory. When the
child, the first process of its namespace, ends, everything that it started ends with it. Landlock
(https://docs.kernel.org/userspace-api/landlock.html) lets it write in its folder alone, and limits
of the kernel bound its time, memory, files and processes. Only the standard library is imported.
"""

import ctypes
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

_NEW_IPC, _NEW_USER, _NEW_PID, _NEW_NET = 0x08000000, 0x10000000, 0x20000000, 0x40000000
_NO_NEW_PRIVILEGES = 38
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_WRITE_FILE = 1 << 1
_WRITES = 0b1_1111_1111_0010
"""Landlock's first version: everything but executing, reading files and listing folders."""
_TRUNCATE, _TRUNCATE_VERSION = 1 << 14, 3
_MOST_FILES, _MOST_FILE_BYTES, _MOST_PROCESSES, _MOST_MESSAGE = 64, 16 << 20, 64, 2000


class _Ruleset(ctypes.Structure):
    _fields_ = (("handled", ctypes.c_uint64),)


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32))


_LIBC = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def leave_the_machine() -> None:
    """Take the process out of the network, and its children out of sight of all others."""
    user, group = os.getuid(), os.getgid()
    _checked(_LIBC.unshare(_NEW_USER | _NEW_NET | _NEW_PID | _NEW_IPC), "namespaces")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"),
                       ("gid_map", f"{group} {group} 1")):  # fmt: skip
        try:
            Path(f"/proc/self/{name}").write_text(text)
        except OSError:
            continue  # Without a mapping the process is nobody, which owns even less.


def write_only_in(folder: str) -> None:
    """Refuse every write outside `folder` from here on, for this process and its children."""
    version = _checked(_LIBC.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1), "Landlock")
    writes = _WRITES | (_TRUNCATE if version >= _TRUNCATE_VERSION else 0)
    rules = _Ruleset(writes)
    size = ctypes.c_size_t(ctypes.sizeof(rules))
    ruleset = _checked(_LIBC.syscall(_CREATE_RULESET, ctypes.byref(rules), size, 0), "Landlock")
    for path, allowed in ((folder, writes), (os.devnull, _WRITE_FILE)):
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        beneath = _Beneath(allowed, opened)
        _checked(_LIBC.syscall(_ADD_RULE, ruleset, 1, ctypes.byref(beneath), 0), "Landlock")
        os.close(opened)
    _checked(_LIBC.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "prctl")
    _checked(_LIBC.syscall(_RESTRICT_SELF, ruleset, 0), "Landlock")
    os.close(ruleset)


def limit(cpu_seconds: int, memory_bytes: int) -> None:
    """Bound what this process may use."""
    for kind, most in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, _MOST_FILE_BYTES),
        (resource.RLIMIT_NOFILE, _MOST_FILES),
        (resource.RLIMIT_NPROC, _MOST_PROCESSES),  # The namespace has a count of its own.
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def run(program: str, pipe: int) -> NoReturn:
    """Run `program` as a main module, write what came of it into `pipe`, and end."""
    message = ""
    try:
        exec(compile(program, "answer.py", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        message = f"the program left by exit ({end.code}) before its end"
    except BaseException as error:
        message = f"{type(error).__name__}: {error}"
    os.write(pipe, json.dumps({"message": message[:_MOST_MESSAGE]}).encode())
    os._exit(0)


def child(request: dict[str, Any], pipe: int) -> NoReturn:
    """The process that runs the program: nothing of the parent's is left open but `pipe`."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    os.chdir(request["folder"])
    limit(request["cpu_seconds"], request["memory_bytes"])
    run(request["program"], pipe)


def wait(process: int, request: dict[str, Any]) -> int | str:
    """The status with which a child ended, or what it was killed for where it took too long."""
    end = time.monotonic() + request["wall_seconds"]
    while time.monotonic() < end:
        ended, status, used = os.wait4(process, os.WNOHANG)
        if not ended:
            time.sleep(0.002)
        # The system counts in ticks, and its signal may come one early.
        elif (
            os.WIFSIGNALED(status) and used.ru_utime + used.ru_stime > request["cpu_seconds"] - 0.1
        ):
            return f"no end in {request['cpu_seconds']} s of the processor's time"
        else:
            return status
    os.kill(process, 9)
    os.waitpid(process, 0)
    return f"no end in {request['wall_seconds']} s"


def answer(request: dict[str, Any]) -> dict[str, str]:
    """Run the program of a request; what came of it."""
    try:
        leave_the_machine()
        write_only_in(request["folder"])
    except OSError as error:
        return {"outcome": "no isolation", "message": str(error)}
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reader)
        child(request, writer)
    os.close(writer)
    status = wait(process, request)
    if isinstance(status, str):
        return {"outcome": "failed", "message": status}
    with os.fdopen(reader, "rb") as said:
        text = said.read(1 << 16)
    if os.WIFSIGNALED(status) or not text:
        return {"outcome": "failed", "message": f"the process was ended (status {status})"}
    try:
        message = json.loads(text)["message"]
    except (ValueError, KeyError, TypeError, RecursionError):
        message = "the program wrote into the channel of its result"
    return {"outcome": "failed", "message": message} if message else {"outcome": "passed"}


if __name__ == "__main__":
    print(json.dumps(answer(json.load(sys.stdin))))
