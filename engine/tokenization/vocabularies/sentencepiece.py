"""Rebuild a SentencePiece `tokenizer.model` in `tokenizers`.

One machinery then serves every model: special tokens cut out of the text before anything else,
byte fallback, offsets, batches on all cores. The `sentencepiece` library reads the file and is
asked, at load, whether both give the same ids; if they do not, the file is refused.

Where a space goes before the text, `legacy` in tokenizer_config.json says. `true`, the default, is
what the library does and Llama 1 and 2 were trained with: one before every piece of text between
special tokens, even where the text begins with a space. `false` is what transformers does for it:
one before the very first piece only, and none where it begins with a space. `add_prefix_space:
false` puts none anywhere.

The library does not tell a user-defined piece from a normal one, nor which algorithm the model
uses, so those few fields are read from the file itself (a protocol buffer:
https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram

from engine.errors import CheckpointError
from engine.tokenization.vocabularies.backend import library_faults
from engine.tokenization.vocabularies.limits import MOST_GROWTH, longest_rule
from engine.tokenization.vocabularies.switches import switch

SPACE = "▁"
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
_UNIGRAM, _BPE = 1, 2
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_PROBES = (
    "Hello world",
    "The  quick\tbrown\n\nfox; x_1 = f(2.50)  # comment",
    "naïve café Größe 東京 مرحبا 🙂☃",
)


@dataclass
class ModelFile:
    """What a `tokenizer.model` holds.

    Attributes:
        pieces: text of every id.
        scores: score of every id.
        types: piece type of every id (1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused,
            6 byte).
        algorithm: 1 for Unigram, 2 for BPE.
        byte_fallback: unknown characters become byte pieces.
        unknown_id: id of the unknown piece.
        special_ids: ids of `bos_token`, `eos_token`, `unk_token` and `pad_token`, where defined.
        charsmap: precompiled normalisation rules, empty for the identity.
        adds_prefix_space: a space is put before the text.
        merges_spaces: runs of spaces become one, and spaces at the ends are dropped.
    """

    pieces: list[str]
    scores: list[float]
    types: list[int] = field(default_factory=list)
    algorithm: int = _UNIGRAM
    byte_fallback: bool = False
    unknown_id: int = 0
    special_ids: dict[str, int] = field(default_factory=dict)
    charsmap: bytes = b""
    adds_prefix_space: bool = True
    merges_spaces: bool = True


@dataclass(frozen=True)
class SentencePieceTokenizer:
    """A rebuilt tokenizer, and what its file says beyond the pieces.

    Attributes:
        backend: gives the ids of the `sentencepiece` library, with special tokens cut out.
        special_tokens: `bos_token`, `eos_token`, `unk_token`, `pad_token` of the file.
        adds_bos: a text starts with BOS where tokenizer_config.json does not say: so for BPE, as
            in Llama's own tokenizer and llama.cpp.
    """

    backend: Tokenizer
    special_tokens: dict[str, str]
    adds_bos: bool


def load_sentencepiece(path: Path, config: Mapping[str, Any]) -> SentencePieceTokenizer:
    """Build the tokenizer of a SentencePiece file.

    Args:
        path: the `tokenizer.model`.
        config: tokenizer_config.json (`legacy` and `add_prefix_space` are used here).

    Raises:
        CheckpointError: the file is damaged, uses an algorithm other than BPE and Unigram, or
            cannot be reproduced exactly.
    """
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        model = _read(processor, path.read_bytes())
    except (OSError, RuntimeError, ValueError, IndexError) as error:
        if path.is_file() and _TIKTOKEN.match(path.read_bytes()[:200]):
            raise CheckpointError(
                f"{path}: this is a vocabulary of tiktoken, as Llama 3 had it originally, and no "
                "SentencePiece model; how it cuts text into words is not in it. Take the model's "
                "tokenizer.json."
            ) from error
        raise CheckpointError(
            f"{path}: this is not a complete SentencePiece model ({error}). Fetch the file again."
        ) from error
    if model.algorithm not in (_UNIGRAM, _BPE):
        raise CheckpointError(
            f"{path}: a SentencePiece model of type {model.algorithm} (word or character); only "
            "BPE and Unigram models are supported. Provide a tokenizer.json instead."
        )
    prefix = switch(config, "add_prefix_space", model.adds_prefix_space)
    legacy = switch(config, "legacy", True)
    with library_faults(str(path)):
        tokenizer = _build(model, prefix, legacy=legacy)
        if prefix == model.adds_prefix_space:
            _compare(tokenizer, processor, path)
    added = [
        AddedToken(piece, special=kind == _CONTROL, normalized=kind == _USER_DEFINED)
        for piece, kind in zip(model.pieces, model.types, strict=True)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    named = {name: model.pieces[index] for name, index in model.special_ids.items()}
    return SentencePieceTokenizer(tokenizer, named, model.algorithm == _BPE)


def _read(processor: Any, data: bytes) -> ModelFile:
    count = processor.get_piece_size()
    model = ModelFile(
        pieces=[processor.id_to_piece(index) for index in range(count)],
        scores=[processor.get_score(index) for index in range(count)],
        unknown_id=processor.unk_id(),
        special_ids={
            f"{name}_token": index
            for name in ("bos", "eos", "unk", "pad")
            if 0 <= (index := getattr(processor, f"{name}_id")()) < count
        },
    )
    for number, value in _fields(data):
        if number == 1:
            model.types.append(int(dict(_fields(value)).get(3, _NORMAL)))
        elif number == 2:
            trainer = dict(_fields(value))
            model.algorithm = int(trainer.get(3, _UNIGRAM))
            model.byte_fallback = bool(trainer.get(35, False))
        elif number == 3:
            normalizer = dict(_fields(value))
            model.charsmap = bytes(normalizer.get(2, b""))
            if (made := longest_rule(model.charsmap)) > MOST_GROWTH:
                raise ValueError(f"a rule of its normalizer makes {made:.0f} characters of one")
            model.adds_prefix_space = bool(normalizer.get(3, True))
            model.merges_spaces = bool(normalizer.get(4, True))
    if len(model.types) != count:
        raise ValueError(f"{len(model.types)} pieces in the file, {count} in the vocabulary")
    return model


def _fields(data: Any) -> Iterator[tuple[int, Any]]:
    """Field numbers and values of one protocol buffer message; numbers as int, others as bytes."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        wire = key & 7
        if wire == 0:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        if wire == 2:
            size, position = _varint(data, position)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {position}")
        if position + size > len(data):
            raise ValueError(f"a field of {size} bytes at byte {position} passes the end")
        yield key >> 3, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError(f"a number longer than 10 bytes at byte {position}")


