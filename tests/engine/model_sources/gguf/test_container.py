import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import CheckpointError
from engine.model_sources.gguf.container import GGUFFile

U8, U32, F32, BOOL, STRING, ARRAY = 0, 4, 6, 7, 8, 9
METADATA: dict[str, tuple[int, Any]] = {
    "general.architecture": (STRING, "llama"),
    "llama.block_count": (U32, 2),
    "a.numbers": (ARRAY, (5, [1, -2, 3])),
    "a.texts": (ARRAY, (STRING, ["x", "", "日本"])),
    "a.half": (F32, 0.5),
    "a.flag": (BOOL, True),
}
TENSORS = [
    ("one.weight", (4, 2), 0, None, np.arange(8, dtype=np.float32).tobytes()),
    ("two.weight", (32,), 8, None, bytes(range(34))),
]
Pack = Callable[..., bytes]


def entry(key: str, kind: int, value: bytes) -> dict[str, tuple[int, Any]]:
    return {key: (kind, value)}


def array(kind: int, count: int, body: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + body


def tensor(**change: Any) -> list[tuple[Any, ...]]:
    fields = {"name": "t", "sizes": (4, 2), "kind": 0, "offset": None, "data": bytes(32)} | change
    return [tuple(fields.values())]


def test_metadata_and_tensors_are_read(tmp_path: Path, gguf_bytes: Pack) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf_bytes(METADATA, TENSORS))
    file = GGUFFile(path)
    assert file.metadata["general.architecture"] == "llama"
    assert file.metadata["a.numbers"].tolist() == [1, -2, 3]
    assert file.metadata["a.texts"] == ["x", "", "日本"]
    assert file.metadata["a.half"] == 0.5
    assert file.metadata["a.flag"] is True
    assert list(file.tensors) == ["one.weight", "two.weight"]
    assert file.tensors["one.weight"].shape == (2, 4)
    assert file.raw("one.weight").view(np.float32).tolist() == list(range(8))
    assert file.tensors["two.weight"].kind == "Q8_0"
    assert file.raw("two.weight").tobytes() == bytes(range(34))
    file.release("one.weight")
    assert file.raw("one.weight").view(np.float32).tolist() == list(range(8))


def test_another_alignment_is_honoured(tmp_path: Path, gguf_bytes: Pack) -> None:
    metadata = METADATA | {"general.alignment": (U32, 256)}
    (tmp_path / "a").write_bytes(gguf_bytes(metadata, TENSORS, align=256))
    file = GGUFFile(tmp_path / "a")
    assert file.tensors["two.weight"].start % 256 == 0
    assert file.raw("two.weight").tobytes() == bytes(range(34))


