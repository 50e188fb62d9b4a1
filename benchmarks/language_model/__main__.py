"""`python -m benchmarks.language_model`: see the package's docstring."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

import benchmarks.language_model
from benchmarks.speed.report import commit, duration, print_table
from benchmarks.training import append_json_line, choose_device, claim, limit_threads
from rebased_cuda.demo import timing

from . import compare, generate, needs, parallel, speed, text
from .sizes import MIXERS, ModelConfiguration
from .train import PRECISIONS, Trainer, TrainingConfiguration, run

OUTPUT = Path(__file__).parent.parent / "runs" / "language_model"
# The models of the paper's Table 9, to the unit, and what a laptop trains in about two minutes. Attention has
# two thirds of the layers, as in the paper (12 and 18), and there 12 heads.
FULL = {"vocabulary": 50304, "width": 768, "layers": 18, "heads": 64, "context": 4096}
FULL_ATTENTION_HEADS = 12
SMALL = {"vocabulary": 2048, "width": 128, "layers": 4, "heads": 4, "context": 512}
# The paper's batch, 4 M tokens a step, in pieces of 8 rows.
FULL_TRAINING = {"precision": "bfloat16", "accumulate": 128}
SMALL_TRAINING = {"steps": 1400, "batch": 2, "learning_rate": 6e-3, "warmup": 100, "checkpoint_every": 200}
VALIDATION_ROWS = {"full": 256, "small": 64}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Of a command line, or of this process'."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.language_model",
        description=benchmarks.language_model.__doc__,
        formatter_class=formatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--text", type=Path, help="folder of text or code; default: the standard library")
    common.add_argument(
        "--tokens", type=Path, help="folder of tokens that `tokenize` or you have made, instead"
    )
    common.add_argument("--output", type=Path, default=OUTPUT, help="checkpoints, tokens, results")
    common.add_argument("--device", help="cpu or cuda; default: a GPU if this build has kernels for it")
    common.add_argument("--small", action="store_true", help="a size for two CPU cores and two minutes")
    common.add_argument("--threads", type=int, help="default: OMP_NUM_THREADS if that is set, else all cores")
    common.add_argument("--vocabulary", type=int, help="of the tokenizer and the model")
    common.add_argument("--width", type=int, help="of the residual stream")
    common.add_argument("--layers", type=int, help="of ReBased and Based; attention has two thirds of them")
    common.add_argument("--heads", type=int, help="of every attention layer, softmax or linear")
    for field in fields(TrainingConfiguration):
        name = "--" + field.name.replace("_", "-")
        told = field.metadata["help"]
        if field.name == "precision":
            common.add_argument(name, choices=list(PRECISIONS), help=told)
        elif field.type == "bool":
            common.add_argument(name, action="store_true", default=None, help=told)
        else:
            common.add_argument(name, type={"int": int, "float": float}[str(field.type)], help=told)

    train = commands.add_parser("train", parents=[common], help="one run; killed, the same line resumes it")
    train.add_argument("--mixer", choices=MIXERS, default="rebased")
    train.add_argument("--name", help="folder of the run below --output; default: mixer and seed")
    train.add_argument(
        "--dry-run", action="store_true", help="trains nothing: says what the run needs of memory and time"
    )
    converter = commands.add_parser("tokenize", help="a folder of text -> a folder of tokens for --tokens")
    converter.add_argument(
        "text", type=Path, help="folder of text or code; with --dataset its name or folder"
    )
    converter.add_argument("tokens", type=Path, help="folder that is written")
    converter.add_argument("--vocabulary", type=int, default=FULL["vocabulary"], help="default %(default)s")
    converter.add_argument(
        "--dataset",
        action="store_true",
        help="a dataset of Hugging Face: a name, or a folder of save_to_disk",
    )
    converter.add_argument("--split", default="train", help="of the dataset; default %(default)s")
    converter.add_argument("--column", default="text", help="of the dataset's rows; default %(default)s")

    several = commands.add_parser("compare", parents=[common], help="every mixer with several seeds")
    several.add_argument("--seeds", type=int, default=3, help="0 to this less one; default %(default)s")
    several.add_argument("--mixers", nargs="+", choices=MIXERS, default=list(MIXERS), help="default: all")
    for command in (train, several):
        command.add_argument(
            "--parallel", choices=list(parallel.STRATEGIES), default="none", help="with torchrun"
        )
    several.add_argument("--json", type=Path, help="also writes the table's figures there")

    timed = commands.add_parser("speed", parents=[common], help="seconds a training step, native and plain")
    timed.add_argument("--rounds", type=int, default=5)
    timed.add_argument("--json", type=Path)

    decode = commands.add_parser("generate", help="decodes with the recurrent step")
    decode.add_argument("checkpoint", type=Path)
    decode.add_argument("--prompt", default="def ")
    decode.add_argument("--tokens", type=int, default=256)
    decode.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    decode.add_argument("--check", type=int, default=0, metavar="N", help="recomputes the first N tokens")
    decode.add_argument("--device")
    return parser.parse_args(argv)


def model_configuration(arguments: argparse.Namespace, mixer: str) -> ModelConfiguration:
    """The model that a command line asks for."""
    preset = SMALL if arguments.small else FULL
    sizes = {
        name: default if getattr(arguments, name) is None else getattr(arguments, name)
        for name, default in preset.items()
    }
    if mixer == "attention":
        sizes["layers"] = max(sizes["layers"] * 2 // 3, 1)
        if not arguments.small and arguments.heads is None:
            sizes["heads"] = FULL_ATTENTION_HEADS
    return ModelConfiguration(mixer, **sizes, positions=not arguments.small)


def _training(arguments: argparse.Namespace, context: int) -> TrainingConfiguration:
    preset: dict[str, Any] = dict(SMALL_TRAINING if arguments.small else FULL_TRAINING)
    given = {field.name: getattr(arguments, field.name) for field in fields(TrainingConfiguration)}
    preset |= {name: value for name, value in given.items() if value is not None}
    return TrainingConfiguration(**{**preset, "context": context})


def _text(arguments: argparse.Namespace, vocabulary: int) -> text.Text:
    if arguments.tokens:
        data = text.open_tokens(arguments.tokens)
        if data.vocabulary > vocabulary:
            raise ValueError(
                f"vocabulary: expected at least {data.vocabulary}, the tokens', got {vocabulary}"
            )
        return data
    return text.load(arguments.text or text.default_folder(), vocabulary, arguments.output)


def _say(line: str, rank: int = 0) -> None:
    if rank == 0:
        print(line, flush=True)


def _run(arguments: argparse.Namespace, mixer: str, folder: Path, strategy: str) -> dict[str, Any]:
    """One run to its end: its record, with sizes, perplexities and time."""
    model = model_configuration(arguments, mixer)
    training = _training(arguments, model.context)
    data = _text(arguments, model.vocabulary)
    with parallel.processes(strategy, choose_device(arguments.device)) as processes:
        trainer = Trainer(model, training, data.training, processes)
        parameters = sum(x.numel() for x in trainer.model.parameters())
        _say(
            f"{mixer}, seed {training.seed}: {parameters:,} parameters, {training.steps} steps of "
            f"{training.batch} x {training.context} tokens; {len(data.training):,} tokens to train on "
            f"({data.training_bytes / 1e6:.1f} MB), {len(data.held_out):,} held out",
            processes.rank,
        )
        rows = text.windows(
            data.held_out, training.context, VALIDATION_ROWS["small" if arguments.small else "full"]
        )
        tokenizer = "" if data.tokenizer is None else data.tokenizer.to_str()
        perplexity, seconds = run(trainer, folder / "checkpoint.pt", rows, tokenizer=tokenizer)
        record = {
            "mixer": mixer,
            "seed": training.seed,
            "parameters": parameters,
            **asdict(perplexity),
            "final_loss": sum(trainer.losses[-20:]) / len(trainer.losses[-20:]),
            "seconds_per_step": seconds,
            "processes": processes.world,
            "model": asdict(model),
            "training": asdict(training),
        }
        del trainer  # before its process group: see `processes`
        _say(
            f"held-out perplexity {perplexity.all:.2f}; AR tokens ({perplexity.recall_share:.0%}) "
            f"{perplexity.recall:.2f}, others {perplexity.other:.2f}; {duration(seconds)} a step",
            processes.rank,
        )
        _say(str(folder / "checkpoint.pt"), processes.rank)
    return record


def _train(arguments: argparse.Namespace) -> int:
    seed = arguments.seed or 0
    folder = arguments.output / (arguments.name or f"{arguments.mixer}-{seed}")
    if arguments.dry_run:
        model = model_configuration(arguments, arguments.mixer)
        print(needs.told(model, _training(arguments, model.context), choose_device(arguments.device)))
        return 0
    record = _run(arguments, arguments.mixer, folder, arguments.parallel)
    if _first_process():
        append_json_line(folder / "results.jsonl", record)
    return 0


def _first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _tokenize(arguments: argparse.Namespace) -> int:
    if arguments.dataset:
        rows = text.load_dataset(str(arguments.text), arguments.split)
        data = text.tokenize_dataset(rows, arguments.column, arguments.vocabulary, arguments.tokens)
    else:
        data = text.tokenize(arguments.text, arguments.vocabulary, arguments.tokens)
    _say(f"{arguments.tokens}: {len(data.training):,} tokens to train on, {len(data.held_out):,} held out")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    """Finished runs are skipped, one that was cut short goes on.

    Commands given twice share the list; processes of torchrun share every run.
    """
    folder = arguments.output / ("compare-small" if arguments.small else "compare")
    lines = folder / "results.jsonl"
    wanted = [(mixer, seed) for seed in range(arguments.seeds) for mixer in arguments.mixers]
    finished = compare.results(lines)  # none is added before every process of torchrun has read this
    together = arguments.parallel != "none"
    with parallel.processes(arguments.parallel, choose_device(arguments.device)):
        for mixer, seed in wanted:
            own = folder / f"{mixer}-{seed}"
            with nullcontext(True) if together else claim(own / "claim") as free:
                if not free or (mixer, seed) in (finished if together else compare.results(lines)):
                    continue
                arguments.seed = seed
                record = _run(arguments, mixer, own, arguments.parallel)
                if _first_process():
                    append_json_line(lines, record)
    if not _first_process():
        return 0
    records = [record for key, record in compare.results(lines).items() if key in wanted]
    print_table("held-out perplexity, mean ± deviation over seeds", compare.HEADER, compare.table(records))
    _say(compare.statement(records))
    if arguments.json:
        _write(arguments.json, {"runs": records, "statement": compare.statement(records)})
    return 0


def _speed(arguments: argparse.Namespace) -> int:
    model = model_configuration(arguments, "rebased")
    # the plain forms are float32's unless another precision is asked for
    training = replace(_training(arguments, model.context), precision=arguments.precision or "float32")
    data = _text(arguments, model.vocabulary)
    device = choose_device(arguments.device)
    timings = []
    for timed in speed.measure(model, training, data.training, device, arguments.rounds):
        timings.append(timed)
        _say(f"N {timed.seqlen}: native {duration(timed.native)}, plain {duration(timed.plain)} a step")
    rows = [
        [
            str(timed.seqlen),
            str(timed.batch),
            duration(timed.native),
            duration(timed.plain),
            f"{timed.ratio:.2f}x",
            timed.plain_name,
            duration(timed.reference),
            f"{timed.reference_ratio:.2f}x",
        ]
        for timed in timings
    ]
    columns = ["N", "rows", "native", "plain", "over native", "", "reference", "over native"]
    print_table("seconds per training step", columns, rows)
    if arguments.json:
        _write(arguments.json, {"model": asdict(model), "timings": [asdict(timed) for timed in timings]})
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    device = choose_device(arguments.device)
    model, tokenizer = generate.load_model(arguments.checkpoint, device)
    prompt = torch.tensor(tokenizer.encode(arguments.prompt).ids, device=device)
    if not len(prompt):
        print("--prompt: expected at least one token", file=sys.stderr)
        return 1
    generation = generate.by_step(model, prompt, arguments.tokens, arguments.temperature)
    print(arguments.prompt + tokenizer.decode(generation.tokens.tolist()))
    steps = arguments.tokens - 1
    first, last = generation.state_bytes
    before, after = generation.process_bytes
    _say(
        f"\n{steps} steps, {steps / generation.seconds:.0f} tokens/s; "
        f"state {first / 2**20:.2f} MiB after the first step, {last / 2**20:.2f} after the last; "
        f"process {before / 2**20:.0f} and {after / 2**20:.0f} MiB"
    )
    if arguments.check:
        count = min(arguments.check, arguments.tokens)
        same = generate.by_recomputing(model, prompt, count) == generation.tokens[:count]
        _say(f"{int(same.sum())} of {count} tokens equal those of recomputing the whole sequence")
        return 0 if bool(same.all()) else 1
    return 0


def _write(path: Path, contents: dict[str, Any]) -> None:
    head = {
        "when": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "commit": commit(),
        "machine": timing.machine(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head | contents, indent=1) + "\n")


COMMANDS = {
    "train": _train,
    "compare": _compare,
    "speed": _speed,
    "generate": _generate,
    "tokenize": _tokenize,
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if "threads" in arguments:
        limit_threads(arguments.threads, 1)
    return COMMANDS[arguments.command](arguments)


if __name__ == "__main__":
    sys.exit(main())
