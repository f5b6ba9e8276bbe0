"""accelerate's `prepare` in two gloo processes, and its FSDP wrapping by peft's policy, under the name peft."""

from __future__ import annotations

import tempfile
from pathlib import Path

import peft
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import set_seed
from peft.utils.other import fsdp_auto_wrap_policy
from small import llama
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaForCausalLM

assert "veneer" in peft.__file__, peft.__file__


def adapted() -> peft.PeftModel:
    return peft.get_peft_model(
        llama(LlamaForCausalLM), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=2)
    )


def trained(accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """Three steps, each process on rows of its own; the adapter's tensors afterwards."""
    set_seed(0)
    model = adapted()
    rows = torch.arange(4 * 6).reshape(4, 6) % 20 + 4
    loader = DataLoader(TensorDataset(rows), batch_size=4 // accelerator.num_processes)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for _ in range(3):
        for (ids,) in loader:
            accelerator.backward(model(input_ids=ids, labels=ids).loss)
            optimizer.step()
            optimizer.zero_grad()
    plain = accelerator.unwrap_model(model)
    return {k: v.clone() for k, v in peft.get_peft_model_state_dict(plain).items()}


accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
assert torch.distributed.get_backend() == "gloo"
found = trained(accelerator)
for key, value in found.items():
    every = accelerator.gather(value[None])
    assert torch.equal(every[0], every[1]), f"{key} differs between the processes"
assert any(v.abs().sum() > 0 for k, v in found.items() if "lora_B" in k)

model = adapted()
plugin = FullyShardedDataParallelPlugin(auto_wrap_policy=fsdp_auto_wrap_policy(model))
policy = plugin.auto_wrap_policy
frozen, trainable = (
    model.base_model.model.model.layers[0],
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_A,
)
assert policy(module=frozen, recurse=False, nonwrapped_numel=1)
assert policy(module=trainable["default"], recurse=False, nonwrapped_numel=1)
assert not policy(module=model.base_model.model.model.embed_tokens, recurse=False, nonwrapped_numel=1)

if accelerator.is_main_process:
    with tempfile.TemporaryDirectory() as name:
        again = adapted()
        peft.set_peft_model_state_dict(again, found)
        again.save_pretrained(name)
        assert (Path(name) / "adapter_model.safetensors").is_file()
accelerator.wait_for_everyone()
accelerator.end_training()
