"""The recall task's examples, the models' sizes, and runs that are killed and go on."""

import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import readme, training
from benchmarks.mqar import __main__ as command
from benchmarks.mqar import cell as cells
from benchmarks.mqar import data, grid, presets, report, steps
from benchmarks.mqar.cell import Cell, Progress, train
from benchmarks.mqar.data import IGNORED, Task, batch
from benchmarks.mqar.mixers import Hyena, PreviousToken, SoftmaxAttention
from benchmarks.mqar.models import LINEAR, MIXERS, RecallModel
from benchmarks.training import claim, load_checkpoint, read_json_lines

REPOSITORY = Path(__file__).parents[2]
CPU = torch.device("cpu")
TINY = Cell(
    width=12,
    seqlen=16,
    pairs=4,
    vocabulary=32,
    learning_rate=3e-3,
    batch=8,
    steps=12,
    examples=None,
    test_examples=16,
    evaluate_every=4,
    data_seed=None,
    tied=False,
    embedding_dropout=0.0,
    attention_dropout=0.0,
)


def parameters(model: torch.nn.Module) -> int:
    return sum(x.numel() for x in model.parameters())


@pytest.mark.parametrize("task", [Task(128, 64, 16), Task(8192, 128, 16), Task(64, 256, 8, random_fill=True)])
def test_examples_are_as_described(task: Task) -> None:
    inputs, targets = batch(task, 50, seed=1)
    assert inputs.shape == targets.shape == (50, task.seqlen)
    half, context = task.vocabulary // 2, 2 * task.pairs
    keys, values = inputs[:, 0:context:2], inputs[:, 1:context:2]
    assert bool(((keys >= 1) & (keys < half)).all())
    assert bool(((values >= half) & (values < task.vocabulary)).all())
    for row in range(50):
        assert len(set(keys[row].tolist())) == len(set(values[row].tolist())) == task.pairs
        value_of = dict(zip(keys[row].tolist(), values[row].tolist(), strict=True))
        asked = (targets[row] != IGNORED).nonzero().flatten()
        assert len(asked) == task.pairs  # every pair is asked for, once, behind the pairs, at even distances
        assert asked.min() >= context
        assert bool(((asked - context) % 2 == 0).all())
        assert {int(inputs[row, i]): int(targets[row, i]) for i in asked} == value_of
        if not task.random_fill:
            rest = torch.ones(task.seqlen, dtype=torch.bool)
            rest[:context], rest[asked] = False, False
            assert bool((inputs[row, rest] == 0).all())


