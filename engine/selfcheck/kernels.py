"""Check kernels by the accuracy rule, at small and real sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from engine.benchmark.cases.case import Case, CaseSizes
from engine.benchmark.cases.shapes import configuration
from engine.benchmark.runner import all_cases
from engine.selfcheck.accuracy import Verdict, check_case, check_layouts
from engine.selfcheck.options import CheckOptions, Finding, failed, passed

DENSE, MIXTURE, HYBRID = "llama-3.1-8b", "qwen3-30b-a3b", "qwen3-next-80b-a3b"
_FRUGAL = "qwen3-0.6b"
"""What a GPU is checked at that has not the memory for float64 at the sizes of `DENSE`."""

_WANTED_BYTES = 24 << 30
_DRAWS = 3
_SMALL_TOKENS, _REAL_TOKENS = 23, 1000


def kernel_check(
    *ops: str, model: str = DENSE, rank: int = 16
) -> Callable[[CheckOptions], Finding]:
    """A check of these ops of `engine.benchmark`, every value and gradient."""

    def run(options: CheckOptions) -> Finding:
        results = {}
        for case in _cases(ops, model, rank, options):
            results[case.name] = settled(partial(check_case, case, options.device))
        return judge(results)

    return run


def settled(check: Callable[[], Verdict]) -> Verdict:
    """The verdict of a check; one that misses the rule by little is drawn again, twice at most.

    The largest of many rounding errors is a matter of luck, and a fault is not: it fails each time.
    """
    verdict: Verdict = {}
    for seed in range(_DRAWS):
        torch.manual_seed(seed)
        verdict = check()
        wrong = [e for e in verdict.get("outputs", {}).values() if not e["passed"]]
        if not wrong or not all(e["ours"] <= 4 * e["plain"] + 2 * e["ulp"] for e in wrong):
            break
    return verdict


def check_layout_kernels(options: CheckOptions) -> Finding:
    """Both orders of NF4 codes."""
    sizes = [(33, 128)] if options.small else [(33, 128), (4097, 4096)]
    return judge(
        {
            f"{rows}x{columns} {dtype}": check_layouts(rows, columns, options.device, dtype)
            for rows, columns in sizes
            for dtype in options.dtypes
        }
    )


def _cases(ops: tuple[str, ...], model: str, rank: int, options: CheckOptions) -> Iterator[Case]:
    """Small sizes in every type, then a real model's in the type that it would train in."""
    tiny = configuration(model, small=True)
    document = _SMALL_TOKENS // 2 + 1
    for dtype in options.dtypes:
        sizes = CaseSizes(_SMALL_TOKENS, dtype, rank, document, optimizer_layers=1)
        yield from (case for case in all_cases(model, sizes, tiny) if case.op in ops)
    if options.small:
        return
    enough = options.free_memory() >= _WANTED_BYTES
    real = model if enough or model != DENSE else _FRUGAL
    whole = replace(configuration(real, small=False), num_hidden_layers=2)
    rows = 512 if enough else 256
    sizes = CaseSizes(_REAL_TOKENS, options.dtypes[0], rank, 600, rows, optimizer_layers=2)
    cases = all_cases(real, sizes, whole.with_layers(whole.num_hidden_layers))
    yield from (case for case in cases if case.op in ops)


def judge(results: dict[str, dict[str, Any]]) -> Finding:
    """One finding of several cases: the first that breaks the rule, with its output and errors."""
    for name, verdict in results.items():
        if verdict["passed"]:
            continue
        for output, entry in verdict.get("outputs", {}).items():
            if not entry["passed"]:
                return failed(
                    f"{name}: {output} is off by {entry['ours']:.1e}, plain torch by "
                    f"{entry['plain']:.1e}, an ulp is {entry['ulp']:.1e}",
                    results,
                )
        return failed(f"{name}: {verdict}", results)
    count = sum(len(verdict.get("outputs", ())) or 1 for verdict in results.values())
    return passed(f"{count} values and gradients in {len(results)} cases", results)
