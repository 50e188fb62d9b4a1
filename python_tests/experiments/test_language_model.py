"""The language model of benchmarks/: data, perplexity, decoding, resuming after a kill, several processes."""

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import EMULATED

pytest.importorskip("tokenizers")
pytest.importorskip("tqdm")
pytest.importorskip("transformers", minversion="5.24")

from benchmarks.language_model import __main__ as command
from benchmarks.language_model import compare, generate, needs, parallel, speed, text
from benchmarks.language_model.evaluate import perplexity, recall_tokens
from benchmarks.language_model.sizes import MIXERS, ModelConfiguration, logits_of, make_model
from benchmarks.language_model.train import (
    Trainer,
    TrainingConfiguration,
    learning_rate,
    parameter_groups,
)
from benchmarks.training import read_json_lines
from rebased_cuda.demo import baselines

pytestmark = pytest.mark.skipif(EMULATED, reason="benchmarks train on the backends that users have")

ROOT = Path(__file__).parents[2]
TINY = ModelConfiguration("rebased", vocabulary=50, width=32, layers=4, heads=2, feature_dim=8, context=24)
SHORT = TrainingConfiguration(steps=12, batch=4, context=24, learning_rate=1e-2, warmup=3, checkpoint_every=4)


def stream(tokens: int = 2000) -> torch.Tensor:
    """Mostly x -> 3 x + 1, which walks through 20 of the 50 tokens; every tenth token is random."""
    generator = torch.Generator().manual_seed(1)
    surprises = torch.randint(TINY.vocabulary, (tokens,), generator=generator).tolist()
    is_surprise = (torch.rand(tokens, generator=generator) < 0.1).tolist()
    walk = [0]
    for surprise, surprised in zip(surprises, is_surprise, strict=True):
        walk.append(surprise if surprised else (3 * walk[-1] + 1) % TINY.vocabulary)
    return torch.tensor(walk)


def trainer(mixer: str = "rebased", **changes: Any) -> Trainer:
    return Trainer(
        replace(TINY, mixer=mixer),
        replace(SHORT, **changes),
        stream(),
        parallel.OneProcess(torch.device("cpu")),
    )


def sources(folder: Path) -> Path:
    """A folder of small, repetitive programs."""
    for number in range(12):
        lines = [f"def function_{i % 7}(value):\n    return value + {i}\n" for i in range(60)]
        (folder / f"file_{number}.py").write_text("\n".join(lines))
    return folder


# --- text


def test_text_is_split_by_file_and_comes_back_byte_for_byte(tmp_path: Path) -> None:
    folder = sources(tmp_path / "text") if (tmp_path / "text").mkdir() is None else tmp_path
    (folder / "binary.bin").write_bytes(b"\xff\x00")
    (folder / "tests").mkdir()
    (folder / "tests" / "left_out.py").write_text("not this")
    odd = "tabs\tand \u00e9\u4e16\u754c \U0001f600\r\n"
    (folder / "odd.txt").write_bytes(odd.encode())
    files = dict(text.read_folder(folder))
    assert len(files) == 13
    training, held_out = text.split(sorted(files.items()))
    assert sorted(training + held_out) == sorted(files.values())
    assert held_out
    data = text.load(folder, 300, tmp_path / "cache")
    assert data.vocabulary == 300
    end = data.tokenizer.token_to_id(text.END)
    assert int((data.training == end).sum()) == len(training)
    assert data.tokenizer.decode(data.tokenizer.encode(odd).ids) == odd
    first = data.training[: data.training.tolist().index(end)]
    assert data.tokenizer.decode(first.tolist()) == training[0]


