"""Adapters that start as a part of the weights: PEFT's pairs, and what PEFT makes of the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config.train_config import TrainConfig
from engine.device import resolve_device
from engine.model_sources.adapter.initial import initial_pair
from engine.model_sources.adapter.peft import save_adapter
from engine.model_sources.load_model import build_for, load_model
from engine.model_sources.open import open_model_source
from engine.training.adapters.starts import as_plain, start_pairs, with_start
from engine.training.adapters.written import adapter_config
from engine.training.trainable import make_trainable
from kernels.nf4 import dequantize, quantize
from models.adapters import adapter_tensors
from models.decoder import Decoder

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.interop

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden" / "llama"
IDS = (torch.arange(60) * 7 % 61 + 1).reshape(2, 30)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NOT_DOWN = ALL[:-1]
"""bitsandbytes' CPU decodes rows of 96 elements wrongly, and PEFT's LoftQ with it."""
CASES: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa, rslora, ranks": {
        "init_lora_weights": "pissa",
        "use_rslora": True,
        "rank_pattern": {"q_proj": 6},
        "alpha_pattern": {"up_proj": 3},
    },
    "olora": {"init_lora_weights": "olora"},
    "fast pissa": {"init_lora_weights": "pissa_niter_16"},
    "loftq": {"init_lora_weights": "loftq", "method": "qlora", "double_quant": False},
    "loftq, three rounds": {
        "init_lora_weights": "loftq",
        "method": "qlora",
        "double_quant": False,
        "loftq_iter": 3,
    },
}


def started(config: TrainConfig) -> tuple[Decoder, dict[str, tuple[torch.Tensor, ...]]]:
    """The model as a run begins with it, and the first pairs."""
    source = with_start(config, open_model_source(GOLDEN))
    model = build_for(config, source, resolve_device("cpu"), torch.float32)
    make_trainable(model, config, None)
    return model, start_pairs(model, config, source)


def peft_config(changes: dict[str, Any]) -> Any:
    keys = {k: v for k, v in changes.items() if k not in ("method", "double_quant", "loftq_iter")}
    if keys["init_lora_weights"] == "loftq":
        keys["loftq_config"] = peft.LoftQConfig(
            loftq_bits=4, loftq_iter=changes.get("loftq_iter", 1)
        )
    targets = NOT_DOWN if keys["init_lora_weights"] == "loftq" else ALL
    return peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets, **keys)


@pytest.mark.usefixtures("loftq_on_a_cpu")
@pytest.mark.parametrize("name", CASES)
def test_a_start_is_pefts_and_its_result_is_what_peft_computes(name: str, tmp_path: Path) -> None:
    changes = CASES[name]
    loftq = name.startswith("loftq")
    given = {"method": "lora", "target_modules": NOT_DOWN if loftq else ALL} | changes
    config = TrainConfig(model=str(GOLDEN), data="d", lora_rank=4, lora_alpha=4, **given)
    model, first = started(config)
    plain = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN, dtype=torch.float32)
    with torch.no_grad():
        original = plain(IDS).logits
        start = model.eval()(IDS)
    if not loftq:
        assert torch.allclose(start, original, atol=2e-5)
    else:
        bare = load_model(GOLDEN, quantize="nf4")(IDS)
        assert float((start - original).norm()) < float((bare - original).norm())
    theirs = peft.get_peft_model(plain, peft_config(changes))
    for path, (a, b) in adapter_tensors(model).items():
        layer = theirs.get_submodule(f"base_model.model.{path}")
        pair = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        if name != "fast pissa":
            # Singular vectors have their signs from whoever computes them; the product has not.
            torch.testing.assert_close(b @ a, pair.detach(), rtol=1e-3, atol=2e-5)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parts in adapter_tensors(model).values():
            for part in parts:
                part.add_(torch.randn(part.shape, generator=draw) * 0.05)
        trained = model(IDS)
    settings, tensors = as_plain(
        adapter_config(config, open_model_source(GOLDEN), None), adapter_tensors(model), first
    )
    save_adapter(tmp_path, settings, tensors)
    base = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN, dtype=torch.float32)
    again = load_model(GOLDEN, adapter=tmp_path)(IDS).detach()
    if loftq:  # the run has the other projections in NF4 too
        for layer in base.model.layers:
            weight = layer.mlp.down_proj.weight.data
            weight.copy_(dequantize(quantize(weight, double_quant=False), dtype=torch.float32))
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        wanted = loaded(IDS).logits
    assert not torch.allclose(trained, start, atol=1e-2)
    assert torch.allclose(trained, wanted, atol=2e-4)
    assert loftq or torch.allclose(again, wanted, atol=2e-4)


@torch.no_grad()
def test_a_randomised_pissa_is_pefts_where_both_draw_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import peft.tuners.lora.layer as peft_layer

    def seeded(*args: Any, **kwargs: Any) -> Any:
        torch.manual_seed(7)
        return torch.svd_lowrank(*args, **kwargs)

    monkeypatch.setattr(peft_layer, "svd_lowrank", seeded)
    linear = torch.nn.Linear(96, 64, bias=False)
    weight = linear.weight.clone()
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["0"], init_lora_weights="pissa_niter_2"
    )
    layer = peft.get_peft_model(torch.nn.Sequential(linear), settings).base_model.model[0]
    torch.manual_seed(7)
    rest, a, b = initial_pair(weight, "pissa_niter_2", 4, 2.0, {})
    theirs = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(b @ a, theirs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(rest, layer.base_layer.weight, rtol=1e-4, atol=1e-6)
    # With few rounds it is not the exact one: the test would see another algorithm.
    exact = initial_pair(weight, "pissa", 4, 2.0, {})
    assert not torch.allclose(exact[2] @ exact[1], theirs, atol=1e-3)


@torch.no_grad()
def test_a_gaussian_start_is_drawn_as_pefts() -> None:
    config = TrainConfig(
        model=str(GOLDEN), data="d", lora_rank=16, method="lora", init_lora_weights="gaussian"
    )
    model, first = started(config)
    assert first == {}
    plain = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN, dtype=torch.float32)
    settings = peft.LoraConfig(r=16, target_modules=ALL, init_lora_weights="gaussian")
    theirs = peft.get_peft_model(plain, settings)
    drawn: list[list[torch.Tensor]] = [[], []]
    for path, (a, b) in adapter_tensors(model).items():
        layer = theirs.get_submodule(f"base_model.model.{path}")
        drawn[0].append(a.flatten())
        drawn[1].append(layer.lora_A["default"].weight.flatten())
        assert not b.any() and not layer.lora_B["default"].weight.any()
    ours, pefts = (torch.cat(parts).sort().values for parts in drawn)
    assert len(ours) == len(pefts) > 10_000
    # Two samples of one distribution: Kolmogorov and Smirnov's distance, at one in ten thousand.
    ranks = torch.searchsorted(pefts, ours).float() / len(pefts)
    distance = (ranks - torch.arange(len(ours)) / len(ours)).abs().max()
    assert float(distance) < 2.2 * (2 / len(ours)) ** 0.5
