"""Map Hugging Face's tensors to those of a GGUF file.

llama.cpp has its own names, and its converter changes some tensors. Read back are:

- llama, mistral, smollm3: rows of q and k. llama.cpp rotates the neighbours (2i, 2i+1) of a head
  where Hugging Face rotates (i, i+d/2), so the converter interleaves the halves of each head.
- experts: one tensor (E, out, in) per projection, or gate above up in one.
- qwen3next, qwen35, qwen35moe: every norm but DeltaNet's own holds 1 + w; `ssm_a` is -exp(A_log);
  the convolution (C, J) has lost its middle dimension.
- qwen3next: the rows of q, k, v and z of all key heads stand together, where Hugging Face has
  those of one key head together. Files of 2025 hold Hugging Face's order, as `ssm_in`.
- qwen35, qwen35moe: value heads are tiled, j reads key head j mod Hk, where Hugging Face groups
  them, j reads key head j // r.

Source: llama.cpp's converter and model loader (MIT), as of August 2026.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from models.config.model_config import ModelConfig
from models.tensor_names import expected_tensors

Shape = tuple[int, ...]
TOP = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}
IN_DELTA_NET = {
    "in_proj_qkv.weight": "attn_qkv.weight",
    "in_proj_z.weight": "attn_gate.weight",
    "in_proj_b.weight": "ssm_beta.weight",
    "in_proj_a.weight": "ssm_alpha.weight",
    "in_proj_ba.weight": "ssm_ba.weight",
    "conv1d.weight": "ssm_conv1d.weight",
    "dt_bias": "ssm_dt.bias",
    "A_log": "ssm_a",
    "norm.weight": "ssm_norm.weight",
    "out_proj.weight": "ssm_out.weight",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.(?:(\d+)\.)?(gate|up|down|gate_up)_proj(?:\.weight)?")
_INTERLEAVED = ("llama", "mistral", "smollm3")
_TILED = ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text")


@dataclass(frozen=True)
class Source:
    """One tensor of a model: `tensors` of the GGUF file, name -> shape, and how to restore it.

    `restore` takes them in that order; of each only entry `entry` of its first dimension where
    that is given.
    """

    tensors: Mapping[str, Shape]
    restore: Callable[..., Tensor] = lambda tensor: tensor
    entry: int | None = None


def sources(config: ModelConfig, present: Mapping[str, Shape]) -> dict[str, Source]:
    """Name in the hub's layout -> where it is, in a file with the tensors `present`."""
    return {
        name: _without_ones(_source(config, name, shape, present), present)
        for name, shape in expected_tensors(config).items()
    }


def _without_ones(source: Source, present: Mapping[str, Shape]) -> Source:
    """`source` as the file has it: ggml drops outer dimensions of 1, such as that of one expert."""
    stored = {name: _stored(present, name, shape) for name, shape in source.tensors.items()}
    if stored == dict(source.tensors):
        return source
    one = source.entry is not None
    shapes = [shape[1:] if one else shape for shape in source.tensors.values()]

    def restore(*parts: Tensor) -> Tensor:
        views = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        return source.restore(*views)

    whole = one and all(len(s) < len(source.tensors[n]) for n, s in stored.items())
    return Source(stored, restore, None if whole else source.entry)


def _source(config: ModelConfig, name: str, shape: Shape, present: Mapping[str, Shape]) -> Source:
    match = _LAYER.fullmatch(name)
    if match is None:
        stem, _, suffix = name.rpartition(".")
        centred = config.zero_centered_norm and stem == "model.norm"
        top = {f"{TOP[stem]}.{suffix}": shape}
        return Source(top, _less_one) if centred else Source(top)
    block, rest = f"blk.{match[1]}.", match[2]
    expert = _EXPERT.fullmatch(rest)
    if expert is not None:
        return _expert(config, block, expert, present)
    if rest.startswith("linear_attn."):
        return _delta_net(config, block, rest.removeprefix("linear_attn."), shape, present)
    module, _, suffix = rest.rpartition(".")
    theirs = f"{block}{IN_LAYER[module]}.{suffix}"
    if module.endswith("norm") and config.zero_centered_norm:
        # These families have a norm behind attention where others have one before the MLP.
        return Source({theirs.replace("ffn_norm", "post_attention_norm"): shape}, _less_one)
    heads = interleaved_heads(config, module, int(match[1]))
    if heads:
        return Source({theirs: shape}, partial(undo_permutation, heads=heads))
    return Source({theirs: shape})


