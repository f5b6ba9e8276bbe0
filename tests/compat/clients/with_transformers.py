"""transformers' own adapter methods, its Trainer and its pipeline, under the name peft."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import peft
import torch
from datasets import Dataset
from small import llama, tokenizer
from transformers import DataCollatorForLanguageModeling, LlamaForCausalLM, Trainer, TrainingArguments, pipeline

assert "veneer" in peft.__file__, peft.__file__
IDS = torch.tensor([[2, 4, 5, 7]])


def train_adapter(model: object) -> None:
    """Put the adapter off its initial values."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.5)


def adapters(folder: Path) -> None:
    model = llama(LlamaForCausalLM).eval()
    base = model(IDS).logits
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2), adapter_name="one")
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], r=4), adapter_name="two")
    train_adapter(model)
    model.set_adapter("one")
    assert model.active_adapters() == ["one"]
    one = model(IDS).logits
    model.set_adapter("two")
    two = model(IDS).logits
    assert not torch.allclose(one, base)
    assert not torch.allclose(two, base)
    assert not torch.allclose(one, two)
    model.disable_adapters()
    assert torch.equal(model(IDS).logits, base)
    model.enable_adapters()
    assert torch.equal(model(IDS).logits, two)
    model.set_adapter("one")
    model.save_pretrained(folder / "one")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(os.listdir(folder / "one"))
    model.delete_adapter("two")
    assert list(model.peft_config) == ["one"]
    fresh = llama(LlamaForCausalLM).eval()
    fresh.load_adapter(str(folder / "one"), adapter_name="back")
    torch.testing.assert_close(fresh(IDS).logits, one)
    state = model.get_adapter_state_dict("one")
    assert state
    assert all("lora_" in k for k in state)


def trainer(folder: Path) -> None:
    words = tokenizer()
    data = Dataset.from_list([{**words("the cat sat on the mat")}, {**words("a dog ran on the rug")}] * 8)

    def arguments(**options: object) -> TrainingArguments:
        given = {"per_device_train_batch_size": 4, "max_steps": 6, "save_steps": 2, "eval_steps": 2, "report_to": []}
        given |= {"save_strategy": "steps", "eval_strategy": "steps", "load_best_model_at_end": True, "use_cpu": True}
        return TrainingArguments(str(folder / "run"), learning_rate=0.05, disable_tqdm=True, **{**given, **options})

    def made() -> Trainer:
        model = peft.get_peft_model(
            llama(LlamaForCausalLM), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
        )
        collator = DataCollatorForLanguageModeling(words, mlm=False)
        return Trainer(
            model,
            arguments(),
            train_dataset=data,
            eval_dataset=data,
            data_collator=collator,
            processing_class=words,
        )

    first = made()
    first.train()
    best = first.state.best_model_checkpoint
    assert best is not None
    names = os.listdir(best)
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names
    saved = peft.PeftModel.from_pretrained(llama(LlamaForCausalLM), best).eval()
    torch.testing.assert_close(first.model.eval()(IDS).logits, saved(IDS).logits)  # the best one is back
    again = made()
    again.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-4"))
    assert again.state.global_step == 6
    for (name, p), q in zip(first.model.named_parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


def pipelines(folder: Path) -> None:
    model = llama(LlamaForCausalLM)
    model.save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    train_adapter(adapted)
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
    adapted.save_pretrained(folder / "adapter")
    wanted = adapted.eval().generate(**tokenizer()("the cat", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    by_object = pipeline("text-generation", adapted, tokenizer=tokenizer())
    by_folder = pipeline("text-generation", str(folder / "adapter"), tokenizer=tokenizer())
    for run in (by_object, by_folder):
        text = run("the cat", max_new_tokens=4, do_sample=False)[0]["generated_text"]
        assert text.split() == tokenizer().decode(wanted[0], skip_special_tokens=True).split(), text


with tempfile.TemporaryDirectory() as made_folder:
    adapters(Path(made_folder))
    trainer(Path(made_folder))
    pipelines(Path(made_folder))
