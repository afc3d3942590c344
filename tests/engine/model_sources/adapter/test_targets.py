"""Which modules an adapter's configuration means, however long its lists are."""

import random
import re
from typing import Any

from engine.model_sources.adapter.targets import is_meant

_WORDS = ["layers", "0", "10", "q_proj", "k_proj", "lm_head", "a.b", "proj", "q", ""]


def _meant_by_the_book(raw: dict[str, list[str]], name: str) -> bool:
    """The rules as PEFT has them, one name of a list after the other."""
    if any(f".{name}".endswith(f".{one}") for one in raw["exclude_modules"]):
        return False
    saved = raw["modules_to_save"]
    if any(re.match(rf"(^|.*\.){re.escape(one)}($|\..*)", name) for one in saved):
        return False
    return any(f".{name}".endswith(f".{one}") for one in raw["target_modules"])


def test_lists_of_names_mean_what_they_mean_one_by_one() -> None:
    random.seed(5)
    seen = set[bool]()
    for _ in range(3000):
        name = ".".join(random.choices(_WORDS[:-1], k=random.randint(1, 5)))
        raw = {
            key: [
                ".".join(random.choices(_WORDS, k=random.randint(1, 2)))
                for _ in range(random.randint(0, most))
            ]
            for key, most in (("target_modules", 4), ("exclude_modules", 1), ("modules_to_save", 1))
        }
        expected = _meant_by_the_book(raw, name)
        assert is_meant(raw, name, "x") == expected, (raw, name)
        sets: dict[str, Any] = {key: set(value) for key, value in raw.items()}
        assert is_meant(sets, name, "x") == expected
        seen.add(expected)
    assert seen == {True, False}