def test_text_cache_follows_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    sources(folder)
    first = text.load(folder, 300, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(text, "train_tokenizer", lambda *x: pytest.fail("not from the cache"))
        again = text.load(folder, 300, tmp_path / "cache")
    assert torch.equal(first.training, again.training)
    (folder / "file_3.py").write_text("something else = 1\n" * 40)
    changed = text.load(folder, 300, tmp_path / "cache")
    assert len(changed.training) != len(first.training) or len(changed.held_out) != len(first.held_out)


@pytest.mark.parametrize(("vocabulary", "match"), [(100, "at least 257"), (50_000, "at most")])
def test_text_refuses_vocabularies(tmp_path: Path, vocabulary: int, match: str) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    with pytest.raises(ValueError, match=match):
        text.load(sources(folder), vocabulary, tmp_path / "cache")


def test_text_refuses_folders_with_nothing_to_hold_out(tmp_path: Path) -> None:
    (tmp_path / "only.txt").write_text("one file")
    with pytest.raises(ValueError, match="at least two UTF-8 files"):
        text.read_folder(tmp_path)


def test_batches_depend_on_seed_and_step_alone() -> None:
    tokens = torch.arange(1000)
    rows = text.batch(tokens, 5, 0, 4, 16)
    assert rows.shape == (4, 17)
    assert torch.equal(rows[:, 1:], rows[:, :-1] + 1)
    assert torch.equal(rows, text.batch(tokens, 5, 0, 4, 16))
    assert not torch.equal(rows, text.batch(tokens, 6, 0, 4, 16))
    assert not torch.equal(rows, text.batch(tokens, 5, 1, 4, 16))


def test_windows_have_no_target_twice() -> None:
    rows = text.windows(torch.arange(1000), 16, 1000)
    assert rows.shape == (62, 17)
    assert len(set(rows[:, 1:].flatten().tolist())) == 62 * 16
    assert text.windows(torch.arange(1000), 16, 5)[-1, -1] == 62 * 16


def test_tokens_may_come_from_anywhere(tmp_path: Path) -> None:
    """The documented format, written by hand, in both widths, and what is wrong with other folders."""
    for vocabulary, dtype in ((50_304, "<u2"), (70_000, "<u4")):
        place = tmp_path / dtype
        place.mkdir()
        tokens = np.arange(vocabulary - 1000, vocabulary)  # above what fits with a sign
        for name in ("training", "held_out"):
            tokens.astype(dtype).tofile(place / f"{name}.bin")
        with pytest.raises(ValueError, match=r"tokens: expected a folder with tokens\.json"):
            text.open_tokens(place)
        facts = {"vocabulary": vocabulary, "training_bytes": 1, "held_out_bytes": 1}
        (place / "tokens.json").write_text(json.dumps(facts))
        data = text.open_tokens(place)
        assert data.tokenizer is None
        assert text.windows(data.held_out, 999, 1).flatten().tolist() == tokens.tolist()
        assert text.batch(data.training, 0, 0, 4, 16).dtype == torch.int64
        (place / "training.bin").write_bytes(b"abc")
        with pytest.raises(ValueError, match="bytes a token"):
            text.open_tokens(place)


# --- perplexity


def test_recall_tokens_against_their_definition() -> None:
    rows = torch.randint(5, (7, 40), generator=torch.Generator().manual_seed(2))
    for row, found in zip(rows.tolist(), recall_tokens(rows).tolist(), strict=True):
        seen: set[tuple[int, int]] = set()
        for i, bigram in enumerate(itertools.pairwise(row)):
            assert found[i] == (bigram in seen)
            seen.add(bigram)


def test_perplexity_of_a_known_model() -> None:
    class Always(torch.nn.Module):  # gives token 1 probability 1/2, the other two 1/4
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
            return SimpleNamespace(logits=torch.tensor([0.25, 0.5, 0.25]).log().expand(*input_ids.shape, 3))

    rows = torch.tensor([[1, 1, 1, 0, 2]])  # bigrams 11, 11 (AR), 10, 02
    one = parallel.OneProcess(torch.device("cpu"))
    result = perplexity(Always(), rows, 1, torch.autocast("cpu", enabled=False), one)
    assert result.recall == pytest.approx(2)
    assert result.other == pytest.approx(32 ** (1 / 3))
    assert result.all == pytest.approx(64 ** (1 / 4))
    assert (result.recall_share, result.tokens) == (0.25, 4)


# --- model


@pytest.mark.parametrize(
    ("mixer", "parameters"), [("rebased", 156_992_256), ("based", 156_955_392), ("attention", 126_807_552)]
)
def test_the_full_preset_is_the_papers(mixer: str, parameters: int) -> None:
    """Table 9, to the unit."""
    with torch.device("meta"):
        model = make_model(command.model_configuration(command.parse_arguments(["train"]), mixer))
    assert sum(x.numel() for x in model.parameters()) == parameters


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_generation_by_step_equals_recomputing(mixer: str, dtype: torch.dtype) -> None:
    run = trainer(mixer, steps=60)
    while run.done < 60:  # an untrained model says the same token again and again
        run.step()
    model = run.model.to(dtype).eval()
    prompt = stream()[:7]
    count = 17 if mixer == "attention" else 60  # attention has 24 positions
    generation = generate.by_step(model, prompt, count)
    assert generation.tokens.tolist() == generate.by_recomputing(model, prompt, count).tolist()
    assert len(set(generation.tokens.tolist())) > 3
    first, last = generation.state_bytes
    assert last > first if mixer == "attention" else last == first


def test_decoding_needs_no_more_memory_the_longer_it_runs() -> None:
    model = make_model(TINY).eval()
    generation = generate.by_step(model, stream()[:7], 2000)
    first, last = generation.state_bytes
    assert first == last
    before, after = generation.process_bytes
    if before == 0:
        pytest.skip("this system does not say how large a process is")
    assert after - before < 2 << 20  # a state kept per token would be 20 MiB


def test_attention_says_how_far_it_reads() -> None:
    model = make_model(replace(TINY, mixer="attention"))
    with pytest.raises(ValueError, match="expected up to 24 tokens, as many as positions, got 25"):
        logits_of(model, torch.zeros(1, 25, dtype=torch.long))


# --- training


def test_learning_rate() -> None:
    rates = [learning_rate(SHORT, step) for step in range(SHORT.steps)]
    assert rates[0] == pytest.approx(1e-2 / 3)
    assert rates[2] == rates[3] == 1e-2
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert 1e-3 < rates[-1] < 1.4e-3


@pytest.mark.parametrize("mixer", MIXERS)
def test_embeddings_and_vectors_do_not_decay(mixer: str) -> None:
    model = make_model(replace(TINY, mixer=mixer))
    decayed, spared = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    names = {x: name for name, x in model.named_parameters()}
    assert {names[x].split(".")[-1] for x in decayed["params"]} == {"weight"}
    embeddings = {name for name in names.values() if "embed" in name}
    assert embeddings == {names[x] for x in spared["params"] if x.dim() > 1}
    assert embeddings
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_the_loss_in_chunks_is_the_loss() -> None:
    """And the gradients, with a chunk that doesn't divide the tokens; no logits of all of them are kept."""
    rows = stream()[: 4 * 25].unflatten(0, (4, 25))
    expected = make_model(TINY)
    logits = logits_of(expected, rows[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    loss.backward()
    model = make_model(TINY)
    model.load_state_dict(expected.state_dict())
    largest = 0

    def look(x: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, x.numel() if x.shape[-1:] == (TINY.vocabulary,) else 0)
        return x

    with torch.autograd.graph.saved_tensors_hooks(look, lambda x: x):
        found = model(input_ids=rows[:, :-1], targets=rows[:, 1:], loss_chunk=7)
    assert largest == 0
    found.backward()
    assert found.item() == pytest.approx(loss.item(), rel=1e-6)
    for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_loss_falls(mixer: str) -> None:
    run = trainer(mixer, steps=40)
    losses = [run.step() for _ in range(40)]
    assert losses[0] == pytest.approx(math.log(TINY.vocabulary), rel=0.02)
    assert sum(losses[-5:]) / 5 < losses[0] - 1


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"accumulate": 2}, 1e-5),
        ({"loss_chunk": 13}, 1e-5),
        ({"activation_checkpointing": True}, 1e-6),
        ({"precision": "bfloat16"}, 5e-3),
        pytest.param({"compile": True}, 1e-5, marks=pytest.mark.slow),
    ],
)
def test_options_change_how_not_what(changes: dict[str, Any], tolerance: float) -> None:
    plain, other = trainer(), trainer(**changes)
    expected = [plain.step() for _ in range(6)]
    assert [other.step() for _ in range(6)] == pytest.approx(expected, rel=tolerance)


