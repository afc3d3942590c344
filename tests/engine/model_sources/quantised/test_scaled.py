"""8-bit weights with scales decode to code times scale, whatever a scale belongs to."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import CheckpointError
from engine.model_sources.load_model import load_model
from engine.model_sources.open import open_model_source
from tests.support.scaled_folders import write_quantised

UP = "model.layers.0.mlp.up_proj.weight"
FP8 = torch.float8_e4m3fn
BLOCK = {"quant_method": "fp8", "weight_block_size": [32, 48]}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "config_groups": {"group_0": {"weights": {"num_bits": 8, "block_structure": [16, 32]}}},
}


def spread(scale: Tensor, shape: tuple[int, ...], block: tuple[int, int]) -> Tensor:
    """Every element's own scale, by its row and column, float64; 0 is the whole of a side."""
    rows, columns = shape
    high, wide = block[0] or rows, block[1] or columns
    grid = scale.reshape(-(-rows // high), -(-columns // wide))
    out = torch.empty(shape, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            out[row, column] = grid[row // high, column // wide]
    return out


CASES: dict[str, tuple[str, Any, torch.dtype, dict[str, Any], tuple[int, int]]] = {
    "fp8 in blocks": (
        "weight_scale_inv", lambda r, c: (-(-r // 32), -(-c // 48)), FP8, BLOCK, (32, 48),
    ),
    "fp8 in blocks of 128": (
        "weight_scale_inv", lambda r, c: (-(-r // 128), -(-c // 128)), FP8,
        {"quant_method": "fp8"}, (128, 128),
    ),
    "fp8 by tensor": ("weight_scale", lambda r, c: (), FP8, {"quant_method": "fp8"}, (0, 0)),
    "e5m2 by tensor": (
        "weight_scale", lambda r, c: (1,), torch.float8_e5m2, {"quant_method": "fp8"}, (0, 0),
    ),
    "fbgemm by row": (
        "weight_scale", lambda r, c: (r, 1), FP8, {"quant_method": "fbgemm_fp8"}, (1, 0),
    ),
    "compressed int8 by row": ("weight_scale", lambda r, c: (r, 1), torch.int8, COMPRESSED, (1, 0)),
    "compressed int8 by tensor": (
        "weight_scale", lambda r, c: (1,), torch.int8, COMPRESSED, (0, 0),
    ),
    "compressed int8 by group": (
        "weight_scale", lambda r, c: (r, c // 16), torch.int8, COMPRESSED, (1, 16),
    ),
    "compressed float in blocks": (
        "weight_scale", lambda r, c: (-(-r // 16), -(-c // 32)), FP8, COMPRESSED, (16, 32),
    ),
    "a method without a name": ("weight_scale", lambda r, c: (r,), torch.int8, {}, (1, 0)),
}  # fmt: skip


def encoder(suffix: str, grid: Any, kind: torch.dtype, zero: bool = False) -> Any:
    def encode(name: str, tensor: Tensor) -> dict[str, Tensor]:
        torch.manual_seed(len(name))
        if kind == torch.int8:
            codes = torch.randint(-127, 128, tensor.shape, dtype=torch.int8)
        else:
            codes = (torch.randn(tensor.shape) * 8).to(kind)
        module = name.removesuffix(".weight")
        scale = torch.rand(grid(*tensor.shape)) * 0.004 + 0.001
        parts = {name: codes, f"{module}.{suffix}": scale, f"{module}.input_scale": torch.ones(1)}
        if zero:
            parts[f"{module}.weight_zero_point"] = torch.randint(-9, 9, scale.shape).to(torch.int8)
        return parts

    return encode


@pytest.mark.parametrize("case", CASES)
def test_a_weight_is_its_code_times_its_scale(tmp_path: Path, case: str) -> None:
    suffix, grid, kind, noted, block = CASES[case]
    folder = write_quantised(tmp_path / "m", encoder(suffix, grid, kind), noted or None)
    source = open_model_source(folder)
    stored = load_file(folder / "model.safetensors")
    for name in source.names():
        if "_proj." not in name:
            assert torch.equal(source.tensor(name), stored[name])
            continue
        codes = stored[name].double()
        scale = stored[name.replace("weight", suffix)]
        exact = codes * spread(scale.double(), tuple(codes.shape), block)
        assert source.dtype(name) == torch.bfloat16
        assert torch.equal(source.tensor(name), exact.float().to(torch.bfloat16)), name
        assert source.codes(name) is None


def test_zero_points_are_taken_off(tmp_path: Path) -> None:
    encode = encoder("weight_scale", lambda r, c: (r, 1), torch.int8, zero=True)
    folder = write_quantised(tmp_path / "m", encode, COMPRESSED)
    stored = load_file(folder / "model.safetensors")
    zero = stored[UP.replace("weight", "weight_zero_point")].double()
    exact = (stored[UP].double() - zero) * stored[UP.replace("weight", "weight_scale")].double()
    assert torch.equal(open_model_source(folder).tensor(UP), exact.float().to(torch.bfloat16))


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_such_a_model_loads_in_every_form(tmp_path: Path, quantize: Any) -> None:
    encode = encoder("weight_scale_inv", lambda r, c: (-(-r // 128), -(-c // 128)), FP8)
    folder = write_quantised(tmp_path / "m", encode, {"quant_method": "fp8"})
    logits = load_model(folder, quantize)(torch.arange(6)[None])
    assert bool(torch.isfinite(logits).all())


def test_experts_in_one_tensor_have_scales_per_expert(tmp_path: Path) -> None:
    def encode(name: str, tensor: Tensor) -> dict[str, Tensor]:
        return {name: tensor}

    folder = write_quantised(tmp_path / "m", encode, {"quant_method": "fp8"}, "qwen3_5_moe_vl")
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith(".mlp.experts.down_proj")]:
        count = len(tensors[name])
        codes = (tensors[name] * 8).to(FP8)
        tensors |= {name: codes, f"{name}_scale_inv": torch.rand(count, 1, 1) + 0.5}
    save_file(tensors, folder / "model.safetensors")
    source = open_model_source(folder)
    name = next(n for n in source.names() if n.endswith(".mlp.experts.down_proj"))
    exact = tensors[name].double() * tensors[f"{name}_scale_inv"].double()
    assert torch.equal(source.tensor(name), exact.float().to(torch.bfloat16))


def test_scales_that_fit_nothing_are_refused(tmp_path: Path) -> None:
    folder = write_quantised(
        tmp_path / "m", encoder("weight_scale", lambda r, c: (3, 5), FP8), {"quant_method": "fp8"}
    )
    with pytest.raises(CheckpointError, match=r"has scales of shape \[3, 5\]"):
        open_model_source(folder)


def test_8_bit_floats_without_scales_are_refused(tmp_path: Path) -> None:
    def encode(name: str, tensor: Tensor) -> dict[str, Tensor]:
        return {name: tensor.to(FP8)}

    folder = write_quantised(tmp_path / "m", encode, {"quant_method": "fp8"})
    with pytest.raises(CheckpointError, match="without their scales"):
        open_model_source(folder)


def test_rotated_weights_are_refused(tmp_path: Path) -> None:
    noted = COMPRESSED | {"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}}
    encode = encoder("weight_scale", lambda r, c: (r, 1), torch.int8)
    folder = write_quantised(tmp_path / "m", encode, noted)
    with pytest.raises(CheckpointError, match="transform_config"):
        open_model_source(folder)


@pytest.mark.parametrize(
    "odd",
    [{"config_groups": ["group_0"]}, {"config_groups": "all"}, {"config_groups": {"g": []}},
     {"config_groups": True, "weight_block_size": 5}, {"transform_config": [1]}],
)  # fmt: skip
def test_notes_of_another_kind_leave_it_to_the_tensors(
    tmp_path: Path, odd: dict[str, object]
) -> None:
    encode = encoder("weight_scale", lambda r, c: (r, 1), torch.int8)
    folder = write_quantised(tmp_path / "m", encode, COMPRESSED | odd)
    source = open_model_source(folder)
    assert any(source.stored_as(n) for n in source.names())


REFUSED: dict[str, tuple[str, dict[str, Tensor]]] = {
    "gptq": ("GPTQ", {"qweight": torch.zeros(8, 64, dtype=torch.int32)}),
    "awq": ("AWQ", {"qweight": torch.zeros(64, 8, dtype=torch.int32)}),
    "hqq": ("HQQ", {"W_q": torch.zeros(64, 8, dtype=torch.uint8)}),
    "aqlm": ("AQLM", {"codebooks": torch.zeros(2, 8)}),
    "eetq": ("EETQ", {"qweight": torch.zeros(64, 64, dtype=torch.int8)}),
    "quanto": ("Quanto", {"weight._data": torch.zeros(8, 8, dtype=torch.int8)}),
    "mxfp4": ("MXFP4", {"weight_blocks": torch.zeros(8, 8, dtype=torch.uint8)}),
    "torchao": ("torchao", {"weight": torch.zeros(64, 64, dtype=torch.int8)}),
    "compressed-tensors": (
        "compressed-tensors", {"weight_packed": torch.zeros(64, 8, dtype=torch.int32)},
    ),
    "newfangled": ("by newfangled", {"weight": torch.zeros(64, 64, dtype=torch.int8)}),
}  # fmt: skip


@pytest.mark.parametrize("method", REFUSED)
def test_other_methods_are_refused_by_name_with_what_to_use(tmp_path: Path, method: str) -> None:
    words, parts = REFUSED[method]

    def encode(name: str, tensor: Tensor) -> dict[str, Tensor]:
        module = name.removesuffix(".weight")
        return {f"{module}.{leaf}": part.clone() for leaf, part in parts.items()}

    folder = write_quantised(tmp_path / f"Some-8B-{method}", encode, {"quant_method": method})
    with pytest.raises(CheckpointError) as caught:
        open_model_source(folder)
    message = str(caught.value)
    assert words in message
    assert "original 16-bit" in message
    if method in ("gptq", "awq"):
        assert f"Some-8B in place of Some-8B-{method}" in message


def test_a_note_of_the_inner_configuration_counts(tmp_path: Path) -> None:
    def encode(name: str, tensor: Tensor) -> dict[str, Tensor]:
        return {name.replace("weight", "qweight"): torch.zeros(4, 4, dtype=torch.int32)}

    folder = write_quantised(tmp_path / "m", encode, None)
    raw = json.loads((folder / "config.json").read_text())
    raw["text_config"] = {"quantization_config": {"quant_method": "awq"}}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="AWQ"):
        open_model_source(folder)
