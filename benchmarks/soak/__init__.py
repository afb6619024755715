"""Random faults and commands over random work, and the check of the whole queue at the end.

    python -m benchmarks.soak --minutes 10 --seed 1

Workers are real processes around an engine that computes nothing; the server is a real one with an
append-only file; every process reaches it through a proxy of its own. The plan, all work, faults
and commands with their moments, follows from the seed. Ends with status 1 if the check against the
sender's ledger finds anything.
"""
