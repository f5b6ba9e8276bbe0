"""Handing A on: the copy, the adapter-by-adapter chain, the stages of one adapter, and a training run."""

from __future__ import annotations

import copy
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from veneer import LayerwiseHandoff, get_peft_model, hand_off
from veneer.errors import AdapterError, PeftWarning
from veneer.handoff_stages import Stages
from veneer.methods.ia3 import IA3Config
from veneer.methods.lora import LoraConfig
from veneer.tuner import Tuner

BLOCKS = 3
Q, V = "model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.v_proj"


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=17, hidden_size=16, intermediate_size=24, num_hidden_layers=BLOCKS,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.3,
        )
    )  # fmt: skip


def lora(**more: Any) -> LoraConfig:
    return LoraConfig(
        **{"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], "r": 2, "lora_alpha": 8, **more}
    )


def layers(model: Any) -> dict[str, Any]:
    return {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "lora_A")}


def a(model: Any, path: str, adapter: str = "default") -> torch.Tensor:
    return layers(model)[path].lora_A[adapter].weight


def train_b(model: Any, adapter: str = "default") -> None:
    for layer in layers(model).values():
        if adapter in layer.lora_B:
            nn.init.normal_(layer.lora_B[adapter].weight)


IDS = torch.arange(12).reshape(2, 6)


# -- the copy ------------------------------------------------------------------------------------------------
def test_hand_off_copies_and_keeps_the_function() -> None:
    model = get_peft_model(llama(), lora())
    before = model(IDS).logits
    assert hand_off(model, "default", Q.format(0), Q.format(2)) == ["lora_A.weight"]
    assert torch.equal(a(model, Q.format(0)), a(model, Q.format(2)))
    assert not torch.equal(a(model, Q.format(0)), a(model, Q.format(1)))
    assert a(model, Q.format(0)) is not a(model, Q.format(2))
    assert torch.equal(model(IDS).logits, before)
    train_b(model)
    both = hand_off(model, "default", "0.self_attn.q_proj", "1.self_attn.v_proj", tensors=["lora_A", "lora_B"])
    assert both == ["lora_A.weight", "lora_B.weight"]
    first, second = layers(model)[Q.format(0)], layers(model)[V.format(1)]
    torch.testing.assert_close(first.delta("default"), second.delta("default"))


@pytest.mark.parametrize(
    ("args", "more", "says"),
    [
        (("default", "lm_haed", Q.format(0)), {}, "no adapted layer 'lm_haed'"),
        (("default", "q_proj", Q.format(0)), {}, "'q_proj' fits 3 layers"),
        (("default", Q.format(0), "model.layers.0.mlp.down_proj"), {}, r"shapes \(2, 16\) and \(2, 24\)"),
        (("other", Q.format(0), Q.format(1)), {}, "has no adapter 'other'; it has: 'default'"),
        (
            ("default", Q.format(0), Q.format(1)),
            {"tensors": "lora_Z"},
            "no tensor 'lora_Z'; it trains: lora_A, lora_B",
        ),
    ],
)
def test_hand_off_says_what_is_wrong(args: tuple[str, str, str], more: dict[str, Any], says: str) -> None:
    model = get_peft_model(llama(), lora(target_modules=["q_proj", "v_proj", "down_proj"]))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(AdapterError, match=says):
        hand_off(model, *args, **more)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# -- one adapter a stage -------------------------------------------------------------------------------------
def test_a_new_adapter_starts_from_the_layer_before() -> None:
    model = get_peft_model(llama(), lora(target_modules=["q_proj"], layers_to_transform=[0, 1]), "first")
    train_b(model, "first")
    y = model(IDS).logits
    model.add_adapter("second", lora(layers_to_transform=[1, 2], handoff=True))
    assert torch.equal(a(model, Q.format(1), "second"), a(model, Q.format(0), "first"))
    assert torch.equal(a(model, Q.format(2), "second"), a(model, Q.format(1), "first"))
    assert not torch.equal(a(model, V.format(1), "second"), a(model, Q.format(0), "first"))  # no v_proj before it
    model.set_adapter("second")
    with model.disable_adapter():
        base = model(IDS).logits
    torch.testing.assert_close(model(IDS).logits, base)
    model.base_model.set_adapter(["first", "second"])
    torch.testing.assert_close(model(IDS).logits, y)


def test_the_latest_trained_adapter_gives() -> None:
    t = Tuner(llama(), lora(layers_to_transform=[0]), "old")
    t.add_adapter("new", lora(layers_to_transform=[0]))
    t.add_adapter("untrained", lora(layers_to_transform=[0, 1]))
    train_b(t.model, "old")
    train_b(t.model, "new")
    t.add_adapter("next", lora(layers_to_transform=[2], handoff=True))
    assert torch.equal(a(t.model, Q.format(2), "next"), a(t.model, Q.format(0), "new"))


def test_nothing_to_receive_is_said() -> None:
    t = Tuner(llama(), lora(layers_to_transform=[2]), "first")
    train_b(t.model, "first")
    with pytest.warns(PeftWarning, match="'second' received nothing"):
        t.add_adapter("second", lora(layers_to_transform=[0], handoff=True))


def test_refusals() -> None:
    with pytest.raises(AdapterError, match="handoff cannot be used with init_lora_weights='pissa'"):
        Tuner(llama(), lora(init_lora_weights="pissa", handoff=True))
    t = Tuner(llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "a")
    with pytest.raises(AdapterError, match="IA3 trains no A that could be handed on; it trains: ia3_l"):
        t.add_adapter("b", IA3Config(target_modules=["q_proj"], feedforward_modules=[], handoff=True))
    assert list(t.peft_config) == ["a"]
    with pytest.raises(AdapterError, match="share a tensor"):
        Stages(Tuner(llama(), lora(share={"lora_A": "all"})))
    made = Tuner(llama(), lora(init_lora_weights=False))
    with pytest.raises(AdapterError, match="is trained already"):
        Stages(made).begin()


