"""What the compiler made of the CUDA kernels, which needs nvcc but no GPU, and what they take on one.

python -m benchmarks.kernels.registers      registers, spills, shared memory, blocks per SM of every kernel
python -m benchmarks.kernels.instructions   the fast paths' SASS: instructions per chunk, accesses
python -m benchmarks.kernels.traffic        bytes that the fast paths' kernels move, by the emulator's tracer
python -m benchmarks.kernels.architectures  compiles all for six architectures, warnings are errors; timed
python -m benchmarks.kernels.profile        each kernel's time in the reference shapes' calls: needs a GPU

Each has --help, and the first two --check, which python_tests/cuda/test_kernel_reports.py runs.
"""
