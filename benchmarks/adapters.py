"""What is done with adapters besides computing: injecting, loading, switching, saving, merging, combining."""

from __future__ import annotations

import tempfile
from typing import Any

from common import SMOLLM2, Case, Lap, package

LLAMA_70B = {
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}


def config(pkg: Any, random: bool = True) -> Any:
    more = {"init_lora_weights": False} if random else {}
    return pkg.LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear", **more)


def smollm2(pkg: Any, adapters: int = 1) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = pkg.get_peft_model(LlamaForCausalLM(LlamaConfig(**SMOLLM2)), config(pkg), "a0")
    for i in range(1, adapters):
        model.add_adapter(f"a{i}", config(pkg))
    return model


def inject(who: str, o: dict[str, Any]) -> Lap:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    pkg = package(who)

    def prepare() -> Any:
        with torch.device("meta"):
            return LlamaForCausalLM(LlamaConfig(**LLAMA_70B))

    def run(model: Any) -> float:
        adapted = pkg.get_peft_model(model, config(pkg, random=False), low_cpu_mem_usage=True)
        return float(sum(p.requires_grad for p in adapted.parameters()))

    return Lap(run, prepare)


def load(who: str, o: dict[str, Any]) -> Lap:
    model = smollm2(package(who))
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder, selected_adapters=["a0"])
    made: list[str] = []

    def run(_: Any) -> None:
        made.append(f"b{len(made)}")
        model.load_adapter(f"{folder}/a0", made[-1])

    for _ in range(o["resident"]):
        run(None)
    return Lap(run)


def switch(who: str, o: dict[str, Any]) -> Lap:
    model = smollm2(package(who), adapters=8)

    def run(_: Any) -> None:
        for i in range(64):
            model.set_adapter(f"a{i % 8}")

    return Lap(run)


def save(who: str, o: dict[str, Any]) -> Lap:
    model, folder = smollm2(package(who)), tempfile.mkdtemp()
    return Lap(lambda _: model.save_pretrained(folder))


def merge(who: str, o: dict[str, Any]) -> Lap:
    model = smollm2(package(who))

    def run(_: Any) -> None:
        model.merge_adapter()
        model.unmerge_adapter()

    return Lap(run)


def combine(who: str, o: dict[str, Any]) -> Lap:
    model = smollm2(package(who), adapters=3)
    made: list[str] = []

    def run(_: Any) -> float:
        made.append(f"w{len(made)}")
        model.add_weighted_adapter(["a0", "a1", "a2"], [0.5, 0.3, 0.2], made[-1], combination_type="svd")
        layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
        return layer.get_delta_weight(made[-1]).norm().item()

    return Lap(run)


def against_peft(about: str, build: Any, target: float | None, **more: Any) -> Case:
    return Case(about, build, ("peft", "veneer"), {("veneer", "peft"): target}, **more)


CASES = {
    "inject": against_peft("injection into a 70B-shaped Llama, 560 layers, meta device", inject, 0.2,
                           agree=("peft", "veneer")),
    "load": against_peft("loading an adapter", load, 0.3, options={"resident": 0}),
    "load-64th": against_peft("loading a 64th adapter", load, 0.3, options={"resident": 63}, rounds=3),
    "switch": against_peft("64 switches between 8 adapters", switch, None),
    "save": against_peft("saving an adapter", save, None),
    "merge": against_peft("merge and unmerge", merge, 0.7),
    "combine": against_peft("the SVD combination of three adapters of rank 16", combine, 0.02,
                            agree=("peft", "veneer"), rounds=3),
}  # fmt: skip
