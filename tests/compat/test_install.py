"""veneer under the name `peft`: each test in a process of its own, since imports are what it is about."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path


def run(code: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


SCRIPT = """
    import veneer.compat
    veneer.compat.install()
    import peft, torch, os
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
    import veneer
    assert peft.PeftModel is veneer.PeftModel

    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )
    def trainer(steps):
        torch.manual_seed(0)
        model = get_peft_model(
            LlamaForCausalLM(config), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
        )
        rows = [{"input_ids": torch.arange(i, i + 8) % 40, "labels": torch.arange(i, i + 8) % 40} for i in range(32)]
        args = TrainingArguments(
            "out", max_steps=steps, save_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
            disable_tqdm=True, seed=0, use_cpu=True, logging_steps=1, lr_scheduler_type="constant",
        )
        return Trainer(model, args, train_dataset=rows)
"""


def test_trainer_saves_the_adapter_alone_and_resumes(tmp_path: Path) -> None:
    code = (
        SCRIPT
        + """
    whole = trainer(8); whole.train()
    files = set(os.listdir("out/checkpoint-4"))
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files, files
    again = trainer(8); again.train(resume_from_checkpoint="out/checkpoint-4")
    for (n, a), (_, b) in zip(whole.model.named_parameters(), again.model.named_parameters()):
        assert torch.equal(a, b), n
    print("ok")
    """
    )
    assert run(code, tmp_path).strip().endswith("ok")


def test_too_late_is_an_error(tmp_path: Path) -> None:
    code = """
    import transformers.trainer_utils, veneer.compat
    try:
        veneer.compat.install()
    except ValueError as e:
        print(e)
    """
    assert "call veneer.compat.install() before" in run(code, tmp_path)


def test_uninstall(tmp_path: Path) -> None:
    code = """
    import sys, veneer.compat
    veneer.compat.install(); veneer.compat.install()
    import peft
    assert peft.__version__ and peft.LoraConfig is veneer.LoraConfig
    veneer.compat.uninstall()
    print("peft" in sys.modules)
    """
    assert run(code, tmp_path).strip() == "False"
