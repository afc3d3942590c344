"""Cases of matrix products: NF4, LoRA groups, the head, attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from engine.benchmark.cases import plain
from engine.benchmark.cases.case import Case, CaseSizes, Tensors, Work, gradients, leaf
from engine.benchmark.cases.elementwise import normal
from engine.benchmark.cases.random_weights import random_nf4, random_projection
from kernels.attention import (
    AttentionPlan,
    AttentionSettings,
    attention_backward,
    attention_forward,
)
from kernels.linear.decode import decode_weight
from kernels.linear.lora import lora_qkv
from kernels.linear.projection import Projection
from kernels.linear.swiglu_mlp import lora_mlp
from kernels.loss.linear_cross_entropy import linear_cross_entropy
from kernels.nf4 import NF4Weight, quantize
from kernels.nf4.dequantize_triton import nf4_dequantize
from kernels.nf4.matmul import nf4_linear, nf4_linear_backward_input
from kernels.nf4.planar import PlanarNF4Weight, from_planar
from models.config.model_config import ModelConfig

NF4_ROWS = (1, 16, 64, 512, 2048, 8192)


def flat(weight: object) -> NF4Weight:
    """An NF4 weight in bitsandbytes' order."""
    if isinstance(weight, PlanarNF4Weight):
        return from_planar(weight)
    assert isinstance(weight, NF4Weight)
    return weight


def cases(model: str, config: ModelConfig, settings: CaseSizes) -> Iterator[Case]:
    """All cases of this module at the shapes of `config`."""
    yield _quantize(model, config, settings)
    yield _dequantize(model, config, settings, transposed=False)
    yield _dequantize(model, config, settings, transposed=True)
    for rows in NF4_ROWS:
        if rows <= max(settings.tokens, 16):
            yield _linear(model, config, settings, rows, backward=False)
    yield _linear(model, config, settings, min(settings.tokens, 2048), backward=True)
    yield _lora_group(model, config, settings, "lora_qkv")
    yield _lora_group(model, config, settings, "lora_mlp")
    yield _head(model, config, settings)
    yield _attention(model, config, settings, backward=False)
    yield _attention(model, config, settings, backward=True)


def _quantize(model: str, config: ModelConfig, settings: CaseSizes) -> Case:
    n, k, dtype = config.intermediate_size, config.hidden_size, settings.dtype

    def ours(t: Tensors) -> Tensors:
        result = quantize(t["w"], double_quant=False)
        return {"packed": result.packed, "absmax": result.absmax}

    def other(t: Tensors) -> Tensors:
        return dict(zip(("packed", "absmax"), plain.nf4_codes(t["w"]), strict=True))

    def make(device: torch.device) -> Work:
        return Work({"w": normal(device, dtype, n, k)}, ours, other)

    nbytes = n * k * (dtype.itemsize + 0.5 + 4 / 64)
    return Case("nf4_quantize", model, f"{n}x{k}", dtype, 2.0 * n * k, nbytes, make)


def _dequantize(model: str, config: ModelConfig, settings: CaseSizes, *, transposed: bool) -> Case:
    n, k, dtype = config.intermediate_size, config.hidden_size, settings.dtype

    def make(device: torch.device) -> Work:
        weight = random_nf4(n, k, device, dtype)
        shape = (k, n) if transposed else (n, k)
        out, stored = torch.empty(shape, dtype=dtype, device=device), flat(weight)

        def ours(_: Tensors) -> Tensors:
            if transposed:
                return {"weight": nf4_dequantize(weight, dtype, out=out, transposed=True)}
            return {"weight": decode_weight(weight, dtype, out=out)}

        def other(_: Tensors) -> Tensors:
            dense = plain.nf4_weight(stored, dtype)
            return {"weight": dense.T.contiguous() if transposed else dense}

        return Work({}, ours, other, quantized={"weight": stored})

    nbytes = n * k * (dtype.itemsize + 0.5 + 1 / 64 + 4 / 64 / 256)
    op = "nf4_dequantize_transposed" if transposed else "nf4_dequantize"
    return Case(op, model, f"{n}x{k}", dtype, 2.0 * n * k, nbytes, make)


