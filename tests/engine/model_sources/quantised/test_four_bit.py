"""bitsandbytes' checkpoints are read to the bit, and weights stay in the codes they have."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import engine
from engine.errors import CheckpointError
from engine.inference.agreement import difference
from engine.model_sources.load_model import build_model, load_model
from engine.model_sources.open import open_model_source
from engine.model_sources.quantised.four_bit import FP4_CODE
from engine.model_sources.quantised.stored_codes import decoded
from kernels.adamw8bit.dynamic_map import dynamic_map
from kernels.linear.int8 import Int8Weight
from kernels.nf4 import NF4_CODE, NF4Weight, dequantize, quantize
from models.decoder import Decoder
from tests.support.scaled_folders import eight_bit, four_bit, fp4, write_quantised
from tests.support.tiny_model import write_tiny_model

NOTED = {"quant_method": "bitsandbytes", "load_in_4bit": True}
Q = "model.layers.0.self_attn.q_proj.weight"
EXPERTS = "model.layers.0.mlp.experts"
IDS = torch.arange(20).reshape(2, 10) * 5 % 61


def decoded_by_hand(stored: dict[str, Tensor], name: str, table: Tensor) -> Tensor:
    """A 4-bit weight decoded element by element, as bitsandbytes documents its format."""
    raw = next(t for n, t in stored.items() if n.startswith(f"{name}.quant_state"))
    state = json.loads(bytes(raw.tolist()))
    packed = stored[name].view(torch.uint8).view(-1).tolist()
    absmax = stored[f"{name}.absmax"]
    scales = []
    for block, code in enumerate(absmax.tolist()):
        if "nested_offset" not in state:
            scales.append(absmax[block])
            continue
        nested = stored[f"{name}.nested_absmax"][block // state["nested_blocksize"]]
        offset = torch.tensor(state["nested_offset"])
        scales.append(stored[f"{name}.nested_quant_map"][code] * nested + offset)
    values = []
    for index in range(math.prod(state["shape"])):
        byte = packed[index // 2]
        nibble = byte >> 4 if index % 2 == 0 else byte & 15
        values.append(table[nibble] * scales[index // state["blocksize"]])
    return torch.stack(values).view(state["shape"]).to(torch.bfloat16)


FORMS: dict[str, tuple[Any, Tensor]] = {
    "nested": (four_bit(), NF4_CODE),
    "plain": (four_bit(nested=False), NF4_CODE),
    "blocks of 32": (four_bit(32), NF4_CODE),
    "blocks of 256, plain": (four_bit(256, False), NF4_CODE),
    "bytes called bfloat16": (four_bit(storage=torch.bfloat16), NF4_CODE),
    "bytes called float32": (four_bit(storage=torch.float32), NF4_CODE),
    "fp4": (fp4, FP4_CODE),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_weight_decodes_to_what_its_bytes_say(tmp_path: Path, form: str) -> None:
    encode, table = FORMS[form]
    folder = write_quantised(tmp_path / "m", encode, NOTED)
    source, stored = open_model_source(folder), load_file(folder / "model.safetensors")
    assert source.dtype(Q) == torch.bfloat16
    assert torch.equal(source.tensor(Q), decoded_by_hand(stored, Q, table))


@pytest.mark.parametrize("quantize_as", [None, "nf4"])
@pytest.mark.parametrize("form", [name for name in FORMS if name != "fp4"])
def test_codes_are_loaded_to_the_bit(tmp_path: Path, form: str, quantize_as: Any) -> None:
    folder = write_quantised(tmp_path / "m", FORMS[form][0], NOTED)
    stored = load_file(folder / "model.safetensors")
    weight = weight_of(load_model(folder, quantize_as), "0.self_attn.q_proj")
    assert isinstance(weight, NF4Weight)
    assert torch.equal(weight.packed, stored[Q].view(torch.uint8).view(-1))
    assert torch.equal(weight.absmax, stored[f"{Q}.absmax"])
    if weight.nested_absmax is not None:
        assert torch.equal(weight.nested_absmax, stored[f"{Q}.nested_absmax"])


def test_scales_in_another_map_are_decoded_exactly(tmp_path: Path) -> None:
    def encode(name: str, tensor: Tensor) -> dict[str, Tensor]:
        parts = four_bit()(name, tensor)
        parts[f"{name}.nested_quant_map"] = dynamic_map(True) * 0.75
        return parts

    folder = write_quantised(tmp_path / "m", encode, NOTED)
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(open_model_source(folder).tensor(Q), decoded_by_hand(stored, Q, NF4_CODE))


@pytest.mark.parametrize("noted", [NOTED, None, {"llm_int8_skip_modules": "null", **NOTED}])
def test_what_is_quantised_is_decided_by_the_tensors(tmp_path: Path, noted: Any) -> None:
    def dynamic(name: str, tensor: Tensor) -> dict[str, Tensor]:
        left = ".1.self_attn." in name or "down_proj" in name
        return {name: tensor.to(torch.bfloat16)} if left else four_bit()(name, tensor)

    folder = write_quantised(tmp_path / "m", dynamic, noted)
    choices: tuple[Any, ...] = ("nf4", None)
    for asked in choices:
        model = load_model(folder, asked)
        assert isinstance(weight_of(model, "0.self_attn.q_proj"), NF4Weight)
        assert isinstance(weight_of(model, "1.mlp.up_proj"), NF4Weight)
        assert isinstance(weight_of(model, "1.self_attn.q_proj"), torch.nn.Parameter)
        assert isinstance(weight_of(model, "0.mlp.down_proj"), torch.nn.Parameter)


def test_8_bit_rows_are_loaded_to_the_bit(tmp_path: Path) -> None:
    folder = write_quantised(tmp_path / "m", eight_bit, {"quant_method": "bitsandbytes"})
    stored = load_file(folder / "model.safetensors")
    weight = weight_of(load_model(folder), "0.self_attn.q_proj")
    assert isinstance(weight, Int8Weight)
    assert torch.equal(weight.codes, stored[Q])
    assert torch.equal(weight.absmax, stored[Q.replace("weight", "SCB")])
    exact = stored[Q].double() * stored[Q.replace("weight", "SCB")].double()[:, None] / 127
    assert torch.allclose(open_model_source(folder).tensor(Q).double(), exact, rtol=2**-8)
    assert isinstance(weight_of(load_model(folder, "nf4"), "0.self_attn.q_proj"), NF4Weight)


def test_experts_in_4_bits_compute_what_they_decode_to(tmp_path: Path) -> None:
    # Of fp32 weights, so that decoding rounds nothing.
    encode = four_bit(dtype=torch.float32)
    folder = write_quantised(tmp_path / "m", encode, NOTED, "qwen3_moe")
    model = load_model(folder)
    experts: Any = model.get_submodule(EXPERTS)
    assert {type(weight) for weight in experts.stored.values()} == {NF4Weight}
    dense = build_model(decoded(open_model_source(folder)))
    assert torch.allclose(model(IDS), dense(IDS), atol=1e-5)


def weight_of(model: Decoder, path: str) -> Any:
    """The weight of a module of the layers."""
    return model.get_submodule(f"model.layers.{path}").weight


def damaged(change: Callable[[dict[str, Tensor]], None]) -> Any:
    def encode(name: str, tensor: Tensor) -> dict[str, Tensor]:
        parts = four_bit()(name, tensor)
        if name == Q:
            change(parts)
        return dict(parts)

    return encode


def put(leaf: str, value: Tensor) -> Any:
    return lambda parts: parts.update({f"{Q}{leaf}": value})


STATE = ".quant_state.bitsandbytes__nf4"
SHAPELESS = b'{"blocksize": 64, "dtype": "bfloat16"}'
DAMAGES: dict[str, tuple[Any, str]] = {
    "no scales": (lambda parts: parts.pop(f"{Q}.absmax"), "without"),
    "too few scales": (put(".absmax", torch.zeros(3, dtype=torch.uint8)), "absmax holds 3"),
    "scales of another type": (put(".absmax", torch.zeros(64)), "its scales are torch.float32"),
    "scales that are not finite": (
        put(".nested_absmax", torch.tensor([math.nan])), "not finite",
    ),
    "too few codes": (put("", torch.zeros(7, 1, dtype=torch.uint8)), "the codes take 7 bytes"),
    "another table": (put(".quant_map", torch.zeros(16)), "quant_map"),
    "no JSON": (put(STATE, torch.zeros(9, dtype=torch.uint8)), "quant_state"),
    "no shape": (put(STATE, torch.tensor(list(SHAPELESS), dtype=torch.uint8)), "shape"),
    "no state at all": (lambda parts: parts.pop(f"{Q}{STATE}"), "bitsandbytes"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_weight_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    change, words = DAMAGES[damage]
    folder = write_quantised(tmp_path / "m", damaged(change), NOTED)
    with pytest.raises(CheckpointError) as caught:
        open_model_source(folder)
    assert words in str(caught.value)
    assert "q_proj" in str(caught.value)


def rows(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    lines = [json.dumps({"prompt": f"Say {n}", "response": "ab"}) for n in range(6)]
    path.write_text("\n".join(lines))
    return path


def test_a_quantised_model_trains_evaluates_merges_and_is_pruned(tmp_path: Path) -> None:
    engine.quantize(write_tiny_model(tmp_path / "base"), tmp_path / "m", bits=4)
    data, model = rows(tmp_path), tmp_path / "m"
    given: dict[str, Any] = {"model": str(model), "data": str(data), "max_steps": 2}
    run = engine.train(engine.TrainConfig(**given, output_dir=tmp_path / "run"), console=False)
    assert run.adapter_path is not None
    record = json.loads((run.adapter_path / "base.json").read_text())
    assert (record["quantization"], record["double_quant"]) == ("nf4", True)
    assert engine.evaluate(model, data, run.adapter_path).perplexity > 1
    merged = engine.merge(model, run.adapter_path, tmp_path / "merged", onto="dequantised")
    assert merged.requantised == 0  # its values are what training saw
    with_adapter = load_model(model, adapter=run.adapter_path)(IDS).detach()
    assert difference(with_adapter[0], load_model(merged.output)(IDS)[0]) < 0.02
    engine.prune(model, tmp_path / "pruned", fraction=0.25)
    assert "quantization_config" not in json.loads((tmp_path / "pruned/config.json").read_text())
    lora = engine.TrainConfig(**given, method="lora", output_dir=tmp_path / "lora")
    result = engine.train(lora, console=False)
    assert result.adapter_path is not None
    assert json.loads((result.adapter_path / "base.json").read_text())["quantization"] is None


def test_what_is_written_is_read_back_to_the_bit(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base")
    result = engine.quantize(base, tmp_path / "m", bits=4)
    stored = load_file(base / "model.safetensors")
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        codes = open_model_source(tmp_path / "m").codes(f"{name}.weight")
        expected = quantize(stored[f"{name}.weight"].to(torch.bfloat16))
        assert isinstance(codes, NF4Weight)
        for part, tensor in expected.tensors().items():
            assert torch.equal(codes.tensors()[part], tensor)
        decoded = open_model_source(tmp_path / "m").tensor(f"{name}.weight")
        assert torch.equal(decoded, dequantize(expected))
    again = engine.quantize(tmp_path / "m", tmp_path / "again", bits=4)
    assert (again.quantised, again.copied) == (0, result.quantised)
    files = [folder / "model.safetensors" for folder in (tmp_path / "m", tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_plan_knows_that_a_model_is_stored_in_nf4(tmp_path: Path) -> None:
    engine.quantize(write_tiny_model(tmp_path / "base"), tmp_path / "m", bits=4)
    given: dict[str, Any] = {"data": str(rows(tmp_path)), "device": "cpu"}
    stored = engine.plan(engine.TrainConfig(model=str(tmp_path / "m"), **given)).as_dict()
    assert any("stored in NF4 stay as they are" in line for line in stored["assumed"])
    lora = engine.TrainConfig(model=str(tmp_path / "m"), method="lora", **given)
    dense = engine.plan(lora).as_dict()
    assert any("stored in NF4 are decoded" in line for line in dense["assumed"])
    plain = engine.plan(engine.TrainConfig(model=str(tmp_path / "base"), **given))
    assert not any(line.startswith("model:") for line in plain.as_dict()["assumed"])
