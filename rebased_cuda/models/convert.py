"""Weights of other packages' ReBased and Based, as this package's layers and models, and back.

    python -m rebased_cuda.models.convert authors best.pt my-model --heads 12
    python -m rebased_cuda.models.convert fla-rebased whole.safetensors layer.pt --heads 16 --prefix layers.3.

`convert` reads, `convert_back` writes what the other side can hold. What is read:

    ==================  ==================================================================================
    authors             corl-team/rebased: a language or recall model of ReBased, Based, softmax attention
                        and short convolutions, or one layer of ReBased or Based
    fla-rebased         flash-linear-attention's ReBasedLinearAttention: one gamma and beta for q, k and
                        all heads, LayerNorm over a head
    fla-based           flash-linear-attention's BasedLinearAttention
    hazyresearch-based  HazyResearch/based's LinearAttention with its TaylorExp, and Zoology's Based
    ==================  ==================================================================================

A state dict does not say with how many heads, which eps and in which mode its layer ran: the arguments do.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..layers import ReBasedAttention
from ..state import check_size
from .configuration import CONVOLUTION, LINEAR, MIXERS, SOFTMAX, RebasedConfig
from .model import RebasedForCausalLM

SOURCES = ("authors", "fla-rebased", "fla-based", "hazyresearch-based")
MODES = ("parallel", "chunk", "fused_chunk")
"""Of flash-linear-attention's layers. parallel has an eps of its own, and for Based a scale of its own."""
State = Mapping[str, Tensor]

_FLA_NAMES = {f"{name}_proj.weight": f"proj_{name}.weight" for name in "qkvo"}
_MODEL_NAMES = (  # of the authors' models and of ours, as pairs of regular expression and replacement
    (r"backbone\.embeddings\.word_embeddings\.", "model.embed_tokens."),
    (r"backbone\.embeddings\.position_embeddings\.", "model.embed_positions."),
    (r"backbone\.ln_f\.", "model.norm."),
    (r"backbone\.layers\.(\d+)\.norm1\.", r"model.layers.\1.mixer_norm."),
    (r"backbone\.layers\.(\d+)\.norm2\.", r"model.layers.\1.mlp_norm."),
    (r"backbone\.layers\.(\d+)\.state_mixer\.", r"model.layers.\1.mlp."),
    (r"backbone\.layers\.(\d+)\.sequence_mixer\.(?:mixer\.)?", r"model.layers.\1.mixer."),
)
_MIXER_NAMES = {  # by the start of the name within a mixer
    "projection.": "proj.",
    "conv.conv.": "conv.",
    "Wqkv.": "proj_qkv.",
    "out_proj.": "proj_o.",
    "ln_q.gamma": "ln_q.weight",
    "ln_q.beta": "ln_q.bias",
    "ln_k.gamma": "ln_k.weight",
    "ln_k.beta": "ln_k.bias",
}


def convert(
    state: State,
    source: str,
    num_heads: int,
    *,
    prefix: str = "",
    feature_map: str | None = None,
    mode: str = "parallel",
    normalize: bool = True,
    eps: float | None = None,
    **settings: Any,
) -> RebasedForCausalLM | ReBasedAttention:
    """A model, or a layer, with the weights of another package's state dict; copies, in their dtypes.

    Args:
        state: the other side's state dict. Of a whole model only for "authors".
        source: one of `SOURCES`.
        num_heads: heads of its attention.
        prefix: takes the entries whose names begin so, without it: one layer of a larger state dict.
        feature_map: of the authors' layers, where their names do not tell: "outer" of a ReBased without norm,
            gamma and beta (by default it counts as Based), "taylor" of a Based with qk_norm (as ReBased).
        mode: that of flash-linear-attention's layers, one of `MODES`.
        normalize: that of fla-rebased: whether q and k have a LayerNorm.
        eps: added to the sum of sim; by default what the source has by default.
        settings: for a whole model, further settings of its `RebasedConfig`, as pad_token_id.

    Raises:
        ValueError, TypeError: an argument is not as above, or the state dict is none of the source's; the
            message names what is missing or left over.
    """
    if source not in SOURCES:
        raise ValueError(f"source: expected one of {', '.join(SOURCES)}, got {source!r}")
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    num_heads = check_size("num_heads", num_heads, 1)
    state = {name[len(prefix) :]: x for name, x in state.items() if name.startswith(prefix)}
    if not state:
        raise ValueError(f"prefix: no name in the state dict begins with {prefix!r}")
    if source == "authors" and any(name.startswith("backbone.") for name in state):
        return _authors_model(state, num_heads, feature_map, eps, settings)
    if settings:
        raise ValueError(f"{next(iter(settings))}: is a setting of a whole model, and this is one layer")
    if source == "authors":
        options: dict[str, Any] = _authors_options(state, feature_map)
        renamed = {_mixer_name(name): x for name, x in state.items()}
    elif source == "hazyresearch-based":
        options = {**MIXERS["based"]}
        renamed = {_mixer_name(name): x for name, x in state.items()}
    else:
        options = _fla_options(source, state, mode, normalize)
        renamed = _from_fla(state, num_heads)
    if eps is not None:
        options["eps"] = eps
    return _layer(renamed, num_heads, options)


