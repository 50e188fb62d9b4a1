"""Language models of this package's layers for Hugging Face transformers (the extra `models`).

    import rebased_cuda.models                     # AutoConfig and AutoModelForCausalLM then know them
    model = RebasedForCausalLM(RebasedConfig.named("rebased-157m"))
    model.generate(tokens, max_new_tokens=256)     # a state of one size in place of a cache that grows

`RebasedConfig` says which mixers stand in the layers, `rebased_cuda.models.convert` reads other packages'
weights.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration import MIXERS, NAMED, RebasedConfig
from .model import RebasedForCausalLM, RebasedModel, RebasedPreTrainedModel

__all__ = [
    "MIXERS",
    "NAMED",
    "RebasedConfig",
    "RebasedForCausalLM",
    "RebasedModel",
    "RebasedPreTrainedModel",
]

AutoConfig.register(RebasedConfig.model_type, RebasedConfig)
AutoModel.register(RebasedConfig, RebasedModel)
AutoModelForCausalLM.register(RebasedConfig, RebasedForCausalLM)
