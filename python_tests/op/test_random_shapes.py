"""Random shapes, and every launch configuration that the plan can choose, held to the float64 reference.

What is drawn and how it is judged is in random_shapes.py. The sizes that matter are the odd ones: other tests
take round numbers, and a fault of 33 to 40 columns went unnoticed by them.
"""

import statistics

import pytest
import random_shapes
import torch
from conftest import needs_kernels
from random_shapes import DTYPES, aimed, check, describe, draw

QUICK, MANY = 150, 2000  # draws of a plain run, and of the sweep


def _sweep(seeds, device):
    ratios, reports = [], []
    for seed in seeds:
        one = draw(seed, device)
        outcome = check(one)
        ratios += outcome.ratios
        if outcome.failures:
            reports.append(describe(one, outcome.failures))
    assert not reports, "\n".join([f"{len(reports)} of {len(seeds)} draws are wrong", *reports])
    if ratios:
        assert statistics.median(ratios) <= 1.25


def _of_dtype(dtype, first, last):
    """The draws of that dtype among `first` to `last` - 1."""
    return [seed for seed in range(first, last) if DTYPES[seed % len(DTYPES)] == dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_draws(dtype, device, one_thread):
    _sweep(_of_dtype(dtype, 0, QUICK), device)


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_random_draws(dtype, device, one_thread):
    _sweep(_of_dtype(dtype, QUICK, QUICK + MANY), device)


@needs_kernels
@pytest.mark.sweep
@pytest.mark.timeout(1800)  # two minutes of one core
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_launch_configuration_is_met(dtype, kernel_device, one_thread):
    """A draw that was compared with the reference took each.

    Backward goes first: its draws have a forward too, whose configuration then needs no draw of its own.
    """
    met, reports = set(), []
    everything = random_shapes.examples()
    assert {getattr(torch, example["dtype"]) for example in everything.values()} == set(DTYPES)
    examples = {
        text: example for text, example in everything.items() if getattr(torch, example["dtype"]) == dtype
    }
    for text in sorted(examples):
        if text in met:
            continue
        example = examples[text]
        one = aimed(text, example, kernel_device)
        outcome = check(one)
        met.update(outcome.launches)
        if text not in outcome.launches:
            reports.append(describe(one, [f"not launched, but {sorted(outcome.launches)}"]))
        elif outcome.failures:
            reports.append(describe(one, outcome.failures))
    assert not reports, "\n".join([f"{len(reports)} configurations are wrong", *reports])


def _one_column_off(size, y, *states):
    return (torch.cat([y[..., :-1], y[..., -1:] * (1 + size)], -1), *states)


def _one_row_off(size, y, *states):
    return (torch.cat([y[:, :, :-1], y[:, :, -1:] * (1 + size)], 2), *states)


def _gradient_off(size, y, *states):
    return ((1 + size) * y - size * y.detach(), *states)


def _state_off(size, y, kv, k):
    return y, torch.cat([kv[:, :, :1] * (1 + size), kv[:, :, 1:]], 2), k


@pytest.mark.parametrize("fault", [_one_column_off, _one_row_off, _gradient_off, _state_off])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_draw_notices_a_fault(dtype, fault, device, monkeypatch, one_thread):
    """The sweep itself: an op that is off somewhere does not pass."""
    right, size = random_shapes.rebased_attention, {torch.float64: 1e-9, torch.float32: 1e-3}.get(dtype, 0.2)

    def wrong(*args, **options):
        result = right(*args, **options)
        if not options["return_state"]:
            return fault(size, result)[0]
        y, *state = fault(size, result[0], *result[1])
        return y, tuple(state)

    def is_general(one):
        problem = one.problem
        return one.loss == "both" and problem.seqlen > 16 and problem.batch > 0 and not problem.packed

    tested = [one for one in (draw(seed, device) for seed in _of_dtype(dtype, 0, 400)) if is_general(one)]
    monkeypatch.setattr(random_shapes, "rebased_attention", wrong)
    for one in tested[:2]:
        assert check(one).failures
    assert tested
