"""The software bill of materials of a release: CycloneDX JSON of what an installation may bring.

cyclonedx-py describes the locked environment, licences and dependencies included. What only the
tests, the documentation and the comparisons use is left out, and each package gets the SHA-256 of
its files from requirements.lock.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from lock import entries
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
NEEDED = ROOT / ".ci" / "needed.py"
OWN_EXTRAS = ("docs", "test", "interop")  # for who works on it


def bill_of_materials(environment: Path, files: list[Path]) -> str:
    """The bill as JSON; `files` are the release's own, `environment` is a Python."""
    options = ["--output-reproducible", "--spec-version", "1.6", "--output-format", "JSON"]
    options += ["--pyproject", str(ROOT / "pyproject.toml")]
    program = Path(sys.executable).with_name("cyclonedx-py")
    bill = json.loads(said(program, "environment", str(environment), *options))
    keep_what_is_installed(bill, environment)
    add_hashes(bill, files)
    text = json.dumps(bill, indent=2, sort_keys=True) + "\n"
    if problem := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text):
        sys.exit(f"The bill of materials does not follow CycloneDX 1.6: {problem}")
    return text


def said(*command: Path | str) -> str:
    """What a command prints."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def keep_what_is_installed(bill: dict[str, Any], environment: Path) -> None:
    """Drop the components that neither the package nor an extra for users leads to."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra, requirements in project["optional-dependencies"].items():
        wanted += [] if extra in OWN_EXTRAS else requirements
    own = canonicalize_name(project["name"])
    refs = {canonicalize_name(part["name"]): part["bom-ref"] for part in bill["components"]}
    needs: dict[str, list[str]] = json.loads(said(environment, str(NEEDED), *wanted))
    needs[own] = needs.pop("")
    refs[own] = bill["metadata"]["component"]["bom-ref"]
    bill["components"] = [
        part for part in bill["components"] if canonicalize_name(part["name"]) in needs
    ]
    bill["dependencies"] = [
        {"ref": refs[name]}
        | ({"dependsOn": sorted(refs[other] for other in others)} if others else {})
        for name, others in sorted(needs.items())
    ]


def add_hashes(bill: dict[str, Any], files: list[Path]) -> None:
    """Say the SHA-256 of the release's files, and of those that the lock allows of each package."""
    locked = {
        canonicalize_name(pin.split("==")[0]): hashes
        for pin, hashes in entries((ROOT / "requirements.lock").read_text()).items()
    }
    for part in bill["components"]:
        name, version = part["name"], part["version"]
        if (key := canonicalize_name(name)) not in locked:
            continue  # pip, which is there before anything is installed
        part["externalReferences"] = [
            *part.get("externalReferences", []),
            {
                "type": "distribution",
                "url": f"https://pypi.org/project/{name}/{version.split('+')[0]}/#files",
                "comment": "any of these files",
                "hashes": [{"alg": "SHA-256", "content": value} for value in locked[key]],
            },
        ]
    bill["metadata"]["component"]["externalReferences"] = [
        {
            "type": "distribution",
            "url": path.name,
            "hashes": [
                {"alg": "SHA-256", "content": hashlib.sha256(path.read_bytes()).hexdigest()}
            ],
        }
        for path in files
    ]
