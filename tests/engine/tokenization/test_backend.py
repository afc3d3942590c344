import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend

from engine.errors import CheckpointError
from engine.model_sources.vocabulary.folder import TokenizerFolder
from engine.tokenization.tokenizer import Tokenizer, load_tokenizer
from engine.tokenization.vocabularies import tokenizer_process
from engine.tokenization.vocabularies.backend import library_faults, open_backend
from engine.tokenization.vocabularies.limits import longest_rule
from engine.tokenization.vocabularies.sentencepiece import load_sentencepiece
from tests.support.tiny_model import write_tokenizer


def tokenizer_json(folder: Path, **changes: Any) -> str:
    write_tokenizer(folder)
    whole: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text())
    whole["model"] |= changes.pop("model", {})
    return json.dumps(whole | changes)


def test_merges_are_never_left_out_at_random(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rules: dict[str, Any] = {"dropout": 0.5, "merges": [["a", "b"]]}
    rules["vocab"] = {"<pad>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "a": 3, "b": 4, "ab": 5}
    text = tokenizer_json(tmp_path, model=rules)
    assert len({len(Backend.from_str(text).encode("ab" * 20).ids) for _ in range(20)}) > 1
    with caplog.at_level(logging.WARNING):
        backend = open_backend(text, "m")
    assert {tuple(backend.encode("ab" * 20).ids) for _ in range(20)} == {(5,) * 20}
    assert "dropout 0.5" in caplog.text


def added(*texts: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"added_tokens": [{"id": 200 + n, "content": t} | flags for n, t in enumerate(texts)]}


def replace(content: str, **pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"normalizer": {"type": "Sequence", "normalizers": list(steps)}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"normalizer": {"type": "Prepend", "prepend": "x" * 9000}}, "of one"),
        ({"normalizer": replace("b" * 10**6, String="a")}, "of one"),
        ({"decoder": replace("b" * 10**6, Regex="q")}, "of one"),
        (sequence(*[replace("qq", String="q")] * 40), "of one"),
        (sequence(*[replace("q", Regex="x*")] * 40), "of one"),
        (added("x" * 10**6), "added token of 1000000"),
        (added(*(str(n) + "x" * 9000 for n in range(200))), "have 1800490 characters together"),
        ({"model": {"type": "Nope"}}, "its tokenizer.json cannot be used"),
    ],
)
def test_a_tokenizer_built_to_take_hours_is_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=words):
        Tokenizer(open_backend(tokenizer_json(tmp_path, **changes), "m"), {})


def test_a_tokenizer_of_very_many_values_is_refused_before_any_is_made() -> None:
    with pytest.raises(CheckpointError, match=r"m holds more than 8,000,000 values"):
        open_backend('{"model": [' + "[]," * 4_100_000, "m")


def test_normalizers_of_models_are_read(tmp_path: Path) -> None:
    steps = [replace("'", Regex="[\u2018\u2019]"), replace('"', String="\u0060\u0060")] * 12
    steps += [{"type": "Prepend", "prepend": "\u2581"}, replace("\u2581", String=" ")]
    steps += [replace(" ", Regex=" {2,}"), {"type": "NFKD"}, {"type": "Lowercase"}]
    Tokenizer(open_backend(tokenizer_json(tmp_path, **sequence(*steps)), "m"), {}).encode("a b")


def test_the_longest_rule_of_a_table_bounds_what_it_makes() -> None:
    table = (8).to_bytes(4, "little") + b"\0" * 8 + b"ab\0" + b"x" * 2000 + b"\0"
    assert longest_rule(table) == 2000
    assert longest_rule(b"") == 1


def test_an_expression_without_end_is_a_named_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = {"type": "Split", "pattern": {"Regex": "(a+a+)+!"}, "behavior": "Isolated"}
    text = tokenizer_json(tmp_path, pre_tokenizer=split | {"invert": False})
    tokenizer = Tokenizer(open_backend(text, "m"), {})
    assert tokenizer.encode("a")
    monkeypatch.setattr(tokenizer_process, "_SECONDS", 0.0)
    monkeypatch.setattr(tokenizer_process, "_RATE", 100_000)
    with pytest.raises(CheckpointError, match="its tokenizer needs more"):
        tokenizer.encode(("a" * 18 + " ") * 100)


def test_a_panic_of_the_library_is_a_named_error_and_our_own_faults_are_not() -> None:
    class PanicException(BaseException):
        """As pyo3 makes it: no child of Exception."""

    with (
        pytest.raises(CheckpointError, match="m: its tokenizer cannot be used"),
        library_faults("m"),
    ):
        raise PanicException("index out of range")
    with pytest.raises(KeyError), library_faults("m"):
        raise KeyError("ours")
    with pytest.raises(KeyboardInterrupt), library_faults("m"):
        raise KeyboardInterrupt


def test_damage_to_the_files_of_a_tokenizer_is_a_named_error(tmp_path: Path) -> None:
    import sentencepiece

    rows = (f"hello world row {n} of many words and {n * 7} numbers" for n in range(300))
    (tmp_path / "rows").write_text("\n".join(rows))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "rows"),
        model_prefix=str(tmp_path / "whole"),
        vocab_size=80,
        model_type="bpe",
        minloglevel=2,
    )
    write_tokenizer(tmp_path)
    whole = {name: (tmp_path / name).read_bytes() for name in ("whole.model", "tokenizer.json")}
    chance, refused = random.Random(1), 0
    for number in range(400):
        name = ("whole.model", "tokenizer.json")[number % 2]
        data = bytearray(whole[name])
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(data))
            data[at : at + chance.randrange(3)] = chance.choice([b"[]", b"-1", b"null", b"\xff"])
        changed = tmp_path / ("damaged" if number % 2 == 0 else name)
        changed.write_bytes(data)
        try:
            if number % 2 == 0:
                load_sentencepiece(changed, {})
            else:
                load_tokenizer(TokenizerFolder(tmp_path)).encode("a b c")
        except CheckpointError:
            refused += 1
    assert refused > 200


def test_an_id_that_no_model_has_a_row_for_is_named(tmp_path: Path) -> None:
    text = tokenizer_json(tmp_path, model={"vocab": {"a": 2**32 - 1}})
    with pytest.raises(CheckpointError, match="the id 4294967295; a model has at most"):
        Tokenizer(open_backend(text, "m"), {})