def convert_back(module: RebasedForCausalLM | ReBasedAttention, target: str) -> dict[str, Tensor]:
    """The state dict of a model or layer under another package's names: what `convert` reads.

    Raises:
        ValueError: the other side cannot hold it; the message says why. (Of eps it is not said: there it is
            an argument of the constructor.)
    """
    if target not in SOURCES:
        raise ValueError(f"target: expected one of {', '.join(SOURCES)}, got {target!r}")
    if isinstance(module, RebasedForCausalLM):
        if target != "authors":
            raise ValueError(f"target: expected authors for a whole model, got {target!r}")
        return _to_authors(module)
    norm = module.layer_norm
    affine = [
        x is not None for x in (module.ln_q.weight, module.ln_q.bias, module.ln_k.weight, module.ln_k.bias)
    ]
    maps = {"authors": ("outer", "taylor"), "fla-rebased": ("outer",)}.get(target, ("taylor",))
    if module.feature_map not in maps:
        raise ValueError(f"feature_map: {target} has {' and '.join(maps)}, the layer {module.feature_map}")
    if module.num_kv_heads != module.num_heads:
        raise ValueError(f"num_kv_heads: {target} has as many as heads, the layer {module.num_kv_heads}")
    state = {name: x.detach().clone() for name, x in module.state_dict().items()}
    if target == "authors":
        if norm != ("token" if all(affine) else None) and not (norm is None and affine[0]):
            raise ValueError(f"layer_norm: the authors have a token's with gamma and beta, the layer {norm}")
        return {_authors_name(name, LINEAR, norm): x for name, x in state.items()}
    if target == "fla-rebased":
        if norm == "token":
            raise ValueError("layer_norm: fla-rebased has one over a head, the layer over a token")
        state = {
            f"{name[5]}_proj.weight" if name.startswith("proj_") else name: x for name, x in state.items()
        }
        for part, name in (("weight", "gamma"), ("bias", "beta")):
            held = [state.pop(f"ln_{side}.{part}") for side in "qk" if f"ln_{side}.{part}" in state]
            if not held:
                continue
            rows = torch.cat(held).view(-1, module.feature_dim)
            if not torch.equal(rows, rows[:1].expand_as(rows)):
                raise ValueError(f"{name}: fla-rebased has one for q, k and all heads, the layer's differ")
            state[f"feature_map.{name}"] = rows[0].clone()
        return state
    if norm is not None or any(affine):
        raise ValueError(f"layer_norm: {target} has no LayerNorm, gamma or beta, the layer has")
    names = _FLA_NAMES if target == "fla-based" else {"out_proj.weight": "proj_o.weight"}
    back = {ours: theirs for theirs, ours in names.items()}
    return {back.get(name, name): x for name, x in state.items()}


def _layer(state: State, num_heads: int, options: dict[str, Any]) -> ReBasedAttention:
    """The layer whose projections have these sizes."""
    wanted = [f"proj_{name}.weight" for name in "qkvo"]
    missing = [name for name in wanted if name not in state]
    if missing:
        raise ValueError(f"state: no {missing[0]} under the source's names: there are {', '.join(state)}")
    q, v = state["proj_q.weight"], state["proj_v.weight"]
    for name, x in (("proj_q.weight", q), ("proj_v.weight", v)):
        if x.dim() != 2 or x.shape[0] % num_heads:
            raise ValueError(f"num_heads: expected a divisor of {name}'s {x.shape[0]} rows, got {num_heads}")
    with torch.device("meta"):
        layer = ReBasedAttention(
            q.shape[1],
            num_heads,
            q.shape[0] // num_heads,
            head_dim=v.shape[0] // num_heads,
            **options,
        )
    _load(layer, state)
    return layer


def _load(module: torch.nn.Module, state: State) -> None:
    """Copies, each in the dtype that it has."""
    try:
        module.load_state_dict({name: x.clone() for name, x in state.items()}, assign=True)
    except RuntimeError as error:
        raise ValueError(f"state: is not that of the source: {error}") from None


