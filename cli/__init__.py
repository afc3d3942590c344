"""The command line: one file per verb."""

from cli.interrupts import INTERRUPTS, is_program

# Here, because a program of this package comes by here before it imports anything else.
if is_program():
    INTERRUPTS.install()
