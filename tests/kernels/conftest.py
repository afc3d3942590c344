"""Fixtures of the kernel tests: device, Triton, accuracy, planted faults.

Kernels run on the GPU, or in Triton's interpreter on a machine without one.
`tests/conftest.py` switches the interpreter on before any kernel is imported.
"""

import math
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch

INTERPRET = not torch.cuda.is_available()


@pytest.fixture
def device() -> torch.device:
    """Where kernel tests put their tensors."""
    return torch.device("cpu" if INTERPRET else "cuda")


@pytest.fixture
def triton_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every op take its Triton kernel, in the interpreter where there is no GPU."""
    pytest.importorskip("triton", reason="Triton is not installed on this platform")
    monkeypatch.delenv("ENGINE_REFERENCE", raising=False)
    if INTERPRET:
        monkeypatch.setenv("ENGINE_INTERPRET", "1")


@pytest.fixture(params=["reference", "triton"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test twice: on the torch reference and on the Triton kernel."""
    if request.param == "triton":
        request.getfixturevalue("triton_on")
    else:
        monkeypatch.setenv("ENGINE_REFERENCE", "1")
    return str(request.param)


def _check_accuracy(ours: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor) -> None:
    """The one accuracy rule: twice the error of plain torch in the same dtype, and one ulp."""
    assert ours.shape == plain.shape == truth.shape
    assert truth.dtype == torch.float64
    if not truth.numel():
        return
    largest = float(truth.abs().max())
    ulp = torch.finfo(ours.dtype).eps * 2.0 ** math.floor(math.log2(largest)) if largest else 0.0
    allowed = 2 * float((plain.double() - truth).abs().max()) + ulp
    worst = float((ours.double() - truth).abs().max())
    assert worst <= allowed, f"off by {worst:.3e}, allowed {allowed:.3e}, largest {largest:.3e}"


@pytest.fixture
def accurate() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]:
    """`accurate(ours, plain, truth)` fails unless ours obeys the accuracy rule."""
    return _check_accuracy


@pytest.fixture
def mutant(tmp_path: Path) -> Callable[[ModuleType, str, str], ModuleType]:
    """`mutant(module, old, new)`: the module with one piece of its source replaced."""

    def load(module: ModuleType, old: str, new: str) -> ModuleType:
        source = Path(str(module.__file__)).read_text()
        assert old in source, f"{old!r} is not in {module.__name__}"
        path = tmp_path / f"mutant_{module.__name__.rpartition('.')[2]}.py"
        path.write_text(source.replace(old, new))
        spec = spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        changed = module_from_spec(spec)
        sys.modules[path.stem] = changed  # where dataclasses look for their module
        spec.loader.exec_module(changed)
        del sys.modules[path.stem]
        return changed

    return load
