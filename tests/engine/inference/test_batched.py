"""Requests that share every pass get the tokens and log-probabilities that they get alone."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from engine.config.tasks.inference import Sampling
from engine.errors import ConfigError
from engine.inference.batched import BatchedGenerator
from engine.inference.generation import generate_ids
from engine.inference.request import RequestSettings, TokenEvent
from engine.model_sources.load_model import load_model
from models.decoder import Decoder

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"
FAMILIES = sorted(path.name for path in GOLDEN.iterdir())
# Below and above a window, a chunk of Gated DeltaNet and the smallest row of the cache.
LENGTHS = (1, 9, 60, 63, 64, 65, 130, 5)


def random_ids(count: int) -> list[int]:
    return torch.randint(3, 64, (count,), generator=torch.Generator().manual_seed(count)).tolist()


def tokens_of(events: Sequence[TokenEvent]) -> list[int]:
    return [event.token for event in events if event.token is not None]


@torch.no_grad()
def uncached_logprobs(model: Decoder, prompt: list[int], made: list[int]) -> torch.Tensor:
    """Log-probabilities (T, V) of every token after the prompt, by one pass without a cache."""
    logits: torch.Tensor = model(torch.tensor([prompt + made]))[0]
    return logits[len(prompt) - 1 : -1].float().log_softmax(-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_requests_get_what_they_get_alone(family: str) -> None:
    model = load_model(GOLDEN / family)
    generator = BatchedGenerator(model, slots=5, prompt_tokens=48)
    settings = RequestSettings(max_new_tokens=7, logprobs=3, prompt_logprobs=True)
    events: dict[int, list[TokenEvent]] = {}
    numbers = []
    for length in LENGTHS:  # each joins while others run, and leaves while others go on
        numbers.append(generator.submit(random_ids(length), settings))
        for event in (*generator.step(), *generator.step()):
            events.setdefault(event.request, []).append(event)
    for number, more in generator.run().items():
        events.setdefault(number, []).extend(more)
    for number, length in zip(numbers, LENGTHS, strict=True):
        prompt, own = random_ids(length), events[number]
        assert tokens_of(own) == list(generate_ids(model, prompt, max_new_tokens=7)), length
        assert [event.finish_reason for event in own] == [None] * 6 + ["length"]
        expected = uncached_logprobs(model, prompt, tokens_of(own))
        for event, row in zip(own, expected, strict=True):
            assert event.logprobs is not None and event.token is not None
            assert event.logprobs.logprob == pytest.approx(float(row[event.token]), abs=2e-4)
            best = row.topk(3)
            assert [value for _, value in event.logprobs.top] == pytest.approx(
                best.values.tolist(), abs=2e-4
            )
        assert own[0].prompt is not None
        assert [one.token for one in own[0].prompt] == prompt[1:]
        before = uncached_logprobs(model, prompt[:1], prompt[1:])
        told = [one.logprob for one in own[0].prompt]
        wanted = before.gather(1, torch.tensor(prompt[1:], dtype=torch.int64)[:, None])[:, 0]
        assert told == pytest.approx(wanted.tolist(), abs=2e-4)


def test_draws_do_not_depend_on_the_others() -> None:
    model = load_model(GOLDEN / "qwen3")
    drawn = Sampling(temperature=1.5, top_p=0.95)
    alone = {
        seed: list(
            generate_ids(
                model,
                random_ids(7),
                max_new_tokens=20,
                sampling=drawn.model_copy(update={"seed": seed}),
            )
        )
        for seed in range(6)
    }
    assert len({tuple(ids) for ids in alone.values()}) == 6
    generator = BatchedGenerator(model, slots=4)
    numbers = {
        generator.submit(
            random_ids(7), RequestSettings(20, drawn.model_copy(update={"seed": seed}))
        ): seed
        for seed in reversed(range(6))
    }
    events = generator.run()
    assert {numbers[number]: tokens_of(own) for number, own in events.items()} == alone


def test_a_cancelled_request_frees_its_slot_and_disturbs_nobody() -> None:
    model = load_model(GOLDEN / "qwen3_next")
    generator = BatchedGenerator(model, slots=2, prompt_tokens=16)
    settings = RequestSettings(max_new_tokens=30)
    running, other, waiting, last = (
        generator.submit(random_ids(n), settings) for n in (8, 40, 9, 10)
    )
    first = generator.step()
    assert [event.request for event in first] == [running]
    assert (generator.active, generator.waiting, generator.free_slots) == (2, 2, 0)
    assert generator.cancel(other)  # while its prompt is read
    assert generator.cancel(waiting)
    assert not generator.cancel(waiting)
    for _ in range(4):
        generator.step()
    assert generator.cancel(running)
    events = generator.run()
    assert list(events) == [last]
    assert (
        tokens_of(events[last])[-25:]
        == list(generate_ids(model, random_ids(10), max_new_tokens=30))[-25:]
    )
    assert (generator.active, generator.waiting, generator.reserved_tokens) == (0, 0, 0)


def test_requests_wait_where_the_cache_has_no_more_memory() -> None:
    model = load_model(GOLDEN / "llama")
    generator = BatchedGenerator(model, slots=8, cache_tokens=256)
    for _ in range(5):
        generator.submit(random_ids(60), RequestSettings(max_new_tokens=10))  # 128 tokens each
    generator.step()
    assert (generator.active, generator.waiting) == (2, 3)
    assert generator.reserved_tokens == 256
    assert len(generator.run()) == 5
    small = BatchedGenerator(model, slots=8, cache_tokens=128)
    with pytest.raises(ConfigError, match="may need a cache for 256 tokens, and 128 are allowed"):
        small.submit(random_ids(120), RequestSettings(max_new_tokens=10))


def test_a_request_that_makes_no_sense_is_refused_by_name() -> None:
    generator = BatchedGenerator(load_model(GOLDEN / "llama"))
    for prompt, settings, message in (
        ([], RequestSettings(), "no tokens"),
        ([-1], RequestSettings(), "token id -1"),
        ([3], RequestSettings(max_new_tokens=0), "0 new tokens"),
        ([3], RequestSettings(stop=("x",)), "stop texts need a tokenizer"),
        ([3], RequestSettings(adapter="mine"), "no adapter named 'mine'"),
    ):
        with pytest.raises(ConfigError, match=message):
            generator.submit(prompt, settings)
    assert generator.waiting == 0
    with pytest.raises(ConfigError, match="0 slots"):
        BatchedGenerator(generator.model, slots=0)


def test_memory_of_sequences_that_left_is_freed() -> None:
    generator = BatchedGenerator(load_model(GOLDEN / "qwen3"), slots=4)
    for length in (3, 70, 140, 5):
        generator.submit(random_ids(length), RequestSettings(max_new_tokens=80))
    generator.step()
    assert generator._cache.allocated_tokens() > 0
    generator.run()
    assert generator._cache.allocated_tokens() == 0


def test_logits_that_are_not_numbers_end_one_request_with_the_reason() -> None:
    model = load_model(GOLDEN / "qwen2_moe")
    embedding = model.model.embed_tokens.weight
    assert isinstance(embedding, torch.Tensor)
    embedding.data[5] = torch.inf
    generator = BatchedGenerator(model, slots=4)
    good = generator.submit([3, 4], RequestSettings(max_new_tokens=2))
    bad = generator.submit([3, 5], RequestSettings(max_new_tokens=2))
    events = {event.request: event for event in generator.step()}
    assert events[bad].finish_reason == "error"
    assert "not finite" in str(events[bad].error)
    assert events[good].error is None
    assert generator.active == 1


@pytest.mark.parametrize("prompt", [4, 250, 300])
def test_an_answer_ends_where_the_context_does(prompt: int) -> None:
    model = load_model(GOLDEN / "qwen3")
    context = model.config.max_position_embeddings
    made = list(generate_ids(model, random_ids(prompt), max_new_tokens=2**53))
    assert len(made) == (context - prompt if prompt < context else context)
    # What is set aside for it has an end too.
    generator = BatchedGenerator(model, cache_tokens=4 * context)
    generator.submit(random_ids(prompt), RequestSettings(max_new_tokens=2**53))
