"""veneer under the name `peft`: each test in a process of its own, since imports are what it is about."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import veneer

SRC = str(Path(veneer.__file__).parents[1])


def start(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([SRC, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )


def run(code: str, folder: Path) -> str:
    done = start("-c", textwrap.dedent(code), folder=folder)
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


def test_transformers_own_adapter_methods(tmp_path: Path) -> None:
    code = """
    import veneer.compat
    veneer.compat.install()
    import torch
    from peft import LoraConfig
    from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    ids = torch.arange(6)[None]
    base = model(ids).logits
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted = model(ids).logits
    assert not torch.allclose(base, adapted)
    assert model.active_adapters() == ["default"]
    model.disable_adapters()
    assert torch.equal(model(ids).logits, base)
    model.enable_adapters()
    assert torch.equal(model(ids).logits, adapted)
    model.save_pretrained("saved")
    import os
    assert "adapter_model.safetensors" in os.listdir("saved"), os.listdir("saved")
    model.add_adapter(LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False), "second")
    model.set_adapter("second")
    assert not torch.allclose(model(ids).logits, adapted)
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(model(ids).logits, adapted)

    torch.manual_seed(0)
    other = LlamaForCausalLM(config).eval()
    other.load_adapter("saved")
    assert torch.allclose(other(ids).logits, adapted, atol=1e-5)
    print("ok")
    """
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


def test_an_imported_peft_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    code = """
    import sys, types, veneer.compat
    sys.modules["peft"] = types.ModuleType("peft")
    try:
        veneer.compat.install()
    except ValueError as e:
        print(e)
    print(veneer.compat.installed())
    """
    out = run(code, tmp_path)
    assert "peft is imported already" in out
    assert "python -m veneer.compat script.py" in out
    assert out.endswith("False\n")


def test_uninstall(tmp_path: Path) -> None:
    code = """
    import sys, veneer.compat
    veneer.compat.install(); veneer.compat.install()
    import peft, peft.tuners.lora.layer
    assert peft.__version__ and peft.LoraConfig is veneer.LoraConfig
    veneer.compat.uninstall()
    print([n for n in sys.modules if n.split(".")[0] == "peft"], veneer.compat.installed())
    """
    assert run(code, tmp_path).strip() == "[] False"


def test_version_spec_and_metadata(tmp_path: Path) -> None:
    code = """
    import importlib.metadata, importlib.util, veneer.compat
    veneer.compat.install()
    from transformers.utils import is_peft_available
    import peft
    assert is_peft_available()
    assert importlib.util.find_spec("peft").name == "peft"
    assert importlib.util.find_spec("peft.tuners.lora") is not None
    assert importlib.metadata.version("peft") == peft.__version__ == "0.21.2"
    assert importlib.metadata.metadata("peft")["Name"] == "peft"
    assert "peft" in importlib.metadata.packages_distributions()
    try:
        import peft.nowhere
    except ModuleNotFoundError as e:
        assert e.name == "peft.nowhere"
    else:
        raise AssertionError
    try:
        from peft.utils import nothing_of_that_name
    except ImportError as e:
        assert "nothing_of_that_name" in str(e)
    else:
        raise AssertionError
    print("ok")
    """
    assert run(code, tmp_path).strip() == "ok"


@pytest.mark.parametrize("how", ["module", "command"])
def test_an_unmodified_script_runs(how: str, tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("NAME = 'beside'\n")
    (tmp_path / "script.py").write_text(
        textwrap.dedent("""
        import sys
        import peft, beside
        from peft.tuners.tuners_utils import BaseTunerLayer
        assert __name__ == "__main__"
        print(peft.LoraConfig.__module__, sys.argv[1:], beside.NAME)
        """)
    )
    by = ("-m", "veneer.compat") if how == "module" else ("-m", "veneer", "run-as-peft")
    done = start(*by, "script.py", "--lr", "0.1", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "veneer.methods.lora ['--lr', '0.1'] beside"


def test_a_missing_script_is_said(tmp_path: Path) -> None:
    done = start("-m", "veneer.compat", "nowhere.py", folder=tmp_path)
    assert done.returncode == 2
    assert "nowhere.py: no such script" in done.stderr
