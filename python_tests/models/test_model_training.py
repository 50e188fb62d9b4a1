"""Training by transformers' Trainer, with checkpointing, adapters, offloading, and over processes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import EMULATED
from problems import relative_error
from processes import Processes
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("transformers", minversion="5.24")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

import peft
from tiny_models import VOCABULARY, prompt, recomputed, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from rebased_cuda.context_parallel import context_parallelize
from rebased_cuda.models import RebasedForCausalLM

pytestmark = [
    pytest.mark.skipif(EMULATED, reason="what is tested here is the same on every backend"),
    pytest.mark.usefixtures("one_thread"),
]


def rows(count: int = 16, seqlen: int = 12) -> list[dict[str, Tensor]]:
    """Sequences in which a token follows from the one before."""
    first = torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(1))
    tokens = [first]
    for _ in range(seqlen - 1):
        tokens.append((3 * tokens[-1] + 1) % VOCABULARY)
    return [{"input_ids": row, "labels": row} for row in torch.stack(tokens, 1)]


# ---- gradient checkpointing


@pytest.mark.parametrize("name", ["positions", "mixed"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_gradients_are_the_same(name, use_reentrant):
    model, tokens = tiny_model(name, spread=0.1).train(), prompt()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(tokens, labels=tokens, use_cache=True).loss.backward()
        return {name: x.grad for name, x in model.named_parameters()}

    expected = {name: x.clone() for name, x in gradients().items()}
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    for name, gradient in gradients().items():
        assert torch.equal(gradient, expected[name]), name


def test_checkpointed_layers_take_no_cache():
    model, tokens = tiny_model(), prompt()
    cache = model(tokens, use_cache=True).cache
    model.train().activation_checkpointing_enable()
    with pytest.raises(ValueError, match="cache: expected none where layers are checkpointed"):
        model(tokens, cache=cache)


def test_checkpointing_saves_less():
    def saved(checkpointing: bool) -> int:
        sizes = []
        model = tiny_model().train()
        if checkpointing:
            model.activation_checkpointing_enable()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            model.model(prompt(4, 60))
        return sum(sizes)

    assert saved(True) < saved(False) / 4


# ---- Trainer


def train(folder: Any, model: nn.Module, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        max_steps=12,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_steps=6,
        logging_steps=1,
        **options,
    )
    trainer = Trainer(model, arguments, train_dataset=rows())
    trainer.train(resume_from_checkpoint=options.pop("resume_from_checkpoint", None))
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": True}, {"bf16": True}], ids=str)
def test_trainer(options, tmp_path):
    torch.manual_seed(0)
    trainer = train(tmp_path, RebasedForCausalLM(tiny_config()), **options)
    told = losses(trainer)
    assert told[-1] < told[0] - 0.4
    if options != {"bf16": True}:  # the same numbers however they are stored
        torch.manual_seed(0)
        assert losses(train(tmp_path / "again", RebasedForCausalLM(tiny_config()))) == pytest.approx(
            told, rel=1e-4
        )
    spared = trainer.get_decay_parameter_names(trainer.model)
    assert not [name for name in spared if ".ln_" in name or "norm" in name or name.endswith("bias")]
    assert "model.layers.1.mixer.proj_q.weight" in spared


@pytest.mark.slow
def test_trainer_with_compilation(tmp_path):
    torch.manual_seed(0)
    expected = losses(train(tmp_path / "eager", RebasedForCausalLM(tiny_config())))
    torch.manual_seed(0)
    told = losses(train(tmp_path, RebasedForCausalLM(tiny_config()), torch_compile=True))
    assert told == pytest.approx(expected, rel=1e-3)


def test_trainer_resumes(tmp_path):
    torch.manual_seed(0)
    whole = train(tmp_path, RebasedForCausalLM(tiny_config()))
    torch.manual_seed(5)  # weights and moments come from the checkpoint
    again = Trainer(RebasedForCausalLM(tiny_config()), whole.args, train_dataset=rows())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert losses(again)[-1] == pytest.approx(losses(whole)[-1], rel=1e-5)
    evaluated = again.evaluate(rows(4))
    assert 0 < evaluated["eval_loss"] < 10


# ---- adapters


def lora(model: RebasedForCausalLM, **options: Any) -> nn.Module:
    targets = ["proj_q", "proj_v", "proj_o"]
    return peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, **options)
    )


def descend(model: nn.Module, steps: int = 3) -> list[float]:
    optimizer = torch.optim.Adam([x for x in model.parameters() if x.requires_grad], lr=1e-2)
    batch = torch.stack([row["input_ids"] for row in rows(8)])
    told = []
    for _ in range(steps):
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        told.append(loss.item())
    return told


def test_lora_trains_merges_and_generates(tmp_path):
    base = tiny_model(spread=0.1)
    frozen = copy.deepcopy(base)
    model = lora(base, modules_to_save=["ln_q", "ln_k"])
    told = descend(model)
    assert told[-1] < told[0]
    tokens = prompt()
    model.eval()
    adapted = model(tokens).logits
    assert not torch.allclose(adapted, frozen(tokens).logits, atol=1e-3)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    said = model.generate(input_ids=tokens, **options)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(frozen, str(tmp_path)).eval()
    torch.testing.assert_close(loaded(tokens).logits, adapted, rtol=1e-5, atol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, adapted, rtol=1e-4, atol=1e-4)
    assert torch.equal(said, recomputed(merged, tokens, 8))


def test_layer_norm_tuning_trains_gamma():
    base = tiny_model(spread=0.1)
    before = base.model.layers[1].mixer.ln_q.weight.detach().clone()
    config = peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["ln_q", "ln_k"])
    model = peft.get_peft_model(base, config)
    trained = [name for name, x in model.named_parameters() if x.requires_grad]
    assert trained
    assert all(".ln_q." in name or ".ln_k." in name for name in trained)
    told = descend(model)
    assert told[-1] < told[0]
    after = model.merge_and_unload().model.layers[1].mixer.ln_q.weight
    assert not torch.allclose(after, before)


# ---- offloading


@pytest.mark.parametrize("name", ["positions", "mixed"])
def test_offloaded_to_disk_it_says_the_same(name, tmp_path):
    model, tokens = tiny_model(name), prompt()
    model.save_pretrained(tmp_path / "saved")
    parts = ["model.embed_tokens", "model.embed_positions", "lm_head", "model.norm", "model.layers.0"]
    where = dict.fromkeys(parts, "cpu") | {f"model.layers.{i}": "disk" for i in (1, 2, 3)}
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", device_map=where, offload_folder=str(tmp_path / "offloaded")
    )
    assert offloaded.model.layers[1].mixer.ln_q.weight.is_meta
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(offloaded.generate(tokens, **options), recomputed(model, tokens, 8))


# ---- several processes


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    processes = Processes(2)
    yield processes
    processes.stop()


def shared_training(way: str) -> tuple[list[float], dict[str, Tensor]]:
    """Three steps on this rank's part of the batch: the losses, and the weights afterwards."""
    torch.manual_seed(0)
    model: Any = tiny_model("positions", spread=0.1).double()
    ranks = dist.get_world_size() if dist.is_initialized() and way != "one" else 1
    rank = dist.get_rank() if ranks > 1 else 0
    plain = model
    if way == "ddp":
        model = DistributedDataParallel(model)
    elif way == "fsdp":
        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model)
    elif way == "context":
        model = DistributedDataParallel(context_parallelize(model, dist.new_group()))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    batch = torch.stack([row["input_ids"] for row in rows(4, 13)])
    told = []
    for _ in range(3):
        inputs, targets = batch[:, :-1], batch[:, 1:]
        positions = torch.arange(inputs.shape[1])[None]
        if way == "context":
            inputs, targets, positions = (x.chunk(ranks, 1)[rank] for x in (inputs, targets, positions))
        else:
            inputs, targets = (x.chunk(ranks)[rank] for x in (inputs, targets))
        logits = model(input_ids=inputs, position_ids=positions, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        told.append(loss.item())
    weights = {name: x.full_tensor() if way == "fsdp" else x for name, x in plain.state_dict().items()}
    return told, {name: x.detach().clone() for name, x in weights.items()}


@pytest.mark.parametrize("way", ["ddp", "fsdp", "context"])
def test_two_processes_train_as_one(two, way):
    told, weights = shared_training("one")
    results = two.run(shared_training, way)
    assert [sum(x) / 2 for x in zip(*(result[0] for result in results), strict=True)] == pytest.approx(told)
    for _, shared in results:
        for name, expected in weights.items():
            assert relative_error(shared[name], expected) <= 1e-9, name


def test_context_parallel_models_refuse_what_lies_on_several_processes(two):
    two.run(_refusals)


def _refusals() -> None:
    model = context_parallelize(tiny_model())
    tokens = prompt(1, 6)
    mask = torch.ones_like(tokens)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="attention_mask: not supported under context parallelism"):
        model(tokens, attention_mask=mask, use_cache=False)
