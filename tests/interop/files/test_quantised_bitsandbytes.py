"""Checkpoints in 4 and 8 bits go between this program and bitsandbytes to the bit.

transformers 5 in this process and transformers 4 beside it load what is written here; what
bitsandbytes wrote is read here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

import engine
from engine.model_sources.load_model import load_model
from engine.model_sources.open import open_model_source

pytestmark = pytest.mark.interop

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"
OLD = Path(os.environ.get("ENGINE_OLD_TRANSFORMERS", Path(sys.prefix) / "transformers4"))
IDS = (torch.arange(40) * 7 % 61 + 1).reshape(2, 20)
FAMILIES = ("llama", "llama3", "mistral", "qwen2", "qwen3", "qwen3_moe", "qwen3_next", "smollm3")
FORMS: dict[str, dict[str, Any]] = {
    "nf4 nested": {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
    },
    "nf4 plain": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 stored as bfloat16": {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_quant_storage": torch.bfloat16,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "fp4 nested": {
        "load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True,
    },
    "dynamic": {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        "llm_int8_skip_modules": ["lm_head", "model.layers.1.self_attn", "down_proj"],
    },
    "int8": {"load_in_8bit": True},
}  # fmt: skip
WIDTHS = {
    "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
READER = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM
assert transformers.__version__.startswith("4."), transformers.__version__
ids = torch.tensor(json.loads(sys.argv[1]))
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").eval()
    with torch.no_grad():
        torch.save(model(ids).logits.float(), folder + "/logits.pt")
"""


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models of every family whose rows are whole blocks.

    bitsandbytes 0.50 quantises a matrix flat, but its decoder for CPUs takes every row to begin a
    block, so that what it decodes of other widths is not what it quantised.
    """
    folders = {}
    for family in FAMILIES:
        raw = json.loads((GOLDEN / family / "config.json").read_text())
        raw |= {key: size for key, size in WIDTHS.items() if key in raw}
        torch.manual_seed(len(family))
        config = AutoConfig.for_model(**raw)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        folders[family] = tmp_path_factory.mktemp("bases") / family
        model.save_pretrained(folders[family])
    return folders


def theirs(base: Path, form: str, target: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The golden model, quantised and saved by transformers with bitsandbytes."""
    model = AutoModelForCausalLM.from_pretrained(
        base,
        quantization_config=BitsAndBytesConfig(**FORMS[form]),
        device_map="cpu",
        dtype=dtype,
    )
    model.save_pretrained(target)
    return model


def decoded_by_them(model: Any) -> dict[str, Tensor]:
    """Every quantised weight as bitsandbytes decodes it."""
    result = {}
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = module.weight
            decoded = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
            result[f"{name}.weight"] = decoded
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            wide = bitsandbytes.functional.int8_vectorwise_dequant(
                module.weight.data, module.weight.SCB
            )
            result[f"{name}.weight"] = wide.to(torch.bfloat16)
    return result


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_their_weights_decode_to_their_bits(
    bases: dict[str, Path], family: str, form: str, tmp_path: Path
) -> None:
    model = theirs(bases[family], form, tmp_path / "m")
    source = open_model_source(tmp_path / "m")
    expected = decoded_by_them(model)
    assert expected
    stored = load_file(tmp_path / "m" / "model.safetensors")
    for name in source.names():
        if name in expected:
            assert torch.equal(source.tensor(name), expected[name]), name
        elif name in stored:
            assert torch.equal(source.tensor(name), stored[name]), name


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_what_they_write(
    bases: dict[str, Path], family: str, dtype: torch.dtype, bits: int, tmp_path: Path
) -> None:
    theirs(bases[family], "nf4 nested" if bits == 4 else "int8", tmp_path / "theirs", dtype)
    engine.quantize(
        bases[family], tmp_path / "ours", bits=bits, dtype=str(dtype).removeprefix("torch.")
    )
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    other = load_file(tmp_path / "theirs" / "model.safetensors")
    # transformers quantises the small matrices of routers and of DeltaNet too, which stay here.
    small = {name for name in other.keys() - ours.keys() if "_proj.weight" in name}
    assert not small
    for name in ours.keys() & other.keys():
        if "_proj" in name and ours[name].dtype == other[name].dtype:
            assert torch.equal(ours[name], other[name]), name
    assert sum(name.endswith((".absmax", ".SCB")) for name in ours) >= 8


@torch.no_grad()
def test_both_transformers_compute_what_the_codes_say(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    folders: dict[str, Path] = {}
    for family in FAMILIES:
        for bits in (4, 8, 16):
            folders[f"{family}, {bits}"] = target = tmp_path / f"{family}-{bits}"
            engine.quantize(bases[family], target, bits=bits)
    assert (OLD / "transformers").is_dir(), f"{OLD} is not filled; run: make interop"
    done = subprocess.run(
        [sys.executable, "-c", READER, json.dumps(IDS.tolist()), *map(str, folders.values())],
        env=os.environ | {"PYTHONPATH": str(OLD)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name, folder in folders.items():
        new = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").eval()
        latest = new(IDS).logits.float()
        old = torch.load(folder / "logits.pt", weights_only=True)
        # The same bfloat16 arithmetic in another order of operations.
        assert relative(old, latest) < 0.02, name
        assert relative(load_model(folder, dtype=torch.bfloat16)(IDS).float(), latest) < 0.03, name
        if name.endswith(", 4"):
            # A first pass packs the codes for the CPU anew, so another copy is decoded.
            other = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").eval()
            wide = other.dequantize().float()
            assert relative(load_model(folder)(IDS), wide(IDS).logits) < 5e-3, name


def relative(left: Tensor, right: Tensor) -> float:
    """Root mean square of the difference over that of the logits."""
    return float((left - right).square().mean().sqrt() / right.square().mean().sqrt())


def test_a_weighted_sum_is_what_peft_calls_cat(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    base = GOLDEN / "qwen3"
    for name, rank in (("a", 2), ("b", 5)):
        config = LoraConfig(
            r=rank,
            lora_alpha=7,
            target_modules=["q_proj", "down_proj"],
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(rank)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        get_peft_model(model, config).save_pretrained(tmp_path / name)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    both = PeftModel.from_pretrained(model, tmp_path / "a", adapter_name="a")
    both.load_adapter(tmp_path / "b", adapter_name="b")
    both.add_weighted_adapter(["a", "b"], [0.7, 1.3], "sum", combination_type="cat")
    both.set_adapter("sum")
    with torch.no_grad():
        expected = both(IDS).logits
    weighted = [(tmp_path / "a", 0.7), (tmp_path / "b", 1.3)]
    assert torch.allclose(load_model(base, adapter=weighted)(IDS), expected, atol=1e-4)
    engine.merge(base, weighted, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(merged(IDS).logits, expected, atol=1e-4)