def _linear(
    model: str, config: ModelConfig, settings: CaseSizes, m: int, *, backward: bool
) -> Case:
    n, k, dtype = config.intermediate_size, config.hidden_size, settings.dtype

    def make(device: torch.device) -> Work:
        weight = random_nf4(n, k, device, dtype)
        stored = flat(weight)

        def ours(t: Tensors) -> Tensors:
            if backward:
                return {"dx": nf4_linear_backward_input(t["dy"], weight)}
            return {"y": nf4_linear(t["x"], weight)}

        def other(t: Tensors) -> Tensors:
            dense = plain.nf4_weight(stored, dtype)
            if backward:
                return {"dx": t["dy"] @ dense.to(t["dy"].dtype)}
            return {"y": t["x"] @ dense.to(t["x"].dtype).T}

        given = normal(device, dtype, m, n if backward else k)
        return Work({"dy" if backward else "x": given}, ours, other, quantized={"weight": stored})

    nbytes = n * k * (0.5 + 1 / 64 + 4 / 64 / 256) + m * (n + k) * dtype.itemsize
    op = "nf4_linear_dx" if backward else "nf4_linear"
    return Case(op, model, f"{m}x{n}x{k}", dtype, 2.0 * m * n * k, nbytes, make)


def _lora_group(model: str, config: ModelConfig, settings: CaseSizes, op: str) -> Case:
    n, hidden, dtype = settings.tokens, config.hidden_size, settings.dtype
    dim, inner = config.head_dim, config.intermediate_size
    q, kv = config.num_attention_heads * dim, config.num_key_value_heads * dim
    if op == "lora_qkv":
        shapes = {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden)}
    else:
        shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    width = sum(out for out, _ in shapes.values()) if op == "lora_qkv" else hidden

    def make(device: torch.device) -> Work:
        group = {
            name: random_projection(out, into, settings.rank, device, dtype)
            for name, (out, into) in shapes.items()
        }
        stored = {name: flat(p.weight) for name, p in group.items()}
        tensors = {"x": normal(device, dtype, n, hidden), "dy": normal(device, dtype, n, width)}
        return Work(
            tensors | adapters(group),
            lambda t: _ours_lora(op, t, group),
            lambda t: _plain_lora(op, t, stored, group, dtype),
            quantized=stored,
        )

    weights = sum(out * into for out, into in shapes.values())
    adapter = sum(settings.rank * (out + into) for out, into in shapes.values())
    flops = n * (4.0 * weights + 6.0 * adapter)
    # x and dy read, y and dx written; the codes once a direction.
    nbytes = 2 * (hidden + width) * n * dtype.itemsize + 2 * 0.5159 * weights + 8.0 * adapter
    shape = f"{n}x{width}x{hidden}" if op == "lora_qkv" else f"{n}x{inner}x{hidden}"
    return Case(op, model, shape, dtype, flops, nbytes, make)


def adapters(group: Mapping[str, Projection]) -> dict[str, Tensor]:
    """The LoRA halves of a group by name."""
    result: dict[str, Tensor] = {}
    for name, projection in group.items():
        assert projection.lora_a is not None and projection.lora_b is not None
        result[f"{name}_a"], result[f"{name}_b"] = projection.lora_a, projection.lora_b
    return result


def _ours_lora(op: str, t: Tensors, group: Mapping[str, Projection]) -> Tensors:
    inputs: dict[str, Tensor] = {"x": leaf(t["x"])} | adapters(group)
    if op == "lora_qkv":
        y = torch.cat(lora_qkv(inputs["x"], group["q"], group["k"], group["v"]), 1)
    else:
        y = lora_mlp(inputs["x"], group["gate"], group["up"], group["down"])
    return {"y": y.detach(), **gradients(y, inputs, t["dy"])}


