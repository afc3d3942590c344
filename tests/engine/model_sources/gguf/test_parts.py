"""Models in several GGUF files: read from any part; missing and foreign parts refused by name."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch

from engine.errors import CheckpointError, ConfigError
from engine.model_sources.gguf.parts import GGUFParts, lone_model, part_names
from engine.model_sources.open import open_model_source

Write = Callable[..., Path]
STRING, U32 = 8, 4


def split(source: Path, folder: Path, groups: list[list[str]], total: int | None = None) -> None:
    """Write the tensors of `source` in parts, as gguf-split does: metadata in the first only."""
    reader = gguf.GGUFReader(str(source))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    count = len(groups)
    for number, names in enumerate(groups):
        path = folder / f"m-{number + 1:05d}-of-{count:05d}.gguf"
        writer = gguf.GGUFWriter(str(path), "llama")
        if number:
            writer.kv_data[0].clear()
        else:
            for field in reader.fields.values():
                if not field.name.startswith(("GGUF.", "general.architecture")):
                    kind = field.types[0]
                    writer.add_key_value(field.name, field.contents(), kind, *field.types[1:2])
        writer.add_key_value("split.no", number, gguf.GGUFValueType.UINT16)
        writer.add_key_value("split.count", count, gguf.GGUFValueType.UINT16)
        writer.add_key_value("split.tensors.count", total or len(tensors), gguf.GGUFValueType.INT32)
        for name in names:
            tensor = tensors[name]
            writer.add_tensor(name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


@pytest.fixture
def whole(write_gguf: Write, tmp_path: Path) -> Path:
    (tmp_path / "whole").mkdir()
    return write_gguf(tmp_path / "whole" / "m.gguf", "llama")


@pytest.fixture
def names(whole: Path) -> list[str]:
    return list(GGUFParts(whole).tensors)


@pytest.mark.parametrize("part", [1, 2, 3])
@pytest.mark.parametrize("first", ["no tensors", "all but the head", "a third"])
def test_a_model_is_read_whole_from_any_part(
    whole: Path, names: list[str], tmp_path: Path, part: int, first: str
) -> None:
    head = ["output.weight"]
    rest = [name for name in names if name not in head]
    groups = {
        "no tensors": [[], rest, head],
        "all but the head": [rest[:-1], rest[-1:], head],
        "a third": [rest[0::2], [*rest[1::2]], head],
    }[first]
    split(whole, tmp_path, groups)
    parts = open_model_source(tmp_path / f"m-{part:05d}-of-00003.gguf")
    original = open_model_source(whole)
    assert parts.config == original.config
    assert not parts.config.tie_word_embeddings
    assert parts.names() == original.names()
    for name in original.names():
        assert torch.equal(parts.tensor(name), original.tensor(name)), name
    assert parts.digest() == open_model_source(tmp_path / "m-00001-of-00003.gguf").digest()


def test_a_folder_with_the_parts_of_one_model_is_that_model(
    whole: Path, names: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    split(whole, folder, [names[:2], names[2:]])
    (folder / "mmproj-F16.gguf").write_bytes(b"GGUF")
    assert open_model_source(folder).names() == open_model_source(whole).names()
    shutil.copy(whole, folder / "other.gguf")
    assert lone_model(folder) is None
    with pytest.raises(ConfigError, match="several GGUF files"):
        open_model_source(folder)


def test_names_of_many_parts_and_of_none_are_looked_through_at_once(tmp_path: Path) -> None:
    (tmp_path / "m-00001-of-00000.gguf").touch()
    assert lone_model(tmp_path) == tmp_path / "m-00001-of-00000.gguf"
    for number in range(300):
        (tmp_path / f"{number}-00001-of-99999.gguf").touch()
    begun = time.process_time()
    assert lone_model(tmp_path) is None
    assert time.process_time() - begun < 1


@pytest.mark.parametrize("given", [1, 3])
def test_a_missing_part_is_named(whole: Path, names: list[str], tmp_path: Path, given: int) -> None:
    split(whole, tmp_path, [names[:2], names[2:4], names[4:]])
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    with pytest.raises(ConfigError, match=r"1 are missing .*: m-00002-of-00003\.gguf\. Download"):
        open_model_source(tmp_path / f"m-{given:05d}-of-00003.gguf")


def test_parts_in_the_wrong_order_and_copies_are_refused_by_name(
    whole: Path, names: list[str], tmp_path: Path
) -> None:
    split(whole, tmp_path, [names[:2], names[2:4], names[4:]])
    second, third = (tmp_path / f"m-0000{number}-of-00003.gguf" for number in (2, 3))
    content = second.read_bytes()
    second.write_bytes(third.read_bytes())
    with pytest.raises(CheckpointError, match=r"m-00002.* is part 3 of 3 by its own word"):
        open_model_source(tmp_path / "m-00001-of-00003.gguf")
    third.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is part 3 of 3 by its own word, .* part 2 of 3"):
        open_model_source(third.with_name("m-00001-of-00003.gguf"))
    second.write_bytes(whole.read_bytes())
    with pytest.raises(CheckpointError, match=r"m-00002.* is a whole model by its own word"):
        open_model_source(tmp_path / "m-00001-of-00003.gguf")


def test_parts_of_other_models_are_refused_by_name(
    whole: Path, names: list[str], tmp_path: Path
) -> None:
    for folder, groups in (("a", [names[:2], names[2:]]), ("b", [names[:4], names[4:]])):
        (tmp_path / folder).mkdir()
        split(whole, tmp_path / folder, groups)
    first, second = (tmp_path / "a" / f"m-0000{number}-of-00002.gguf" for number in (1, 2))
    other = tmp_path / "b" / second.name
    content = second.read_bytes()
    shutil.copy(other, second)
    with pytest.raises(CheckpointError, match=r"tensors, and the model has .* belongs to another"):
        open_model_source(first)
    second.write_bytes(content)
    shutil.copy(tmp_path / "b" / first.name, first)
    with pytest.raises(CheckpointError, match=r"m-00002.* holds 2 tensors that stand in m-00001"):
        open_model_source(second)


def test_renamed_parts_say_what_name_is_expected(
    whole: Path, names: list[str], tmp_path: Path
) -> None:
    split(whole, tmp_path, [names[:2], names[2:]])
    renamed = (tmp_path / "m-00001-of-00002.gguf").rename(tmp_path / "mine.gguf")
    with pytest.raises(ConfigError, match=r"expected NAME-00001-of-00002\.gguf"):
        open_model_source(renamed)


def test_names_of_parts() -> None:
    assert part_names("m.gguf") == ["m.gguf"]
    assert part_names("m-00001-of-00000.gguf") == ["m-00001-of-00000.gguf"]
    assert part_names("a-b-00002-of-00002.gguf") == [
        "a-b-00001-of-00002.gguf", "a-b-00002-of-00002.gguf",
    ]  # fmt: skip