def _authors_options(state: State, feature_map: str | None) -> dict[str, Any]:
    """How the authors' ReBased or Based normalises, by what it has parameters for."""
    if "ln_q.weight" in state:
        options: dict[str, Any] = {}
    elif "ln_q.gamma" in state:
        options = {"layer_norm": None}
    else:
        options = dict(MIXERS["based"])
    return options if feature_map is None else {**options, "feature_map": feature_map}


def _mixer_name(name: str) -> str:
    """Ours for a name within a mixer of the authors' or of HazyResearch's."""
    for theirs, ours in _MIXER_NAMES.items():
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    return name


def _fla_options(source: str, state: State, mode: str, normalize: bool) -> dict[str, Any]:
    eps = 1e-10  # of features, in chunks
    if source == "fla-based":
        parallel = {
            "scale": 1.0,
            "eps": 1e-6,
        }  # where the features are not made, their 1 / sqrt(d) is missing
        return {**MIXERS["based"], **(parallel if mode == "parallel" else {"eps": eps})}
    return {
        "layer_norm": "head" if normalize else None,
        "use_gamma": "feature_map.gamma" in state,
        "use_beta": "feature_map.beta" in state,
        "eps": 1e-5 if mode == "parallel" else eps,
    }


def _from_fla(state: State, num_heads: int) -> dict[str, Tensor]:
    """Under our names, with the one gamma and beta repeated for q, k and every head."""
    renamed = {}
    for name, x in state.items():
        part = {"feature_map.gamma": "weight", "feature_map.beta": "bias"}.get(name)
        if part is None:
            renamed[_FLA_NAMES.get(name, name)] = x
        else:
            renamed |= {f"ln_{side}.{part}": x.repeat(num_heads) for side in "qk"}
    return renamed


def _authors_model(
    state: State, num_heads: int, feature_map: str | None, eps: float | None, settings: dict[str, Any]
) -> RebasedForCausalLM:
    outside: dict[str, Tensor] = {}
    mixers: dict[int, dict[str, Tensor]] = {}  # by layer, and by the authors' names within it
    for name, x in state.items():
        for theirs, ours in _MODEL_NAMES:
            name = re.sub(f"^{theirs}", ours, name)
        found = re.fullmatch(r"model\.layers\.(\d+)\.mixer\.(.*)", name)
        if found is None:
            outside[name] = x
        else:
            mixers.setdefault(int(found[1]), {})[found[2]] = x
    embedding = outside.get("model.embed_tokens.weight")
    if embedding is None:
        raise ValueError("state: no backbone.embeddings.word_embeddings.weight, which a model has")
    if sorted(mixers) != list(range(len(mixers))):
        raise ValueError(f"state: expected mixers in layers 0, 1, ..., got them in {sorted(mixers)}")
    sizes: dict[str, Any] = {"layer_types": []}
    for layer, mixer in sorted(mixers.items()):
        if "conv.conv.weight" in mixer:
            sizes["layer_types"].append(CONVOLUTION)
            sizes["conv_kernel"] = mixer["conv.conv.weight"].shape[2]
        elif "Wqkv.weight" in mixer:
            sizes["layer_types"].append(SOFTMAX)
            sizes["attention_bias"] = "Wqkv.bias" in mixer
        elif "proj_q.weight" in mixer and "proj_v.weight" in mixer:
            sizes["layer_types"].append(LINEAR)
            sizes["feature_dim"] = mixer["proj_q.weight"].shape[0] // num_heads
            sizes["head_dim"] = mixer["proj_v.weight"].shape[0] // num_heads
            sizes |= _authors_options(mixer, feature_map)
        else:
            raise ValueError(f"state: the mixer of layer {layer} is not known: it has {', '.join(mixer)}")
        names = {f"model.layers.{layer}.mixer.{_mixer_name(name)}": x for name, x in mixer.items()}
        outside |= names
    if eps is not None:
        sizes["attention_eps"] = eps
    positions = outside.get("model.embed_positions.weight")
    hidden = outside.get("model.layers.0.mlp.fc1.weight")  # recall models have no MLPs
    config = RebasedConfig(
        vocab_size=embedding.shape[0],
        hidden_size=embedding.shape[1],
        num_hidden_layers=len(mixers),
        intermediate_size=0 if hidden is None else hidden.shape[0],
        max_position_embeddings=None if positions is None else positions.shape[0],
        num_attention_heads=num_heads,
        **sizes,
        **settings,
    )
    with torch.device("meta"):
        model = RebasedForCausalLM(config)
    _load(model, outside)
    model.tie_weights()
    model.eval()
    return model