def _plain_lora(
    op: str,
    t: Tensors,
    stored: Mapping[str, NF4Weight],
    group: Mapping[str, Projection],
    dtype: torch.dtype,
) -> Tensors:
    inputs = {name: leaf(tensor) for name, tensor in t.items() if name != "dy"}
    x = inputs["x"]

    def one(name: str, given: Tensor) -> Tensor:
        weight = plain.nf4_weight(stored[name], dtype).to(given.dtype)
        a, b = inputs[f"{name}_a"], inputs[f"{name}_b"]
        return plain.lora(given, weight, a, b, group[name].scale)

    if op == "lora_qkv":
        y = torch.cat([one(name, x) for name in stored], 1)
    else:
        y = one("down", plain.swiglu(one("gate", x), one("up", x)))
    return {"y": y.detach(), **gradients(y, inputs, t["dy"])}


def _head(model: str, config: ModelConfig, settings: CaseSizes) -> Case:
    n, vocabulary = min(settings.tokens, settings.head_rows), config.vocab_size
    hidden, dtype = config.hidden_size, settings.dtype

    def ours(t: Tensors) -> Tensors:
        h = leaf(t["hidden"])
        loss = linear_cross_entropy(h, t["weight"], t["labels"])
        return {"loss": loss.detach(), **gradients(loss, {"hidden": h})}

    def other(t: Tensors) -> Tensors:
        h = leaf(t["hidden"])
        loss = plain.cross_entropy(h @ t["weight"].T, t["labels"]).mean()
        return {"loss": loss.detach(), **gradients(loss, {"hidden": h})}

    def make(device: torch.device) -> Work:
        tensors = {
            "hidden": normal(device, dtype, n, hidden),
            "weight": normal(device, dtype, vocabulary, hidden) * hidden**-0.5,
            "labels": torch.randint(0, vocabulary, (n,), device=device),
        }
        return Work(tensors, ours, other)

    flops = 4.0 * n * vocabulary * hidden
    nbytes = (vocabulary + 2.0 * n) * hidden * dtype.itemsize
    shape = f"{n}x{vocabulary}x{hidden}"
    return Case("linear_cross_entropy", model, shape, dtype, flops, nbytes, make)


def attention_flops(config: ModelConfig, bounds: Sequence[int]) -> float:
    """Operations of causal attention forward: two products over the visible half of each square."""
    width = config.num_attention_heads * config.head_dim
    lengths = [end - start for start, end in pairwise(bounds)]
    return sum(2.0 * length * length * width for length in lengths)


def _attention(model: str, config: ModelConfig, settings: CaseSizes, *, backward: bool) -> Case:
    n, dim, dtype, bounds = settings.tokens, config.head_dim, settings.dtype, settings.bounds
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    scale = dim**-0.5

    def other(t: Tensors) -> Tensors:
        if not backward:
            return {"o": plain.attention(t["q"], t["k"], t["v"], bounds)}
        inputs = {name: leaf(t[name]) for name in ("q", "k", "v")}
        out = plain.attention(inputs["q"], inputs["k"], inputs["v"], bounds)
        return {"o": out.detach(), **gradients(out, inputs, t["do"])}

    def make(device: torch.device) -> Work:
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        packing = AttentionSettings(AttentionPlan.from_cu_seqlens(cu_seqlens, n), None, scale)

        def ours(t: Tensors) -> Tensors:
            q, k, v = t["q"], t["k"], t["v"]
            out, saved = attention_forward(q, k, v, packing)
            if not backward:
                return {"o": out}
            grads = attention_backward(t["do"], q, k, v, out, saved, packing)
            return {"o": out, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}

        sizes = {"q": heads, "k": kv_heads, "v": kv_heads, "do": heads}
        tensors = {name: normal(device, dtype, n, h, dim) for name, h in sizes.items()}
        return Work(tensors, ours, other)

    forward = attention_flops(config, bounds)
    unit = n * dim * dtype.itemsize
    if backward:
        nbytes = unit * (4.0 * heads + 4.0 * kv_heads)
        flops, op = 3.5 * forward, "attention_grad"
    else:
        nbytes, flops, op = unit * (2.0 * heads + 2.0 * kv_heads), forward, "attention"
    shape = f"{len(bounds) - 1}x{bounds[1]}x({heads}+{kv_heads})x{dim}"
    return Case(op, model, shape, dtype, flops, nbytes, make)
