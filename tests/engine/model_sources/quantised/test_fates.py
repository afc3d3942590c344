"""What becomes of quantised weights is said once, in one line, by every verb."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import engine
from engine.model_sources.load_model import build_model, load_model
from engine.model_sources.open import open_model_source
from engine.model_sources.quantised.stored_codes import decoded
from engine.verbs.models.export import export_gguf
from engine.verbs.training.train import dry_run
from kernels.nf4 import NF4Weight
from tests.support.scaled_folders import Encode, eight_bit, four_bit, fp4, fp8, write_quantised
from tests.support.tokenizer_folder import write_byte_tokenizer

NOTED = {"quant_method": "bitsandbytes", "load_in_4bit": True}
FP8 = {"quant_method": "fp8"}
STAY = "14 weights stored in NF4 stay as they are"


def dynamic(name: str, tensor: Tensor) -> dict[str, Tensor]:
    left = "down_proj" in name
    return {name: tensor.to(torch.bfloat16)} if left else four_bit()(name, tensor)


def without_experts(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Of fp32 weights, so that decoding rounds nothing."""
    left = ".mlp.experts." in name
    return {name: tensor} if left else four_bit(dtype=torch.float32)(name, tensor)


def folder_of(target: Path, encode: Encode, noted: Any = NOTED, family: str = "qwen3") -> Path:
    write_quantised(target, encode, noted, family)
    write_byte_tokenizer(target, open_model_source(target).config.vocab_size)
    return target


