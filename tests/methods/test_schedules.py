"""AdaLoRA's and AdaMSS's schedules: peft's budgets and masks, by themselves in any loop, exact on resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import veneer

ADALORA: dict[str, Any] = {
    "init_r": 6, "target_r": 2, "total_step": 12, "tinit": 2, "tfinal": 3, "deltaT": 2, "lora_alpha": 5,
}  # fmt: skip
ADAMSS: dict[str, Any] = {
    "r": 6, "num_subspaces": 4, "use_asa": True, "asa_target_subspaces": 5, "init_warmup": 2, "final_warmup": 10,
    "mask_interval": 2,
}  # fmt: skip
TARGETS = ["q_proj", "v_proj"]


def base() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**sizes))


def config(package: Any, name: str, **more: Any) -> Any:
    settings = ADALORA if name == "AdaLoraConfig" else ADAMSS
    return getattr(package, name)(task_type="CAUSAL_LM", target_modules=TARGETS, **{**settings, **more})


def make(package: Any, name: str, **more: Any) -> Any:
    model = package.get_peft_model(base(), config(package, name, **more))
    torch.manual_seed(1)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            if p.requires_grad:
                p.copy_(torch.randn(p.shape) * 0.1)
    return model.train()


def batch(i: int) -> Tensor:
    return torch.randint(0, 50, (4, 9), generator=torch.Generator().manual_seed(i))


def train(model: Any, steps: range, by_hand: bool, optimizer: Any = None) -> list[float]:
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for i in steps:
        loss = model(input_ids=batch(i), labels=batch(i)).loss
        loss.backward()
        optimizer.step()
        if by_hand:
            model.base_model.update_and_allocate(i + 1)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def tensors(model: Any) -> dict[str, Tensor]:
    return {k: p.detach().clone() for k, p in model.named_parameters() if "adamss_" in k or "lora_" in k}


def same(a: Any, b: Any) -> bool:
    x, y = tensors(a), tensors(b)
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def test_adalora_is_pefts(tmp_path: Path) -> None:
    """The same losses, the same ranks at every step, the same file, read by either."""
    ours, theirs = make(veneer, "AdaLoraConfig"), make(peft, "AdaLoraConfig")
    a, b = train(ours, range(13), by_hand=True), train(theirs, range(13), by_hand=True)
    assert a == pytest.approx(b, rel=1e-4)
    mine, other = ours.peft_config["default"].rank_pattern, theirs.peft_config["default"].rank_pattern
    assert mine == {k.removesuffix(".default"): v for k, v in other.items()}
    assert sum(sum(v) for v in mine.values()) == 2 * 4
    assert len({sum(v) for v in mine.values()}) > 1, "all ranks are equal: this proves nothing"
    theirs.save_pretrained(tmp_path / "b")
    ours.save_pretrained(tmp_path / "a")
    x = batch(99)
    y = theirs.eval()(input_ids=x).logits
    for folder in ("a", "b"):
        for package in (veneer, peft):
            loaded = package.PeftModel.from_pretrained(base(), tmp_path / folder).eval()
            assert torch.allclose(loaded(input_ids=x).logits, y, atol=2e-4)


def test_the_orthogonality_loss_is_added_in_training_only() -> None:
    model = make(veneer, "AdaLoraConfig", orth_reg_weight=0.7)
    x = batch(0)
    plain = model.base_model.model(input_ids=x, labels=x).loss
    eye = lambda t: float((t - torch.eye(len(t))).norm().detach())
    terms = [
        eye(p @ p.T) if "lora_A" in n else eye(p.T @ p)
        for n, p in model.named_parameters()
        if "lora_" in n and "lora_E" not in n
    ]
    assert model(input_ids=x, labels=x).loss.item() == pytest.approx(
        plain.item() + 0.7 * sum(terms) / len(terms), rel=1e-5
    )
    assert torch.equal(model.eval()(input_ids=x, labels=x).loss, plain)
    whole = model.train()(input_ids=x, labels=x, num_items_in_batch=torch.tensor(64)).loss
    half = model.base_model.model(input_ids=x, labels=x, num_items_in_batch=torch.tensor(64)).loss
    assert (whole - half).item() == pytest.approx(0.7 * sum(terms) / len(terms) / 2, rel=1e-4)


@pytest.mark.parametrize("name", ["AdaLoraConfig", "AdamssConfig"])
def test_by_itself_is_by_hand(name: str) -> None:
    """A loop that never calls the schedule trains as one that does."""
    a, b = make(veneer, name), make(veneer, name)
    assert train(a, range(12), by_hand=False) == train(b, range(12), by_hand=True)
    assert same(a, b)
    assert a.peft_config["default"].get("rank_pattern") == b.peft_config["default"].get("rank_pattern")


def test_no_schedule_no_method() -> None:
    model = veneer.get_peft_model(base(), veneer.LoraConfig(target_modules=TARGETS))
    assert not hasattr(model.base_model, "update_and_allocate")
    assert hasattr(make(veneer, "AdaLoraConfig").base_model, "update_and_allocate")
    assert not hasattr(make(veneer, "AdamssConfig", use_asa=False).base_model, "update_and_allocate")


def frozen(model: Any) -> set[str]:
    return {n for n, p in model.named_parameters() if "adamss_A" in n and not p.requires_grad}


def test_adamss_freezes_what_matters_least() -> None:
    """The first cut is peft's up to the one cluster that peft freezes too many; the last leaves the asked number."""
    ours, theirs = make(veneer, "AdamssConfig"), make(peft, "AdamssConfig")
    assert train(ours, range(4), by_hand=True) == pytest.approx(train(theirs, range(4), by_hand=True), rel=1e-4)
    assert frozen(ours)
    assert frozen(ours) < frozen(theirs)
    assert len(frozen(theirs)) == len(frozen(ours)) + 1
    before = tensors(ours)
    train(ours, range(4, 12), by_hand=True)
    assert len(frozen(ours)) == 16 - ADAMSS["asa_target_subspaces"]
    early = frozen(ours) & {n for n in before if torch.equal(before[n], tensors(ours)[n])}
    assert early, "what was frozen at the first cut has moved"


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": batch(i)[0], "labels": batch(i)[0]}


