"""LoRA+ moves every tensor of an adapter as PEFT's optimizer does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config.train_config import TrainConfig
from engine.model_sources.load_model import load_model
from engine.training.trainable import make_optimizer, make_trainable

peft = pytest.importorskip("peft")
from peft.optimizers import create_loraplus_optimizer  # noqa: E402

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.interop

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden" / "llama"
RATE, RATIO = 1e-2, 8.0


@pytest.mark.parametrize(("dora", "decay"), [(False, 0.1), (True, 0.0)])
def test_three_steps_are_those_of_peft(dora: bool, decay: float) -> None:
    """PEFT lets DoRA's magnitudes decay; here vectors do not."""
    keys: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "use_dora": dora}
    config = TrainConfig(
        model=str(GOLDEN), data="d", method="lora", lora_rank=4, optimizer="adamw",
        learning_rate=RATE, loraplus_lr_ratio=RATIO, weight_decay=decay, **keys,
    )  # fmt: skip
    model = load_model(GOLDEN)
    make_trainable(model, config, None)
    optimizer = make_optimizer(model, config)
    for group in optimizer.param_groups:
        group["lr"] = RATE * group.get("lr_ratio", 1.0)
    base = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN, dtype=torch.float32)
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, **keys))
    peer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=RATIO, loraplus_weight_decay=decay
    )
    pairs = {}
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            plain = name.removeprefix("base_model.model.").replace(".default", "")
            pairs[plain.removesuffix(".weight")] = parameter
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert own.keys() == pairs.keys()
    draw = torch.Generator().manual_seed(0)
    for name, parameter in own.items():
        pairs[name].data.copy_(parameter.data)
    for _ in range(3):
        for name, parameter in own.items():
            parameter.grad = torch.randn(parameter.shape, generator=draw)
            pairs[name].grad = parameter.grad.clone()
        optimizer.step()
        peer.step()
    for name, parameter in own.items():
        torch.testing.assert_close(parameter, pairs[name], rtol=1e-5, atol=1e-6)
