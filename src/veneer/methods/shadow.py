"""Shadow: a small trained network runs beside the model, and each block is nudged by how the two differ. Li et al.
2026, arXiv:2604.19254, section 3.

    s = project(backbone(embed(x)))     block by block:  y = block(h + alpha * U D drop(h - s)),
                                        s <- s + sigmoid(G(y)) * (T(y) - s)     G, T: Linear, gelu, Linear

    shadow_down.weight (r, hidden)  D    shadow_up.weight (hidden, r)  U, zero at first
    shadow_update_transform, shadow_update_gate: 0.weight (k, hidden), 0.bias, 2.weight (hidden, k), 2.bias    T, G
    shadow_backbone.*: a smaller model of the base's kind; shadow_projection.weight (hidden, shadow_hidden_size)
    shadow_head.weight (labels, hidden), for sequence classification

k is update_hidden_size, r where that is None. The loss gains auxiliary_loss_weight times the loss of s, before any
block, under the base's own head. Files write the adapter's name as "default", whatever it is. The shadow's keys and
values stand behind the base's in one cache, so a search that reorders the one reorders the other. It does not merge.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from ..config import AdapterConfig
from ..errors import AdapterError
from ..kinds import Attach, Spec
from ..sharded import refuse
from ..site import Site
from ..view import View

PARTS = ("shadow_update_transform", "shadow_update_gate")


@dataclass
class ShadowConfig(AdapterConfig):
    """target_modules: the decoder blocks (default: all). r: rank of the nudge. shadow_alpha: its size. shadow_dropout:
    on what it reads. init_weights: start with U = 0. update_hidden_size: k.

    shadow_model: "mirror", a model like the base with shadow_num_hidden_layers (default: 1), shadow_hidden_size,
    shadow_num_attention_heads and shadow_intermediate_size (default: the base's); or a pretrained model's name or
    folder. share_embeddings: read the base's embeddings, where the widths agree. auxiliary_loss_weight: see above.
    """

    r: int = 8
    shadow_alpha: float = 0.1
    shadow_dropout: float = 0.2
    init_weights: bool = True
    shadow_model: str = "mirror"
    shadow_num_hidden_layers: int | None = None
    shadow_hidden_size: int | None = None
    shadow_num_attention_heads: int | None = None
    shadow_intermediate_size: int | None = None
    share_embeddings: bool = True
    update_hidden_size: int | None = None
    auxiliary_loss_weight: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "SHADOW"
        if self.r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {self.r}")
        if not 0 <= self.shadow_dropout <= 1:
            raise ValueError(f"dropout probability has to be between 0 and 1, but got {self.shadow_dropout}")
        for key in ("shadow_num_hidden_layers", "shadow_hidden_size", "shadow_num_attention_heads",
                    "shadow_intermediate_size", "update_hidden_size"):  # fmt: skip
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key}={value!r} must be at least 1")


class Shadow(Attach):
    Config = ShadowConfig
    prefix = "shadow_"
    dropout = "shadow_dropout"

    def prepare(self, cfg: Any, model: Any, model_type: str | None) -> None:
        if not cfg.target_modules:
            cfg.target_modules = set(blocks(model))

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        hidden, k = width(site.module), cfg.update_hidden_size or cfg.r
        out = {
            "shadow_down.weight": Spec((cfg.r, hidden), like="linear", file="shadow_down.default.weight"),
            "shadow_up.weight": Spec((hidden, cfg.r), like="linear", file="shadow_up.default.weight"),
        }
        for part in PARTS:
            for i, (a, b) in (0, (k, hidden)), (2, (hidden, k)):
                for leaf, shape in (("weight", (a, b)), ("bias", (a,))):
                    own = f"{i}.{leaf}"
                    out[f"{part}.{own}"] = Spec(shape, like="linear", file=f"{part}.default.{own}")
        return out

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> None:
        for name in ("shadow_down", "shadow_up", *(f"{part}_{i}" for part in PARTS for i in (0, 2))):
            rows, cols = getattr(p, name).shape
            drawn = nn.Linear(cols, rows, bias=p.has(f"{name}_bias"))
            p.fill(name, drawn.weight)
            if p.has(f"{name}_bias"):
                p.fill(f"{name}_bias", drawn.bias)
        if cfg.init_weights:
            nn.init.zeros_(p.shadow_up)

    def modules(self, cfg: Any, model: Any, fill: bool) -> dict[str, nn.Module]:
        embedding = model.get_input_embeddings().weight
        hidden, own = embedding.shape[1], backbone(cfg, model)
        wide = own.config.hidden_size
        out: dict[str, nn.Module] = {"shadow_backbone": own}
        out["shadow_projection"] = nn.Identity() if wide == hidden else nn.Linear(wide, hidden, bias=False)
        score = model._modules.get("score")
        if str(getattr(cfg.task_type, "value", cfg.task_type)) == "SEQ_CLS" and score is not None:
            out["shadow_head"] = copy.deepcopy(getattr(score, "original_module", score))
        return {k: placed(m, embedding.device).requires_grad_(True) for k, m in out.items()}

    def begin(self, cfg: Any, parts: dict[str, Any], model: Any, call: dict[str, Any]) -> dict[str, Any]:
        own, embed = parts["shadow_backbone"], model.get_input_embeddings()
        ids, given = call.get("input_ids"), call.get("inputs_embeds")
        given_to: dict[str, Any] = {
            k: call.get(k) for k in ("attention_mask", "position_ids") if call.get(k) is not None
        }
        if shares(cfg, own, embed):
            x = embed(ids) if given is None else given
            given_to["inputs_embeds"] = x.to(next(own.parameters()).dtype)
        elif ids is None:
            raise AdapterError("this shadow has embeddings of its own, so it needs input_ids, not inputs_embeds")
        else:
            given_to["input_ids"] = ids
        cache = room_in_cache(own, model, call)
        out = own(**given_to, past_key_values=cache, use_cache=cache is not None)
        s = parts["shadow_projection"](out.last_hidden_state)
        return {"s": s, "first": s, "waiting": None}

    def act(self, ps: Sequence[View], base: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        h, rest = (args[0], args[1:]) if args else (kwargs["hidden_states"], ())
        kwargs = {k: v for k, v in kwargs.items() if k != "hidden_states"}
        nudged = h
        for p in ps:
            s = current(p).to(h.dtype)
            low = linear(p.drop(h - s), p.shadow_down.to(h.dtype))
            nudged = nudged + p.cfg.shadow_alpha * linear(low, p.shadow_up.to(h.dtype))
        out = base(nudged, *rest, **kwargs)
        for p in ps:  # the last block's is never asked for
            p.data[p.name]["waiting"] = (p, out[0] if isinstance(out, tuple) else out)
        return out

    def finish(self, cfg: Any, parts: dict[str, Any], model: Any, call: dict[str, Any], out: Any, data: Any) -> Any:
        labels = call.get("labels")
        if labels is None or not cfg.auxiliary_loss_weight:
            return out
        added = auxiliary_loss(parts, model, call, data["first"], labels)
        if added is None:
            return out
        loss = out[0] if isinstance(out, tuple) else out["loss"]
        loss = loss + cfg.auxiliary_loss_weight * added.to(loss.dtype)
        if isinstance(out, tuple):
            return (loss, *out[1:])
        out["loss"] = loss
        return out


def current(p: View) -> Tensor:
    """The shadow state that a block meets, (rows, length, hidden)."""
    state = p.data[p.name]
    if state["waiting"] is not None:
        before, y = state["waiting"]
        state["s"], state["waiting"] = updated(before, state["s"].to(y.dtype), y), None
    return state["s"]


def updated(p: View, s: Tensor, y: Tensor) -> Tensor:
    """The state after a block whose output is y."""
    refuse(p.shadow_update_gate_0, "SHADOW", "its networks run between the blocks")

    def net(part: str) -> Tensor:
        w = [getattr(p, f"shadow_update_{part}_{i}").to(y.dtype) for i in ("0", "0_bias", "2", "2_bias")]
        return linear(gelu(linear(y, w[0], w[1])), w[2], w[3])

    return s + torch.sigmoid(net("gate")) * (net("transform") - s)


def auxiliary_loss(parts: dict[str, Any], model: Any, call: dict[str, Any], s: Tensor, labels: Tensor) -> Tensor | None:
    """The base's loss of the shadow alone; None for a task without a head for it."""
    counted = {k: call[k] for k in ("num_items_in_batch",) if call.get(k) is not None}
    head = parts.get("shadow_head")
    if head is not None:
        logits = head(s[torch.arange(len(s)), last_tokens(model, call, s)].to(head.weight.dtype))
        return model.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=model.config, **counted)
    head = model.get_output_embeddings()
    if head is None:
        return None
    words = model.config.get_text_config().vocab_size
    return model.loss_function(logits=head(s.to(head.weight.dtype)), labels=labels, vocab_size=words, **counted)


