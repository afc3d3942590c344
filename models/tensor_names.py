"""Names and shapes of a model's tensors, read off the graph.

The graph's parameters are named and shaped as the text model of transformers 5 has them. A file may
name and divide them otherwise (`models.tensor_layout`).
"""

from __future__ import annotations

import math

import torch
from torch import nn

from kernels.runtime.simulation import shapes_only
from models.config.model_config import MODEL_TYPES, ModelConfig
from models.decoder import Decoder
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


def skeleton(config: ModelConfig) -> Decoder:
    """The graph without weights, on the meta device; a simulated step does not count it."""
    with shapes_only(), torch.device("meta"):
        return Decoder(config)


def layer_tensors(config: ModelConfig) -> Shapes:
    """Name below `model.layers.0.` -> shape, for the parameters of the first layer."""
    return _shapes(skeleton(config.with_layers(1)).layers[0])


def graph_tensors(config: ModelConfig) -> Shapes:
    """Name -> shape of every parameter of the graph.

    `lm_head.weight` is absent where the head is tied to the embedding.
    """
    period = config.period
    graph = skeleton(config.with_layers(period))
    result = _shapes(graph.model.embed_tokens, "model.embed_tokens.")
    for layer in range(config.num_hidden_layers):
        result |= _shapes(graph.layers[layer % period], f"model.layers.{layer}.")
    result |= _shapes(graph.model.norm, "model.norm.")
    return result if graph.lm_head is None else result | _shapes(graph.lm_head, "lm_head.")


def _shapes(module: nn.Module, prefix: str = "") -> Shapes:
    return {f"{prefix}{name}": tuple(p.shape) for name, p in module.named_parameters()}


def parameter_count(config: ModelConfig) -> int:
    """Elements of all parameters of the graph; a tied head counts once."""
    return sum(math.prod(shape) for shape in graph_tensors(config).values())


def projections_of(config: ModelConfig) -> tuple[str, ...]:
    """Those of `PROJECTIONS` that a model of `config` has, in their order."""
    stored = expected_tensors(config, Layout(config.nested, fused=False))
    leaves = {name.rsplit(".", 2)[-2] for name in stored if name.endswith(".weight")}
    return tuple(name for name in PROJECTIONS if name in leaves)


def expected_tensors(config: ModelConfig, layout: Layout | None = None) -> Shapes:
    """Hugging Face tensor name -> shape, for every tensor of a model source of `config`.

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
