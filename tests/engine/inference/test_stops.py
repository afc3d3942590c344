"""What a run taught as the end of an answer ends it wherever the result goes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.config.tasks.inference import Sampling
from engine.config.train_config import TrainConfig
from engine.data.batches.taught_stops import taught_stops
from engine.data.examples import Example
from engine.errors import CheckpointError
from engine.inference.generation import complete, stop_ids_of
from engine.model_sources.interface.stops import adapter_stops, stops_of
from engine.model_sources.load_model import load_model
from engine.model_sources.open import open_model_source
from engine.tokenization.tokenizer import load_tokenizer
from engine.verbs.models.merge import merge
from engine.verbs.training.train import train

PAD, IM_START, IM_END = 0, 1, 2


@pytest.fixture
def base(tiny_model: Path) -> Path:
    """A model that ends at <pad>, with a template that ends every turn with <|im_end|>."""
    config = json.loads((tiny_model / "tokenizer_config.json").read_text())
    (tiny_model / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<pad>"}))
    (tiny_model / "generation_config.json").write_text('{"eos_token_id": 0, "top_k": 5}')
    raw = json.loads((tiny_model / "config.json").read_text())
    (tiny_model / "config.json").write_text(json.dumps(raw | {"eos_token_id": 0}))
    return tiny_model


def ends(folder: Path) -> Any:
    return json.loads((folder / "generation_config.json").read_text())["eos_token_id"]


def run(base: Path, rows: Path, output: Path, method: str, **options: Any) -> Path:
    settings: dict[str, Any] = {"max_steps": 1, "batch_size": 2, "max_length": 128, **options}
    config = TrainConfig(
        model=str(base), data=(str(rows),), output_dir=output, method=method, **settings
    )
    return Path(str(train(config).output_path))


def test_an_adapter_and_what_it_is_merged_into_stop(
    base: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    rows = write_rows(4)
    adapter = run(base, rows, tmp_path / "run", "lora", checkpoint_every=1)
    assert ends(adapter) == [PAD, IM_END]
    source = open_model_source(base)
    tokenizer = load_tokenizer(source)
    assert stop_ids_of(source, tokenizer) == {PAD}
    assert stop_ids_of(source, tokenizer, adapter) == {PAD, IM_END}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (adapter / name).read_bytes() == (base / name).read_bytes()
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert json.loads((checkpoint / "state.json").read_text())["stop_token_ids"] == [IM_END]
    merge(base, tmp_path / "run", tmp_path / "merged")
    assert ends(tmp_path / "merged") == [PAD, IM_END]
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text())["top_k"] == 5
    further = run(base, rows, tmp_path / "next", "lora", init_adapter=adapter)
    assert ends(further) == [PAD, IM_END]


def test_a_model_without_a_generation_config_gets_one(
    base: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    (base / "generation_config.json").unlink()
    model = run(base, write_rows(4), tmp_path / "run", "full")
    assert ends(model) == [PAD, IM_END]
    written = open_model_source(model)
    assert stop_ids_of(written, load_tokenizer(written)) == {PAD, IM_END}


def test_a_file_that_lists_the_end_stays_as_it_is(
    tiny_model: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    text = {"eos_token_id": [2, 0], "temperature": 0.6}
    (tiny_model / "generation_config.json").write_text(json.dumps(text))
    adapter = run(tiny_model, write_rows(4), tmp_path / "run", "lora")
    assert json.loads((adapter / "generation_config.json").read_text()) == text


def test_only_special_tokens_at_the_end_of_a_whole_stretch_are_taught() -> None:
    examples = [
        Example([1, 9, 9, 2, 1, 9, 3], [0, 1, 1, 1, 0, 1, 1], "a"),  # ends with 2, then with 3
        Example([1, 9, 2, 9, 4], [0, 1, 1, 1, 0], "b"),  # 2 within a stretch that ends in text
        Example([1, 9, 9, 9, 9, 9, 9, 5], [0, 1, 1, 1, 1, 1, 1, 1], "c"),  # cut by the limit
        Example([1, 9, 2], [0, 1, 1], "d"),
    ]
    assert taught_stops(examples, {1, 2, 3, 4, 5}, max_length=8) == (2, 3)


@pytest.mark.parametrize("stop", ["<|im_end|>", "a<|im_end|>", "<|im_end|>\n"])
def test_a_stop_string_with_a_special_token_stops(base: Path, stop: str) -> None:
    tokenizer = load_tokenizer(open_model_source(base))
    model = load_model(base)
    answer = tokenizer.encode("ba<|im_end|>\nb")
    prompt = tokenizer.encode("x")
    ids = iter(answer)

    class Scripted:
        config, dtype, device = model.config, model.dtype, model.device
        ids_device = model.ids_device

        def eval(self) -> Any:
            return self

        def decode_batch(self, input_ids: Any, cache: Any, rows: Any, groups: Any) -> Any:
            import torch

            cache.advance()
            return torch.nn.functional.one_hot(torch.tensor([next(ids)]), model.config.vocab_size)

    shown: list[str] = []
    result = complete(
        Scripted(),  # type: ignore[arg-type]
        tokenizer,
        prompt,
        max_new_tokens=5,
        stop_ids=frozenset(),
        stop=[stop],
        sampling=Sampling(),
        on_text=shown.append,
    )
    assert result.finish_reason == "stop"
    assert result.text == "".join(shown)[: len(result.text)]
    assert result.text == "ba".removesuffix(stop.split("<")[0] or " ")


@pytest.mark.parametrize("value", ["2", True, [True], 1.0, {}, [[2]], [None], 2**31, 10**200])
def test_what_is_no_token_id_ends_no_answer_and_is_refused(base: Path, value: Any) -> None:
    """`true` is 1 in Python, and a text would be passed over: answers would end elsewhere."""
    path = base / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id is ") as told:
        stops_of(open_model_source(base))
    assert str(path) in str(told.value)
    with pytest.raises(CheckpointError, match="eos_token_id is "):
        adapter_stops(base)
