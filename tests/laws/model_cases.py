"""Methods that act on a whole model, on a small language model: prompts, and what is no wrapper around a layer.

Every registered method without a case in law_cases.py gets one here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from law_cases import CASES
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from veneer import registry
from veneer.kinds import Prompt

CONTEXT = {"cpt_token_ids": [5, 9, 7], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 4]}
FAR = {"opt_projection_epsilon": 9.0, "opt_projection_format_epsilon": 9.0}

# Settings by method: variant -> config. A prompt that is not here has 3 virtual tokens, others their defaults.
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "CPT": {
        "": {**CONTEXT, **FAR},
        "decay": {**CONTEXT, **FAR, "opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.7},
    },
    "ADAPTION_PROMPT": {"": {"adapter_len": 4, "adapter_layers": 2}},
    "MULTITASK_PROMPT_TUNING": {"": {"num_virtual_tokens": 3, "num_tasks": 3, "num_ranks": 2}},
    "P_TUNING": {
        "": {"num_virtual_tokens": 3, "encoder_hidden_size": 16},
        "lstm": {
            "num_virtual_tokens": 3,
            "encoder_hidden_size": 16,
            "encoder_reparameterization_type": "LSTM",
            "encoder_num_layers": 1,
        },
    },
    "PREFIX_TUNING": {
        "": {"num_virtual_tokens": 3},
        "projection": {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 16},
    },
}
# What a call of the model gets beside ids and labels, by method: name -> values for the 4 rows of a batch.
INPUTS: dict[str, dict[str, list[Any]]] = {
    "CPT": {"input_type_mask": [[1, 2, 2, 3, 4, 4, 4]] * 4},
    "MULTITASK_PROMPT_TUNING": {"task_ids": [2, 0, 1, 1]},
}


class ModelCase(NamedTuple):
    method_name: str
    cfg_kwargs: dict[str, Any]
    variant: str = ""

    @property
    def id(self) -> str:
        return "-".join(x for x in (self.method_name, self.variant, "model") if x)

    def config(self, package: Any) -> Any:
        """The case's config, of veneer or of another package with the same names."""
        entry = registry.METHODS[self.method_name]
        own = package.__name__ == "veneer"
        made = registry.method(self.method_name).Config if own else getattr(package, entry.config)
        return made(task_type="CAUSAL_LM", **self.cfg_kwargs)

    def make_model(self) -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        return LlamaForCausalLM(
            LlamaConfig(vocab_size=50, num_key_value_heads=2, pad_token_id=0, initializer_range=0.1, **sizes)
        )

    def make_batch(self, i: int) -> dict[str, Tensor]:
        ids = torch.randint(1, 49, (4, 7), generator=torch.Generator().manual_seed(i))
        more = {k: torch.tensor(v) for k, v in INPUTS.get(self.method_name, {}).items()}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, **more}


def needs_others(name: str) -> bool:
    """Whether a method acts through other adapters only, and so trains nothing by itself."""
    return bool(getattr(registry.method(name), "needs_others", False))


def _cases() -> list[ModelCase]:
    on_layers = {c.method_name for c in CASES}
    out = []
    for name in registry.METHODS:
        if name not in on_layers and not getattr(registry.method(name), "needs_others", False):
            plain = {"num_virtual_tokens": 3} if isinstance(registry.method(name), Prompt) else {}
            out += [ModelCase(name, kwargs, v) for v, kwargs in SETTINGS.get(name, {"": plain}).items()]
    return out


MODEL_CASES = _cases()
