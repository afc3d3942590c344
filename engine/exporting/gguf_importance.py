"""Which inputs of a weight matter: their mean squares over calibration rows.

Quantising moves a row w of a weight by d, and its output by d x. Over inputs that vary apart from
each other the mean of (d x)^2 is sum_j d_j^2 v_j with v_j the mean square of input j, so v says how
much the error of a column counts. llama.cpp calls it an importance matrix; an expert's is over the
tokens that it gets.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.data.batches.loader import collate
from engine.data.examples import Example, build_examples, check_ids
from engine.data.rows import Row
from engine.device import resolve_device, resolve_dtype
from engine.inference.perplexity import by_tokens
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.load_model import build_model
from engine.tokenization.tokenizer import load_tokenizer
from kernels.linear.columns import matrix_of
from kernels.linear.observer import InputObserver, observe_inputs
from models.decoder import Decoder
from models.layers.experts import Experts
from models.layers.linear import Linear

if TYPE_CHECKING:
    from kernels.linear.projection import Projection

_TOKENS_PER_BATCH = 2048
_LONGEST_ROW = 2048

log = logging.getLogger(__name__)


def measured_importance(
    source: ModelSource, rows: Sequence[Row], device: str = "auto"
) -> dict[str, Tensor]:
    """Mean squares of the inputs of every matrix on some rows.

    Parameter of the graph -> fp32 (in,), of experts (E, in). The whole model is in memory
    meanwhile. Raises `DataError` for rows that cannot be used.
    """
    examples, _ = build_examples(rows, load_tokenizer(source), _LONGEST_ROW)
    check_ids(examples, source.config.vocab_size)
    where = resolve_device(device)
    model = build_model(source, device=where, dtype=resolve_dtype("auto", where))
    tokens = sum(map(len, examples))
    log.info("importance of inputs: %d rows, %d tokens", len(examples), tokens)
    return importance_of(model, examples)


@torch.no_grad()
def importance_of(model: Decoder, examples: list[Example]) -> dict[str, Tensor]:
    """Mean squares of every matrix's inputs; experts that no token reached have those of all."""
    watch = _Squares(model)
    with observe_inputs(watch):
        for group in by_tokens(examples, _TOKENS_PER_BATCH):
            batch = collate(group).to(model.device, model.ids_device)
            last, _ = model.model.norm.forward_for(model.hidden_states(batch), ())
            watch.add(watch.head, matrix_of(last))
    return {name: _mean(*watch.sums[name]) for name in watch.sums}


def _mean(sums: Tensor, counts: Tensor) -> Tensor:
    mean = sums / counts.clamp(min=1).unsqueeze(-1)
    if mean.dim() == 2:
        mean[counts == 0] = sums.sum(0) / counts.sum().clamp(min=1)
    return mean.float().cpu()


class _Squares(InputObserver):
    """Adds up squared inputs, by the weight that reads them."""

    def __init__(self, model: Decoder) -> None:
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}
        self._names: dict[int, str] = {}
        self._experts: dict[str, int] = {}
        tied = model.config.tie_word_embeddings
        self.head = "model.embed_tokens.weight" if tied else "lm_head.weight"
        for path, module in model.named_modules():
            if isinstance(module, Linear):
                self._names[id(module.weight)] = f"{path}.weight"
            elif isinstance(module, Experts):
                for leaf in ("gate_up_proj", "down_proj"):
                    self._names[id(getattr(module, leaf))] = f"{path}.{leaf}"
                    self._experts[f"{path}.{leaf}"] = module.count

    def linear(self, x: Tensor, projections: Sequence[Projection]) -> None:
        """Add the inputs of these projections."""
        for projection in projections:
            self.add(self._names[id(projection.weight)], x)

    def expert(self, x: Tensor, expert: int, weight: object) -> None:
        """Add the inputs of one expert."""
        self.add(self._names[id(weight)], x, expert)

    def add(self, name: str, x: Tensor, expert: int | None = None) -> None:
        """Add rows x (N, in) of inputs of the parameter `name`."""
        if name not in self.sums:
            shape = (self._experts[name],) if name in self._experts else ()
            sums = torch.zeros(*shape, x.shape[-1], dtype=torch.float64, device=x.device)
            self.sums[name] = sums, torch.zeros(shape, dtype=torch.float64, device=x.device)
        sums, counts = self.sums[name]
        at = ... if expert is None else expert
        sums[at] += x.float().square().sum(0)
        counts[at] += x.shape[0]
