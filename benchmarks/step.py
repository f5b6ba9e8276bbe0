"""One LoRA training step on the SmolLM2-135M shape, r=16 on every linear layer.

"frozen" is the limit: the base's forward and the gradient of its input, nothing trained. "veneer" is the import
changed and nothing else; "switches" has what `veneer train` turns on besides: base_kernels, the head's loss in chunks
and at the labels alone, freed memory kept, and a beginning that rows share computed once. "int8" is switches with
`base.matmul: int8`, "small" switches with `mlp_checkpointing` and `return_memory`.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from common import SMOLLM2, Case, Lap, device, package, resident_mb

OPTIONS = {"batch": 4, "seq": 256, "r": 16, "dropout": 0.0, "dtype": "float32", "labels": 1.0, "shared": 0}


def build(who: str, o: dict[str, Any]) -> Lap:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    empty = resident_mb()
    where, shape = device(), (o["batch"], o["seq"])
    model: Any = LlamaForCausalLM(LlamaConfig(**SMOLLM2)).to(where, getattr(torch, o["dtype"])).train()
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    ids = torch.randint(0, SMOLLM2["vocab_size"], shape, device=where)
    labels = ids.masked_fill(torch.rand(shape, device=where) >= o["labels"], -100)
    ids[:, : o["shared"]], labels[:, : o["shared"]] = ids[0, : o["shared"]].clone(), -100  # a system prompt
    call: dict[str, Any] = {"input_ids": ids, "labels": labels, "use_cache": False}
    trained: list[Any] = []
    if who == "frozen":
        model.requires_grad_(False)
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_(True)
        call = {"inputs_embeds": embeds, "labels": labels, "use_cache": False}
    else:
        model, trained = adapted(package(who), model, o)
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
    loss_of = lambda call: model(**call).loss
    if who in ("switches", "int8", "small"):
        loss_of = with_switches(model, call, who == "small")
    if who == "int8":
        from veneer.int8 import int8_base

        int8_base(model, [lambda: model(input_ids=ids[:2])]).on()

    def run(_: Any) -> float:
        torch.manual_seed(2)
        loss = loss_of(call)
        loss.backward()
        if optimizer is None:
            embeds.grad = None
        else:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return Lap(run, memory_base_mb=weights + (empty if where == "cpu" else 0))


def adapted(pkg: Any, model: Any, o: dict[str, Any]) -> tuple[Any, list[Any]]:
    """The model with an adapter whose tensors are the same for either package."""
    import torch

    config = pkg.LoraConfig(
        task_type="CAUSAL_LM", r=o["r"], lora_alpha=2 * o["r"], target_modules="all-linear", lora_dropout=o["dropout"]
    )
    model = pkg.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    named = sorted((n, p) for n, p in model.named_parameters() if p.requires_grad)
    for _, p in named:
        p.data.copy_(torch.randn(p.shape, generator=generator) * 0.02)
    return model, [p for _, p in named]


def with_switches(model: Any, call: dict[str, Any], small: bool) -> Any:
    import torch

    from veneer import base_kernels
    from veneer.train.allocator import keep_blocks, return_blocks
    from veneer.train.loss import labelled_loss
    from veneer.train.prefix import shared_prefix

    base_kernels(model, mlp_checkpointing=small).on()
    _ = return_blocks() if small else keep_blocks()
    batch = {"input_ids": call["input_ids"], "labels": call["labels"]}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    context = ExitStack()
    form = context.enter_context(shared_prefix(model, batch, batch["input_ids"].shape[1])) or (lambda batch: batch)

    def loss(_: Any, context: ExitStack = context) -> Any:  # the context lives as long as this function
        return labelled_loss(model, form(batch), None)

    return loss


def case(about: str, time: float, frozen: float, memory: float, **options: Any) -> Case:
    o = {**OPTIONS, **options}
    own = ("veneer", "switches", "small", *(("int8",) if o["dtype"] == "float32" else ()))
    return Case(
        about=f"LoRA step, {about}",
        build=build,
        contestants=("frozen", "peft", *own),
        targets={
            ("veneer", "peft"): time,
            ("switches", "peft"): time,
            **({("int8", "peft"): 0.6} if "int8" in own else {}),
            ("veneer", "frozen"): frozen,
            ("switches", "frozen"): frozen,
            ("small", "peft"): None,
            ("peft", "frozen"): None,
        },
        memory_targets={("veneer", "peft"): memory, ("switches", "peft"): memory, ("small", "peft"): memory},
        agree=() if o["dropout"] else ("peft", "veneer", "switches", "small"),
        tolerance=1e-4 if o["dtype"] == "float32" else 2e-2,
        options=o,
        rounds=3,
        laps=2,
        # as veneer.train.allocator sets it before torch is imported
        env={who: {"THP_MEM_ALLOC_ENABLE": "1"} for who in ("switches", "int8", "small")},
    )


CASES = {
    "step": case("4 x 256, float32", 0.75, 1.08, 0.6),
    "step-long": case("1 x 1024, float32", 0.75, 1.08, 0.6, batch=1, seq=1024),
    "step-dropout": case("4 x 256, float32, dropout 0.05", 0.5, 1.08, 0.6, dropout=0.05),
    "step-bf16": case("4 x 256, bfloat16", 0.92, 1.08, 0.6, dtype="bfloat16"),
    "step-masked": case("4 x 256, float32, 30 % of the tokens labelled", 0.6, 1.08, 0.4, labels=0.3),
    "step-prompt": case("8 rows of 256, 192 of them one system prompt", 0.4, 1.08, 0.4, batch=8, shared=192),
}
