"""The modules, ranks and factors of an adapter are PEFT's for the same settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config.train_config import TrainConfig
from engine.model_sources.adapter.peft import save_adapter
from engine.model_sources.load_model import load_model
from engine.model_sources.open import open_model_source
from engine.training.adapters.written import adapter_config
from engine.training.trainable import make_trainable
from models.adapters import adapter_tensors

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.interop

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden" / "llama"
IDS = (torch.arange(60) * 7 % 61 + 1).reshape(2, 30)
QV = ["q_proj", "v_proj"]
CASES: dict[str, dict[str, Any]] = {
    "layers": {"target_modules": QV, "layers_to_transform": [1]},
    "pattern": {"target_modules": r".*\.layers\.1\..*(q|up)_proj"},
    "pattern, excluded": {"target_modules": r".*_proj", "exclude_modules": r".*(k|down)_proj"},
    "names": {"target_modules": ["model.layers.0.mlp.up_proj", "self_attn.v_proj"]},
    "excluded endings": {"target_modules": [*QV, "up_proj"], "exclude_modules": ["mlp.up_proj"]},
    "layers, ranks": {
        "target_modules": QV,
        "layers_to_transform": [0],
        "rank_pattern": {"q_proj": 2},
    },
    "ranks and alphas, rslora": {
        "target_modules": [*QV, "up_proj"],
        "rank_pattern": {r"layers\.1\.self_attn\.v_proj": 7, "v_proj": 2},
        "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 3, ".*up_proj": 1},
        "use_rslora": True,
    },
    "dora": {"target_modules": QV, "layers_to_transform": [1], "use_dora": True},
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_trained_and_written_is_what_peft_adapts(name: str, tmp_path: Path) -> None:
    keys = CASES[name]
    given = {"layers" if key == "layers_to_transform" else key: keys[key] for key in keys}
    config = TrainConfig(
        model=str(GOLDEN), data="d", method="lora", lora_rank=4, lora_alpha=6, **given
    )
    model = load_model(GOLDEN)
    make_trainable(model, config, None)
    with torch.no_grad():
        for _, parts in sorted(adapter_tensors(model).items()):
            parts[1].normal_(std=0.3)
    save_adapter(
        tmp_path, adapter_config(config, open_model_source(GOLDEN), None), adapter_tensors(model)
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN, dtype=torch.float32)
    fresh = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=6, **keys))
    theirs = {
        path.removeprefix("base_model.model."): (layer.r["default"], layer.scaling["default"])
        for path, layer in fresh.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    ours = {
        path: (parts[0].shape[0], model.get_submodule(path).scale)
        for path, parts in adapter_tensors(model).items()
    }
    assert {path: rank for path, (rank, _) in ours.items()} == {
        path: rank for path, (rank, _) in theirs.items()
    }
    for path, (_, scale) in theirs.items():
        assert ours[path][1] == pytest.approx(scale)
    plain = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    with torch.no_grad():
        logits, wanted = model.eval()(IDS), loaded(IDS).logits
        again = load_model(GOLDEN, adapter=tmp_path)(IDS)
    assert torch.allclose(logits, wanted, atol=2e-5)
    assert torch.allclose(again, wanted, atol=2e-5)