# -- the stages of one adapter -------------------------------------------------------------------------
def trainable(model: Any) -> list[int]:
    """Blocks whose adapter tensors train."""
    return sorted(
        {int(n.split("layers.")[1][0]) for n, p in model.named_parameters() if p.requires_grad and "lora_" in n}
    )


@pytest.mark.parametrize("keep", [False, True])
def test_stages_in_a_loop_of_ones_own(keep: bool) -> None:
    model = get_peft_model(llama(), lora())
    stages = Stages(model, keep_training=keep)
    assert len(stages) == BLOCKS
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    stages.begin()
    for i in range(BLOCKS):
        assert trainable(model) == (list(range(i + 1)) if keep else [i])
        before = {p: a(model, p).clone() for p in layers(model)}
        for _ in range(3):
            optimizer.zero_grad()
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()
        moved = {int(p.split(".")[2]) for p in before if not torch.equal(before[p], a(model, p))}
        assert moved == set(trainable(model))
        y = model(IDS).logits
        assert stages.advance() == (i + 1 < BLOCKS)
        assert torch.equal(model(IDS).logits, y)
        if i + 1 < BLOCKS:
            assert torch.equal(a(model, Q.format(i + 1)), a(model, Q.format(i)))
            assert torch.equal(a(model, V.format(i + 1)), a(model, V.format(i)))
    stages.release()
    assert trainable(model) == list(range(BLOCKS))
    assert stages.handed == [(n.format(i), n.format(i + 1)) for i in range(BLOCKS - 1) for n in (Q, V)]


class Counting(Dataset):
    """Rows that count up, so that there is something to learn."""

    def __init__(self, rows: int = 24) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(8) + i) % 17
        return {"input_ids": ids, "labels": ids}


def run(model: Any, folder: Path, callback: Any, **more: Any) -> Trainer:
    settings = {"max_steps": 36, **more}
    args = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=8, learning_rate=2e-2,
        lr_scheduler_type="constant", logging_steps=4, save_strategy="no", report_to="none", use_cpu=True,
        disable_tqdm=True, seed=0, **settings,
    )  # fmt: skip
    trainer = Trainer(model=model, args=args, train_dataset=Counting(), callbacks=[callback])
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "more", [{"steps_per_stage": 12}, {}, {"epochs_per_stage": 4}], ids=["steps", "even", "epochs"]
)
def test_a_training_run(tmp_path: Path, more: dict[str, int]) -> None:
    model = get_peft_model(llama(), lora())
    seen: list[list[int]] = []

    class Watched(LayerwiseHandoff):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(trainable(model))

    callback = Watched(model, **more)
    trainer = run(
        model,
        tmp_path,
        callback,
        **({"max_steps": -1, "num_train_epochs": 12} if "epochs_per_stage" in more else {}),
    )
    assert seen == [[0]] * 12 + [[1]] * 12 + [[2]] * 12
    assert len(callback.stages.handed) == 4
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    assert losses[3] < losses[0]
    assert min(losses[3:6]) < losses[2]  # the second stage goes on from where the first ended
    assert trainable(model) == list(range(BLOCKS))


def test_a_run_too_short_says_so_and_bad_settings(tmp_path: Path) -> None:
    model = get_peft_model(llama(), lora())
    with pytest.warns(PeftWarning, match="ends in stage 2 of 3"):
        run(model, tmp_path, LayerwiseHandoff(model, steps_per_stage=2), max_steps=4)
    with pytest.raises(AdapterError, match="not both"):
        LayerwiseHandoff(model, steps_per_stage=1, epochs_per_stage=1)
    with pytest.raises(AdapterError, match="steps_per_stage=0"):
        LayerwiseHandoff(model, steps_per_stage=0)


def test_a_resumed_run_goes_on_in_its_stage(tmp_path: Path) -> None:
    model = get_peft_model(llama(), lora())
    callback = LayerwiseHandoff(model, steps_per_stage=5)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    callback.on_train_begin(args, TrainerState(global_step=7, max_steps=15), TrainerControl())
    assert trainable(model) == [1]
    assert callback.stages.handed == []
    callback.on_step_end(args, TrainerState(global_step=10, max_steps=15), TrainerControl())
    assert trainable(model) == [2]
    by_epoch = LayerwiseHandoff(model, epochs_per_stage=2)
    by_epoch.on_train_begin(args, TrainerState(epoch=3.5, num_train_epochs=6), TrainerControl())
    assert trainable(model) == [1]


def test_an_optimizer_without_all_tensors_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(llama(), lora())
    layers(model)[Q.format(2)].lora_A["default"].weight.requires_grad_(False)
    with pytest.raises(AdapterError, match="does not hold all tensors"):
        run(model, tmp_path, LayerwiseHandoff(model), max_steps=3)


def test_importing_the_module_does_not_import_transformers() -> None:
    code = "import sys, veneer.handoff, veneer.share, veneer.combine; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[2] / "examples" / "handoff.py"
    losses = runpy.run_path(str(path))["main"]()
    assert losses[-1] < 0.7 * losses[0]
    assert "model.layers.0.self_attn.v_proj -> model.layers.1.self_attn.v_proj" in capsys.readouterr().out
