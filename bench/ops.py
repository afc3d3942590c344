"""The ops beside bitsandbytes and Liger: ``engine bench --against bench.peers``.

Takes the options of ``engine bench``. Without --output the rows and the picture go to a new folder
under ``runs``; the committed results are never written over.
"""

import sys
import time
from collections.abc import Sequence

from typer.main import get_command

from cli.tools.bench import app


def main(arguments: Sequence[str]) -> None:
    given = [*arguments, "--against", "bench.peers"]
    if not any(word.split("=")[0] in ("--output", "--compare") for word in arguments):
        given += ["--output", time.strftime("runs/bench-%Y%m%d-%H%M%S")]
    get_command(app).main(args=given, prog_name="bench.ops")


if __name__ == "__main__":
    main(sys.argv[1:])
