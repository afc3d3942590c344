"""The ops under pytest-benchmark: ``pytest bench --benchmark-only``.

No part of the test run.

`--benchmark-save` and `--benchmark-compare` follow an op over time on one machine. The limits of
the machine and other implementations are not looked at here: ``engine bench`` does that.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from engine.benchmark.cases.case import Case
from engine.benchmark.runner import all_cases, default_settings
from engine.benchmark.timing import synchronize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODEL = "llama-3.1-8b" if DEVICE.type == "cuda" else "smollm2-135m"
CASES = list(all_cases(MODEL, default_settings(DEVICE)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_op(case: Case, benchmark: BenchmarkFixture) -> None:
    work = case.make(DEVICE)

    def fresh() -> tuple[tuple[dict[str, torch.Tensor]], dict[str, object]]:
        inputs = work.copies()
        synchronize(DEVICE)
        return (inputs,), {}

    def call(inputs: dict[str, torch.Tensor]) -> None:
        work.ours(inputs)
        synchronize(DEVICE)

    benchmark.extra_info["shape"] = case.shape
    benchmark.pedantic(call, setup=fresh, rounds=10, warmup_rounds=2)
