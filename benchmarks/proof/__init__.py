"""One command that builds, tests, sanitizes, stresses and measures on the card at hand: `python -m benchmarks.proof`.

`stage` says what a stage is, `stages` lists them, `runner` runs a process within its budget, `schedule` runs stages in order
and resumes them, `ledger` and `state` are what is kept on disk, `report` reads that and writes the results.
"""
