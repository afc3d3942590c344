"""The graphs of hybrids and mixtures through their Triton kernels: on a GPU, or interpreted."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.model_sources.load_model import load_model
from models.adapters import adapter_tensors, add_lora
from models.decoder import Decoder
from models.layers.context import StepSettings

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"


def gradients(
    model: Decoder, ids: torch.Tensor, bounds: torch.Tensor, settings: StepSettings
) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.loss(ids, ids, bounds, settings=settings).backward()
    results = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: gradient for name, gradient in results.items() if gradient is not None}


@pytest.mark.parametrize(
    ("family", "tile"), [("qwen2_moe", None), ("qwen2_moe", 16), ("qwen3_5_vl", None)]
)
def test_every_gradient_is_that_of_the_reference(
    family: str, tile: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed on this platform")
    monkeypatch.delenv("ENGINE_REFERENCE", raising=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        monkeypatch.setenv("ENGINE_INTERPRET", "1")
    golden = load_file(GOLDEN / family / "golden.safetensors")
    model = load_model(GOLDEN / family, device=device)
    add_lora(model, rank=4)
    for pair in adapter_tensors(model).values():
        for part in pair:
            part.normal_(0, 0.1)
    ids = golden["packed.input_ids"][:40].to(device)
    bounds = torch.tensor([0, 17, 40], dtype=torch.int32, device=device)
    got = gradients(model, ids, bounds, StepSettings(tile))
    monkeypatch.setenv("ENGINE_REFERENCE", "1")
    want = gradients(model, ids, bounds, StepSettings())
    assert got.keys() == want.keys()
    assert len(got) > 10
    for name, gradient in want.items():
        assert float((got[name] - gradient).norm() / gradient.norm()) <= 1e-4, name