def test_activation_checkpointing_saves_less() -> None:
    def saved(**changes: Any) -> int:
        sizes = []
        run = trainer(**changes)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            logits_of(run.model, stream()[:24].unsqueeze(0))
        return sum(sizes)

    assert saved(activation_checkpointing=True) < saved() / 4


def test_a_checkpoint_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole, first, second = trainer(), trainer(), trainer()
    expected = [whole.step() for _ in range(12)]
    for _ in range(5):
        first.step()
    first.save(tmp_path / "checkpoint.pt")
    assert second.restore(tmp_path / "checkpoint.pt")
    assert second.done == 5
    while second.done < 12:
        second.step()
    assert second.losses == expected
    for mine, theirs in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    run = trainer()
    run.step()
    run.save(tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"seed 0 \(now 1\)"):
        trainer(seed=1).restore(tmp_path / "checkpoint.pt")
    assert trainer(checkpoint_every=9).restore(tmp_path / "checkpoint.pt")


def command_line(folder: Path, *more: str) -> list[str]:
    sizes = "--vocabulary 300 --width 32 --layers 2 --heads 2 --context 32 --batch 4 --steps 60 --warmup 5"
    sizes += " --learning-rate 3e-3"  # at twice that a rounding grows by a factor of 10,000 on the way
    places = ["--text", str(folder / "text"), "--output", str(folder / "output"), "--device", "cpu"]
    return ["-m", "benchmarks.language_model", "train", "--small", *places, *sizes.split(), *more]


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def start(arguments: list[str]) -> "subprocess.Popen[str]":
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, **pipes)


