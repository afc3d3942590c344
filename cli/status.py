"""`engine status`: how far a run is, from its files alone."""

import json
from pathlib import Path
from typing import Annotated

import typer

from cli.options import Json

app = typer.Typer(add_completion=False)


@app.command(name="status")
def status(
    run: Annotated[
        str, typer.Argument(help="Run directory, or a run's name under runs/; else the newest.")
    ] = "",
    tail: Annotated[int, typer.Option(min=0, help="Also show the log's last lines.")] = 0,
    as_json: Json = False,
) -> None:
    """How far a run is: progress, loss, speed, time left, and whether it is alive."""
    from engine.status import describe_status, find_run, read_status

    directory = find_run(run, Path("runs"))
    found = read_status(directory, tail)
    if as_json:
        print(json.dumps(found))
        return
    for line in describe_status(found):
        print(line)
