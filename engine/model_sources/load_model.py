"""Load a model source into a `Decoder`, tensor by tensor.

The graph is built without memory (torch's meta device). Each tensor is then read from the mapped
file, quantised or cast, put where it belongs and forgotten, so peak host memory is the finished
model plus less than 1.5 times the largest single tensor of the file.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from engine.config.choices import QUANTIZATIONS, Quantization
from engine.config.rules import TIED_EMBEDDING
from engine.device import named_dtype, resolve_device
from engine.errors import CheckpointError, ConfigError
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.open import open_model_source
from engine.model_sources.quantised.fates import say_loaded
from engine.model_sources.quantised.stored_codes import (
    StoredCodes,
    decoded,
    joined_experts,
)
from engine.model_sources.quantised.weight_form import WeightForm
from kernels.linear.int8 import quantize_int8
from kernels.nf4 import NF4Weight
from kernels.runtime.host_memory import host_copy
from kernels.runtime.ranks import Ranks
from kernels.runtime.simulation import equal_parts, shapes_only
from kernels.vocabulary.shard import own_rows
from models.adapters import attach_lora
from models.decoder import Decoder
from models.layers.experts import Experts, QuantizedExperts
from models.layers.linear import Linear
from models.memory.sharded_parameters import ShardedParameters
from models.memory.sharded_weights import ShardedWeights
from models.over_ranks import divide_experts
from models.sharding import shard_vocabulary
from models.tensor_layout import Layout
from models.tensor_names import is_quantised, skeleton

if TYPE_CHECKING:
    from engine.config.train_config import TrainConfig
    from engine.model_sources.adapter.adapted_source import AdaptedSource

_PART = 1 << 22
OUTER_MATRICES = ("model.embed_tokens.weight", "lm_head.weight")
"""Matrices with a row for every token of the vocabulary."""


@dataclass(frozen=True)
class LayerPlacement:
    """Where layers' weights are between their turns: on the host, and divided among ranks or not.

    On a CPU device and host are one. Without `ranks` every process has all weights. With
    `vocabulary` the ranks divide the rows of embedding and head too. Where every weight is to be
    `trained` they divide both as `models.sharding.shard_parameters` does. Experts may be divided
    over `experts`: each then computes with its own alone, and `ranks` divide the other weights.
    """

    on_host: bool = False
    ranks: Ranks | None = None
    vocabulary: Ranks | None = None
    trained: bool = False
    experts: Ranks | None = None

    @property
    def row_ranks(self) -> Ranks | None:
        """The ranks among whom the rows of embedding and head are divided."""
        return self.vocabulary or (self.ranks if self.trained else None)


ON_DEVICE = LayerPlacement()


def build_model(
    source: ModelSource,
    *,
    quantization: Quantization | None = None,
    double_quant: bool = True,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    head_8bit: bool = False,
    embedding_on_host: bool = False,
    layers: LayerPlacement = ON_DEVICE,
) -> Decoder:
    """A decoder with the source's weights, every parameter frozen but where `layers` says trained.

    The large projections of each layer (`models.tensor_names.is_quantised`), experts among them,
    are quantised if asked for; embeddings, norms, biases, routers and the head stay in `dtype`, or
    the head, with the embedding where they are tied, is stored in 8-bit rows. An embedding on the
    host sends only a batch's rows to the device; `layers` says where the layers' weights are when
    it is not their turn. Where they are divided among ranks, each keeps its share of a layer as
    soon as that is read. Codes that the source's files hold are taken as they are, unless another
    quantisation is asked for. Raises `CheckpointError` for a tensor that is not finite,
    `ConfigError` for a tied embedding on the host.
    """
    device = torch.device(device)
    if embedding_on_host and layers.row_ranks is not None:
        raise ConfigError(
            "the embedding is to lie on the host and its rows are to be divided among ranks, which "
            "exclude each other: leave out --embedding-on host or the division of the vocabulary."
        )
    if embedding_on_host and source.config.tie_word_embeddings:
        raise ConfigError(f"{TIED_EMBEDDING.message} {TIED_EMBEDDING.fix}.")
    model = skeleton(source.config)
    layout = Layout.of_names(source.config, source.names())
    offloaded = layers.on_host and layers.ranks is None and device.type == "cuda"
    form = WeightForm(quantization, double_quant, device, dtype, offloaded)
    codes = StoredCodes(source, layout, quantization)
    finish = _LayerEnds(model, layers, device)
    parameters = [(n, tuple(p.shape)) for n, p in model.named_parameters()]
    with shapes_only():  # nothing is loaded yet
        if layers.row_ranks is not None:
            shard_vocabulary(model, layers.row_ranks)
        if layers.experts is not None:
            _divide_experts(model, layers, layers.experts)
    for name, shape in parameters:
        if not _set_codes(model, name, shape, codes, form):
            tensor = layout.assemble(name, shape, source.tensor)
            if layers.row_ranks is not None and name in OUTER_MATRICES:
                tensor = tensor[own_rows(shape[0], shape[1], layers.row_ranks)]
            outer = (head_8bit, embedding_on_host, device, dtype)
            if not _set_outer_tensor(model, name, tensor, *outer):
                _set_tensor(model, name, tensor, form, stays_dense=codes.used)
            del tensor
        for part in layout.parts(name, shape):
            source.release(part)
        finish.parameter_is_set(name)
    finish.all_are_set()
    _return_freed_memory()
    return model.eval()


def _divide_experts(model: Decoder, placement: LayerPlacement, ranks: Ranks) -> None:
    if placement.ranks is not None and placement.trained:
        raise ConfigError(
            "Parameters that are trained are to be sharded, which takes those that all processes "
            "have, and experts to be divided over processes; leave one of the two out."
        )
    try:
        divide_experts(model, ranks)
    except ValueError as error:
        raise ConfigError(f"Experts cannot be divided: {error}.") from error


class _LayerEnds:
    """What is done with a layer whose parameters were all read, in their order."""

    def __init__(self, model: Decoder, placement: LayerPlacement, device: torch.device) -> None:
        self._model, self._placement = model, placement
        owners = ((n.split(".")[:3], n) for n, _ in model.named_parameters())
        ends = {int(at[2]): name for at, name in owners if at[:2] == ["model", "layers"]}
        self._last = {name: layer for layer, name in ends.items()}
        self._sharded: ShardedWeights | ShardedParameters | None = None
        if placement.ranks is not None and placement.trained:
            self._sharded = ShardedParameters(placement.ranks, device)
        elif placement.ranks is not None:
            self._sharded = ShardedWeights(placement.ranks, device, on_host=placement.on_host)

    def parameter_is_set(self, name: str) -> None:
        """After the last parameter of a layer, lay it out, and keep this rank's share of it."""
        number = self._last.get(name)
        if number is None:
            return
        layer = self._model.layers[number]
        layer.make_weights_adjacent()
        if self._sharded is not None:
            self._sharded.take(layer)

    def all_are_set(self) -> None:
        """The model brings its layers' weights from where they are."""
        if self._sharded is not None:
            self._sharded.reserve()
            self._model.weight_stream = self._sharded
            self._model.requires_grad_(self._placement.trained)
        elif self._placement.on_host:
            self._model.stream_weights()