def finish(arguments: list[str]) -> str:
    process = start(arguments)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return printed


def kill_on_the_way(arguments: list[str], path: Path) -> None:
    """Starts a run and kills it, with all its processes, once its first checkpoint is there."""
    process = start(arguments)
    give_up = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < give_up:
        time.sleep(0.005)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()  # torchrun's
    for pid in (*map(int, workers), process.pid):
        os.kill(pid, signal.SIGKILL)
    printed, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, f"it ended before it could be killed: {printed}"


def losses_of(path: Path) -> list[float]:
    losses: list[float] = torch.load(path, weights_only=True)["losses"]
    return losses


def test_killed_runs_have_the_losses_of_whole_ones(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    sources(tmp_path / "text")
    finish(command_line(tmp_path, "--name", "whole"))
    killed = command_line(tmp_path, "--name", "killed", "--checkpoint-every", "2")
    path = tmp_path / "output" / "killed" / "checkpoint.pt"
    kill_on_the_way(killed, path)
    cut = losses_of(path)
    assert 0 < len(cut) < 60
    finish(killed)
    whole = losses_of(tmp_path / "output" / "whole" / "checkpoint.pt")
    assert losses_of(path) == whole
    assert whole[: len(cut)] == cut
    assert whole[-1] < whole[0] - 1


# --- several processes


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def documented(strategy: str) -> list[str]:
    """The page's torchrun line for that strategy, to which settings can be added."""
    page = (ROOT / "benchmarks" / "language_model" / "README.md").read_text()
    (line,) = re.findall(rf"^torchrun (.* --parallel {strategy}\b.*)$", page, re.MULTILINE)
    return [*TORCHRUN[:3], *line.split()]


def perplexities(printed: str) -> list[float]:
    """Over all, AR and other tokens, as a run said them, once."""
    (found,) = re.findall(r"perplexity (\S+); AR tokens \(\S+\) (\S+), others (\S+);", printed)
    return [float(value) for value in found]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "context"])
def test_two_processes_have_the_losses_of_one(tmp_path: Path, strategy: str) -> None:
    (tmp_path / "text").mkdir()
    sources(tmp_path / "text")
    options = ("--checkpoint-every", "30", "--clip", "0.5", "--validate-every", "30", "--loss-chunk", "20")
    said = finish(command_line(tmp_path, "--name", "one", *options))
    more = ("--activation-checkpointing", "--accumulate", "2")
    settings = command_line(tmp_path, "--name", "two", *options, *more)[4:]
    said_by_two = finish([*documented(strategy), *settings])
    one, two = (losses_of(tmp_path / "output" / name / "checkpoint.pt") for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-5)
    assert perplexities(said_by_two) == pytest.approx(perplexities(said), abs=0.02)
    validated = [read_json_lines(tmp_path / "output" / name / "validation.jsonl") for name in ("one", "two")]
    assert [line["step"] for line in validated[0]] == [line["step"] for line in validated[1]] == [30, 60]
    assert validated[1][0]["all"] == pytest.approx(validated[0][0]["all"], rel=1e-4)
    (result,) = read_json_lines(tmp_path / "output" / "two" / "results.jsonl")
    assert result["processes"] == 2
    assert result["all"] == pytest.approx(perplexities(said)[0], abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "context"])
