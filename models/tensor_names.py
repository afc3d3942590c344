"""Which families this engine knows, and what a checkpoint of each holds.

The graph's parameters are named and shaped as the text model of transformers 5 holds them. A file
may name and divide them otherwise (`models.tensor_layout`). What a family changes is in
`models.families`, in fields of `ModelConfig`; a part of the graph that only some have adds its
tensors here.
"""

from __future__ import annotations

import math

from models.config.model_config import MODEL_TYPES, ModelConfig
from models.tensor_layout import Layout

SUPPORTED: tuple[str, ...] = MODEL_TYPES
ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
DELTA_PROJECTIONS = ("in_proj_qkv", "in_proj_z", "in_proj_qkvz", "out_proj")
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
PROJECTIONS = (*ATTENTION_PROJECTIONS, *MLP_PROJECTIONS, *DELTA_PROJECTIONS)
"""The large matrices of every family, by the last part of their names: what is quantised and
adapted. A router, the gate of a shared expert and DeltaNet's rows of b and a are small, and are
not among them."""

Shapes = dict[str, tuple[int, ...]]


def _attention(config: ModelConfig, layer: int) -> Shapes:
    hidden, dim = config.hidden_size, config.head_dim
    width, kv_width = config.heads(layer) * dim, config.kv_heads(layer) * dim
    q_width = width * (2 if config.attention_gate else 1)
    shapes: Shapes = {
        "q_proj.weight": (q_width, hidden),
        "k_proj.weight": (kv_width, hidden),
        "v_proj.weight": (kv_width, hidden),
        "o_proj.weight": (hidden, width),
    }
    if config.attention_bias:
        for name, rows in (("q_proj", q_width), ("k_proj", kv_width), ("v_proj", kv_width)):
            shapes[f"{name}.bias"] = (rows,)
    if config.attention_output_bias:
        shapes["o_proj.bias"] = (hidden,)
    if config.qk_norm:
        shapes |= {"q_norm.weight": (dim,), "k_norm.weight": (dim,)}
    return shapes


def _delta_net(config: ModelConfig) -> Shapes:
    hidden, heads = config.hidden_size, config.linear_num_value_heads
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = heads * config.linear_value_head_dim
    channels = 2 * keys + values
    shapes: Shapes = (
        {
            "in_proj_qkvz.weight": (channels + values, hidden),
            "in_proj_ba.weight": (2 * heads, hidden),
        }
        if config.linear_joint_projections
        else {
            "in_proj_qkv.weight": (channels, hidden),
            "in_proj_z.weight": (values, hidden),
            "in_proj_b.weight": (heads, hidden),
            "in_proj_a.weight": (heads, hidden),
        }
    )
    return shapes | {
        "conv1d.weight": (channels, 1, config.linear_conv_kernel_dim),
        "dt_bias": (heads,),
        "A_log": (heads,),
        "norm.weight": (config.linear_value_head_dim,),
        "out_proj.weight": (hidden, values),
    }


def _mlp(hidden: int, inner: int, bias: bool = False) -> Shapes:
    shapes: Shapes = {
        "gate_proj.weight": (inner, hidden),
        "up_proj.weight": (inner, hidden),
        "down_proj.weight": (hidden, inner),
    }
    if bias:
        shapes |= {"gate_proj.bias": (inner,), "up_proj.bias": (inner,)}
        shapes["down_proj.bias"] = (hidden,)
    return shapes


def _mixture(config: ModelConfig) -> Shapes:
    hidden, count, inner = config.hidden_size, config.num_experts, config.moe_intermediate_size
    shapes: Shapes = {
        "gate.weight": (count, hidden),
        "experts.gate_up_proj": (count, 2 * inner, hidden),
        "experts.down_proj": (count, hidden, inner),
    }
    if config.shared_expert_intermediate_size:
        shared = _mlp(hidden, config.shared_expert_intermediate_size)
        shapes |= {f"shared_expert.{name}": shape for name, shape in shared.items()}
        shapes["shared_expert_gate.weight"] = (1, hidden)
    return shapes


def layer_tensors(config: ModelConfig, layer: int = 0) -> Shapes:
    """Name below `model.layers.N.` -> shape, for the parameters of layer `layer`."""
    linear = config.layer_types[layer] == "linear_attention"
    room, mixer = (
        ("linear_attn", _delta_net(config)) if linear else ("self_attn", _attention(config, layer))
    )
    inner = config.intermediate_size
    mlp = (
        _mixture(config)
        if config.sparse_layers[layer]
        else _mlp(config.hidden_size, inner, config.mlp_bias)
    )
    return {
        "input_layernorm.weight": (config.hidden_size,),
        **{f"{room}.{name}": shape for name, shape in mixer.items()},
        "post_attention_layernorm.weight": (config.hidden_size,),
        **{f"mlp.{name}": shape for name, shape in mlp.items()},
    }


def graph_tensors(config: ModelConfig) -> Shapes:
    """Name -> shape of every parameter of the graph.

    `lm_head.weight` is absent where the head is tied to the embedding.
    """
    shapes: Shapes = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_hidden_layers):
        for name, shape in layer_tensors(config, layer).items():
            shapes[f"model.layers.{layer}.{name}"] = shape
    shapes["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def parameter_count(config: ModelConfig) -> int:
    """Elements of all parameters of the graph; a tied head counts once."""
    return sum(math.prod(shape) for shape in graph_tensors(config).values())


def projections_of(config: ModelConfig) -> tuple[str, ...]:
    """Those of `PROJECTIONS` that a model of `config` has, in their order."""
    stored = expected_tensors(config, Layout(config.nested, fused=False))
    leaves = {name.rsplit(".", 2)[-2] for name in stored if name.endswith(".weight")}
    return tuple(name for name in PROJECTIONS if name in leaves)


def expected_tensors(config: ModelConfig, layout: Layout | None = None) -> Shapes:
    """Hugging Face tensor name -> shape, for every tensor of a checkpoint of `config`.

    `layout` defaults to that of the family's files on the hub.
    """
    layout = layout or Layout.of_hub(config)
    return {
        name: part
        for graph_name, shape in graph_tensors(config).items()
        for name, part in layout.parts(graph_name, shape).items()
    }


def is_quantised(name: str) -> bool:
    """Whether a quantised model holds the weight `name` in NF4 or int8.

    These are the projections of the layers and all experts. Embeddings, head, norms, biases and
    routers keep the compute type.
    """
    path, _, leaf = name.rpartition(".")
    if path.endswith(".mlp.experts"):
        return leaf in ("gate_up_proj", "down_proj")
    return leaf == "weight" and path.rpartition(".")[2] in PROJECTIONS