def build_for(
    config: TrainConfig,
    source: ModelSource,
    device: torch.device,
    dtype: torch.dtype,
    ranks: Ranks | None = None,
    experts: Ranks | None = None,
) -> Decoder:
    """The model that a run of `config` trains on, every parameter frozen. Raises as above.

    With `ranks` the layers' weights are divided among them, trained or not, and perhaps the rows of
    embedding and head (`divides_vocabulary`). Experts are divided among `experts`.
    """
    vocabulary = ranks if divides_vocabulary(config) else None
    four_bit = config.method == "qlora"
    return build_model(
        source if four_bit else decoded(source),
        quantization="nf4" if four_bit else None,
        double_quant=config.double_quant,
        device=device,
        dtype=dtype,
        head_8bit=config.head_precision == "8bit",
        embedding_on_host=config.embedding_on == "host",
        layers=LayerPlacement(
            "weights" in config.offload, ranks, vocabulary, config.every_weight, experts
        ),
    )


def divides_vocabulary(config: TrainConfig) -> bool:
    """Whether ranks that divide layers divide the rows of embedding and head too.

    They do where they are trained, and else where the objective is one of next tokens alone and
    reads none of them on the host.
    """
    return config.every_weight or not (
        config.learns_answers or config.teacher is not None or config.embedding_on == "host"
    )