def test_a_description_cut_inside_a_character_is_no_obstacle(
    tmp_path: Path, gguf_bytes: Pack
) -> None:
    cut = "é".encode()[:1]
    metadata = entry("general.description", STRING, struct.pack("<Q", 1) + cut)
    (tmp_path / "a").write_bytes(gguf_bytes(metadata, TENSORS))
    assert GGUFFile(tmp_path / "a").metadata["general.description"] == "\ufffd"


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "version 1": ({"version": 1}, "its version is 1"),
    "version 4": ({"version": 4}, "its version is 4"),
    "a big-endian file": ({"version": 3 << 24}, "little-endian"),
    "2^40 tensors": ({"counts": (2**40, 0)}, "claims 1099511627776 tensors"),
    "2^64 - 1 entries": ({"counts": (0, 2**64 - 1)}, "metadata entries"),
    "more entries than there are": ({"counts": (2, 7)}, "is not a sound GGUF file"),
    "more tensors than there are": (
        {"metadata": {}, "tensors": [], "counts": (9, 0)},
        "cannot name",
    ),
    "an empty key": ({"metadata": entry("", U32, b"\0" * 4)}, "cannot name"),
    "a key with a space": ({"metadata": entry("a b", U32, b"\0" * 4)}, "cannot name"),
    "a key of 257 letters": ({"metadata": entry("k" * 257, U32, b"\0" * 4)}, "cannot name"),
    "an unknown value type": ({"metadata": entry("k", 13, b"\0" * 8)}, "unknown value type 13"),
    "a string of 2^60 bytes": (
        {"metadata": entry("k", STRING, struct.pack("<Q", 2**60))},
        "claims 1152921504606846976 bytes",
    ),
    "a string beyond the file": (
        {"metadata": entry("k", STRING, struct.pack("<Q", 5000))},
        "claims 5000 bytes",
    ),
    "an array of 2^60 numbers": ({"metadata": entry("k", ARRAY, array(U32, 2**60))}, "elements"),
    "an array of 2^60 strings": ({"metadata": entry("k", ARRAY, array(STRING, 2**60))}, "elements"),
    "an array of 2^63 bytes": ({"metadata": entry("k", ARRAY, array(U8, 2**63))}, "elements"),
    "an array beyond the file": ({"metadata": entry("k", ARRAY, array(U32, 999))}, "999 elements"),
    "an array of arrays": (
        {"metadata": entry("k", ARRAY, array(ARRAY, 1, array(U32, 0)))},
        "an array of the value type 9",
    ),
    "an array of unknown things": ({"metadata": entry("k", ARRAY, array(99, 1))}, "type 99"),
    "an array of broken texts": (
        {"metadata": entry("k", ARRAY, array(STRING, 1, struct.pack("<Q", 1) + b"\xff"))},
        "not UTF-8",
    ),
    "a pre-tokenizer that is an array": (
        {"metadata": {"tokenizer.ggml.pre": (ARRAY, (U8, [1, 2]))}},
        "expected a text",
    ),
    "a scaling that is a number": (
        {"metadata": {"llama.rope.scaling.type": (F32, 1.0)}},
        "expected a text",
    ),
    "merges that are one number": (
        {"metadata": {"tokenizer.ggml.merges": (U32, 7)}},
        "expected an array of texts",
    ),
    "an id that is an array": (
        {"metadata": {"tokenizer.ggml.eos_token_id": (ARRAY, (U8, [1, 2]))}},
        "expected a number",
    ),
    "millions of empty texts": (
        {"metadata": entry("k", ARRAY, array(STRING, 2**21 + 1, bytes(8 * (2**21 + 1))))},
        "more than any vocabulary",
    ),
    "an alignment of zero": ({"metadata": {"general.alignment": (U32, 0)}}, "alignment is 0"),
    "an alignment of 48": ({"metadata": {"general.alignment": (U32, 48)}}, "alignment is 48"),
    "an alignment of 8192": (
        {"metadata": {"general.alignment": (U32, 8192)}},
        "a power of two up to 4096",
    ),
    "an alignment that is a text": (
        {"metadata": {"general.alignment": (STRING, "32")}},
        "alignment is '32'",
    ),
    "no dimensions": ({"tensors": tensor(sizes=())}, "has 0 dimensions"),
    "five dimensions": ({"tensors": tensor(sizes=(8, 1, 1, 1, 1))}, "has 5 dimensions"),
    "a size of zero": ({"tensors": tensor(sizes=(0, 4))}, "has the shape [4, 0]"),
    "a size of 2^63": ({"tensors": tensor(sizes=(2**63, 4))}, "has the shape"),
    "a product beyond 64 bits": ({"tensors": tensor(sizes=(2**31,) * 4)}, "said to lie"),
    "an unknown tensor type": ({"tensors": tensor(kind=4)}, "unknown type number 4"),
    "a type number of 2^32 - 1": ({"tensors": tensor(kind=2**32 - 1)}, "unknown type number"),
    "rows that blocks do not fill": (
        {"tensors": tensor(kind=8, sizes=(33, 1))},
        "rows of 33, no multiple of 32",
    ),
    "data beyond the file": ({"tensors": tensor(sizes=(4, 300))}, "in a file of"),
    "an offset beyond the file": ({"tensors": tensor(offset=4096)}, "in a file of"),
    "an offset of 2^64 - 32": ({"tensors": tensor(offset=2**64 - 32)}, "in a file of"),
    "an unaligned offset": ({"tensors": tensor(offset=4, data=bytes(64))}, "steps of 32"),
    "tensors on the same bytes": (
        {"tensors": tensor() + tensor(name="u", offset=0)},
        "tensors 't' and 'u' overlap",
    ),
    "two tensors of one name": ({"tensors": tensor() + tensor()}, "'t' stands there twice"),
    "a name with a slash outside ASCII": ({"tensors": tensor(name="t\xe9")}, "cannot name"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_malformed_file_is_refused_with_a_reason(
    tmp_path: Path, gguf_bytes: Pack, case: str
) -> None:
    change, words = CASES[case]
    path = tmp_path / "bad.gguf"
    arguments = {"metadata": METADATA, "tensors": TENSORS} | change
    path.write_bytes(gguf_bytes(**arguments))
    start = time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        GGUFFile(path)
    assert time.perf_counter() - start < 5  # milliseconds; a loop over a forged count never ends
    message = str(caught.value)
    assert words in message
    assert str(path) in message
    assert "\n" not in message


@pytest.mark.parametrize("data", [b"", b"GGUF", b"GGML" + bytes(100), b"\x80\x04" + bytes(40)])
def test_what_is_no_gguf_file_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(CheckpointError, match="is not a GGUF file"):
        GGUFFile(tmp_path / "a")


def test_a_key_that_stands_there_twice_is_refused(tmp_path: Path, gguf_bytes: Pack) -> None:
    data = gguf_bytes({"key.a": (U32, 1), "key.b": (U32, 2)}, [])
    (tmp_path / "a").write_bytes(data.replace(b"key.b", b"key.a"))
    with pytest.raises(CheckpointError, match=r"'key\.a' stands there twice"):
        GGUFFile(tmp_path / "a")


def test_a_file_cut_anywhere_is_refused(tmp_path: Path, gguf_bytes: Pack) -> None:
    whole = gguf_bytes(METADATA, TENSORS)
    last = len(whole) - 30  # padding behind the last tensor may be missing
    for length in range(0, last, 3):
        (tmp_path / "a").write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            GGUFFile(tmp_path / "a")


def test_random_damage_is_an_error_or_a_consistent_file(tmp_path: Path, gguf_bytes: Pack) -> None:
    whole = gguf_bytes(METADATA, TENSORS)
    rng = random.Random(2)
    path = tmp_path / "a.gguf"
    refused = 0
    extremes = [b"\xff" * 8, b"\0" * 8, struct.pack("<Q", 2**63), struct.pack("<Q", 1000)]
    for _ in range(600):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(4, len(data) - 70)
            kind = rng.randrange(3)
            if kind == 0:
                data[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                data[at : at + 8] = rng.choice(extremes)
            else:
                del data[at : at + rng.randint(1, 8)]
        path.write_bytes(bytes(data))
        try:
            file = GGUFFile(path)
        except CheckpointError:
            refused += 1
            continue
        for name, info in file.tensors.items():
            assert info.start + info.size <= len(data)
            assert file.raw(name).size == info.size
    assert 200 < refused < 600
