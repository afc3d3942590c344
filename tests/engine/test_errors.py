import random

from engine.errors import ConfigError, printable


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
        assert len(shown) < 4000 * 10 + 60


def test_a_long_message_keeps_its_beginning_and_its_end() -> None:
    message = str(ConfigError("found " + "x" * 10**6 + ", do this."))
    assert message.startswith("found xxx")
    assert message.endswith("xxx, do this.")
    assert len(message) < 4100
