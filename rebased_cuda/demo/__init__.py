"""What `python -m rebased_cuda` runs: checks of the op, a short training, a speed table.

`timing` (calls that take turns) and `baselines` (plain PyTorch as fast as it could be made) also serve the
benchmarks. The op itself uses nothing of this folder.
"""
