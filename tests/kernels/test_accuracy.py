"""The accuracy rule itself, and rules that every Triton kernel's source obeys."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import kernels

FOLDER = Path(kernels.__path__[0])
JIT = re.compile(r"^@(triton\.)?jit\b", re.MULTILINE)
FILES = sorted(
    path.relative_to(FOLDER).as_posix()
    for path in FOLDER.rglob("*.py")
    if JIT.search(path.read_text())
)
# Their unmasked accesses are of single elements, and of tiles that are whole by construction.
PARTLY_UNMASKED = {
    "adamw8bit/fused_triton.py",
    "delta_net/backward_intra_triton.py",
    "delta_net/backward_triton.py",
    "delta_net/causal_conv1d_triton.py",
    "delta_net/forward_triton.py",
    "delta_net/tiles.py",
    "moe/grouped_matmul_triton.py",
    "nf4/matmul.py",
    "nf4/quantize_triton.py",
}
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


def at_first_element(tree: ast.AST) -> set[int]:
    """The accesses (by id) at a pointer as the kernel was given it: at one element."""
    calls_seen = set()
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        inside = list(ast.walk(function))
        changed = {n.id for n in inside if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        given = {argument.arg for argument in function.args.args} - changed
        for call in inside:
            if isinstance(call, ast.Call) and call.args and ast.unparse(call.args[0]) in given:
                calls_seen.add(id(call))
    return calls_seen


def source_faults(source: str) -> Iterator[str]:
    """What in a kernel file could overflow at 2^31 elements or touch memory that is not there."""
    tree = ast.parse(source)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    single = at_first_element(tree)
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
        masked = "mask" in {k.arg for k in call.keywords} or id(call) in single
        if called in ("tl.load", "tl.store") and not masked:
            yield f"line {call.lineno}: {called} without a mask"


@pytest.mark.parametrize("name", FILES)
def test_program_ids_are_int64_and_every_access_is_masked(name: str) -> None:
    faults = list(source_faults((FOLDER / name).read_text()))
    assert [fault for fault in faults if "mask" in fault] == [] or name in PARTLY_UNMASKED
    assert [fault for fault in faults if "mask" not in fault] == []


def test_every_kernel_file_keeps_the_rules() -> None:
    assert len(FILES) >= 17
    assert set(FILES) >= PARTLY_UNMASKED


@pytest.mark.parametrize(
    "line",
    [
        "row = tl.program_id(0) * ROWS",
        "row = tl.program_id(0).to(tl.int32)",
        "x = tl.load(x_ptr + row)",
        "tl.store(y_ptr + row, x)",
        "def kernel(y_ptr, row):\n    y_ptr += row\n    tl.store(y_ptr, 0.0)",
    ],
)
def test_a_source_against_the_rules_is_reported(line: str) -> None:
    good = "row = tl.program_id(0).to(tl.int64)\nx = tl.load(x_ptr + row, mask=row < n)"
    assert not list(source_faults(good))
    assert not list(source_faults("def kernel(seed_ptr):\n    return tl.load(seed_ptr)"))
    assert len(list(source_faults(f"{good}\n{line}"))) == 1


def test_every_kernel_file_imports_without_triton() -> None:
    paths = sorted(path.relative_to(FOLDER.parent) for path in FOLDER.rglob("[a-z]*.py"))
    assert len(paths) > 40
    names = ", ".join(".".join(path.with_suffix("").parts) for path in paths)
    code = (
        "import sys; sys.modules['triton'] = None\n"
        f"import {names}, torch\n"
        "x = torch.ones(2, 4)\n"
        "assert kernels.elementwise.rms_norm.rms_norm(x, x[0]).shape == (2, 4)\n"
        "import os; os.environ['ENGINE_INTERPRET'] = '1'\n"
        "try: kernels.elementwise.rms_norm.rms_norm(x, x[0])\n"
        "except RuntimeError as error: assert 'pip install triton' in str(error)\n"
        "else: raise SystemExit('a kernel ran without Triton')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=FOLDER.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
