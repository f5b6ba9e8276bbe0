"""The public names: they resolve, they are peft's where peft has them, and importing them costs nothing extra."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest

import veneer

OWN = {
    "AdapterError",
    "CannotMerge",
    "LoadError",
    "LoadReport",
    "PeftWarning",
    "matrices",
    "Matrices",
    "LayerwiseHandoff",
    "hand_off",
    "CordaConfig",  # peft has these four inside peft.tuners.lora
    "LoraGAConfig",
    "preprocess_corda",
    "reduce_intruder_dimension",  # and these in peft.tuners.lora.intruders and peft.utils.hotswap
    "hotswap_adapter",
    "prepare_model_for_compiled_hotswap",
    "base_kernels",
    "__version__",
}

SCRIPT = """
import torch
import veneer as peft
from veneer import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
base = LlamaForCausalLM(LlamaConfig(**sizes))
base.save_pretrained("base")
config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, lora_alpha=16, lora_dropout=0.1, bias="none")
model = get_peft_model(LlamaForCausalLM.from_pretrained("base"), config)
model.print_trainable_parameters()
ids = torch.randint(0, 40, (2, 6))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
losses = []
for _ in range(8):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
model.eval()
expected = model(input_ids=ids).logits
model.save_pretrained("adapter")
assert PeftConfig.from_pretrained("adapter").peft_type == peft.PeftType.LORA
loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("base"), "adapter")
assert torch.allclose(loaded(input_ids=ids).logits, expected, atol=1e-6)
auto = peft.AutoPeftModelForCausalLM.from_pretrained("adapter")
assert torch.allclose(auto(input_ids=ids).logits, expected, atol=1e-6)
merged = loaded.merge_and_unload()
assert torch.allclose(merged(input_ids=ids).logits, expected, atol=1e-5)
print("done", sorted(peft.get_peft_model_state_dict(model))[0])
"""


def python(code: str, cwd: Path | None = None) -> str:
    import veneer as package

    source = str(Path(package.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": source, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_public_name_resolves() -> None:
    assert len(veneer.__all__) == len(set(veneer.__all__))
    for name in veneer.__all__:
        assert getattr(veneer, name) is not None, name
    assert set(veneer.__all__) <= set(dir(veneer))


def test_names_are_pefts() -> None:
    """Whatever is not on the list of veneer's own names is a name of peft, of the same kind."""
    for name in set(veneer.__all__) - OWN:
        assert hasattr(peft, name), f"{name} is neither peft's nor listed as veneer's own"
        assert isinstance(getattr(veneer, name), type) == isinstance(getattr(peft, name), type), name
        assert callable(getattr(veneer, name)) == callable(getattr(peft, name)), name


def test_everyday_names_of_peft_are_here() -> None:
    wanted = {
        "AutoPeftModel",
        "AutoPeftModelForCausalLM",
        "AutoPeftModelForFeatureExtraction",
        "AutoPeftModelForQuestionAnswering",
        "AutoPeftModelForSeq2SeqLM",
        "AutoPeftModelForSequenceClassification",
        "AutoPeftModelForTokenClassification",
        "IA3Config",
        "LNTuningConfig",
        "LoHaConfig",
        "LoraConfig",
        "OFTConfig",
        "PeftConfig",
        "PeftMixedModel",
        "PeftModel",
        "PeftModelForCausalLM",
        "PeftModelForFeatureExtraction",
        "PeftModelForQuestionAnswering",
        "PeftModelForSeq2SeqLM",
        "PeftModelForSequenceClassification",
        "PeftModelForTokenClassification",
        "PeftType",
        "PrefixTuningConfig",
        "PromptLearningConfig",
        "PromptTuningConfig",
        "PromptTuningInit",
        "TaskType",
        "TrainableTokensConfig",
        "VeraConfig",
        "get_layer_status",
        "get_model_status",
        "get_peft_config",
        "get_peft_model",
        "get_peft_model_state_dict",
        "inject_adapter_in_model",
        "load_peft_weights",
        "set_peft_model_state_dict",
        "PEFT_TYPE_TO_CONFIG_MAPPING",
        "cast_mixed_precision_params",
    }
    assert wanted <= set(dir(peft))
    assert wanted <= set(dir(veneer))


def test_an_unknown_name_says_so() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LoraConfg'"):
        veneer.LoraConfg  # noqa: B018


def test_enums_are_pefts() -> None:
    assert {t.name: t.value for t in veneer.TaskType} == {t.name: t.value for t in peft.TaskType}
    theirs = {t.name: t.value for t in peft.PeftType}
    assert all(theirs[t.name] == t.value for t in veneer.PeftType)
    assert str(veneer.TaskType.CAUSAL_LM) == str(peft.TaskType.CAUSAL_LM)
    assert f"{veneer.PeftType.LORA}" == f"{peft.PeftType.LORA}"


def test_importing_veneer_is_light() -> None:
    code = "import sys, veneer; print([m for m in ('torch', 'transformers', 'datasets', 'peft') if m in sys.modules])"
    assert python(code).strip() in ("[]", "['torch']")


def test_lora_needs_no_transformers() -> None:
    code = (
        "import sys, torch, veneer\n"
        "net = torch.nn.Sequential(torch.nn.Linear(4, 3))\n"
        "m = veneer.get_peft_model(net, veneer.LoraConfig(target_modules=['0']))\n"
        "m(torch.ones(1, 4)); m.merge_and_unload()\n"
        "print([x for x in ('transformers', 'datasets', 'peft') if x in sys.modules])"
    )
    assert python(code).strip() == "[]"


def test_a_peft_script_runs_with_one_import_changed(tmp_path: Path) -> None:
    out = python(SCRIPT, cwd=tmp_path)
    assert out.startswith("trainable params: ")
    assert out.splitlines()[-1] == "done base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
