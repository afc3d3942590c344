"""A DoRA adapter trained here is PEFT's: the same logits beside the base and merged into it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from engine.config.train_config import TrainConfig
from engine.model_sources.load_model import load_model
from engine.verbs.models.merge import merge
from engine.verbs.training.train import train
from models.adapters import adapter_tensors

pytestmark = pytest.mark.interop
GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
IDS = torch.arange(3, 83).reshape(2, 40)


def peer(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def tiny_model(target: Path, family: str) -> Path:
    """A golden checkpoint with a tokenizer of single characters."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    target.mkdir()
    for name in ("config.json", "model.safetensors"):
        (target / name).write_bytes((GOLDEN / family / name).read_bytes())
    vocab = {text: index for index, text in enumerate(["<end>", *"abcdefghijklmnopqrstuvwxyz "])}
    Tokenizer(BPE(vocab, [])).save(str(target / "tokenizer.json"))
    (target / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<end>", "pad_token": "<end>"})
    )
    return target


@torch.no_grad()
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_trained_adapter_gives_our_logits_in_peft(
    family: str, rslora: bool, tmp_path: Path
) -> None:
    base, run = tiny_model(tmp_path / "base", family), tmp_path / "run"
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "what is a list", "response": "a row of things"}\n' * 4)
    settings = TrainConfig(
        model=str(base), data=str(rows), output_dir=run, max_steps=8, batch_size=2, method="lora",
        learning_rate=2e-2, lora_rank=4, use_dora=True, use_rslora=rslora, device="cpu", plot=False,
    )  # fmt: skip
    with torch.enable_grad():
        train(settings, console=False)
    adapter = run / "adapter"
    model = load_model(base, adapter=adapter)
    assert all(len(parts) == 3 for parts in adapter_tensors(model).values())
    ours = model(IDS)
    assert float((ours - load_model(base)(IDS)).abs().max()) > 1e-2
    with_peft = PeftModel.from_pretrained(peer(base), str(adapter)).eval()
    assert float((ours - with_peft(IDS).logits).abs().max()) <= 1e-4
    merge(base, adapter, tmp_path / "merged")
    merged = peer(tmp_path / "merged")
    assert float((ours - merged(IDS).logits).abs().max()) <= 1e-4
    theirs = with_peft.merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        assert torch.allclose(tensor, theirs[name], rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "qwen3_next"])
def test_peft_has_no_magnitudes_for_experts_either(family: str) -> None:
    """Why `use_dora` is refused for them: when this fails, it can be allowed."""
    for parameter in ("gate_up_proj", "down_proj"):
        wanted = LoraConfig(
            r=2, use_dora=True, target_modules=[], target_parameters=[f"mlp.experts.{parameter}"]
        )
        with pytest.raises(ValueError, match="does not work with use_dora=True"):
            get_peft_model(peer(GOLDEN / family), wanted)
