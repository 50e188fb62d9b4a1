"""torch.compile without graph breaks, export with sizes that may change, and ahead-of-time compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", minversion="5.24")

from tiny_models import prompt, recomputed, tiny_model
from transformers import CompileConfig, DynamicCache

from rebased_cuda.models import RebasedForCausalLM

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ["positions", "mixed"]
TRACED: dict[str, Any] = {"fullgraph": True, "backend": "aot_eager"}
"""Traces forward and backward as inductor would be handed them, without its minutes of C++."""


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch.compiler.reset()


class Logits(nn.Module):
    """tokens -> logits, as export wants it: tensors in, a tensor out."""

    def __init__(self, model: RebasedForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens, use_cache=False).logits
        return logits


class Step(nn.Module):
    """A token and all states -> logits; the states are updated in place."""

    def __init__(self, model: RebasedForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, states: list[list[Tensor]]) -> Tensor:
        cache = DynamicCache(config=self.model.config)
        for layer, held in zip(cache.layers, states, strict=True):
            for i, state in held:
                layer.recurrent_states[i] = state
                layer.is_recurrent_states_initialized[i] = layer.has_previous_state[i] = True
        logits: Tensor = self.model(tokens, cache=cache, use_cache=True).logits
        return logits


def states_of(cache: Any) -> list[list[tuple[int, Tensor]]]:
    """(index, state) of every layer of a cache of recurrent states."""
    return [
        [(i, state) for i, state in layer.recurrent_states.items() if state is not None]
        for layer in cache.layers
    ]


@pytest.mark.parametrize("name", NAMES)
def test_training_compiles_without_breaks(name):
    model, tokens = tiny_model(name, spread=0.1).train(), prompt()
    model(tokens, labels=tokens).loss.backward()
    expected = {name: x.grad.clone() for name, x in model.named_parameters()}
    model.zero_grad()
    torch.compile(model, **TRACED)(tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_compiles_without_breaks(name):
    model, tokens = tiny_model(name), prompt()
    compiled = torch.compile(model, **TRACED)
    with torch.no_grad():
        output = model(tokens[:, :4], use_cache=True)
        for t in range(4, 9):
            output = compiled(tokens[:, t : t + 1], cache=output.cache, use_cache=True)
        expected = model(tokens, use_cache=False).logits[:, -1:]
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_generate_compiles_its_steps_with_a_static_cache(name):
    """As transformers does on a GPU unasked."""
    model, tokens = tiny_model(name), prompt()
    compiled = CompileConfig(**TRACED)
    compiled._compile_all_devices = True
    options = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 6, "compile_config": compiled}
    said = model.generate(tokens, cache_implementation="static", **options)
    assert torch.equal(said, recomputed(model, tokens, 6))


@pytest.mark.parametrize("name", NAMES)
def test_export_with_any_batch_and_length(name):
    model = Logits(tiny_model(name))
    sizes = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("length", min=2, max=60)}
    with torch.no_grad():
        program = torch.export.export(model, (prompt(),), dynamic_shapes=(sizes,))
        for shape in ((3, 9), (2, 17), (5, 2)):
            tokens = prompt(*shape)
            torch.testing.assert_close(program.module()(tokens), model(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["positions"])
def test_ahead_of_time_compiled(name, tmp_path):
    """The model, and its step with the states as arguments that it updates."""
    model = tiny_model(name)
    tokens = prompt()
    with torch.no_grad():
        cache = model(tokens[:, :8], use_cache=True).cache
        states = states_of(cache)
        for module, arguments in (
            (Logits(model), (tokens,)),
            (Step(model), (tokens[:, 8:].contiguous(), states)),
        ):
            expected = model(tokens, use_cache=False).logits[:, -1]
            exported = torch.export.export(module, arguments)
            path = torch._inductor.aoti_compile_and_package(
                exported, package_path=str(tmp_path / f"{type(module).__name__}.pt2")
            )
            logits = torch._inductor.aoti_load_package(path)(*arguments)
            torch.testing.assert_close(logits[:, -1], expected, rtol=1e-4, atol=1e-4)
        # the states went on too: the compiled step again, on the token that the model would say
        again = torch._inductor.aoti_load_package(path)(expected.argmax(-1)[:, None], states)
        longer = torch.cat([tokens, expected.argmax(-1)[:, None]], 1)
        torch.testing.assert_close(
            again[:, -1], model(longer, use_cache=False).logits[:, -1], rtol=1e-4, atol=1e-4
        )
