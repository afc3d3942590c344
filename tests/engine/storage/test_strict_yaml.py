import random
from pathlib import Path

import pytest
import yaml

from engine.config.sources import load_config
from engine.errors import ConfigError
from engine.storage import strict_yaml

CONFIG = (
    b"model: m\ndata: [a, b]\nlora_rank: 8\nlearning_rate: 1e-4\n"
    b"chat_template_kwargs: {a: 1}\nseed: 3\nmax_steps: 5\n"
)
PIECES = (
    b"!!int ''", b"!!timestamp x", b"!!float x", b"!!bool x", b"!!binary x", b"!!set {a}",
    b"!!python/object:os.system x", b"&a ", b"*a ", b"\0", b"{", b"[", b": ", b"? ", b"- ", b"|\n",
    b'"', b"!!omap [a]", b"<<: *a\n", b"9" * 5000, b"0x", b"!!null x", b"%YAML 9\n---\n",
    b"\x1b[31m",
)  # fmt: skip


def bomb(levels: int) -> str:
    """Lists of nine aliases of the list before: 9 ** levels values in a few hundred bytes."""
    further = [
        f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, levels)
    ]
    return "\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x]", *further])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (bomb(9), "aliases that stand for over"),
        ("a: &a [*a]", "inside the very value"),
        ("[" * 200 + "]" * 200, "nested more than 64 deep"),
        ("a: !!int ''", "cannot be read as int"),
        ("a: !!timestamp x", "cannot be read as timestamp"),
        ("a: !!bool maybe", "cannot be read as bool"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    ],
    ids=["billion laughs", "circle", "deep", "int", "timestamp", "bool", "python"],
)
def test_a_hostile_text_is_one_kind_of_error(text: str, words: str) -> None:
    with pytest.raises(yaml.YAMLError, match=words):
        strict_yaml.load(text)


@pytest.mark.parametrize("piece", ["[", "{", "[x, ", "{a: "])
def test_what_is_nested_too_deep_is_refused_without_reading_on(piece: str) -> None:
    loader = strict_yaml.StrictLoader(piece * 20_000)
    with pytest.raises(yaml.YAMLError, match="nested more than 64 deep"):
        loader.get_single_data()
    assert loader.index <= 65 * len(piece)


def test_aliases_of_a_reasonable_size_are_read() -> None:
    value = strict_yaml.load(bomb(3))
    assert value["a2"][8][8] == ["x"] * 9


def test_damage_to_a_configuration_is_a_configuration_error(tmp_path: Path) -> None:
    path, chance, refused = tmp_path / "c.yaml", random.Random(3), 0
    for _ in range(600):
        data = bytearray(CONFIG)
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(data))
            piece = chance.choice(PIECES) if chance.random() < 0.6 else chance.randbytes(2)
            data[at : at + chance.randrange(4)] = piece
        path.write_bytes(data)
        try:
            load_config(path)
        except ConfigError as error:
            refused += 1
            message = str(error)
            assert message.isprintable(), ascii(message)
            assert len(message) < 2000
    assert refused > 300
