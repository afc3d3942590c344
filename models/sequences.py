"""Log-probabilities of the sequences of a batch."""

from __future__ import annotations

from torch import Tensor

from kernels.loss.linear_preference import sequence_log_probs
from models.decoder import Decoder, balance_of
from models.layers.context import DEFAULT_SETTINGS, StepSettings
from models.layers.packed_batch import PackedBatch, Sequences
from models.memory.checkpointing import Routed


def sequences_of(batch: PackedBatch) -> Sequences:
    """The sequences of a batch. Raises `ValueError` where it is not divided into any."""
    if batch.sequences is None:
        raise ValueError("the batch does not say which sequences its trained tokens belong to")
    return batch.sequences


def batch_log_probs(
    model: Decoder, batch: PackedBatch, settings: StepSettings = DEFAULT_SETTINGS
) -> tuple[Tensor, Tensor | None]:
    """log p of every sequence's trained tokens (S,), fp32 or wider, and the router's loss.

    A batch in host memory is sent to the device; the host does not wait. The router's balancing
    loss (), of all tokens of the batch and times its factor, is None where the model or the
    settings ask for none. Raises `ValueError` for a batch without `sequences`.
    """
    sequences_of(batch)
    batch = batch.to(model.device, model.ids_device)
    factor = model.router_factor(settings)
    routed: Routed | None = [] if factor else None
    x = model.hidden_states(batch, settings, routed)
    trained = model.model.norm(x.index_select(0, batch.trained))
    sequences = sequences_of(batch)
    sums = sequence_log_probs(
        trained,
        model.head_weight(),
        batch.targets,
        sequences.slots,
        sequences.shape,
        settings.loss_chunk_tokens,
    )
    if not routed:
        return sums, None
    return sums, factor * balance_of(routed, batch).to(sums.dtype)