def last_tokens(model: Any, call: dict[str, Any], s: Tensor) -> Tensor:
    """(rows,) where each row's last real token is."""
    mask, ids, pad = call.get("attention_mask"), call.get("input_ids"), model.config.get_text_config().pad_token_id
    if mask is None and ids is not None and pad is not None:
        mask = ids != pad
    if mask is None:
        return torch.full((len(s),), s.shape[1] - 1, device=s.device)
    at = torch.arange(s.shape[1], device=s.device)
    return (at * (mask[:, -s.shape[1] :] != 0).to(s.device)).argmax(dim=1)


# -- the small model -----------------------------------------------------------------------------------------


def blocks(model: nn.Module) -> list[str]:
    """The names of the decoder's blocks."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in ("layers", "h") and ".encoder." not in name:
            return [f"{name}.{i}" for i in range(len(module))]
    raise AttributeError(
        f"Unable to automatically find a `nn.ModuleList` of decoder layers (`.layers` or `.h`) in "
        f"{type(model).__name__}; set `target_modules` to the decoder blocks"
    )


def width(block: Any) -> int:
    """The hidden size of a block: that of its first norm."""
    return next(p.shape[0] for n, p in block.named_parameters() if "norm" in n or n.startswith("ln_"))


def backbone(cfg: Any, model: Any) -> Any:
    """The shadow's own model: the module that holds the blocks, its embeddings taken out where the base's serve."""
    from transformers import AutoModel

    if cfg.shadow_model != "mirror":
        made: Any = AutoModel.from_pretrained(cfg.shadow_model, trust_remote_code=False)
    else:
        made = AutoModel.from_config(mirrored(cfg, model.config))
    decoder = made._modules.get("decoder")
    made = made if decoder is None else decoder
    if "embed_tokens" in made._modules and shares(cfg, made, model.get_input_embeddings()):
        del made._modules["embed_tokens"]
        made.embed_tokens = None
    return made.float().train(model.training)


def placed(module: nn.Module, device: torch.device) -> nn.Module:
    """The module on the base's device. Where that is meta, what no file holds (rotary frequencies) stays as made."""
    made = [(m, name, m._buffers[name]) for m in module.modules() for name in m._non_persistent_buffers_set]
    module.to(device)
    for m, name, buffer in made if device.type == "meta" else ():
        m._buffers[name] = buffer
    return module


