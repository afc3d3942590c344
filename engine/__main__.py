"""`python -m engine`: the command line."""

import runpy

if __name__ == "__main__":
    # By name: what stands above this package is not imported by it.
    runpy.run_module("cli.main", run_name="__main__", alter_sys=True)