def _set_outer_tensor(
    model: Decoder,
    name: str,
    tensor: Tensor,
    head_8bit: bool,
    embedding_on_host: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> bool:
    """Set a head or an embedding that is to be no dense tensor on the device, if this is one."""
    head, embedding = model.lm_head, model.model.embed_tokens
    if name == "model.embed_tokens.weight" and (embedding_on_host or (head_8bit and head is None)):
        _require_finite(name, tensor)
        if embedding_on_host:
            embedding.set_weight(host_copy(tensor, dtype), device)
        else:
            embedding.set_weight(replace(quantize_int8(tensor, device), dtype=dtype))
        return True
    if name == "lm_head.weight" and head_8bit and head is not None:
        _require_finite(name, tensor)
        head.set_weight(replace(quantize_int8(tensor, device), dtype=dtype))
        return True
    return False


def _return_freed_memory() -> None:
    """Give the pages that quantising freed back to the system, where the C library knows how."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl has not
        if trim is not None:
            trim(0)


def _set_codes(
    model: Decoder, name: str, shape: tuple[int, ...], codes: StoredCodes, form: WeightForm
) -> bool:
    """Set a weight that is taken in its file's codes, if this is one."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, Experts):
        experts = codes.experts(name, shape)
        if experts is None:
            return False
        ready: dict[str, QuantizedExperts] = {}
        for projection, parts in experts.items():
            joined = joined_experts(parts)
            if isinstance(joined, NF4Weight):
                ready[projection] = form.experts_in_order(joined.to(form.device), module.share)
            else:
                own = module.share.of_weight(joined)
                assert isinstance(own, tuple)
                ready[projection] = form.stored(tuple(part.to(form.device) for part in own))
        module.set_quantized(leaf, ready)
        return True
    weight = codes.weight(name) if isinstance(module, Linear) else None
    if weight is None or not isinstance(module, Linear):
        return False
    module.set_weight(form.in_order(weight.to(form.device)))
    return True


def _set_tensor(
    model: Decoder, name: str, tensor: Tensor, form: WeightForm, stays_dense: bool = False
) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    _require_finite(name, tensor)
    if isinstance(module, Experts) and form.quantization:
        module.set_quantized(leaf, form.quantized_experts(leaf, tensor, module.share))
    elif isinstance(module, Linear) and leaf == "weight":
        small = form.quantization is None or not is_quantised(name) or stays_dense
        weight = _owned(tensor, form.device, form.dtype) if small else form.quantized(tensor)
        module.set_weight(weight)
    else:
        part = module.share.of(tensor) if isinstance(module, Experts) else tensor
        owned = _owned(part, form.device, form.dtype)
        setattr(module, leaf, nn.Parameter(owned, requires_grad=False))


def _require_finite(name: str, tensor: Tensor) -> None:
    if not tensor.is_cuda and not _all_finite(tensor):
        raise CheckpointError(
            f"tensor {name} holds values that are not finite; the model is damaged or was "
            "saved from a diverged run. Download it again or use an earlier one."
        )


def _all_finite(tensor: Tensor) -> bool:
    """Whether every element is finite, in parts: fp32 copies of all would be the load's peak."""
    parts = tensor.reshape(-1).split(_PART)
    return all(bool(torch.isfinite(part.float().sum())) for part in equal_parts(parts))


def _owned(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A copy that no longer reads the mapped file."""
    return tensor.to(device=device, dtype=dtype, copy=True)


def adapted(source: ModelSource, adapter: Any) -> AdaptedSource:
    """`source` with a saved adapter on it; give it to `build_model`, then to `attach_adapter`.

    `adapter` is a path, or pairs of a path and a weight. Raises `CheckpointError` where its modules
    or shapes do not fit the model, `ConfigError` where several cannot be added up.
    """
    from engine.model_sources.adapter.adapted_source import AdaptedSource
    from engine.model_sources.adapter_path import open_adapters

    return AdaptedSource(source, open_adapters(adapter, source.config, source.path))


def attach_adapter(model: Decoder, source: AdaptedSource) -> None:
    """Put the pairs that stay separate on `model`, which was built from `source`."""
    attach_lora(model, source.pairs, source.scales, source.adapter.config.lora_dropout)


def load_model(
    model: str | Path,
    quantize: Quantization | None = None,
    adapter: str | Path | Sequence[tuple[str | Path, float]] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = torch.float32,
) -> Decoder:
    """Load a model for use: a Hugging Face directory, a hub id or a `.gguf` file.

    `dtype` may be a name: float32, bfloat16 (or bf16), float16, or auto as the command line has it.
    Without `quantize` weights that bitsandbytes quantised stay as they are stored.

    Needs `config.json` and weights, no tokenizer. With an `adapter` its pairs stay separate and
    trainable. Raises `ConfigError` or `CheckpointError` naming what cannot be used.
    """
    if quantize not in (None, *QUANTIZATIONS):
        raise ConfigError(f"quantize is {quantize!r}; expected None, 'nf4' or 'int8'")
    where = resolve_device(device) if isinstance(device, str) else device
    kind = named_dtype(dtype, where)
    source = open_model_source(model)
    say_loaded(source, quantize)
    if adapter is None:
        return build_model(source, quantization=quantize, device=where, dtype=kind)
    both = adapted(source, adapter)
    decoder = build_model(both, quantization=quantize, device=where, dtype=kind)
    attach_adapter(decoder, both)
    return decoder