def test_what_some_processes_saved_others_take_up(tmp_path: Path, strategy: str, first: int) -> None:
    """One process and two, one of them killed on its way, the other to the end."""
    (tmp_path / "text").mkdir()
    sources(tmp_path / "text")
    finish(command_line(tmp_path, "--name", "whole"))
    mixed = command_line(tmp_path, "--name", "mixed", "--checkpoint-every", "5")
    on_two = [*TORCHRUN, *mixed, "--parallel", strategy]
    path = tmp_path / "output" / "mixed" / "checkpoint.pt"
    kill_on_the_way(mixed if first == 1 else on_two, path)
    assert 0 < len(losses_of(path)) < 60
    finish(on_two if first == 1 else mixed)
    whole = losses_of(tmp_path / "output" / "whole" / "checkpoint.pt")
    assert losses_of(path) == pytest.approx(whole, rel=1e-5)


def test_processes_want_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="torchrun"), parallel.processes("ddp", torch.device("cpu")):
        pass
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--parallel ddp"), parallel.processes("none", torch.device("cpu")):
        pass


def test_gradients_are_exchanged_after_the_last_piece_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    exchanged = []

    class Watched(parallel.OneProcess):
        def accumulating(self, model: torch.nn.Module, last: bool) -> Any:
            exchanged.append(last)
            return super().accumulating(model, last)

    run = Trainer(TINY, replace(SHORT, accumulate=4), stream(), Watched(torch.device("cpu")))
    run.step()
    assert exchanged == [False, False, False, True]
    waited = []
    model = SimpleNamespace(
        no_sync=lambda: waited.append("no_sync"), set_requires_gradient_sync=lambda x: waited.append(x)
    )
    for kind in (parallel.DataParallel, parallel.ShardedDataParallel):
        for last in (False, True):
            kind.accumulating(SimpleNamespace(), model, last)
    assert waited == ["no_sync", False, True]


