"""NF4 decoding and the optimizer step on a CPU, beside other implementations.

In one process, in turn, round after round: so a change of the machine's load meets every side. The
time of a side is its shortest; the ratios compare the shortest times. With one thread it is the
processor's time, to which other programs on the machine add little.

    decode   a weight with double quantisation to fp32 and to bf16. bitsandbytes makes a new tensor
             each time, for its CPU op takes no `out`; weights are small enough for the allocator to
             give it the same memory again.
    step     AdamW over parameters of an adapter: torch.optim.AdamW as it is by default, the same
             fused, and ours with 8-bit moments.

Ours is measured with numba's loops, where numba is installed, and with torch's ops alone.

Run as ``python -m bench.cpu.loops [--rounds N] [--threads N]``.
"""

import argparse
import datetime
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from engine.provenance import device_name, git_commit
from kernels.nf4 import dequantize, quantize
from kernels.runtime.cores import compiles_loops
from optim import AdamW8bit

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "loops_cpu.jsonl"
WEIGHTS = ((576, 1536), (2048, 2048))
ADAPTER = [(16, 576), (1536, 16), (576, 16), (16, 1536)] * 100

Sides = dict[str, Callable[[], object]]


@contextmanager
def torch_ops_alone() -> Iterator[None]:
    os.environ["ENGINE_REFERENCE"] = "1"
    try:
        yield
    finally:
        del os.environ["ENGINE_REFERENCE"]


def in_torch(call: Callable[[], object]) -> None:
    with torch_ops_alone():
        call()


def shortest(sides: Sides, rounds: int, threads: int) -> dict[str, float]:
    """Seconds of each side: the least of its turns, after one that does not count."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    best = dict.fromkeys(sides, float("inf"))
    for turn in range(rounds + 1):
        for name, call in sides.items():
            began = clock()
            call()
            if turn:
                best[name] = min(best[name], clock() - began)
    return best


def decode_sides(shape: tuple[int, int], dtype: torch.dtype) -> Sides:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    ours, out = quantize(weight), torch.empty(shape, dtype=dtype)
    packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    state.dtype = dtype
    if not torch.equal(dequantize(ours, dtype), dequantize_4bit(packed, state)):
        raise SystemExit(f"the sides decode {shape} to other bits")
    call = partial(dequantize, ours, dtype, out=out)
    return {
        "bitsandbytes": partial(dequantize_4bit, packed, state),
        "ours": call,
        "ours, torch ops": partial(in_torch, call),
    }


def step_sides() -> Sides:
    def parameters() -> list[torch.nn.Parameter]:
        made = [torch.nn.Parameter(torch.randn(shape) * 0.02) for shape in ADAPTER]
        for parameter in made:
            parameter.grad = torch.randn(parameter.shape) * 1e-3
        return made

    call = AdamW8bit(parameters(), lr=1e-4).step
    return {
        "torch": torch.optim.AdamW(parameters(), lr=1e-4).step,
        "torch, fused": torch.optim.AdamW(parameters(), lr=1e-4, fused=True).step,
        "ours": call,
        "ours, torch ops": partial(in_torch, call),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.cpu.loops", description="Time two loops.")
    parser.add_argument("--rounds", type=int, default=40, help="turns of every side")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if not compiles_loops():
        print("numba is not installed: ours are torch's ops in both columns.")
    work: dict[str, Sides] = {
        f"decode {rows}x{columns} to {str(dtype).removeprefix('torch.')}": decode_sides(
            (rows, columns), dtype
        )
        for rows, columns in WEIGHTS
        for dtype in (torch.float32, torch.bfloat16)
    }
    work["step of an adapter"] = step_sides()
    measured: dict[str, Any] = {}
    for name, sides in work.items():
        seconds = shortest(sides, options.rounds, options.threads)
        measured[name] = {side: round(1e6 * value, 1) for side, value in seconds.items()}
        other = next(iter(seconds.values()))
        text = ", ".join(f"{side} {1e6 * value:.0f} us" for side, value in seconds.items())
        print(f"{name}: {text}; ours takes {seconds['ours'] / other:.2f} of the first", flush=True)
    row = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "cpu": device_name(torch.device("cpu")),
        "threads": options.threads,
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "numba": compiles_loops(),
        "microseconds": measured,
    }
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"One row added to {RESULTS.name}")


if __name__ == "__main__":
    main()
