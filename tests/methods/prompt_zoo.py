"""Tiny transformers models and batches, one of each kind that a prompt can stand before."""

from __future__ import annotations

from typing import Any

import peft
import torch
import transformers as tf

import veneer
from veneer.model import get_peft_model

IDS = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _config(arch: str, labels: int) -> Any:
    same = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "num_labels": labels, **IDS}
    sized = {"intermediate_size": 48, "max_position_embeddings": 128}
    dry = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if arch == "llama":
        return tf.LlamaConfig(num_key_value_heads=2, **sized, **same)
    if arch == "gpt2":
        return tf.GPT2Config(n_positions=128, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **same)
    if arch == "opt":
        return tf.OPTConfig(ffn_dim=48, max_position_embeddings=128, word_embed_proj_dim=32, dropout=0.0, **same)
    if arch == "bloom":
        return tf.BloomConfig(hidden_dropout=0.0, attention_dropout=0.0, **same)
    if arch in ("bert", "roberta"):
        kind = tf.BertConfig if arch == "bert" else tf.RobertaConfig
        return kind(**sized, **dry, **same)
    if arch == "t5":
        own = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        return tf.T5Config(dropout_rate=0.0, decoder_start_token_id=0, num_labels=labels, **own, **IDS)
    half = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in
            (("layers", 2), ("ffn_dim", 48), ("attention_heads", 4))}  # fmt: skip
    whole = {"d_model": 32, "max_position_embeddings": 128, "dropout": 0.0, "num_labels": labels}
    return tf.BartConfig(decoder_start_token_id=2, forced_eos_token_id=None, **whole, **half, **IDS)


AUTO = {
    "CAUSAL_LM": tf.AutoModelForCausalLM,
    "SEQ_CLS": tf.AutoModelForSequenceClassification,
    "TOKEN_CLS": tf.AutoModelForTokenClassification,
    "QUESTION_ANS": tf.AutoModelForQuestionAnswering,
    "SEQ_2_SEQ_LM": tf.AutoModelForSeq2SeqLM,
    "FEATURE_EXTRACTION": tf.AutoModel,
}


def make(arch: str, task: str, seed: int = 0, **changes: Any) -> Any:
    """A model with no weight left at zero, in eval mode; the same seed gives the same weights."""
    torch.manual_seed(seed)
    config = _config(arch, 2 if task == "QUESTION_ANS" else 3)
    for key, value in changes.items():
        setattr(config, key, value)
    model = AUTO[task].from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def batch(task: str, pad: str | None = "right", labels: bool = True, method: str = "") -> dict[str, torch.Tensor]:
    """Two rows of six tokens; pad: the side on which the second row has two tokens of padding. method: with what it
    takes beside the base's arguments."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 60, (2, 6), generator=draw)
    mask = torch.ones_like(ids)
    if pad:
        mask[1, slice(4, 6) if pad == "right" else slice(0, 2)] = 0
    ids = ids.masked_fill(mask == 0, 0)
    out = {"input_ids": ids, "attention_mask": mask, **own(method, 2)}
    if not labels:
        return out
    if task == "CAUSAL_LM":
        out["labels"] = ids.masked_fill(mask == 0, -100)
    elif task == "SEQ_CLS":
        out["labels"] = torch.tensor([0, 2])
    elif task == "TOKEN_CLS":
        out["labels"] = torch.randint(0, 3, (2, 6), generator=draw).masked_fill(mask == 0, -100)
    elif task == "QUESTION_ANS":
        out |= {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([4, 3])}
    elif task == "SEQ_2_SEQ_LM":
        out["labels"] = torch.randint(3, 60, (2, 5), generator=draw)
    return out


def own(method: str, rows: int = 1) -> dict[str, torch.Tensor]:
    """What a method takes beside the base's arguments: every row of the second task."""
    return {"task_ids": torch.ones(rows, dtype=torch.long)} if method == "multitask" else {}