def test_gaps_follow_the_power_law() -> None:
    task = Task(64, 40, 2)  # 18 places, the first query's distribution known
    inputs, targets = batch(task, 40_000, seed=0)
    first_key = inputs[:, :1]
    positions = ((inputs == first_key) & (targets != IGNORED)).to(torch.uint8).argmax(1)
    found = np.bincount((positions.numpy() - 4) // 2, minlength=18) / len(inputs)
    p = data.gap_probabilities(task)
    assert p.sum() == pytest.approx(1)
    assert p[1] / p[0] == pytest.approx(2**-0.99)
    assert np.abs(found - p).max() < 0.01


def test_every_key_is_as_likely_in_every_place() -> None:
    inputs, _ = batch(Task(16, 16, 4), 20_000, seed=0)  # keys 1..7
    for place in range(0, 8, 2):
        assert np.abs(np.bincount(inputs[:, place], minlength=8)[1:] / 20_000 - 1 / 7).max() < 0.012


def test_examples_depend_on_seed_split_and_index_alone() -> None:
    task = Task(64, 32, 4)
    inputs, _ = batch(task, 8, 3, "train", 5)
    assert torch.equal(inputs, batch(task, 8, 3, "train", 5)[0])
    for other in ((4, "train", 5), (3, "test", 5), (3, "train", 6)):
        assert not torch.equal(inputs, batch(task, 8, *other)[0])


def test_answers_are_where_the_values_stand() -> None:
    inputs, targets = batch(Task(64, 32, 4), 8, 0)
    rows, positions, found = data.answers(inputs, targets)
    assert len(rows) == 8 * 4
    assert torch.equal(inputs[rows, found], targets[rows, positions])
    assert torch.equal(inputs[rows, found - 1], inputs[rows, positions])  # behind the same key
    assert bool((found < 8).all())


@pytest.mark.parametrize(
    ("sizes", "message"), [((64, 30, 8), "seqlen"), ((64, 31, 4), "seqlen"), ((8, 32, 4), "vocabulary")]
)
def test_impossible_tasks_are_refused(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Task(*sizes)


# The paper's Table 4, every number of it. Its columns count learned positions for different lengths: 256 for
# Based and ReBased, 1,024 for attention and RWKV, and for these two behind a convolution and for Mamba not
# the same at every width.
@pytest.mark.parametrize(
    ("mixer", "positions", "counts"),
    [
        ("softmax same", 1024, (623_744, 1_313_024, 2_888_192, 6_824_960)),
        ("rwkv convolution", (2048, 2048, 512, 512), (677_120, 1_395_200, 2_561_024, 5_777_408)),
        ("based", 256, (577_984, 1_179_520, 2_459_392, 5_307_904)),
        ("rebased", 256, (577_984 + 768, 1_179_520 + 768, 2_459_392 + 768, 5_307_904 + 768)),
        ("softmax", (512, 128, 128, 128), (578_752, 1_149_312, 2_462_464, 5_580_288)),
        ("rwkv", 1024, (623_872, 1_313_280, 2_888_704, 6_825_984)),
        ("mamba", (1024, 1024, 1024, 512), (655_360, 1_413_120, 3_235_840, 7_847_936)),
    ],
)
def test_parameter_counts_are_the_papers(
    mixer: str, positions: int | tuple[int, ...], counts: tuple[int, ...]
) -> None:
    name, _, first = mixer.partition(" ")
    if name in ("rwkv", "mamba"):
        pytest.importorskip("transformers")
    lengths = (positions,) * 4 if isinstance(positions, int) else positions
    for width, length, count in zip((64, 128, 256, 512), lengths, counts, strict=True):
        assert parameters(RecallModel(name, width, 8192, length, first or "paper")) == count


# What the authors' code leaves behind when it has built a model: standard deviations of uniform or normal
# draws, or None where nothing is drawn. Torch's own start of a Linear or convolution of n inputs has
# 1 / sqrt(3 n).
STARTS: dict[str, dict[str, float | None]] = {
    "softmax": {
        "blocks.0.mixer.conv.weight": 1 / 3,  # 3 tokens
        "blocks.0.mixer.conv.bias": 1 / 3,
        "blocks.0.mixer.proj.weight": 0.02,
        "blocks.0.mixer.proj.bias": None,
        "blocks.1.mixer.proj_qkv.weight": 0.02,
        "blocks.1.mixer.proj_qkv.bias": None,
        "blocks.1.mixer.out_proj.weight": 0.01,
        "blocks.1.mixer.out_proj.bias": None,
        "tokens.weight": 0.02,
        "positions.weight": 0.02,
    },
    "rebased": {
        "blocks.1.mixer.proj_q.weight": 0.02,
        "blocks.1.mixer.proj_k.weight": 0.02,
        "blocks.1.mixer.proj_v.weight": 0.02,
        "blocks.1.mixer.proj_o.weight": 0.02,
        "blocks.1.mixer.ln_q.weight": None,
    },
    "rwkv": {
        "blocks.0.mixer.attention.key.weight": 128**-0.5 / 3**0.5,
        "blocks.0.mixer.attention.value.weight": 128**-0.5 / 3**0.5,
        "blocks.1.mixer.attention.receptance.weight": 128**-0.5 / 3**0.5,
        "blocks.1.mixer.attention.output.weight": 128**-0.5 / 3**0.5,
    },
    "mamba": {
        "blocks.0.mixer.in_proj.weight": 0.02,
        "blocks.0.mixer.x_proj.weight": 0.02,
        "blocks.1.mixer.dt_proj.weight": 0.02,
        "blocks.1.mixer.dt_proj.bias": None,
        "blocks.1.mixer.out_proj.weight": 0.01,
        "blocks.1.mixer.conv1d.weight": 0.5 / 3**0.5,  # 4 tokens
        "blocks.1.mixer.conv1d.bias": 0.5 / 3**0.5,
        "blocks.1.mixer.D": None,
    },
    "hyena": {
        "blocks.1.mixer.proj_in.weight": 0.02,
        "blocks.1.mixer.proj_in.bias": None,
        "blocks.1.mixer.layers.0.weight": 0.02,
        "blocks.1.mixer.layers.1.weight": 0.02,
        "blocks.1.mixer.last.weight": 0.02,
        "blocks.1.mixer.out_proj.weight": 0.01,
        "blocks.1.mixer.short.weight": 1 / 3,
        "blocks.1.mixer.skip": 1.0,
        "blocks.1.mixer.frequency": None,
    },
}


@pytest.mark.parametrize("mixer", STARTS)
def test_models_start_as_the_authors_do(mixer: str) -> None:
    if mixer in ("rwkv", "mamba"):
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    found = dict(RecallModel(mixer, 128, 256, 64).named_parameters())
    for name, deviation in STARTS[mixer].items():
        values = found[name].detach()
        if deviation is None:
            assert float(values.std()) == 0, name
            continue
        # the deviation of n normal draws is known to about one part in sqrt(2 n)
        assert float(values.std()) == pytest.approx(deviation, rel=4 / (2 * values.numel()) ** 0.5), name
        assert abs(float(values.mean())) < 5 * deviation / values.numel() ** 0.5, name


def test_rwkv_mamba_and_hyena_start_where_no_dice_are_thrown() -> None:
    pytest.importorskip("transformers")
    rwkv = RecallModel("rwkv", 6, 32, 16).blocks[1].mixer.attention
    assert rwkv.time_first.tolist() == pytest.approx([math.log(0.3) + x for x in (0, 0.5, -0.5) * 2])
    channels = torch.arange(6) / 5  # RWKV-4's decays of the last of two layers
    assert torch.allclose(rwkv.time_decay, -5 + 8 * channels**2)
    share = torch.arange(6) / 6
    assert torch.allclose(rwkv.time_mix_key, share**0.5)
    assert torch.allclose(rwkv.time_mix_value, share**0.5 + 0.3)
    assert torch.allclose(rwkv.time_mix_receptance, share**0.25)
    mamba = RecallModel("mamba", 6, 32, 16).blocks[1].mixer
    assert torch.allclose(mamba.A_log.exp(), torch.arange(1.0, 17.0).expand(12, 16))
    hyena = RecallModel("hyena", 6, 32, 16).blocks[1].mixer
    assert set(hyena.frequency.tolist()) == {1.0}
    angles = 2e-4 * math.pi * torch.arange(16) / 16
    expected = torch.stack([torch.arange(16) / 15, angles.cos(), -angles.sin()], 1)
    assert torch.allclose(hyena.features, expected, atol=1e-7)


def test_dropout_is_of_the_embedding_and_of_attention_in_training_alone() -> None:
    tokens = torch.randint(32, (64, 16))
    model = RecallModel("softmax", 48, 32, 16, embedding_dropout=0.25)
    x, whole = model.embed(tokens), model.eval().embed(tokens)
    dropped = x == 0
    assert float(dropped.float().mean()) == pytest.approx(0.25, abs=0.01)
    assert torch.allclose(x[~dropped], whole[~dropped] / 0.75)
    assert RecallModel("mamba", 12, 32, 16, embedding_dropout=0.25).dropout.p == 0

    mixer = SoftmaxAttention(16, dropout=0.5)
    mixer.proj_qkv.weight.data.zero_()  # every token attends to all before it alike
    mixer.proj_qkv.bias.data[32:] = 1.0  # and every value is 1
    mixer.out_proj.weight.data.copy_(torch.eye(16))
    mixer.out_proj.bias.data.zero_()
    torch.manual_seed(0)
    one = mixer(torch.zeros(4000, 1, 16))  # the one entry of its matrix is 2 or 0
    assert set(one.unique().tolist()) == {0.0, 2.0}
    assert float(one.detach().mean()) == pytest.approx(1, abs=0.05)
    assert torch.equal(mixer.eval()(torch.zeros(4, 1, 16)), torch.ones(4, 1, 16))


def test_first_layers() -> None:
    def names(mixer: str, first: str) -> list[str]:
        return [type(block.mixer).__name__ for block in RecallModel(mixer, 12, 32, 16, first).blocks]

    assert names("softmax", "paper") == ["GatedShortConvolution", "SoftmaxAttention"]
    assert names("softmax", "same") == ["SoftmaxAttention"] * 2
    assert names("rebased", "same") == ["ReBasedAttention"] * 2
    assert names("rebased", "shift") == ["PreviousToken", "ReBasedAttention"]
    pytest.importorskip("transformers")
    assert names("rwkv", "paper") == ["RWKV"] * 2
    assert names("rwkv", "convolution") == ["GatedShortConvolution", "RWKV"]
    for first in ("convolution", "shift"):
        with pytest.raises(ValueError, match="first: mamba"):
            RecallModel("mamba", 12, 32, 16, first)


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_model_is_causal_and_has_gradients(mixer: str) -> None:
    if mixer in ("rwkv", "mamba"):
        pytest.importorskip("transformers")
    model = RecallModel(mixer, 24, 32, 16, tied=False)
    inputs, targets = batch(Task(32, 16, 4), 4, 0)
    whole = model(inputs)
    changed = inputs.clone()
    changed[:, 10:] = 5
    assert torch.allclose(model(changed)[:, :10], whole[:, :10], atol=1e-5)
    assert not torch.allclose(model(changed)[:, 10:], whole[:, 10:], atol=1e-3)
    model.loss(inputs, targets).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        assert bool(parameter.grad.any()), name


def test_the_ablations_rows() -> None:
    options = {name: LINEAR[name] for name in ("x2", "norm", "gamma", "gamma-beta", "rebased")}
    has = {}
    for name, option in options.items():
        assert LINEAR[name + "-square"] == option | {"feature_map": "square"}
        assert option["feature_map"] == "outer"
        held = RecallModel(name, 24, 32, 16).norm_parameters()
        assert held.keys() == RecallModel(name + "-square", 24, 32, 16).norm_parameters().keys()
        has[name] = (option["layer_norm"] == "token", "gamma_q" in held, "beta_k" in held)
    assert has == {
        "x2": (False, False, False),
        "norm": (True, False, False),
        "gamma": (False, True, False),
        "gamma-beta": (False, True, True),
        "rebased": (True, True, True),
    }


def test_loss_is_over_the_queries_alone() -> None:
    model = RecallModel("rebased", 24, 32, 16, tied=True)
    inputs, targets = batch(Task(32, 16, 4), 4, 0)
    logits = model(inputs) @ model.tokens.weight.T
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED
    )
    assert torch.allclose(model.loss(inputs, targets), expected)


def test_previous_token() -> None:
    x = torch.randn(2, 5, 3)
    y = PreviousToken()(x)
    assert not y[:, 0].any()
    assert torch.equal(y[:, 1:], x[:, :-1])


def test_softmax_attention_is_its_matrix() -> None:
    mixer, x = SoftmaxAttention(12, heads=2), torch.randn(2, 9, 12)
    v = mixer._heads(x)[2]
    y = mixer.out_proj((mixer.attention_matrix(x) @ v).transpose(1, 2).flatten(2))
    assert torch.allclose(mixer(x), y, atol=1e-6)


def test_hyenas_long_convolution_is_a_convolution() -> None:
    mixer = Hyena(6, 12).double()
    x = torch.randn(2, 12, 6, dtype=torch.float64)
    x1, x2, v = mixer.short(torch.nn.functional.pad(mixer.proj_in(x).mT, (2, 0))).chunk(3, 1)
    v, h = v * x1, mixer.filter(12)
    direct = torch.stack(
        [sum(h[:, i - j] * v[..., j] for j in range(i + 1)) for i in range(12)], -1
    ) + v * mixer.skip.unsqueeze(1)
    assert torch.allclose(mixer(x), mixer.out_proj((x2 * direct).mT), atol=1e-9)


@pytest.mark.parametrize(
    "cell", [TINY, replace(TINY, examples=20, embedding_dropout=0.2)], ids=["new", "kept"]
)
def test_a_run_goes_on_from_its_checkpoint(cell: Cell, tmp_path: Path) -> None:
    whole, progress = train(cell, CPU)
    assert progress.step == 12
    assert [row[0] for row in progress.history] == [4, 8, 12]

    def stop(progress: Progress) -> None:
        if progress.step == 7:
            raise KeyboardInterrupt

    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        train(cell, CPU, path, every=0, tell=stop)
    saved = load_checkpoint(path)
    assert saved is not None
    assert saved["progress"]["step"] == 7
    made: list[int] = []
    again, resumed = train(cell, CPU, path, tell=lambda progress: made.append(progress.step))
    assert made == [8, 9, 10, 11, 12]
    assert resumed.history == progress.history
    for name, x in whole.state_dict().items():  # bit by bit the run that nothing stopped
        assert torch.equal(x, again.state_dict()[name]), name


def test_a_run_stops_early_and_at_what_is_not_finite() -> None:
    _, progress = train(replace(TINY, stop_at=0.0), CPU)
    assert progress.step == 0
    _, progress = train(replace(TINY, learning_rate=1e30), CPU)
    assert progress.diverged
    assert progress.step < 12


def test_micro_batches_change_nothing_but_rounding() -> None:
    whole, piecewise = (train(replace(TINY, micro_batch=size), CPU)[1] for size in (None, 4))
    assert piecewise.loss == pytest.approx(whole.loss, rel=1e-3)


def test_epochs_go_over_the_same_examples_in_new_orders() -> None:
    def examples(cell: Cell, epoch: int) -> list[tuple[int, ...]]:
        batches = [cells.Batches(cell, CPU).at(step) for step in range(5 * epoch, 5 * epoch + 5)]
        for inputs, targets in batches:
            assert inputs.shape == targets.shape == (8, 16)
            assert inputs.dtype == targets.dtype == torch.int64
            assert int((targets != IGNORED).sum()) == 8 * 4
        return [tuple(row.tolist()) for inputs, _ in batches for row in inputs]

    cell = replace(TINY, examples=40, data_seed=42)  # 5 batches of 8
    first = examples(cell, 0)
    assert len(set(first)) == 40
    assert set(first) == set(examples(cell, 1))
    assert first != examples(cell, 1)
    # the run's seed orders the same examples, unless it is theirs too
    assert set(examples(replace(cell, seed=1), 0)) == set(first)
    assert examples(replace(cell, seed=1), 0) != first
    assert not set(examples(replace(cell, data_seed=None), 0)) & set(first)
    with pytest.raises(ValueError, match="examples"):
        replace(cell, examples=7)


def test_a_budget_keeps_what_has_finished(tmp_path: Path) -> None:
    both = [TINY, replace(TINY, seed=1)]
    assert grid.run(tmp_path, both, CPU, deadline=time.monotonic()) == []
    lines = grid.run(tmp_path, both[:1], CPU, deadline=time.monotonic() + 3600)
    assert len(lines) == 1
    # time is up after the second run's first step, which the next one does not do again
    assert grid.work(tmp_path, both, CPU, every=0, deadline=time.monotonic()) == 0
    saved = load_checkpoint(tmp_path / f"{both[1].name}.pt")
    assert saved is not None
    assert saved["progress"]["step"] == 1
    assert grid.run(tmp_path, both, CPU, deadline=time.monotonic()) == lines
    assert len(grid.run(tmp_path, both, CPU)) == 2


def test_a_budget_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["grid", *OPTIONS, "--device", "cpu", "--output", str(tmp_path), "--budget", "0"]
    assert command.main(arguments) == 0
    assert not read_json_lines(tmp_path / grid.RESULTS)
    assert "0 runs" in capsys.readouterr().out


def test_progress_is_told_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bar = grid._Bar(tmp_path, [TINY])
    bar.begin(TINY)
    for step, seconds in ((3, 0.0), (7, 40.0)):  # taken up at a checkpoint after step 3
        progress = Progress(step=step, accuracy=0.25)
        bar.started -= seconds
        bar.shown = bar.printed = -1e9
        bar.show(progress)
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"0 of 1 runs; {TINY.name}: step 3 of 12, accuracy 0.250"
    assert second.startswith(f"0 of 1 runs; {TINY.name}: step 7 of 12, accuracy 0.250, at most 50.")
    assert second.endswith(" s left")


@pytest.mark.parametrize(
    ("threads", "environment", "expected"), [(None, None, 2), (None, "5", 9), (3, "5", 3), (3, None, 3)]
)
def test_threads_are_as_told(
    threads: int | None, environment: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "available_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if environment is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    before = torch.get_num_threads()
    torch.set_num_threads(9)  # stands for what torch has read from the environment
    try:
        training.limit_threads(threads, processes=4)
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
    with pytest.raises(ValueError, match="threads"):
        training.limit_threads(0, 1)


def test_every_setting_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["run", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    for name, field in Cell.__dataclass_fields__.items():
        assert f"--{name.replace('_', '-')}" in told
        assert len(field.metadata["help"]) > 10, name


@pytest.mark.parametrize("name", command.DRAWN)
def test_drawings_need_no_runs(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert command.main([name, "--output", str(tmp_path)]) == 0
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_the_papers_command_gives_every_experiment_options_that_it_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for extra in ("tokenizers", "tqdm", "transformers", "matplotlib"):
        pytest.importorskip(extra)
    from benchmarks import paper

    called: list[list[str]] = []
    for name, (_, line, known) in paper.EXPERIMENTS.items():
        monkeypatch.setitem(paper.EXPERIMENTS, name, (lambda argv: called.append(argv) or 0, line, known))
    options = ["--device", "cpu", "--jobs", "2", "--threads", "1", "--output", str(tmp_path)]
    assert paper.main(["--small", *options]) == 0
    assert len(called) == len(paper.EXPERIMENTS)
    parsed = {}
    for argv in called:
        parser = paper.language_model.parse_arguments if argv[0] == "compare" else command._arguments
        if argv[0] == "table3":
            continue  # it parses its own: test_attention_maps
        parsed[argv[0]] = parser(argv)
    assert len({str(arguments.output) for arguments in parsed.values()}) == len(parsed)
    assert parsed["figure1"].small
    assert (parsed["figure1"].jobs, parsed["figure1"].threads, parsed["compare"].threads) == (2, 1, 1)
    called.clear()
    monkeypatch.setitem(paper.EXPERIMENTS, "table1", (lambda argv: 3, "table1", ()))
    assert paper.main(["--only", "table1", "figure2"]) == 3  # one that fails ends it
    assert not called


def test_a_grid_skips_what_is_finished(tmp_path: Path) -> None:
    both = [TINY, replace(TINY, seed=1)]
    lines = grid.run(tmp_path, both[:1], CPU)
    assert cells.cell_of(lines[0]) == TINY
    before = (tmp_path / grid.RESULTS).read_bytes()
    lines = grid.run(tmp_path, both, CPU)
    assert [line["seed"] for line in lines] == [0, 1]
    assert (tmp_path / grid.RESULTS).read_bytes().startswith(before)
    assert len(read_json_lines(tmp_path / grid.RESULTS)) == 2
    assert {path.name for path in tmp_path.iterdir()} == {grid.RESULTS}


COMMAND = [sys.executable, "-m", "benchmarks.mqar"]
OPTIONS = [
    f"--{name.replace('_', '-')}={'none' if value is None else str(value).lower()}"
    for name, value in vars(replace(TINY, steps=400, evaluate_every=100)).items()
    if name != "seed"
]


def test_a_killed_grid_goes_on(tmp_path: Path) -> None:
    both = [*COMMAND, "grid", *OPTIONS, "--seed", "0", "1", "--jobs", "2", "--device", "cpu"]
    folders = [tmp_path / name for name in ("killed", "whole")]
    killed = subprocess.Popen([*both, "--checkpoint-every", "0", "--output", str(folders[0])], cwd=REPOSITORY)
    while len(list(folders[0].glob("*.pt"))) < 2:  # both processes are at work
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    deadline = time.monotonic() + 60
    while not _free(folders[0]):  # the worker goes when it sees that its parent has
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not read_json_lines(folders[0] / grid.RESULTS)
    reached = [load_checkpoint(path)["progress"]["step"] for path in folders[0].glob("*.pt")]  # type: ignore[index]
    assert all(0 < step < 400 for step in reached)
    for folder in folders:
        subprocess.run([*both, "--output", str(folder)], cwd=REPOSITORY, check=True)
    lines = [{line["seed"]: line for line in read_json_lines(folder / grid.RESULTS)} for folder in folders]
    assert len(read_json_lines(folders[0] / grid.RESULTS)) == 2
    for seed in (0, 1):  # the same to the last digit as if nothing had happened
        assert lines[0][seed]["history"] == lines[1][seed]["history"]
        assert len(lines[0][seed]["history"]) == 4
    assert not list(folders[0].glob("*.pt"))


def _free(folder: Path) -> bool:
    for lock in folder.glob("*.lock"):
        with claim(lock) as mine:
            if not mine:
                return False
    return True


def test_expected_best() -> None:
    accuracies = [0.2, 0.9, 0.5]
    assert report.expected_best(accuracies, 1) == pytest.approx(sum(accuracies) / 3)
    pairs = [max(a, b) for a in accuracies for b in accuracies]
    assert report.expected_best(accuracies, 2) == pytest.approx(sum(pairs) / 9)
    assert report.expected_best(accuracies, 100) == pytest.approx(0.9)


def a_line(accuracy: float, **settings: Any) -> dict[str, Any]:
    cell = replace(TINY, **settings)
    progress = Progress(step=12, seconds=1.0, accuracy=accuracy)
    return cells.result(cell, RecallModel(cell.mixer, 12, 32, 16), progress, CPU)


def test_figure_1_is_of_medians() -> None:
    lines = [a_line(x, seed=seed) for seed, x in enumerate((0.9, 0.1, 0.95))]
    lines += [a_line(0.7, seed=seed, learning_rate=1e-2) for seed in range(3)]
    lines += [a_line(0.25, mixer="softmax")]
    table = report.figure1(lines)
    assert "| 0.90 (0.10 to 0.95) |" in table
    assert "| Attention | 0.25 (one seed) |" in table
    twice = report.figure7([a_line(0.5, first="same"), a_line(0.25, first="convolution")])
    assert "in both blocks | 0.50" in twice
    assert "+ beta)² | 0.25" in twice


def test_scores_are_of_the_best_rate_on_average() -> None:
    lines = [a_line(0.9, seed=0), a_line(0.1, seed=1)]
    lines += [a_line(0.6, seed=seed, learning_rate=1e-2) for seed in range(2)]
    score = report.scores(lines)["rebased", 16, 12]
    assert score.learning_rate == 1e-2
    assert score.accuracies == (0.6, 0.6)


def test_table_1_has_accuracies_of_few_steps_and_steps_to_learn() -> None:
    lines = [a_line(x, seed=seed, steps=6) for seed, x in enumerate((0.9, 0.2, 0.4))]
    for seed, x in enumerate((0.99, 0.5, 1.0)):
        lines.append(a_line(x, seed=seed, steps=20, stop_at=0.99) | {"steps_done": 7 + seed})
    lines += [a_line(0.3, mixer="rebased-square", steps=steps, stop_at=0.99) for steps in (6, 20)]
    table = report.table1(lines)
    assert "| 0.40 (0.20 to 0.90) | 9 | 1.000 | 0.30 (one seed) | > 20 | 1.000 |" in table


def test_rank_test() -> None:
    assert report.rank_test([1, 2, 3], [4, 5, 6]) == pytest.approx(2 / 20)
    assert report.rank_test([1, 2, 4], [3, 5, 6]) == pytest.approx(4 / 20)
    assert report.rank_test([0.5, 0.5], [0.5, 0.5]) == 1


def test_the_papers_table_agrees_with_its_means() -> None:
    assert report.PAPER_MEANS.keys() == report.PAPER_TABLE1.keys()
    for row, means in report.PAPER_MEANS.items():
        for cells_of_length, mean in zip(report.PAPER_TABLE1[row], means, strict=True):
            # printed with two digits, of numbers with two digits
            assert sum(x for x, _ in cells_of_length) / 4 == pytest.approx(mean, abs=0.0101)


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_are_possible_and_without_doubles(name: str, small: bool) -> None:
    chosen = presets.PRESETS[name](small)
    assert len({cell.name for cell in chosen}) == len(chosen)
    for cell in chosen:
        assert cell.task.pairs > 0
    if name == "table1":
        assert {cell.seed for cell in chosen} == set(range(5))
        assert {cell.mixer for cell in chosen} == {
            "based",
            *(m for m in LINEAR if m not in ("based", "linear")),
        }
    if small:
        assert {(cell.embedding_dropout, cell.attention_dropout, cell.data_seed) for cell in chosen} == {
            (0.0, 0.0, None)
        }
    else:
        assert all(cell.vocabulary == 8192 and cell.batch == 512 for cell in chosen)
        assert {(cell.embedding_dropout, cell.attention_dropout, cell.data_seed) for cell in chosen} == {
            (0.1, 0.1, 42)
        }


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_preset_leaves_results_a_table_and_a_picture(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    small = presets.PRESETS[name](True)
    kept = [cell for cell in small if cell.mixer in ("based", "rebased", "rebased-square")]
    tiny = [replace(TINY, mixer=c.mixer, width=c.width // 2, learning_rate=c.learning_rate) for c in kept]
    monkeypatch.setitem(presets.PRESETS, name, lambda small: list(dict.fromkeys(tiny)))
    arguments = [name, "--small", "--jobs", "1", "--device", "cpu", "--output", str(tmp_path)]
    assert command.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "| Based |" in printed
    assert (tmp_path / f"{name}.md").read_text() in printed
    pictures = list(tmp_path.glob("*.png"))
    assert len(pictures) == 1
    assert pictures[0].stat().st_size > 5000


def test_one_run_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["run", *OPTIONS, "--steps", "5", "--device", "cpu", "--output", str(tmp_path)]) == 0
    assert "rebased" in capsys.readouterr().out
    assert read_json_lines(tmp_path / grid.RESULTS)[0]["steps_done"] == 5


def test_plain_pytorch_is_the_same_step() -> None:
    line = steps.measure(64, CPU, 128, rounds=2)  # raises where losses differ
    assert set(line["seconds"]) == {steps.NATIVE, *(f"{name} of 64" for name in steps.PLAIN)}
    assert "| 64 | 2 |" in steps.table([line])


def test_the_pages_tables_are_the_results() -> None:
    page = readme.PAGE.read_text()
    assert readme.BLOCK.findall(page)
    assert readme.fill(page) == page, "run python -m benchmarks.readme"


def test_a_table_without_results_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="table1-small"):
        readme.fill("<!-- table: table1-small -->\n<!-- end -->")
    grid.run(tmp_path / "runs", [replace(TINY, mixer=mixer) for mixer in ("based", "x2")], CPU)
    readme.keep(tmp_path / "runs", "table1-small")
    page = "before\n<!-- table: table1-small -->\nold\n<!-- end -->\nafter\n"
    filled = readme.fill(page)
    assert "| Based | 0.58 | 0.51 | 0." in filled
    assert "old" not in filled
    assert filled.startswith("before\n")
    assert filled.endswith("<!-- end -->\nafter\n")
    assert readme.fill(filled) == filled