# --- commands


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_dry_run_says_what_is_needed(
    mixer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--output", str(tmp_path / "output"), "--device", "cpu"]
    assert command.main(["train", "--dry-run", "--mixer", mixer, *place, "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    assert "20,000 steps of 1,024 x 4,096 tokens in 128 pieces: 4,194,304 a step, 83,886,080,000" in printed
    assert not (tmp_path / "output").exists()
    arguments = command.parse_arguments(["train", "--mixer", mixer])
    model = command.model_configuration(arguments, mixer)
    rate = float(re.findall(r"at the (\S+) TFLOP/s", printed)[0])
    assert rate > 0
    assert f"{needs.parameters(model):,} parameters" in printed
    (gib,) = re.findall(r"memory of one process: (\S+) GiB", printed)
    # the whole batch's logits, which nothing holds at once, would be 800 GiB
    assert 16 * needs.parameters(model) / 2**30 < float(gib) < 60


def test_a_folder_of_tokens_trains_as_its_text(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    sources(tmp_path / "text")
    place = str(tmp_path / "tokens")
    assert command.main(["tokenize", str(tmp_path / "text"), place, "--vocabulary", "300"]) == 0
    short = command_line(tmp_path, "--steps", "4", "--threads", "1")[3:]
    assert command.main(["train", *short, "--name", "text"]) == 0
    assert command.main(["train", *short, "--name", "tokens", "--tokens", place]) == 0
    paths = [tmp_path / "output" / name / "checkpoint.pt" for name in ("text", "tokens")]
    assert losses_of(paths[0]) == losses_of(paths[1])
    with pytest.raises(ValueError, match="vocabulary: expected at least 300"):
        command.main(["train", *short, "--name", "few", "--tokens", place, "--vocabulary", "299"])


def test_a_dataset_becomes_a_folder_of_tokens(tmp_path: Path) -> None:
    """Rows saved by the library `datasets` come back whole and in order, in one stream or the other."""
    datasets = pytest.importorskip("datasets")
    lines = [f"row {i} holds {i * i} and {chr(0x3B1 + i % 20)}" for i in range(400)]
    datasets.Dataset.from_dict({"content": lines, "number": range(400)}).save_to_disk(tmp_path / "rows")
    place = tmp_path / "tokens"
    arguments = ["tokenize", "--dataset", str(tmp_path / "rows"), str(place), "--vocabulary", "300"]
    with pytest.raises(ValueError, match="column: expected one of content, number, got 'text'"):
        command.main(arguments)
    few = [{"text": "a " * 300}]  # one row, which can't be in both streams
    with pytest.raises(ValueError, match="expected text, got none"):
        text.tokenize_dataset(few, "text", 258, place)
    assert not (place / "tokens.json").exists()
    assert command.main([*arguments, "--column", "content"]) == 0
    data = text.open_tokens(place)
    rows = []
    for stream in (data.training, data.held_out):
        decoded = data.tokenizer.decode(stream.tolist(), skip_special_tokens=False)
        rows.append(decoded.removesuffix(text.END).split(text.END))
    assert sorted(rows[0] + rows[1]) == sorted(lines)
    assert [x for x in lines if x in rows[0]] == rows[0]
    assert 20 <= len(rows[1]) <= 60
    assert data.held_out_bytes == sum(len(x.encode()) for x in rows[1])


@pytest.mark.slow
def test_two_processes_compare_together(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    sources(tmp_path / "text")
    shared = command_line(tmp_path, "--steps", "4")[3:]
    line = [*TORCHRUN, "-m", "benchmarks.language_model", "compare", *shared, "--parallel", "ddp"]
    printed = finish([*line, "--seeds", "1", "--mixers", "rebased", "based"])
    assert printed.count("perplexity on AR tokens") == 1  # the first process speaks
    lines = read_json_lines(tmp_path / "output" / "compare-small" / "results.jsonl")
    assert [(line["mixer"], line["processes"]) for line in lines] == [("rebased", 2), ("based", 2)]


def test_speed_times_forms_that_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "CHUNKS", (16, 32))
    timings = list(
        speed.measure(
            TINY,
            replace(SHORT, accumulate=4),  # of the preset's batch, which this one is not
            stream(),
            torch.device("cpu"),
            rounds=2,
            lengths=(16, 70),
            tokens=140,
        )
    )
    assert [timing.seqlen for timing in timings] == [16, 70]
    assert all(min(timing.native, timing.plain, timing.reference) > 0 for timing in timings)


def test_speed_finds_a_form_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = speed.reference_chunked
    monkeypatch.setattr(speed, "reference_chunked", lambda *x: honest(*x) * 1.01)
    with pytest.raises(RuntimeError, match=r"gradients of plain, reference.chunked"):
        list(speed.measure(TINY, SHORT, stream(), torch.device("cpu"), rounds=1, lengths=(64,), tokens=64))


def record(mixer: str, seed: int, recall: float) -> dict[str, Any]:
    return {
        "mixer": mixer,
        "seed": seed,
        "parameters": 10,
        "all": 2 * recall,
        "recall": recall,
        "other": 3 * recall,
    }


def test_the_comparison_says_who_is_below() -> None:
    records = [record("rebased", 0, 3.0), record("rebased", 1, 4.0), record("based", 0, 3.5)]
    assert "is below Based's: 3.000 against 3.500 (1 of 1 seeds lower)" in compare.statement(records)
    records.append(record("based", 1, 3.1))
    told = compare.statement(records)
    assert "is NOT below" in told
    assert "standard error 0.700" in told
    assert "nothing to compare" in compare.statement(records[:2])
    rows = compare.table(records)
    assert [row[0] for row in rows] == ["based", "rebased"]
    assert rows[1][3:7] == ["7.00 ± 1.41", "16.45", "3.50 ± 0.71", "3.67"]


def test_commands_from_text_to_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").mkdir()
    sources(tmp_path / "text")
    shared = command_line(tmp_path, "--steps", "8")[3:]
    figures = tmp_path / "figures.json"
    arguments = ["compare", *shared, "--seeds", "2", "--mixers", "rebased", "based", "--json", str(figures)]
    assert command.main(arguments) == 0
    capsys.readouterr()
    assert command.main(arguments) == 0  # all four are finished: nothing is trained again
    printed = capsys.readouterr().out
    assert "steps of" not in printed
    assert "Based's" in printed
    contents = json.loads(figures.read_text())
    assert len(contents["runs"]) == 4
    assert {run["seed"] for run in contents["runs"]} == {0, 1}
    assert len({run["all"] for run in contents["runs"]}) == 4
    checkpoint = tmp_path / "output" / "compare-small" / "rebased-0" / "checkpoint.pt"
    assert command.main(["generate", str(checkpoint), "--tokens", "50", "--check", "50"]) == 0
    printed = capsys.readouterr().out
    assert "50 of 50 tokens equal" in printed
    assert "tokens/s" in printed
