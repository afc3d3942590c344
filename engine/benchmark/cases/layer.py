"""The case of a whole decoder layer: QLoRA on all projections."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from engine.benchmark.cases import plain
from engine.benchmark.cases.case import Case, CaseSizes, Tensors, Work, gradients, leaf
from engine.benchmark.cases.elementwise import adapter_shapes, normal
from engine.benchmark.cases.matmul import attention_flops, flat
from engine.benchmark.cases.random_weights import random_decoder
from kernels.attention import AttentionPlan
from kernels.nf4 import NF4Weight
from models.config.model_config import ModelConfig
from models.layers.block import DecoderLayer
from models.layers.context import LayerContext
from models.layers.linear import Linear, RMSNorm
from models.memory.checkpointing import ForwardPass, run_layer
from models.tensor_names import PROJECTIONS, layer_tensors


def cases(model: str, config: ModelConfig, settings: CaseSizes) -> Iterator[Case]:
    """The case of this module at the shapes of `config`."""
    n, dtype = settings.tokens, settings.dtype
    one = replace(config, num_hidden_layers=1, layer_types=config.layer_types[:1], vocab_size=64)
    weights = linear_parameters(config)
    adapter = sum(a * b for a, b in adapter_shapes(config, settings.rank, 1))
    flops = n * (4.0 * weights + 6.0 * adapter) + 3.5 * attention_flops(config, settings.bounds)
    nbytes = 4.0 * n * config.hidden_size * dtype.itemsize + 2 * 0.5159 * weights + 8.0 * adapter
    shape = f"{len(settings.bounds) - 1}x{settings.bounds[1]}"
    yield Case(
        "decoder_layer", model, shape, dtype, flops, nbytes, lambda d: _make(one, settings, d)
    )


def linear_parameters(config: ModelConfig) -> int:
    """Weights of one layer's seven projections."""
    return sum(shape[0] * shape[1] for shape in layer_tensors(config).values() if len(shape) == 2)


def _make(config: ModelConfig, settings: CaseSizes, device: torch.device) -> Work:
    n, dtype = settings.tokens, settings.dtype
    decoder = random_decoder(config, device, dtype, rank=settings.rank)
    layer = decoder.layers[0]
    cu_seqlens = torch.tensor(settings.bounds, dtype=torch.int32)
    starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff()).long()
    positions = (torch.arange(n) - starts).to(device)
    cos, sin = decoder.rotary(positions, dtype)
    context = LayerContext(cos, sin, AttentionPlan.from_cu_seqlens(cu_seqlens, n))
    run = ForwardPass(context, ("none",))
    linears = {
        name.rsplit(".", 1)[-1]: module
        for name, module in layer.named_modules()
        if isinstance(module, Linear)
    }
    stored = {name: flat(module.weight) for name, module in linears.items()}
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}

    def ours(t: Tensors) -> Tensors:
        inputs: dict[str, Tensor] = {"x": leaf(t["x"]), **trained}
        y = run_layer(inputs["x"], layer, run)
        return {"y": y.detach(), **gradients(y, inputs, t["dy"])}

    def other(t: Tensors) -> Tensors:
        return _plain_layer(t, layer, stored, settings)

    given = {name: normal(device, dtype, n, config.hidden_size) for name in ("x", "dy")}
    norms = {f"norm {name}": module.weight for name, module in _norms(layer).items()}
    tensors: dict[str, Tensor] = {**given, **trained, **norms, "cos": cos, "sin": sin}
    return Work(tensors, ours, other, quantized=stored)


def _norms(layer: DecoderLayer) -> dict[str, RMSNorm]:
    return {n: module for n, module in layer.named_modules() if isinstance(module, RMSNorm)}


def _plain_layer(
    t: Tensors, layer: DecoderLayer, stored: dict[str, NF4Weight], settings: CaseSizes
) -> Tensors:
    """The layer by autograd, with every weight decoded where it is used."""
    eps, dim = layer.input_layernorm.eps, layer.head_dim
    inputs = {name: leaf(tensor) for name, tensor in t.items() if name == "x" or "lora_" in name}

    def linear(name: str, x: Tensor) -> Tensor:
        assert name in PROJECTIONS
        part = "self_attn" if name[0] in "qkvo" else "mlp"
        module = layer.get_submodule(f"{part}.{name}")
        assert isinstance(module, Linear)
        weight = plain.nf4_weight(stored[name], settings.dtype).to(x.dtype)
        a, b = (inputs[f"{part}.{name}.lora_{half}"] for half in "AB")
        y = plain.lora(x, weight, a, b, module.scale)
        return y if module.bias is None else y + module.bias.to(y.dtype)

    def norm(name: str, x: Tensor) -> Tensor:
        return plain.rms_norm(x, t[f"norm {name}"], eps)

    x = inputs["x"]
    h = norm("input_layernorm", x)
    q, k, v = (linear(name, h).unflatten(1, (-1, dim)) for name in ("q_proj", "k_proj", "v_proj"))
    if layer.self_attn is not None and layer.self_attn.q_norm is not None:
        q, k = norm("self_attn.q_norm", q), norm("self_attn.k_norm", k)
    q, k = (plain.rope(part, t["cos"], t["sin"]) for part in (q, k))
    attended = plain.attention(q, k, v, settings.bounds).flatten(1)
    x1 = x + linear("o_proj", attended)
    h = norm("post_attention_layernorm", x1)
    y = x1 + linear("down_proj", plain.swiglu(linear("gate_proj", h), linear("up_proj", h)))
    return {"y": y.detach(), **gradients(y, inputs, t["dy"])}
