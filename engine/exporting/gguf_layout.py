"""Tensors of a GGUF file, and how each is made.

The way back from `engine.model_sources.gguf.tensor_map`, which says what llama.cpp changes and why:
q and k of Llamas are interleaved, experts are one tensor per projection, norms that are stored
around zero get one added, and DeltaNet's rows have llama.cpp's order and form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from engine.model_sources.gguf.config import llama3_factors
from engine.model_sources.gguf.tensor_map import (
    IN_DELTA_NET,
    IN_LAYER,
    TOP,
    has_tiled_heads,
    interleaved_heads,
)
from models.config.model_config import ModelConfig
from models.tensor_names import graph_tensors

Shape = tuple[int, ...]
_EXACT = ("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "ssm_conv1d.weight")


@dataclass(frozen=True)
class GGUFTensor:
    """`name` of `shape` in the file is `make` of the graph's parameter `parameter`."""

    name: str
    shape: Shape
    parameter: str | None
    make: Callable[[Tensor], Tensor] = lambda tensor: tensor

    @property
    def columns_move(self) -> bool:
        """Whether `make` moves columns of a matrix; else it works on rows alone."""
        return self.name.endswith("ssm_out.weight")

    @property
    def exact(self) -> bool:
        """Whether every program expects this tensor in fp32."""
        return len(self.shape) == 1 or self.name.endswith(_EXACT)


def layout(config: ModelConfig) -> list[GGUFTensor]:
    """Every tensor of the file, in the order of the model."""
    tensors = [] if config.rope_parameters["rope_type"] != "llama3" else [_rope_factors(config)]
    for name, shape in graph_tensors(config).items():
        tensors += _of_parameter(config, name, shape)
    return tensors


def _of_parameter(config: ModelConfig, name: str, shape: Shape) -> list[GGUFTensor]:
    module, _, suffix = name.rpartition(".")
    if not name.startswith("model.layers."):
        make = _plus_one if config.zero_centered_norm and module == "model.norm" else _same
        return [GGUFTensor(f"{TOP[module]}.{suffix}", shape, name, make)]
    _, _, number, rest = name.split(".", 3)
    block = f"blk.{number}."
    if rest.startswith("mlp.experts."):
        return _experts(block, name, shape)
    if rest.startswith("linear_attn."):
        return _delta_net(config, block, name, rest.removeprefix("linear_attn."), shape)
    module, _, suffix = rest.rpartition(".")
    theirs = f"{block}{IN_LAYER[module]}.{suffix}"
    if module.endswith("norm") and config.zero_centered_norm:
        theirs = theirs.replace("ffn_norm", "post_attention_norm")
        return [GGUFTensor(theirs, shape, name, _plus_one)]
    if module == "mlp.shared_expert_gate":
        return [GGUFTensor(theirs, shape[1:], name, lambda gate: gate.view(-1))]
    heads = interleaved_heads(config, module, int(number))
    if heads:
        return [GGUFTensor(theirs, shape, name, partial(interleaved, heads=heads))]
    return [GGUFTensor(theirs, shape, name)]


def _experts(block: str, name: str, shape: Shape) -> list[GGUFTensor]:
    if name.endswith("down_proj"):
        return [GGUFTensor(f"{block}ffn_down_exps.weight", shape, name)]
    count, rows, columns = shape
    half = (count, rows // 2, columns)
    return [
        GGUFTensor(f"{block}ffn_gate_exps.weight", half, name, lambda both: both[:, : rows // 2]),
        GGUFTensor(f"{block}ffn_up_exps.weight", half, name, lambda both: both[:, rows // 2 :]),
    ]


def _delta_net(
    config: ModelConfig, block: str, name: str, rest: str, shape: Shape
) -> list[GGUFTensor]:
    keys, heads = config.linear_num_key_heads, config.linear_num_value_heads
    key_rows = keys * config.linear_key_head_dim
    if rest == "in_proj_qkvz.weight":
        value_rows = heads * config.linear_value_head_dim
        split = partial(by_kind, key_heads=keys, sizes=(key_rows, key_rows, value_rows, value_rows))
        joint = (2 * key_rows + value_rows, shape[1])
        return [
            GGUFTensor(f"{block}attn_qkv.weight", joint, name, lambda w: torch.cat(split(w)[:3])),
            GGUFTensor(
                f"{block}attn_gate.weight", (value_rows, shape[1]), name, lambda w: split(w)[3]
            ),
        ]
    theirs = f"{block}{IN_DELTA_NET[rest]}"
    order: Callable[..., Tensor] = partial(tiled, key_heads=keys, value_heads=heads)
    if not has_tiled_heads(config) or rest == "norm.weight":
        order = _same_rows
    if rest == "conv1d.weight":
        start = 2 * key_rows
        return [
            GGUFTensor(
                theirs, (shape[0], shape[-1]), name, lambda w: order(w.squeeze(1), start=start)
            )
        ]
    if rest == "A_log":
        return [GGUFTensor(theirs, shape, name, lambda a: order(a.float().exp().neg(), start=0))]
    if rest == "out_proj.weight":
        return [GGUFTensor(theirs, shape, name, lambda w: order(w.mT, start=0).mT)]
    start = 2 * key_rows if rest == "in_proj_qkv.weight" else 0
    return [GGUFTensor(theirs, shape, name, partial(order, start=start))]


def _rope_factors(config: ModelConfig) -> GGUFTensor:
    """Llama 3's rotary scaling, which llama.cpp reads as a divisor of every frequency."""
    rope = config.rope_parameters
    factors = llama3_factors(
        rope["rope_theta"], config.head_dim, rope["factor"], rope["low_freq_factor"],
        rope["high_freq_factor"], rope["original_max_position_embeddings"],
    ).float()  # fmt: skip
    return GGUFTensor("rope_freqs.weight", tuple(factors.shape), None, lambda _: factors)


def interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection (heads * head_dim, ...): the halves of a head alternate."""
    rows = tensor.shape[0]
    halves = tensor.reshape(heads, 2, rows // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def tiled(tensor: Tensor, key_heads: int, value_heads: int, start: int) -> Tensor:
    """Rows from `start` on, from value heads that are grouped by key head to tiled ones."""
    groups = tensor[start:].unflatten(0, (key_heads, value_heads // key_heads, -1))
    return torch.cat((tensor[:start], groups.transpose(0, 1).flatten(0, 2)))


def by_kind(joint: Tensor, key_heads: int, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Rows [q | k | v | z] of each key head in turn, as the rows of each kind of all heads."""
    heads = joint.unflatten(0, (key_heads, -1))
    parts = heads.split([size // key_heads for size in sizes], 1)
    return tuple(part.flatten(0, 1) for part in parts)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _same_rows(tensor: Tensor, start: int = 0) -> Tensor:
    del start
    return tensor


def _plus_one(norm: Tensor) -> Tensor:
    return norm.float() + 1
