"""Fixtures and settings shared by every test.

Every test starts from the same seed, and outside the comparisons with other programs every
uninitialised tensor is filled with NaN (or the largest integer), so that an output element that no
code writes cannot look right by luck.
"""

import atexit
import os
import random
import shutil
import signal
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.runtime import cores
from tests.support.pages.browsers import HAS_BROWSER

# The tensors here are small: more threads would only wait for each other. Processes of tests
# have as many: sums of floating-point numbers, and so the bytes of a run, depend on it.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# torch lists the functions that obey `with torch.device(...)` once, at its first use: it must list
# the real ones, not those that `poisoned_memory` puts in their stead, or meta models take memory.
with torch.device("meta"):
    assert torch.empty(1).is_meta

FIXTURES = Path(__file__).parent / "fixtures"
SLOW_TESTS = Path(__file__).parent / "support" / "slow_tests.txt"
PEERS = ("transformers", "peft", "bitsandbytes", "xllamacpp")
MISSING_PEERS = [name for name in PEERS if find_spec(name) is None]

# A shell that runs the tests in the background, or `nohup`, lets its children ignore these signals.
# The tests of signals, and the processes that they start, need the default handlers.
for name, handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    number = getattr(signal, name, None)
    if number is not None and signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

# What is stored to be used again goes with the tests.
os.environ["ENGINE_CACHE"] = tempfile.mkdtemp(prefix="engine-tests-")
atexit.register(shutil.rmtree, os.environ["ENGINE_CACHE"], ignore_errors=True)

# Triton reads this when a kernel is defined, so it is set before any test module is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The comparisons import transformers, PEFT and others, which the product must work without. The
# tests of the pages need a browser, which may not be here.
collect_ignore = ["interop"] if MISSING_PEERS else []
HAS_POSTGRES = all(map(shutil.which, ("initdb", "pg_ctl")))
collect_ignore += [] if HAS_POSTGRES else ["examples/test_postgres.py"]
collect_ignore += [] if HAS_BROWSER else ["browser"]


def pytest_report_header() -> list[str]:
    lines = []
    if MISSING_PEERS:
        missing = ", ".join(MISSING_PEERS)
        lines.append(
            f"tests/interop: not collected, {missing} not installed (`make interop` installs them)"
        )
    if not HAS_BROWSER:
        lines.append(
            "tests/browser: not collected, they need playwright and a browser "
            "(`apt-get install chromium`)"
        )
    return lines


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that `tests/support/slow_tests.txt` lists, for `-m "not slow"`."""
    slow = frozenset(SLOW_TESTS.read_text().splitlines())
    for item in items:
        if item.nodeid.partition("[")[0] in slow:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def golden() -> Callable[[str], Path]:
    """The folder of a tiny random checkpoint with stored logits, loss and gradients.

    ``golden("qwen3")`` holds config.json, model.safetensors, golden.json and golden.safetensors.
    """

    def folder(family: str) -> Path:
        path = FIXTURES / "golden" / family
        if not path.is_dir():
            known = ", ".join(sorted(p.name for p in (FIXTURES / "golden").iterdir()))
            raise ValueError(f"no golden fixture {family!r}; there are {known}")
        return path

    return folder


@pytest.fixture(autouse=True)
def same_seed() -> None:
    """Seed the three generators that product or test code could draw from."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global generator is the one to pin
    torch.manual_seed(0)


def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap an allocation so that its result is filled with NaN, True or the largest integer."""

    def allocate_poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.is_meta:
            return tensor
        with torch.no_grad():
            if tensor.is_floating_point() or tensor.is_complex():
                tensor.fill_(float("nan"))
            elif tensor.dtype == torch.bool:
                tensor.fill_(True)
            else:
                tensor.fill_(torch.iinfo(tensor.dtype).max)
        return tensor

    return allocate_poisoned


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``torch.empty`` and its relatives return NaN, as unwritten memory may."""
    if request.node.get_closest_marker("interop") is None:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (torch.Tensor, "new_empty"),
        ):
            monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def no_compiled_loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take torch's loops whether numba is installed or not, so that tests do not depend on it.

    The compiled ones are compared with them in tests/interop/test_compiled_loops.py.
    """
    if request.node.get_closest_marker("interop") is None:
        monkeypatch.setattr(cores, "compiles_loops", lambda: False)
