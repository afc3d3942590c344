"""The ops beside bitsandbytes and Liger: ``engine bench --against bench.peers``.

Takes the options of ``engine bench``. Without --output the rows and the picture are written to
``bench/results``.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from typer.main import get_command

from cli.tools.bench import app

RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str]) -> None:
    given = [*arguments, "--against", "bench.peers"]
    if not any(word.split("=")[0] == "--output" for word in arguments):
        given += ["--output", str(RESULTS)]
    get_command(app).main(args=given, prog_name="bench.ops")


if __name__ == "__main__":
    main(sys.argv[1:])