def _expert(
    config: ModelConfig, block: str, match: re.Match[str], present: Mapping[str, Shape]
) -> Source:
    count, inner = config.num_experts, config.moe_intermediate_size
    into, back = (count, inner, config.hidden_size), (count, config.hidden_size, inner)
    entry, kind = None if match[1] is None else int(match[1]), match[2]
    if kind == "down":
        return Source({f"{block}ffn_down_exps.weight": back}, entry=entry)
    joint = f"{block}ffn_gate_up_exps.weight"
    if joint in present:
        both = {joint: (count, 2 * inner, config.hidden_size)}
        if kind == "gate_up":
            return Source(both, entry=entry)
        half = slice(0, inner) if kind == "gate" else slice(inner, None)
        return Source(both, lambda rows: rows[half].clone(), entry)
    if kind == "gate_up":
        names = (f"{block}ffn_gate_exps.weight", f"{block}ffn_up_exps.weight")
        return Source(dict.fromkeys(names, into), lambda *parts: torch.cat(parts, 1), entry)
    return Source({f"{block}ffn_{kind}_exps.weight": into}, entry=entry)


def _delta_net(
    config: ModelConfig, block: str, rest: str, shape: Shape, present: Mapping[str, Shape]
) -> Source:
    keys, heads = config.linear_num_key_heads, config.linear_num_value_heads
    key_rows = keys * config.linear_key_head_dim
    if rest == "in_proj_qkvz.weight":
        legacy = f"{block}ssm_in.weight"
        if legacy in present:
            return Source({legacy: shape})
        value_rows = heads * config.linear_value_head_dim
        parts = {
            f"{block}attn_qkv.weight": (2 * key_rows + value_rows, shape[1]),
            f"{block}attn_gate.weight": (value_rows, shape[1]),
        }
        return Source(parts, partial(by_key_head, key_heads=keys, key_rows=key_rows))
    theirs = f"{block}{IN_DELTA_NET[rest]}"
    tiled = has_tiled_heads(config)
    group = partial(grouped, key_heads=keys, value_heads=heads)
    if rest == "conv1d.weight":
        start = 2 * key_rows if tiled else shape[0]
        return Source({theirs: shape}, lambda taps: group(taps, start=start))
    if rest == "A_log":
        return Source({theirs: shape}, lambda a: group(a.neg().log(), start=0 if tiled else heads))
    if not tiled or rest == "norm.weight":
        return Source({theirs: shape})
    if rest == "out_proj.weight":
        return Source({theirs: shape}, lambda w: group(w.mT, start=0).mT.contiguous())
    start = 2 * key_rows if rest == "in_proj_qkv.weight" else 0
    return Source({theirs: shape}, partial(group, start=start))


def _stored(present: Mapping[str, Shape], name: str, shape: Shape) -> Shape:
    """The file's shape of tensor `name`, of which dimensions of 1 may have been dropped."""
    stored = present.get(name, shape)
    same = [size for size in stored if size != 1] == [size for size in shape if size != 1]
    return stored if same else shape


def interleaved_heads(config: ModelConfig, module: str, layer: int) -> int:
    """The heads of `module` in which llama.cpp interleaves the two halves; 0 where it does not."""
    leaf = module.rpartition(".")[2]
    if config.model_type not in _INTERLEAVED or leaf not in ("q_proj", "k_proj"):
        return 0
    return config.heads(layer) if leaf == "q_proj" else config.kv_heads(layer)


def has_tiled_heads(config: ModelConfig) -> bool:
    """Whether llama.cpp has DeltaNet's value heads in another order than Hugging Face."""
    several = config.linear_num_value_heads != config.linear_num_key_heads
    return config.model_type in _TILED and several


def undo_permutation(tensor: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection (or its bias), from interleaved halves to halves.

    `tensor` is (heads * head_dim, ...) with any type; the result is contiguous.
    """
    rows = tensor.shape[0]
    paired = tensor.reshape(heads, rows // heads // 2, 2, *tensor.shape[1:])
    return paired.transpose(1, 2).reshape(tensor.shape).contiguous()


def grouped(tensor: Tensor, key_heads: int, value_heads: int, start: int) -> Tensor:
    """Rows from `start` on, from value heads that are tiled over key heads to grouped ones."""
    rows = tensor[start:]
    if not rows.numel():
        return tensor
    tiles = rows.unflatten(0, (value_heads // key_heads, key_heads, -1))
    return torch.cat((tensor[:start], tiles.transpose(0, 1).flatten(0, 2)))


def by_key_head(qkv: Tensor, z: Tensor, key_heads: int, key_rows: int) -> Tensor:
    """Rows [q | k | v] and [z] of all heads, as rows [q | k | v | z] of each key head in turn."""
    parts = (*qkv.split((key_rows, key_rows, qkv.shape[0] - 2 * key_rows)), z)
    return torch.cat([part.unflatten(0, (key_heads, -1)) for part in parts], 1).flatten(0, 1)


def _less_one(norm: Tensor) -> Tensor:
    return norm - 1
