"""The public attention matrix, and what the attention maps make of it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rebased_cuda
from benchmarks.attention_maps import __main__ as command
from benchmarks.attention_maps import overlap
from benchmarks.mqar import data
from benchmarks.mqar.__main__ import main as mqar
from benchmarks.mqar.cell import Cell
from benchmarks.mqar.models import RecallModel
from benchmarks.training import read_json_lines
from rebased_cuda import ReBasedAttention, attention_matrix, rebased_attention

TINY = Cell(
    width=12,
    seqlen=16,
    pairs=4,
    vocabulary=32,
    batch=8,
    steps=4,
    examples=None,
    test_examples=16,
    evaluate_every=2,
    data_seed=None,
    first="shift",
    tied=False,
    embedding_dropout=0.0,
    attention_dropout=0.0,
)


@pytest.mark.parametrize("feature_map", ["outer", "square", "taylor", "elu"])
@pytest.mark.parametrize("layer_norm", ["token", "head", None])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_the_matrix_times_v_is_the_op(feature_map: str, layer_norm: str | None, kv_heads: int) -> None:
    q = torch.randn(2, 4, 33, 5)
    k, v = torch.randn(2, kv_heads, 33, 5), torch.randn(2, kv_heads, 33, 7)
    affine = [torch.randn(4, 5), torch.randn(5), torch.randn(kv_heads, 5), torch.randn(kv_heads, 5)]
    options = {"feature_map": feature_map, "layer_norm": layer_norm, "scale": 0.4}
    attention = attention_matrix(q, k, *affine, **options)
    assert attention.shape == (2, 4, 33, 33)
    y = rebased_attention(q, k, v, *affine, **options)
    assert torch.allclose(attention @ v.repeat_interleave(4 // kv_heads, 1), y, rtol=1e-3, atol=1e-4)
    assert not attention.triu(1).any()
    assert "attention_matrix" in rebased_cuda.__all__


@pytest.mark.parametrize("use_beta", [True, False])
def test_the_layers_matrix_is_what_it_computes_with(use_beta: bool) -> None:
    layer = ReBasedAttention(12, 4, feature_dim=3, num_kv_heads=2, layer_norm="token", use_beta=use_beta)
    x = torch.randn(2, 9, 12)
    v = layer.proj_v(x).unflatten(-1, (2, -1)).transpose(1, 2).repeat_interleave(2, 1)
    y = layer.proj_o((layer.attention_matrix(x) @ v).transpose(1, 2).flatten(2))
    assert torch.allclose(layer(x), y, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="x: expected shape"):
        layer.attention_matrix(x[..., :5])


def test_overlap() -> None:
    found = torch.tensor([[1, 3]])
    perfect = torch.nn.functional.one_hot(found, 5).float()
    assert overlap.overlap(perfect, found).item() == 1
    assert overlap.overlap(perfect.roll(1, -1), found).item() == 0
    half = 0.5 * perfect + 0.5 * perfect.roll(1, -1)  # min 0.5 a query, max 1 + 0.5
    assert overlap.overlap(half, found).item() == pytest.approx(1 / 3)


def test_attention_at_queries() -> None:
    inputs, targets = data.batch(TINY.task, 3, 0)
    attention = torch.rand(3, 2, 16, 16)
    rows, found = overlap.at_queries(attention, inputs, targets)
    assert rows.shape == (3, 4, 16)
    for example in range(3):
        asked = (targets[example] != data.IGNORED).nonzero().flatten()
        for i, position in enumerate(asked):
            assert torch.allclose(rows[example, i], attention[example, :, position].mean(0))
            assert inputs[example, found[example, i]] == targets[example, position]


@pytest.mark.parametrize("mixer", ["rebased", "based", "softmax"])
def test_a_models_attention_is_over_the_past_and_sums_to_one(mixer: str) -> None:
    model = RecallModel(mixer, 24, 32, 16, first="shift", tied=False)
    attention = model.attention(data.batch(TINY.task, 2, 0)[0])
    assert attention.shape == (2, 1 if mixer == "softmax" else 12, 16, 16)
    assert not attention.triu(1).any()
    assert torch.allclose(attention.sum(-1), torch.ones(()), atol=1e-4)
    with pytest.raises(ValueError, match="no attention matrix"):
        RecallModel("hyena", 24, 32, 16).attention(data.batch(TINY.task, 2, 0)[0])


def test_a_model_that_attends_to_the_value_overlaps_fully(monkeypatch: pytest.MonkeyPatch) -> None:
    def ideal(self: RecallModel, tokens: torch.Tensor) -> torch.Tensor:
        # a token's earlier twin is its key, and the value stands behind it
        same = (tokens.unsqueeze(2) == tokens.unsqueeze(1)).tril(-1) & (tokens > 0).unsqueeze(2)
        attention = torch.nn.functional.pad(same[..., :-1], (1, 0)).float()
        return attention.unsqueeze(1)

    monkeypatch.setattr(RecallModel, "attention", ideal)
    model = RecallModel("rebased", 12, 32, 16, first="shift")
    found = overlap.judge(TINY, model, torch.device("cpu"), examples=70)
    assert found["iou"] == 1
    assert found["iou_examples"] == 70
    assert len(found["shown"]) == overlap.SHOWN
    assert [len(found["shown"][0]["truth"]), len(found["shown"][0]["attention"][0])] == [4, 8]


@pytest.mark.parametrize("small", [True, False])
def test_the_runs_are_possible(small: bool) -> None:
    cells = overlap.cells(small)
    assert len({cell.name for cell in cells}) == len(cells)
    assert all(cell.first == "shift" and cell.task.pairs for cell in cells)
    main = [cell for cell in cells if cell.seqlen == overlap.SEQLEN[small]]
    assert {cell.mixer for cell in main} == set(overlap.MIXERS)


@pytest.mark.parametrize("through", ["attention_maps", "mqar"])
def test_the_command_leaves_table_and_pictures(
    through: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    cells = [replace(TINY, mixer=mixer) for mixer in overlap.MIXERS]
    cells += [replace(TINY, seqlen=24)]
    monkeypatch.setattr(overlap, "cells", lambda small: cells)
    monkeypatch.setitem(overlap.SEQLEN, True, 16)
    monkeypatch.setitem(command.EXAMPLES, True, 20)
    arguments = ["--small", "--jobs", "1", "--device", "cpu", "--output", str(tmp_path)]
    assert (command.main(arguments) if through == "attention_maps" else mqar(["table3", *arguments])) == 0
    printed = capsys.readouterr().out
    assert "| Attention | 0.999 |" in printed
    assert {path.name for path in tmp_path.glob("*.png")} == {f"figure{n}.png" for n in (5, 8, 9, 10)}
    lines = read_json_lines(tmp_path / "results.jsonl")
    assert len(lines) == 4
    assert all(0 < line["iou"] < 1 for line in lines)