def rows(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    lines = [json.dumps({"prompt": f"Say {n}", "response": "ab"}) for n in range(4)]
    path.write_text("\n".join(lines))
    return path


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines about stored weights that were logged since the last call."""
    lines = [text for text in caplog.messages if "weights stored in" in text]
    caplog.clear()
    return [text.partition(": ")[2] for text in lines]


@pytest.fixture(autouse=True)
def _listen(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")


LOADED: dict[str, tuple[Encode, Any, str | None, str]] = {
    "NF4": (four_bit(), NOTED, None, STAY),
    "NF4 in NF4": (four_bit(), NOTED, "nf4", STAY),
    "NF4 in int8": (
        four_bit(), NOTED, "int8",
        "14 weights stored in NF4 are decoded and quantised to 8-bit rows",
    ),
    "dynamic": (
        dynamic, NOTED, "nf4",
        "12 weights stored in NF4 stay as they are; "
        "2 weights stored in 16 bits or more stay as they are",
    ),
    "FP4": (fp4, NOTED, None, "14 weights stored in FP4 are decoded"),
    "FP4 in NF4": (
        fp4, NOTED, "nf4", "14 weights stored in FP4 are decoded and quantised to NF4",
    ),
    "int8": (eight_bit, NOTED, None, "14 weights stored in 8-bit rows stay as they are"),
    "int8 in NF4": (
        eight_bit, NOTED, "nf4",
        "14 weights stored in 8-bit rows are decoded and quantised to NF4",
    ),
    "fp8 in NF4": (fp8, FP8, "nf4", "14 weights stored in fp8 are decoded and quantised to NF4"),
}  # fmt: skip


@pytest.mark.parametrize("case", LOADED)
def test_one_line_says_what_is_loaded_as_what(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    encode, noted, asked, words = LOADED[case]
    quantize: Any = asked
    load_model(folder_of(tmp_path / "m", encode, noted), quantize)
    assert said(caplog) == [words]


def test_dense_models_have_no_such_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_model(folder_of(tmp_path / "m", lambda name, t: {name: t}, None), "nf4")
    assert said(caplog) == []


KINDS: dict[str, tuple[Encode, Any, str]] = {
    "NF4": (four_bit(), NOTED, "NF4"),
    "FP4": (fp4, NOTED, "FP4"),
    "int8": (eight_bit, NOTED, "8-bit rows"),
    "fp8": (fp8, FP8, "fp8"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_verb_says_it_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    encode, noted, form = KINDS[kind]
    model, data = folder_of(tmp_path / "m", encode, noted), rows(tmp_path)
    start, nf4 = f"14 weights stored in {form}", kind == "NF4"
    given: dict[str, Any] = {"model": str(model), "data": str(data), "device": "cpu"}
    config = engine.TrainConfig(**given, max_steps=1, output_dir=tmp_path / "run")
    trained = f"{start} {'stay as they are' if nf4 else 'are decoded and quantised to NF4'}"
    assert f"model: {model}: {trained}" in engine.plan(config).as_dict()["assumed"]
    assert f"{model}: {trained}" in dry_run(config)
    assert said(caplog) == []
    adapter = engine.train(config, console=False).adapter_path
    assert adapter is not None
    assert said(caplog) == [trained]
    used = f"{start} {'stay as they are' if kind in ('NF4', 'int8') else 'are decoded'}"
    engine.evaluate(model, data)
    assert said(caplog) == [used]
    engine.generate(model, "Say", max_new_tokens=2)
    assert said(caplog) == [used]
    engine.merge(model, adapter, tmp_path / "merged")
    assert said(caplog) == [f"{start} are decoded"]
    engine.merge(model, adapter, tmp_path / "onto", onto="dequantised")
    assert said(caplog) == [f"{start} are decoded{'' if nf4 else ' and quantised to NF4'}"]
    engine.prune(model, tmp_path / "pruned", fraction=0.25)
    assert said(caplog) == [f"{start} are decoded and written dense"]
    engine.quantize(model, tmp_path / "again", bits=4)
    assert said(caplog) == [trained]
    export_gguf(model=str(model), output=tmp_path / "m.gguf", type="q8_0")
    assert said(caplog) == [f"{start} are decoded and written as q8_0"]
    load_model(tmp_path / "m.gguf", "nf4")
    assert "stored in Q8_0 are decoded and quantised to NF4" in said(caplog)[0]


def test_experts_left_in_16_bits_are_quantised_beside_the_codes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of(tmp_path / "m", without_experts, NOTED, "qwen3_moe")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": "abcdefgh" * n}) + "\n" for n in range(1, 5)))
    config = engine.TrainConfig(
        model=str(folder), data=str(data), max_steps=1, output_dir=tmp_path / "run"
    )
    adapter = engine.train(config, console=False).adapter_path
    lines = said(caplog)
    assert len(lines) == 1
    assert "stored in NF4 stay as they are" in lines[0]
    assert "stored in 16 bits or more are quantised to NF4" in lines[0]
    model = load_model(folder, "nf4", adapter)
    experts: Any = model.get_submodule("model.layers.0.mlp.experts")
    assert {type(weight) for weight in experts.stored.values()} == {NF4Weight}
    # Merged onto what training saw, the 16-bit model has the same logits.
    assert adapter is not None
    merged = engine.merge(folder, adapter, tmp_path / "out", onto="dequantised", dtype="float32")
    ids = torch.arange(20).reshape(2, 10) * 5 % 61
    assert torch.allclose(model(ids), load_model(merged.output)(ids), atol=2e-4)


def test_4_bit_models_generate_and_export_as_their_decoded_ones(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", four_bit(dtype=torch.float32))
    source = open_model_source(folder)
    ids = torch.arange(20).reshape(2, 10) * 5 % 61
    dense = build_model(decoded(source))
    assert torch.allclose(load_model(folder)(ids), dense(ids), atol=1e-5)
    engine.quantize(folder, tmp_path / "dense", bits=16, dtype="float32")
    answers = [
        engine.generate(path, "Say 1", max_new_tokens=12, temperature=0.0, dtype="float32").text
        for path in (folder, tmp_path / "dense")
    ]
    assert answers[0] == answers[1]
    export_gguf(model=str(folder), output=tmp_path / "m.gguf", type="f32")
    written = open_model_source(tmp_path / "m.gguf")
    assert sorted(written.names()) == sorted(source.names())
    for name in source.names():
        assert torch.equal(written.tensor(name).float(), source.tensor(name).float()), name
