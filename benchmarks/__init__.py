"""The paper's experiments, how fast the op is, and facts about its kernels: README.md has the commands."""