N = 3
CONTEXT = {"cpt_token_ids": [5, 9, 7], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 4]}
FAR = {"opt_projection_epsilon": 9.0, "opt_projection_format_epsilon": 5.0, "opt_weighted_loss_type": "decay"}
ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt": ("PromptTuningConfig", {}),
    "prefix": ("PrefixTuningConfig", {}),
    "mlp": ("PromptEncoderConfig", {"encoder_hidden_size": 20}),
    "lstm": ("PromptEncoderConfig", {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 8}),
    "multitask": ("MultitaskPromptTuningConfig", {"num_tasks": 3, "num_ranks": 2}),
    "cartridge": ("CartridgeConfig", {}),
    "cpt": ("CPTConfig", {**CONTEXT, **FAR, "opt_loss_decay_factor": 0.7}),
}
METHODS = tuple(ZOO)
CACHES = ("prefix", "cartridge")


def config(method: str, task: str | None, theirs: bool = False, **settings: Any) -> Any:
    """A method's config, of veneer or of peft, for N virtual tokens or what the settings say."""
    name, given = ZOO[method]
    return getattr(peft if theirs else veneer, name)(
        **{"task_type": task, "num_virtual_tokens": N, **given, **settings}
    )


def trained(model: Any) -> torch.Tensor:
    """The adapter's first trained tensor."""
    return next(p for p in model.prompt_encoder["default"].parameters() if p.requires_grad)


DECODERS = ("llama", "gpt2", "opt", "bloom", "bart")
LM = [(arch, "CAUSAL_LM") for arch in DECODERS] + [("t5", "SEQ_2_SEQ_LM"), ("bart", "SEQ_2_SEQ_LM")]
HEADS = [
    ("bert", "SEQ_CLS"),
    ("roberta", "SEQ_CLS"),
    ("llama", "SEQ_CLS"),
    ("gpt2", "SEQ_CLS"),
    ("bert", "TOKEN_CLS"),
    ("llama", "TOKEN_CLS"),
    ("bert", "QUESTION_ANS"),
    ("gpt2", "QUESTION_ANS"),
    ("bert", "FEATURE_EXTRACTION"),
    ("llama", "FEATURE_EXTRACTION"),
]


EVERY = ("prompt", "prefix")  # on every architecture; the others, which share their code, on the four below
FEW = ("llama", "gpt2", "t5", "bert")


def cases(pairs: list[tuple[str, str]], methods: tuple[str, ...] = METHODS) -> list[tuple[str, str, str]]:
    """(method, architecture, task) for each method that knows the task."""
    return [
        (m, arch, task)
        for m in methods
        for arch, task in pairs
        if (m != "cpt" or task == "CAUSAL_LM") and (m in EVERY or arch in FEW)
    ]


def peft_has(case: tuple[str, str, str]) -> bool:
    """Whether peft has a right answer: its multitask prompts take no task_ids for some tasks, and in an
    encoder-decoder stand before the decoder in training and not in generation."""
    return case[0] != "multitask" or case[2] not in ("SEQ_2_SEQ_LM", "QUESTION_ANS", "FEATURE_EXTRACTION")


CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def adapted(method: str, arch: str, task: str, changes: dict | None = None, **settings: Any) -> Any:
    torch.manual_seed(3)
    cfg = config(method, task, **settings)
    return get_peft_model(make(arch, task, **(changes or {})), cfg).eval()


def twin(method: str, arch: str, task: str, changes: dict | None = None, **settings: Any) -> Any:
    """peft's model of the same seed: the same base, heads and prompt."""
    torch.manual_seed(3)
    cfg = config(method, task, theirs=True, **settings)
    return peft.get_peft_model(make(arch, task, **(changes or {})), cfg).eval()


def main_output(out: Any) -> torch.Tensor:
    if "start_logits" in out:
        return torch.stack([out.start_logits, out.end_logits])
    return out.logits if "logits" in out else out.last_hidden_state
