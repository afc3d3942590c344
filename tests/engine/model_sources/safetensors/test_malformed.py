import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load

from engine.errors import CheckpointError
from engine.memory.process import forget_peak, peak_resident
from engine.model_sources.safetensors.file import SafetensorsFile, save_file

BODY = bytes(range(24))


def entry(
    dtype: Any = "F32", shape: Any = (2, 3), offsets: Any = (0, 24), **extra: Any
) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **extra}


def pack(header: Any, body: bytes = BODY, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + body


GOOD = pack({"a": entry()})
HALVES = {"a": entry(shape=[3], offsets=[0, 12])}
CASES: dict[str, tuple[bytes, str]] = {
    "an empty file": (b"", "cut short"),
    "seven bytes": (b"\0" * 7, "cut short"),
    "a header of no bytes": (b"\0" * 8 + b"{}", "claims 0"),
    "a header beyond the file": (pack({"a": entry()}, length=10_000), "claims 10000"),
    "a header of 2^63 bytes": (pack({}, length=2**63), "header claims"),
    "a header of 2^64 - 8 bytes": (pack({}, length=2**64 - 8), "header claims"),
    "a header above the limit": (pack(b"{}" + b" " * (17 << 20)), "header claims"),
    "a header that is not UTF-8": (pack(b'{"\xff":1}'), "not UTF-8"),
    "a header that starts with a letter": (pack(b' x{"a":1}'), "does not start with"),
    "a header that is a list": (pack(b"[1,2]"), "does not start with"),
    "a header cut in the middle": (pack(b'{"a":{"dtype":"F32"'), "damaged or cut short"),
    "text behind the header's object": (pack(b"{} {}"), "damaged or cut short"),
    "brackets nested 100,000 deep": (
        pack(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        "not acceptable JSON",
    ),
    "a pickle": (b"\x80\x02}q\x00." + bytes(40), "header claims"),
    "a zip file": (b"PK\x03\x04" + bytes(60), "header claims"),
    "a truncated body": (GOOD[:-1], "is cut short"),
    "a body that is missing": (pack({"a": entry()}, b""), "is cut short"),
    "bytes behind the last tensor": (GOOD + b"\0", "bytes after its last tensor"),
    "a body without tensors": (pack({}), "bytes after its last tensor"),
    "an entry that is a list": (pack({"a": [1]}), "expected an object"),
    "an entry that is null": (pack({"a": None}), "expected an object"),
    "an entry without a shape": (
        pack({"a": {"dtype": "F32", "data_offsets": [0, 24]}}),
        "an object with dtype, shape and data_offsets",
    ),
    "an unknown type": (pack({"a": entry(dtype="F31")}), "has the type F31"),
    "a type in small letters": (pack({"a": entry(dtype="f32")}), "has the type f32"),
    "a type that is a number": (pack({"a": entry(dtype=4)}), "has the type 4"),
    "a type that is a list": (pack({"a": entry(dtype=["F32"])}), "has the type ['F32']"),
    "a type that is an object": (pack({"a": entry(dtype={"F32": 1})}), "has the type"),
    "an escape sequence for a type": (pack({"a": entry(dtype="\x1b[31m")}), "\\x1b[31m"),
    "FP6 weights": (pack({"a": entry(dtype="F6_E2M3", shape=[32])}), "Convert the model to BF16"),
    "a negative size": (pack({"a": entry(shape=[-2, -3])}), "has the shape"),
    "a size of 2^40 by zero": (
        pack({"a": entry(shape=[2**40, 0], offsets=[0, 0])}, b""),
        "has the shape",
    ),
    "a size of 2^63": (pack({"a": entry(shape=[2**63])}), "has the shape"),
    "a size that is a fraction": (pack({"a": entry(shape=[2.0, 3])}), "has the shape"),
    "a size that is true": (pack({"a": entry(shape=[True, 6])}), "has the shape"),
    "a size that is a text": (pack({"a": entry(shape=["6"])}), "has the shape"),
    "a shape that is a number": (pack({"a": entry(shape=6)}), "has the shape"),
    "nine dimensions": (pack({"a": entry(shape=[6, *[1] * 8])}), "has the shape"),
    "a thousand dimensions": (pack({"a": entry(shape=[6, *[1] * 999])}), "has the shape"),
    "a shape smaller than its bytes": (pack({"a": entry(shape=[5])}), "takes 20 bytes"),
    "a type wider than its bytes": (pack({"a": entry(dtype="F64")}), "takes 48 bytes"),
    "a product beyond 64 bits": (
        pack({"a": entry(shape=[2**31, 2**31, 2**31])}),
        "data_offsets [0, 24] span 24",
    ),
    "one offset": (pack({"a": entry(offsets=[24])}), "expected two offsets"),
    "three offsets": (pack({"a": entry(offsets=[0, 24, 24])}), "expected two offsets"),
    "a negative offset": (pack({"a": entry(offsets=[-24, 0])}), "expected two offsets"),
    "offsets in the wrong order": (pack({"a": entry(offsets=[24, 0])}), "span -24"),
    "an offset of 2^64": (pack({"a": entry(offsets=[2**64, 2**64 + 24])}), "two offsets"),
    "a start beyond the file": (pack({"a": entry(offsets=[24, 48])}), "leaves a gap"),
    "two tensors on the same bytes": (pack({"a": entry(), "b": entry()}), "overlaps"),
    "two tensors that overlap": (
        pack({**HALVES, "b": entry(shape=[4], offsets=[8, 24])}),
        "overlaps the tensor before it",
    ),
    "a gap between two tensors": (
        pack({**HALVES, "b": entry(shape=[2], offsets=[16, 24])}),
        "leaves a gap",
    ),
    "a key that stands there twice": (
        pack(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2)),
        "stands in one object twice",
    ),
    "a name that climbs out": (pack({"../../etc/passwd": entry()}), "cannot name a tensor"),
    "an empty name": (pack({"": entry()}), "cannot name a tensor"),
    "a name with a NUL": (pack({"a\0b": entry()}), "cannot name a tensor"),
    "a name of 513 letters": (pack({"a" * 513: entry()}), "cannot name a tensor"),
    "metadata that is a list": (pack({"__metadata__": [], "a": entry()}), "strings to strings"),
    "metadata with a number": (
        pack({"__metadata__": {"a": 1}, "a": entry()}),
        "strings to strings",
    ),
    "NaN in the header": (pack(b'{"a":{"dtype":NaN}}'), "not a JSON number"),
    "a number of 5,000 digits": (pack(b'{"a":' + b"9" * 5000 + b"}"), "not acceptable JSON"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_malformed_file_is_refused_with_a_reason(tmp_path: Path, case: str) -> None:
    data, words = CASES[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(path)
    message = str(caught.value)
    assert words in message
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 600 + len(str(path))


def test_the_well_formed_file_of_these_cases_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(GOOD)
    assert SafetensorsFile(tmp_path / "a").tensor("a").shape == (2, 3)


@pytest.mark.parametrize(
    "header",
    [
        b" \n\t\r" + json.dumps({"a": entry()}).encode(),
        json.dumps({"a": entry(), "__metadata__": None}).encode(),
        json.dumps({"a": entry(device="cpu")}).encode(),
        json.dumps({"a": entry(), "b": entry(shape=[0, 3], offsets=[24, 24])}).encode(),
        json.dumps({"a": entry()}).encode() + b" \n\n",
    ],
    ids=["space before", "no metadata", "another key", "an empty tensor", "space after"],
)
def test_what_the_library_reads_is_read(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "a"
    path.write_bytes(pack(header))
    file = SafetensorsFile(path)
    with safe_open(path, "pt") as theirs:
        assert sorted(file.keys()) == sorted(theirs.keys())
        for name in file.keys():  # noqa: SIM118
            assert torch.equal(file.tensor(name), theirs.get_tensor(name))
    assert file.metadata == {}


EMPTY = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
BOMBS: dict[str, Callable[[], bytes]] = {
    "empty tensors": lambda: b"{%s}" % b",".join(EMPTY % n for n in range(200_000)),
    "empty tensors beyond the limit of bytes": lambda: b"{%s}" % ((EMPTY % 1 + b",") * 1_000_000),
    "empty lists": lambda: b'{"a":[' + b"[]," * 5_000_000 + b"[]]}",
    "empty objects": lambda: b'{"a":[' + b"{}," * 5_000_000 + b"{}]}",
    "empty texts": lambda: b'{"a":[' + b'"",' * 5_000_000 + b'""]}',
    "short keys": lambda: b"{%s}" % b",".join(b'"%d":1' % n for n in range(1_400_000)),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_header_that_would_make_very_many_objects_is_refused_at_once(
    tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "a"
    path.write_bytes(pack(BOMBS[kind](), b""))
    forget_peak()
    before, start = peak_resident(), time.process_time()
    with pytest.raises(CheckpointError, match=r"65536 tensors|header claims"):
        SafetensorsFile(path)
    # To parse them takes seconds, and hundreds of megabytes.
    assert time.process_time() - start < 0.5
    assert peak_resident() - before < 64 << 20


def test_a_header_of_as_many_tensors_as_fit_is_read(tmp_path: Path) -> None:
    names = b",".join(EMPTY % number for number in range(65_536))
    text = json.dumps(json.dumps({"tags": {f"[{n}], {{": [n] for n in range(9000)}})).encode()
    (tmp_path / "a").write_bytes(pack(b'{"__metadata__":{"a":%s},%s}' % (text, names), b""))
    assert len(SafetensorsFile(tmp_path / "a").keys()) == 65_536


def mutate(data: bytes, rng: random.Random) -> bytes:
    """`data` with one to four bytes, or a stretch of it, changed; mostly in the header."""
    result = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(min(len(result), 300))
        kind = rng.randrange(6)
        if kind == 0:
            result[at] = rng.randrange(256)
        elif kind == 1:
            result[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del result[at : at + rng.randint(1, 9)]
        elif kind == 3:
            result[at:at] = rng.choice([b"9", b"-", b'"', b"{", b"}", b",", b"\0", b"0", b"1e9"])
        elif kind == 4:
            result[at:at] = result[at : at + rng.randint(1, 40)]
        else:
            digits = [i for i in range(8, min(len(result), 300)) if 48 <= result[i] < 58]
            if digits:
                result[rng.choice(digits)] = rng.randrange(48, 58)
        if not result:
            break
    if rng.random() < 0.1:
        result = result[: rng.randrange(len(result) + 1)]
    return bytes(result)


def test_random_damage_is_an_error_or_a_file_the_library_reads_too(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {
        "a": torch.randn(2, 3),
        "b.c": torch.ones(5).half(),
        "d": torch.zeros(4).to(torch.int8),
    }
    save_file(tensors, path, {"format": "pt"})
    whole = path.read_bytes()
    rng = random.Random(1)
    refused = 0
    for _ in range(600):
        data = mutate(whole, rng)
        path.write_bytes(data)
        try:
            file = SafetensorsFile(path)
        except CheckpointError:
            refused += 1
            continue
        theirs = {name: tuple(tensor.shape) for name, tensor in load(data).items()}
        assert theirs == {name: file.shape(name) for name in file.keys()}  # noqa: SIM118
        for name in theirs:
            assert file.tensor(name).numel() >= 1
    assert 300 < refused < 600