class VeneerTrainer(Trainer):
    """Saves and loads the adapter alone, as veneer's own trainer does."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self.model.save_pretrained(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.model.load_adapter(resume_from_checkpoint, "default", is_trainable=True)


def trainer(model: nn.Module, folder: Path) -> Trainer:
    args = TrainingArguments(
        str(folder), max_steps=12, save_steps=1, per_device_train_batch_size=4, learning_rate=0.05, report_to="none",
        use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant", logging_strategy="no",
    )  # fmt: skip
    return VeneerTrainer(model, args, train_dataset=Rows())


@pytest.mark.parametrize(("name", "at"), [("AdaLoraConfig", 5), ("AdaLoraConfig", 10), ("AdamssConfig", 5)])
def test_trainer_runs_it_and_resumes_exactly(name: str, at: int, tmp_path: Path) -> None:
    """Before the ranks are settled, and after, when the file holds the kept triplets alone."""
    whole = make(veneer, name)
    trainer(whole, tmp_path).train()
    if name == "AdaLoraConfig":
        pattern = whole.peft_config["default"].rank_pattern
        assert sum(sum(v) for v in pattern.values()) == 2 * 4
    else:
        assert len(frozen(whole)) == 16 - ADAMSS["asa_target_subspaces"]
    again = make(veneer, name)
    trainer(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    assert same(whole, again)
    assert frozen(whole) == frozen(again)
    assert whole.peft_config["default"].get("rank_pattern") == again.peft_config["default"].get("rank_pattern")