def _build(model: ModelFile, prefix: bool, legacy: bool) -> Tokenizer:
    if model.algorithm == _BPE:
        vocabulary = {piece: index for index, piece in enumerate(model.pieces)}
        tokenizer = Tokenizer(
            BPE(
                vocab=vocabulary,
                merges=_merges(model, vocabulary),
                unk_token=None if model.byte_fallback else model.pieces[model.unknown_id],
                fuse_unk=True,
                byte_fallback=model.byte_fallback,
            )
        )
    else:
        scored = list(zip(model.pieces, model.scores, strict=True))
        tokenizer = Tokenizer(Unigram(scored, model.unknown_id, model.byte_fallback))
    steps = _normalisation(model)
    if legacy and model.merges_spaces:
        steps.append(normalizers.Replace(Regex(r"\A "), ""))
    if prefix and legacy:
        steps += [_prepend(model), normalizers.Replace(" ", SPACE)]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement=SPACE, prepend_scheme="first" if prefix else "never", split=False
        )
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    back: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        back.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(back)
    return tokenizer


def _normalisation(model: ModelFile) -> list[Any]:
    """Normalizers that do what the file's charsmap and `remove_extra_whitespaces` ask for."""
    steps: list[Any] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.merges_spaces:
        # One leading space stays for `legacy: false`: Metaspace adds no second one to it, and after
        # a special token it is the only sign of a space.
        steps.append(normalizers.Replace(Regex(f"[ {SPACE}]+\\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    return steps


def _prepend(model: ModelFile) -> Any:
    """The normalizer that puts the library's space before a text that is not empty.

    Tokens that are matched in normalised text are normalised themselves, and must stay as they
    are to be recognised.
    """
    whole = [
        piece
        for piece, kind in zip(model.pieces, model.types, strict=True)
        if kind == _USER_DEFINED
    ]
    if not whole:
        return normalizers.Prepend(SPACE)
    names = "|".join(re.escape(piece) for piece in whole)
    return normalizers.Replace(Regex(rf"\A(?!(?:{names})\z)(?=(?m:.|\n))"), SPACE)


def _merges(model: ModelFile, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a third, the best piece first.

    SentencePiece joins the neighbours whose union has the best score, and of equal ones the
    first; it never joins characters to a control or byte piece. The order of the ids is not that
    of the scores: in Llama's files runs of spaces have low ids and the lowest score.
    """
    merges: list[tuple[str, str]] = []
    ordered = sorted(range(len(model.pieces)), key=lambda i: (-model.scores[i], i))
    for index in ordered:
        piece = model.pieces[index]
        if model.types[index] not in (_NORMAL, _USER_DEFINED):
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((left, right))
    return merges


def _compare(tokenizer: Tokenizer, processor: Any, path: Path) -> None:
    """Refuse a file whose ids would differ from those of the `sentencepiece` library."""
    for probe in _PROBES:
        ours = tokenizer.encode(probe, add_special_tokens=False).ids
        theirs = list(processor.encode(probe))
        if ours != theirs:
            raise CheckpointError(
                f"{path}: this SentencePiece model cannot be reproduced exactly: {probe!r} gives "
                f"{ours[:12]}.. where sentencepiece gives {theirs[:12]}... Convert it to a "
                "tokenizer.json with the program that trained it."
            )
