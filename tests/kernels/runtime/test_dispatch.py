"""ENGINE_REFERENCE chooses the reference everywhere, or in the modules it names."""

from collections.abc import Callable

import pytest
import torch

from kernels.elementwise import rms_norm, rms_norm_triton, swiglu


def test_names_choose_the_reference_in_those_modules_alone(
    triton_on: None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def kernel(name: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        def run(x: torch.Tensor, *rest: object) -> tuple[torch.Tensor, torch.Tensor]:
            asked.append(name)
            return x, x

        return run

    monkeypatch.setattr(rms_norm_triton, "forward", kernel("norm"))
    monkeypatch.setattr(swiglu, "_forward_triton", kernel("swiglu"))
    x = torch.ones(2, 64, device=device)
    monkeypatch.setenv("ENGINE_REFERENCE", "rms_norm,nf4")
    rms_norm.rms_norm_forward(x, x[0], 1e-6)
    swiglu.swiglu_forward(x, x)
    assert asked == ["swiglu"]
    monkeypatch.setenv("ENGINE_REFERENCE", "elementwise")
    swiglu.swiglu_forward(x, x)
    assert asked == ["swiglu"]


def test_a_name_that_no_kernel_has_is_refused(
    triton_on: None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINE_REFERENCE", "rmsnorm")
    x = torch.ones(2, 64, device=device)
    with pytest.raises(ValueError, match="names 'rmsnorm'"):
        swiglu.swiglu_forward(x, x)
