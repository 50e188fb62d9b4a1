"""Multi-query associative recall with ReBased, its ablations and what the paper compares them with.

run       one training run, with the settings given
grid      every combination of the mixers, widths, learning rates and seeds given
figure1   accuracy of all mixers against width and length
table1    the ablation, with Figure 3
table3    overlap of attention with the tokens to retrieve (benchmarks.attention_maps)
figure4   expected validation accuracy against how many learning rates one tries
figure7   each mixer behind a convolution and in both blocks
figure2   the kernels (drawn at once), figure6 the models' architectures (drawn at once)
steps     seconds per training step: this package's op against plain PyTorch

Results go to a folder, a line of JSON each, with tables and pictures when all are there. The same command
goes on where it was stopped, or shares the work with a process that has it running already.
"""
