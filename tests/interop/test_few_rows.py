"""Loops for few rows, which numba compiles for a CPU, obey the rule that kernels obey."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.elementwise.rms_norm import add_rms_norm_forward, rms_norm_forward
from kernels.elementwise.rope import rope_
from kernels.elementwise.swiglu import swiglu_forward
from kernels.few_rows.elementwise import gate_rows, norm_rows, rotate_rows
from kernels.few_rows.product import StoredWeight, multiply_rows, takes_rows, takes_weight
from kernels.linear.int8 import dequantize_int8, quantize_int8
from kernels.nf4 import dequantize, quantize
from models.adapters import add_lora
from models.cache.many_sequences import BatchCache, BatchPass
from models.cache.one_sequence import KVCache
from models.config.model_config import ModelConfig
from models.decoder import Decoder

pytestmark = pytest.mark.interop
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def check(ours: Tensor, plain: Tensor, truth: Tensor) -> None:
    """Twice the error of plain torch in the same dtype, and one ulp."""
    largest = float(truth.abs().max())
    ulp = torch.finfo(ours.dtype).eps * 2.0 ** math.floor(math.log2(largest))
    allowed = 2 * float((plain.double() - truth).abs().max()) + ulp
    assert float((ours.double() - truth).abs().max()) <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["dense", "int8", "nf4", "nested"])
def test_products_are_as_exact_as_torch(kind: str, dtype: torch.dtype) -> None:
    """For every number of rows, with outputs that fill no tile, beside other columns."""
    dense = torch.randn(67, 576) * 0.05
    stored: StoredWeight
    if kind == "dense":
        stored = dense.to(dtype)
        decoded = stored.float()
    elif kind == "int8":
        stored = quantize_int8(dense)
        decoded = dequantize_int8(stored, torch.float32)
    else:
        stored = quantize(dense, 32, double_quant=kind == "nested")
        decoded = dequantize(stored, torch.float32)
    for rows in range(1, 9):
        x = torch.randn(rows, 600)[:, :576].to(dtype)
        wide = torch.full((rows, 80), torch.nan, dtype=dtype)
        out, truth = wide[:, 5:72], x.double() @ decoded.double().T
        assert takes_rows(x)
        assert takes_weight(x, stored)
        multiply_rows(x, (stored,), (out,))
        check(out, x @ decoded.to(dtype).T, truth)
        assert int(wide.isnan().sum()) == rows * 13
        before = torch.randn(rows, 67).to(dtype)
        out.copy_(before)
        multiply_rows(x, (stored,), (out,), add=True)
        check(out, torch.addmm(before, x, decoded.to(dtype).T), truth + before.double())


def test_the_outputs_of_a_group_are_divided_among_cores() -> None:
    """A weight may lie in two parts, and a part in two weights."""
    x, weights = torch.randn(2, 1024), [torch.randn(n, 1024) for n in (999, 33, 1100)]
    outs = [torch.full((2, len(weight)), torch.nan) for weight in weights]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        multiply_rows(x, weights, outs)
    finally:
        torch.set_num_threads(threads)
    for weight, out in zip(weights, outs, strict=True):
        check(out, x @ weight.T, x.double() @ weight.double().T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centred", [False, True])
def test_norms_are_as_exact_as_torch(centred: bool, dtype: torch.dtype) -> None:
    x, addend = (torch.randn(3, 600)[:, :576].to(dtype) for _ in range(2))
    weight = torch.randn(576).to(dtype)
    for other in (None, addend):
        total = x if other is None else x + other
        truth, _ = rms_norm_forward(total.double(), weight.double(), 1e-5, zero_centered=centred)
        if other is None:
            plain, _ = rms_norm_forward(x, weight, 1e-5, zero_centered=centred)
        else:
            plain, _, _ = add_rms_norm_forward(x, other, weight, 1e-5, zero_centered=centred)
        own = None if other is None else other.clone()
        check(norm_rows(x, weight, 1e-5, zero_centered=centred, addend=own), plain, truth)
        assert own is None or torch.equal(own, total)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_and_swiglu_are_as_exact_as_torch(dtype: torch.dtype) -> None:
    angles = torch.randn(3, 32)
    cos, sin = angles.cos(), angles.sin()
    x = torch.randn(3, 300)[:, :256].to(dtype).unflatten(1, (4, 64))
    truth, plain = rope_(x.double(), cos.double(), sin.double()), rope_(x.clone(), cos, sin)
    rotate_rows(x, cos, sin)
    check(x, plain, truth)
    both = torch.randn(3, 1056).mul_(12).to(dtype)
    both[0, :5] = torch.tensor([0.0, 200.0, -200.0, 87.0, -87.0])
    gate, up = both[:, :528], both[:, 528:]
    check(gate_rows(both), swiglu_forward(gate, up), F.silu(gate.double()) * up.double())
    both[:, 0] = torch.nan
    assert gate_rows(both)[:, 0].isnan().all()


CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("adapted", [False, True])
def test_next_tokens_are_those_of_a_whole_pass(family: str, adapted: bool) -> None:
    """With biases, norms of heads, and low-rank pairs, alone and several sequences together."""
    model = Decoder(ModelConfig.from_dict(CONFIG | {"model_type": family})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05 if parameter.dim() > 1 else 1.0)
    if adapted:
        add_lora(model, rank=4)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    model.requires_grad_(False)
    ids = [torch.randint(0, 512, (length,)) for length in (5, 9, 12)]
    whole = [model(row[None])[0] for row in ids]
    cache, owners = BatchCache(model.config, model.dtype, model.device), {}
    for index, row in enumerate(ids):
        own = KVCache(model.config, 4, model.dtype, model.device)
        torch.testing.assert_close(model.decode(row[:4], own), whole[index][3])
        owners[cache.join(own)] = index
    order = [owners[sequence] for sequence in cache.running()]
    tokens = torch.stack([ids[index][4] for index in order])
    logits = model.decode_batch(tokens, BatchPass(cache.bands()), range(3))
    torch.testing.assert_close(logits, torch.stack([whole[index][4] for index in order]))
