"""The accuracy rule itself, and rules that every Triton kernel's source obeys."""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import kernels

FOLDER = Path(kernels.__path__[0])
FILES = ("cross_entropy.py", "dropout.py", "rms_norm_triton.py", "rope.py", "swiglu.py")
Accurate = Callable[[Tensor, Tensor, Tensor], None]


def test_the_rule_allows_twice_the_error_of_plain_torch_and_an_ulp(accurate: Accurate) -> None:
    truth = torch.tensor([1.0, 3.0], dtype=torch.float64)
    plain = truth.float() + torch.tensor([0.0, 1e-3])
    ulp = 2 * torch.finfo(torch.float32).eps
    accurate(truth.float() + 2e-3, plain, truth)
    accurate(truth.float() + ulp / 2, truth.float(), truth)
    for wrong in (2.01e-3, -2.01e-3, float("nan"), float("inf")):
        with pytest.raises(AssertionError):
            accurate(truth.float() + wrong, plain, truth)
    with pytest.raises(AssertionError):
        accurate(truth.float() + 2 * ulp, truth.float(), truth)


def test_fresh_memory_is_poisoned() -> None:
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.ones(3)).isnan().all()


def source_faults(source: str) -> Iterator[str]:
    """What in a kernel file could overflow at 2^31 elements or touch memory that is not there."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    widened = {
        id(call.func.value)
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and call.func.attr == "to"
        and [ast.unparse(argument) for argument in call.args] == ["tl.int64"]
    }
    for call in calls:
        called = ast.unparse(call.func)
        if called == "tl.program_id" and id(call) not in widened:
            yield f"line {call.lineno}: a program id is used before it is int64"
        if called in ("tl.load", "tl.store") and "mask" not in {k.arg for k in call.keywords}:
            yield f"line {call.lineno}: {called} without a mask"


@pytest.mark.parametrize("name", FILES)
def test_program_ids_are_int64_and_every_access_is_masked(name: str) -> None:
    source = (FOLDER / name).read_text()
    assert source.count("tl.program_id") >= 1
    assert not list(source_faults(source))


@pytest.mark.parametrize(
    "line",
    [
        "row = tl.program_id(0) * ROWS",
        "row = tl.program_id(0).to(tl.int32)",
        "x = tl.load(x_ptr + row)",
        "tl.store(y_ptr + row, x)",
    ],
)
def test_a_source_against_the_rules_is_found(line: str) -> None:
    good = "row = tl.program_id(0).to(tl.int64)\nx = tl.load(x_ptr + row, mask=row < n)"
    assert not list(source_faults(good))
    assert len(list(source_faults(f"{good}\n{line}"))) == 1


def test_every_kernel_file_imports_without_triton() -> None:
    files = (*FILES, "rms_norm.py", "linear_cross_entropy.py")
    names = ", ".join(f"kernels.{Path(f).stem}" for f in files)
    code = (
        "import sys; sys.modules['triton'] = None\n"
        f"import {names}, kernels.attention, torch\n"
        "x = torch.ones(2, 4)\n"
        "assert kernels.rms_norm.rms_norm(x, x[0]).shape == (2, 4)\n"
        "import os; os.environ['ENGINE_INTERPRET'] = '1'\n"
        "try: kernels.rms_norm.rms_norm(x, x[0])\n"
        "except RuntimeError as error: assert 'pip install triton' in str(error)\n"
        "else: raise SystemExit('a kernel ran without Triton')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=FOLDER.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
