"""Loading tokenizers: what is added around a text, declared tokens, offsets, bad files."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing

from engine.errors import CheckpointError
from engine.inference.generation import prompt_ids
from engine.tokenization.chat_template import CHATML
from engine.tokenization.tokenizer import Tokenizer, load_tokenizer
from tests.support.tokenizer_folder import TokenizerFolder, write_byte_tokenizer


class Source:
    """The part of a checkpoint that tokenizers are loaded from."""

    def __init__(
        self,
        serialised: str | None,
        config: Mapping[str, Any],
        files: Mapping[str, bytes] | None = None,
        model: Path | None = None,
        template: str | None = None,
    ) -> None:
        self.path = Path("some-model")
        self.serialised, self.config, self.files = serialised, config, files or {}
        self.model, self.template = model, template
        self.raw_config: dict[str, Any] = {}

    def tokenizer_json(self) -> str | None:
        return self.serialised

    def tokenizer_model(self) -> Path | None:
        return self.model

    def tokenizer_config(self) -> dict[str, Any]:
        return dict(self.config)

    def tokenizer_files(self) -> dict[str, bytes]:
        return dict(self.files)

    def chat_template(self, name: str = "default") -> str | None:
        return self.template if name == "default" else None


def load(*args: Any, **kwargs: Any) -> Tokenizer:
    return load_tokenizer(Source(*args, **kwargs))


BASE = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}


def with_post_processor(serialised: str) -> str:
    backend = Backend.from_str(serialised)
    ids = {token: backend.token_to_id(token) for token in ("<s>", "</s>")}
    backend.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=list(ids.items())
    )
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    return str(backend.to_str())


def test_what_stands_around_a_text_is_decided_by_the_file(
    backend_json: str,
) -> None:
    serialised = with_post_processor(backend_json)
    plain = load(backend_json, BASE)
    bare = plain.encode("Hello there")
    assert bare == plain.encode("Hello there", add_special_tokens=False)
    bos, eos = plain.bos_token_id, plain.eos_token_id
    assert load(serialised, BASE).encode("Hello there") == [bos, *bare, eos]
    assert load(serialised, BASE).encode("") == [bos, eos]
    # transformers ignores these beside a tokenizer.json, so that the file has the last word.
    flags = {"add_bos_token": True, "add_eos_token": False}
    assert load(serialised, {**BASE, **flags}).encode("Hello there") == [bos, *bare, eos]
    assert load(backend_json, {**BASE, **flags}).encode("Hello there") == bare


def test_truncation_and_padding_stored_in_the_file_are_not_applied(backend_json: str) -> None:
    tokenizer = load(with_post_processor(backend_json), BASE)
    text = "The quick brown fox jumps over the lazy dog."
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert tokenizer.decode(ids) == text
    assert offsets[-1][1] == len(text)
    assert tokenizer.encode_batch_with_offsets([text, ""]) == [(ids, offsets), ([], [])]


def test_special_tokens_map_wins_over_the_configuration_unless_that_lists_all(
    backend_json: str,
) -> None:
    special_map = json.dumps({"bos_token": "<|endoftext|>", "pad_token": {"content": "</s>"}})
    files = {"special_tokens_map.json": special_map.encode()}
    tokenizer = load(backend_json, BASE, files)
    assert tokenizer.special_tokens == {
        "bos_token": "<|endoftext|>", "eos_token": "</s>", "pad_token": "</s>",
    }  # fmt: skip
    assert tokenizer.pad_token_id == tokenizer.token_to_id("</s>") == tokenizer.eos_token_id
    assert tokenizer.bos_token_id in tokenizer.special_ids
    complete = load(backend_json, {**BASE, "added_tokens_decoder": {}}, files)
    assert complete.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


def test_declared_tokens_are_added_and_must_get_their_ids(backend_json: str) -> None:
    size = load(backend_json, {}).vocab_size
    added = json.dumps({"<tool>": size}).encode()
    tokenizer = load(backend_json, BASE, {"added_tokens.json": added})
    assert tokenizer.encode("<tool>x") == [size, *tokenizer.encode("x")]
    token = {"content": "<new>", "special": True, "normalized": False}
    config = {**BASE, "added_tokens_decoder": {str(size): token}}
    tokenizer = load(backend_json, config, {"added_tokens.json": added})
    assert tokenizer.encode("<new>") == [size]
    assert tokenizer.vocab_size == size + 1
    assert tokenizer.decode([size]) == ""
    with pytest.raises(CheckpointError, match=rf"declared with the id {size + 1}"):
        load(backend_json, {**BASE, "added_tokens_decoder": {str(size + 1): token}})


def test_other_ids_for_tokens_that_exist_are_said_and_the_vocabulary_holds(
    backend_json: str, caplog: pytest.LogCaptureFixture
) -> None:
    plain = load(backend_json, BASE)
    config = {**BASE, "added_tokens_decoder": {"3": {"content": "</s>", "special": True}}}
    assert load(backend_json, config).encode("a</s>") == plain.encode("a</s>")
    assert "1 added tokens are declared with other ids" in caplog.text


def test_naming_a_token_again_leaves_its_flags(backend_json: str) -> None:
    serialised = json.loads(backend_json)
    for token in serialised["added_tokens"]:
        token["rstrip"] = token["content"] == "</s>"
        token["single_word"] = token["content"] == "<s>"
    text = json.dumps(serialised)
    tokenizer = load(text, BASE)
    assert tokenizer.encode("</s>  a") == [tokenizer.eos_token_id, *tokenizer.encode("a")]
    assert tokenizer.bos_token_id not in tokenizer.encode("a<s>b")


@pytest.mark.parametrize("key", ["additional_special_tokens", "extra_special_tokens"])
@pytest.mark.parametrize("in_map", [False, True])
def test_tokens_that_are_only_listed_as_special_are_special(
    backend_json: str, key: str, in_map: bool
) -> None:
    size = load(backend_json, {}).vocab_size
    listed = {key: ["<act>", "</act>"]}
    files = {"special_tokens_map.json": json.dumps(listed).encode()} if in_map else {}
    tokenizer = load(backend_json, BASE if in_map else {**BASE, **listed}, files)
    assert tokenizer.encode("<act></act>") == [size, size + 1]
    assert {size, size + 1} <= tokenizer.special_ids


def test_tokens_with_names_and_tokens_in_a_list_stand_side_by_side(backend_json: str) -> None:
    both = {"additional_special_tokens": ["<act>"], "extra_special_tokens": {"image": "<img>"}}
    tokenizer = load(backend_json, {**BASE, **both})
    size = load(backend_json, {}).vocab_size
    assert tokenizer.encode("<img><act>") == [size, size + 1]
    assert {size, size + 1} <= tokenizer.special_ids


@pytest.mark.parametrize("value", [3, {"text": "<s>"}, [1]])
def test_what_is_no_token_is_refused_by_name(backend_json: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"for eos_token; expected a text, or an object"):
        load(backend_json, {"eos_token": value})


def test_a_model_without_a_template_gets_the_documented_one(backend_json: str) -> None:
    tokenizer = load(backend_json, BASE)
    assert not tokenizer.has_own_template
    assert tokenizer.chat_template.source == CHATML
    stripped = json.loads(backend_json)
    stripped["added_tokens"] = []
    stripped["model"]["vocab"].pop("<|im_start|>")
    with_bos = with_post_processor(json.dumps(stripped))
    tokenizer = load(with_bos, BASE)
    ids = prompt_ids(tokenizer, "Q")
    assert ids == [tokenizer.bos_token_id, *tokenizer.encode("Q\n", add_special_tokens=False)]


def test_a_rendered_chat_is_encoded_without_a_second_bos(
    make_tokenizer: Callable[..., Tokenizer],
) -> None:
    tokenizer = make_tokenizer("llama3", add_bos=True)
    assert tokenizer.encode("x")[0] == tokenizer.bos_token_id
    ids = prompt_ids(tokenizer, "Q")
    assert ids.count(tokenizer.bos_token_id or 0) == 1
    assert tokenizer.decode(ids, skip_special_tokens=False).endswith("<|end_header_id|>\n\n")


def test_a_token_of_several_characters_keeps_its_place_in_the_text(
    make_tokenizer: Callable[..., Tokenizer],
) -> None:
    tokenizer = make_tokenizer()
    text = "a 🙂é  \n<|im_end|> 東京"
    ids, offsets = tokenizer.encode_with_offsets(text)
    index = ids.index(tokenizer.eos_token_id or 0)
    assert text[slice(*offsets[index])] == "<|im_end|>"
    covered = {index for start, end in offsets for index in range(start, end)}
    assert covered == set(range(len(text)))


def test_offsets_keep_white_space_that_the_file_would_trim(backend_json: str) -> None:
    serialised = json.loads(backend_json)
    serialised["post_processor"]["trim_offsets"] = True
    text = "a   b"
    _, offsets = load(json.dumps(serialised), BASE).encode_with_offsets(text)
    assert {index for start, end in offsets for index in range(start, end)} == set(range(5))


@pytest.mark.parametrize("serialised", ["", "{}", '{"model": {"type": "Nothing"}}', "\x00"])
def test_a_damaged_tokenizer_file_is_refused(serialised: str) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be used"):
        load(serialised, {})


def test_a_model_without_any_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        load(None, {})
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tekken\.json is in a form that is not read"):
        TokenizerFolder(tmp_path).load()


def test_mistral_words_are_fixed_only_where_the_configuration_asks() -> None:
    vocab = {letter: index for index, letter in enumerate(sorted(ByteLevel.alphabet()))}
    vocab |= {f"\u4e00{index}": index for index in range(len(vocab), 100_300)}
    vocab |= {"1": vocab["1"], "12": 100_300}
    backend = Backend(BPE(vocab, [("1", "2")]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    source = Source(str(backend.to_str()), {"fix_mistral_regex": True})

    def pieces(**raw_config: str) -> int:
        source.raw_config = dict(raw_config)
        return len(load_tokenizer(source).encode("12"))

    assert pieces(model_type="mistral", transformers_version="4.57.1") == 2
    assert pieces(model_type="mistral", transformers_version="5.0.0") == 1
    assert pieces(model_type="llama") == 1
    source.config = {}
    assert pieces(model_type="mistral", transformers_version="4.57.1") == 1


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("added_tokens.json", {"<x>": "seven"}),
        ("added_tokens.json", {"<x>": {"id": 7}}),
        ("added_tokens.json", {"<x>": -1}),
        ("added_tokens.json", {"<x>": 7.5}),
        ("added_tokens.json", {"<x>": True}),
        ("added_tokens.json", {"<x>": None}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"seven": {"content": "<x>"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": ["<x>"]}),
        ("tokenizer_config.json", {"added_tokens_decoder": "<x>"}),
    ],
)
def test_an_added_token_whose_id_is_no_number_is_refused(
    tmp_path: Path, file: str, content: dict[str, Any]
) -> None:
    write_byte_tokenizer(tmp_path, 40)
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="the tokenizer's files"):
        TokenizerFolder(tmp_path).load()
