"""A language model of ReBased, Based or attention blocks, as in section 5.4 of the paper, on your own text.

    python -m benchmarks.language_model train    [--mixer rebased] [--text FOLDER] [--small] [--dry-run] ...
    python -m benchmarks.language_model tokenize TEXT TOKENS
    python -m benchmarks.language_model generate CHECKPOINT [--prompt TEXT] [--tokens N]
    python -m benchmarks.language_model compare  --small [--seeds N]
    python -m benchmarks.language_model speed

text.py reads a folder and tokenizes it, needs.py says what a run needs, sizes.py makes the model
(`rebased_cuda.models`), train.py the loop with its checkpoints, parallel.py the same loop over several
processes (torchrun), evaluate.py perplexity over all, associative-recall and other tokens, generate.py
decodes with the recurrent step, compare.py sets the mixers side by side over several seeds, speed.py times a
training step with the native op and with plain PyTorch.
"""
