import random

from engine.errors import ConfigError, listing, printable


def test_a_message_shows_control_characters_and_half_surrogates_as_escapes() -> None:
    error = ConfigError("the name \x1b[2J\u202e\udcff\r is odd; use é, 中 or \n.")
    assert str(error) == "the name \\x1b[2J\\u202e\\udcff\\r is odd; use é, 中 or \n."


def test_any_text_becomes_one_that_can_be_written_and_is_short() -> None:
    chance = random.Random(0)
    for _ in range(200):
        text = "".join(chr(chance.randrange(0x11000)) for _ in range(chance.randrange(9000)))
        shown = printable(text)
        shown.encode()
        assert all(sign.isprintable() or sign in "\n\t" for sign in shown)
        assert len(shown) <= 2000
        assert len(printable(text, 100)) <= 100


def test_a_long_message_keeps_its_beginning_and_its_end() -> None:
    message = str(ConfigError("found " + "x" * 10**6 + ", do this."))
    assert message.startswith("found xxx")
    assert message.endswith("xxx, do this.")
    assert len(message) < 4100


def test_a_list_in_a_message_is_short_whatever_its_items_are() -> None:
    assert listing([]) == ""
    assert listing(["a", "b"]) == "a, b"
    assert listing(map(str, range(40))).endswith("15, and 24 more")
    names = [f"model.layers.{n}.mlp.experts.0.gate_proj.weight [1408, 32]" for n in range(30)]
    assert 400 < len(listing(names)) < 540
    assert listing(names).endswith(f"and {30 - listing(names).count('gate_proj')} more")
    assert len(listing(["x" * 5000] * 3)) < 600
    assert listing(["\x1b[2J"]).isprintable()
    assert listing(["a\nb", "c"]) == "a\\nb, c"
