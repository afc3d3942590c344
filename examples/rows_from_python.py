"""Train on rows that a program makes, without writing a file.

    python -m examples.rows_from_python --model MODEL [--output runs/rows_from_python]

`data` takes a list of mappings, a generator, or a function that returns one. To go on with such a
run, give the same rows again: `engine.resume(run, data=rows)`.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import engine


def sums(count: int) -> Iterator[dict[str, str]]:
    """Questions about sums, with their answers."""
    for number in range(count):
        yield {"prompt": f"What is {number} + 1?", "response": f"{number + 1}"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="examples.rows_from_python", description="Train on rows from Python."
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/rows_from_python"))
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args(arguments)
    result = engine.train(
        model=given.model,
        data=sums(200),
        output_dir=given.output,
        max_steps=given.steps,
        max_length=256,
    )
    print(f"{result.metrics['rows_read']} rows, adapter in {result.adapter_path}")


if __name__ == "__main__":
    main()
