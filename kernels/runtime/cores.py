"""Work on all cores of a CPU, and ask for compiled loops.

torch gives an elementwise op to its own threads, but an op that is many small steps gains nothing
from that. Here each core takes one part of the whole, from its first step to its last. Parts must
not overlap; results do not depend on how many there are. numba compiles loops where it is
installed, for ops that torch has no fast form of.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


@functools.cache
def compiles_loops() -> bool:
    """Whether numba is installed, which compiles loops for a CPU. It is optional."""
    return all(importlib.util.find_spec(name) is not None for name in ("numba", "llvmlite"))


def use_compiled(tensor: torch.Tensor) -> bool:
    """Whether the op that works on `tensor` takes the compiled loop; ENGINE_REFERENCE=1 says no."""
    return tensor.is_cpu and compiles_loops() and os.environ.get("ENGINE_REFERENCE") != "1"


def over_cores(count: int, least: int, work: Callable[[int, int], None]) -> None:
    """Call `work(begin, end)` for ranges that cover `range(count)`, at least `least` long.

    In a dispatch mode, which sees one thread alone, all is one range: so a memory meter misses
    nothing. What `work` raises is raised here.
    """
    parts = 1 if is_in_torch_dispatch_mode() else min(torch.get_num_threads(), count // least)
    if parts <= 1:
        work(0, count)
        return
    own, *others = itertools.pairwise(count * i // parts for i in range(parts + 1))
    waiting = [_pool(parts - 1).submit(work, begin, end) for begin, end in others]
    work(*own)
    for part in waiting:
        part.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="engine-core")
