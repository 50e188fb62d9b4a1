"""How fast the op is, against what one would otherwise run and against what the machine can do.

    python -m benchmarks.speed [--quick] [--device cpu|cuda] [--only QUESTION ...] [--output FILE.json]
    python -m benchmarks.speed compare BEFORE.json AFTER.json
    python -m benchmarks.speed plot FILE.json

harness.py times, ceilings.py measures the machine, peers.py holds the methods, questions.py what is asked,
report.py tables, JSON and the comparison, plots.py the figures.
"""
