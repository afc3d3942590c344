"""Generate text: prefill, then one token at a time with a cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.config.tasks.inference import Sampling
from engine.errors import CheckpointError, ConfigError
from engine.inference.streaming import TextStream
from engine.model_sources.interface.stops import adapter_stops, stops_of
from models.config.model_config import ModelConfig
from models.decoder import Decoder
from models.layers.kv_cache import KVCache

if TYPE_CHECKING:
    from engine.model_sources.interface.model_source import ModelDescription
    from engine.tokenization.tokenizer import Tokenizer

_LARGEST = 1e38
"""The largest score that a penalty makes; float32 ends at 3.4e38."""


@dataclass(frozen=True)
class GenerateResult:
    """What came out: `finish_reason` is "stop" (a stop token or string) or "length".

    `sampling` says what of generation_config.json was used, if anything.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str
    tokens_per_second: float
    sampling: str | None = None


def next_token(
    logits: Tensor, seen: Sequence[int], sampling: Sampling, generator: torch.Generator
) -> int:
    """Draw one id from logits (V,); `seen` are the ids that the repetition penalty knows.

    Any temperature, penalty and mass that the settings allow gives an id: quotients are formed in
    float64, of distances from the likeliest token. Raises `CheckpointError` for logits that are not
    numbers.
    """
    scores = logits.float().cpu()
    if not bool(torch.isfinite(scores).all()):
        raise CheckpointError(
            "The model's logits are not finite numbers. Its values do not fit its compute type, or "
            "the weights are damaged: try --dtype float32."
        )
    if sampling.repetition_penalty != 1.0 and seen:
        ids = torch.tensor(sorted(set(seen)))
        picked, penalty = scores[ids].double(), sampling.repetition_penalty
        changed = torch.where(picked > 0, picked / penalty, picked * penalty)
        scores[ids] = changed.clamp(-_LARGEST, _LARGEST).float()
    if sampling.temperature == 0:
        return int(scores.argmax())
    scores = ((scores.double() - scores.max()) / sampling.temperature).float()
    if 0 < sampling.top_k < scores.numel():
        scores[scores < scores.topk(sampling.top_k).values[-1]] = -torch.inf
    probabilities = scores.softmax(-1)
    if sampling.top_p < 1.0:
        ordered, order = probabilities.sort(descending=True)
        # A token stays if the mass before it is below top_p, so the most likely always does.
        before = (ordered.cumsum(-1) - ordered).double()
        ordered[before >= sampling.top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter_(0, order, ordered)
    if sampling.min_p > 0:
        probabilities[probabilities < sampling.min_p * probabilities.max()] = 0
    return int(torch.multinomial(probabilities, 1, generator=generator))


def generate_ids(
    model: Decoder,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int] = frozenset(),
    sampling: Sampling | None = None,
) -> Iterator[int]:
    """Yield new ids, the stop token included, until one is in `stop_ids` or the limit is reached.

    Raises `ConfigError` for a prompt that is empty or not of the model's vocabulary.
    """
    sampling = sampling or Sampling()
    if not prompt:
        raise ConfigError("the prompt has no tokens; give at least one character")
    if max(prompt) >= model.config.vocab_size:
        raise ConfigError(
            f"the prompt has the token id {max(prompt)}, and the model's vocabulary ends at "
            f"{model.config.vocab_size - 1}: its tokenizer is that of another model, or of this "
            "one with tokens added whose rows its embedding never got. Take the tokenizer files "
            "that belong to the weights."
        )
    _refuse_stretching(model.config, len(prompt) + max_new_tokens)
    cache = KVCache(model.config, len(prompt) + max_new_tokens, model.dtype, model.device)
    generator = torch.Generator().manual_seed(sampling.seed)
    seen = list(prompt)
    fresh = torch.tensor(seen, device=model.device)
    model.eval()
    for _ in range(max_new_tokens):
        token = next_token(model.decode(fresh, cache), seen, sampling, generator)
        yield token
        if token in stop_ids:
            return
        seen.append(token)
        fresh = torch.tensor([token], device=model.device)


def _refuse_stretching(config: ModelConfig, tokens: int) -> None:
    """Raise `ConfigError` for a text whose growth would turn the keys that are cached."""
    rope = config.rope_parameters
    longest = rope.get("original_max_position_embeddings", tokens)
    if rope["rope_type"] == "dynamic" and tokens > longest:
        raise ConfigError(
            f"the prompt and its answer may have {tokens} tokens, and past {longest} this model's "
            "dynamic rotary scaling turns every position anew with each token, which a cache of "
            "keys cannot follow; ask for a shorter answer, or give a shorter prompt"
        )


def stop_ids_of(
    source: ModelDescription, tokenizer: Tokenizer, adapter: Path | None = None
) -> frozenset[int]:
    """Ids that end an answer, by generation_config.json, config.json, tokenizer and adapter."""
    ids = {*stops_of(source), *(() if adapter is None else adapter_stops(adapter))}
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return frozenset(ids)


def _with_special(stop: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of those stop strings that hold special tokens, which decoding leaves out."""
    encoded = [tokenizer.encode(mark, add_special_tokens=False) for mark in stop if mark]
    return [ids for ids in encoded if not tokenizer.special_ids.isdisjoint(ids)]


def complete(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int],
    stop: Sequence[str] = (),
    sampling: Sampling | None = None,
    on_text: Callable[[str], None] | None = None,
) -> GenerateResult:
    """Generate and decode, ending before the first of the strings in `stop`.

    `on_text` takes every new piece of the answer; together they are its text.
    """
    started, ids, reason = time.perf_counter(), list[int](), "length"
    endings = _with_special(stop, tokenizer)
    stream = TextStream(tokenizer.decode, stop)
    watched = on_text is not None or bool(stop)  # else the ids are decoded once, at the end
    text = None
    for token in generate_ids(
        model, prompt_ids, max_new_tokens=max_new_tokens, stop_ids=stop_ids, sampling=sampling
    ):
        if token in stop_ids:
            reason = "stop"
            text = tokenizer.decode(ids)
            ids.append(token)
            break
        ids.append(token)
        ending = next((e for e in endings if ids[-len(e) :] == e), None)
        if ending is not None:
            reason = "stop"
            text = tokenizer.decode(ids[: -len(ending)])
            break
        if not watched:
            continue
        piece = stream.push(token)
        if piece and on_text is not None:
            on_text(piece)
        if stream.stopped():
            text, reason = stream.text, "stop"
            break
    text = tokenizer.decode(ids) if text is None else text
    rest = stream.finish(text)
    if rest and on_text is not None:
        on_text(rest)
    seconds = max(time.perf_counter() - started, 1e-9)
    return GenerateResult(text, len(prompt_ids), len(ids), reason, len(ids) / seconds)


def prompt_ids(
    tokenizer: Tokenizer,
    prompt: str,
    system: str | None = None,
    raw: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """The ids a model is asked to continue: the chat template's, or those of the bare text."""
    if raw:
        return tokenizer.encode(prompt)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    text = tokenizer.chat_template.render(
        messages, add_generation_prompt=True, **(template_kwargs or {})
    )
    return tokenizer.encode(text, add_special_tokens=False)