def _to_authors(model: RebasedForCausalLM) -> dict[str, Tensor]:
    config = model.config
    kinds = config.layer_types
    if not config.tie_word_embeddings:
        raise ValueError("tie_word_embeddings: the authors' models have tied ones, the model has not")
    wrapped = "mixer." if len(set(kinds)) > 1 else ""  # a hybrid's mixers are wrapped once more
    linear = next((x for x in model.modules() if isinstance(x, ReBasedAttention)), None)
    if linear is not None:
        convert_back(linear, "authors")  # which says what cannot be
    state = {}
    for name, x in model.state_dict().items():
        found = re.fullmatch(r"model\.layers\.(\d+)\.mixer\.(.*)", name)
        if found is not None:
            theirs = _authors_name(found[2], kinds[int(found[1])], config.layer_norm)
            name = f"backbone.layers.{found[1]}.sequence_mixer.{wrapped}{theirs}"
        for pattern, ours in _MODEL_NAMES[:-1]:
            theirs = pattern.replace("\\.", ".").replace(r"(\d+)", r"\1")
            name = re.sub("^" + re.escape(ours).replace(r"\\1", r"(\d+)"), theirs, name)
        state[name] = x.detach().clone()
    return state


def _authors_name(name: str, kind: str, layer_norm: str | None) -> str:
    """The authors' for our name within a mixer."""
    if kind == CONVOLUTION:
        return {"proj": "projection", "conv": "conv.conv"}[name.split(".")[0]] + "." + name.split(".")[1]
    if kind == SOFTMAX:
        return {"proj_qkv": "Wqkv", "proj_o": "out_proj"}[name.split(".")[0]] + "." + name.split(".")[1]
    if layer_norm is None and name.startswith("ln_"):
        return name.replace("weight", "gamma").replace("bias", "beta")
    return name


def _read(path: Path) -> dict[str, Tensor]:
    """A state dict from a file of torch.save or of safetensors."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file  # transformers brings it along

        loaded: dict[str, Tensor] = load_file(path)
        return loaded
    state = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise ValueError(f"{path}: expected a state dict, or one under state_dict or model")
    return state


def main(argv: Sequence[str] | None = None) -> int:
    """The command: a folder for `from_pretrained` of a model, a state dict of a layer."""
    parser = argparse.ArgumentParser(
        prog="python -m rebased_cuda.models.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", choices=SOURCES, help="whose weights they are; with --back, are to be")
    parser.add_argument(
        "checkpoint", type=Path, help="a state dict (.pt, .safetensors); with --back a folder"
    )
    parser.add_argument("output", type=Path, help="a folder for a model, a file of torch.save for a layer")
    parser.add_argument("--heads", type=int, help="of the attention; wanted without --back")
    parser.add_argument("--prefix", default="", help="of the layer's names in a larger state dict")
    parser.add_argument("--feature-map", help="of the authors' layers, where their names do not tell")
    parser.add_argument(
        "--mode", choices=MODES, default="parallel", help="of flash-linear-attention's layers"
    )
    parser.add_argument("--no-layer-norm", action="store_true", help="fla-rebased with normalize=False")
    parser.add_argument("--eps", type=float, help="default: the source's")
    parser.add_argument("--back", action="store_true", help="from a model's folder to the authors' names")
    arguments = parser.parse_args(argv)
    try:
        if arguments.back:
            model = RebasedForCausalLM.from_pretrained(arguments.checkpoint)
            torch.save(convert_back(model, arguments.source), arguments.output)
            return 0
        if arguments.heads is None:
            parser.error("--heads is wanted: a state dict does not say it")
        module = convert(
            _read(arguments.checkpoint),
            arguments.source,
            arguments.heads,
            prefix=arguments.prefix,
            feature_map=arguments.feature_map,
            mode=arguments.mode,
            normalize=not arguments.no_layer_norm,
            eps=arguments.eps,
        )
    except (ValueError, TypeError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    if isinstance(module, RebasedForCausalLM):
        module.save_pretrained(arguments.output)
        print(f"{arguments.output}: for RebasedForCausalLM.from_pretrained")
        return 0
    torch.save(module.state_dict(), arguments.output)
    names = (
        "hidden_size",
        "num_heads",
        "feature_dim",
        "head_dim",
        "feature_map",
        "layer_norm",
        "scale",
        "eps",
    )
    made = [f"{name}={getattr(module, name)!r}" for name in names]
    made += [f"use_gamma={module.ln_q.weight is not None}", f"use_beta={module.ln_q.bias is not None}"]
    print(f"{arguments.output}: the state dict of ReBasedAttention({', '.join(made)})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
