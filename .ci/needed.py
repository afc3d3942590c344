"""Print what some requirements bring with them in this environment: a JSON object, name -> names.

Runs with the Python whose packages are asked about. Unlike a list of everything that packages
mention, it follows an extra only where something asks for it, and markers as they are here.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def graph(requirements: list[str]) -> dict[str, list[str]]:
    """Name -> what it needs, of all that `requirements` lead to; "" for the requirements."""
    needs: dict[str, set[str]] = {"": set()}
    seen: set[tuple[str, str]] = set()
    queue = [("", Requirement(text)) for text in requirements]
    while queue:
        parent, wanted = queue.pop()
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        name = canonicalize_name(wanted.name)
        needs[parent].add(name)
        needs.setdefault(name, set())
        for extra in ("", *wanted.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            for text in importlib.metadata.requires(name) or []:
                child = Requirement(text)
                marker, child.marker = child.marker, None
                if marker is None or marker.evaluate({"extra": extra}):
                    queue.append((name, child))
    return {name: sorted(others) for name, others in sorted(needs.items())}


if __name__ == "__main__":
    print(json.dumps(graph(sys.argv[1:])))