def shares(cfg: Any, own: Any, embedding: Any) -> bool:
    return cfg.share_embeddings and own.config.hidden_size == embedding.weight.shape[1]


def mirrored(cfg: Any, base: Any) -> Any:
    """The base's config, smaller. The heads' own width stays; there are no more key/value heads than heads."""
    out = copy.deepcopy(base)
    n = out.num_hidden_layers = cfg.shadow_num_hidden_layers or 1
    for key, own in (("hidden_size", cfg.shadow_hidden_size), ("num_attention_heads", cfg.shadow_num_attention_heads)):
        if own is not None:
            setattr(out, key, own)
    if cfg.shadow_intermediate_size is not None:
        key = next(k for k in ("intermediate_size", "ffn_dim", "n_inner") if k in out.to_dict())
        setattr(out, key, cfg.shadow_intermediate_size)
    kept = out.to_dict()
    if (kept.get("num_key_value_heads") or 0) > out.num_attention_heads:
        out.num_key_value_heads = out.num_attention_heads
    if kept.get("layer_types"):
        out.layer_types = list(kept["layer_types"])[:n]
    return out


def room_in_cache(own: Any, model: Any, call: dict[str, Any]) -> Any:
    """The call's cache with room for the shadow's keys and values behind the base's; None where none is kept."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    past, use = call.get("past_key_values"), call.get("use_cache")
    if past is None:
        if model.training or not (model.config.use_cache if use is None else use):
            return None
        past = call["past_key_values"] = DynamicCache(config=model.config.get_text_config())
    if not isinstance(past, DynamicCache):
        raise AdapterError(f"{type(past).__name__} has no room for the shadow's keys and values; use a DynamicCache")
    held = past.__dict__.setdefault("shadows", {})
    if id(own) not in held:
        if past.get_seq_length():
            raise AdapterError("this cache was filled without the shadow; start from an empty one")
        first = max(len(past.layers), model.config.get_text_config().num_hidden_layers)
        while len(past.layers) < first + own.config.num_hidden_layers:
            past.layers.append(DynamicLayer())
        held[id(own)] = first
    attentions = [m for m in own.modules() if vars(m).get("layer_idx") is not None]
    low = min(m.layer_idx for m in attentions)
    for m in attentions:
        m.layer_idx += held[id(own)] - low
    return past
