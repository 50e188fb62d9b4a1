"""How fast the op is, against what one would otherwise run and against what the machine can do.

    python -m benchmarks.speed [--quick] [--device cpu|cuda] [--only QUESTION ...] [--output FILE.json]
                               [--targets]
    python -m benchmarks.speed against FOLDER [--device cpu|cuda] [--only QUESTION ...] [--pairs N] ...
    python -m benchmarks.speed compare BEFORE.json AFTER.json
    python -m benchmarks.speed [--targets] show FILE.json
    python -m benchmarks.speed plot FILE.json
    python -m benchmarks.speed.predict

op.py calls the op, harness.py times, ceilings.py measures the machine, peers.py and others.py hold the
methods, questions/ what is asked, targets.py what the project has set itself, report.py tables, JSON and what
moved, plots.py the figures. against.py is about two versions of the op, each in a process of its own
(version.py). predict.py is about CUDA kernels on a GPU that is not there.
"""
