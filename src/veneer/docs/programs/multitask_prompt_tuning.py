import torch
from transformers import LlamaConfig, LlamaForCausalLM

from veneer import MultitaskPromptTuningConfig, get_peft_model

base = LlamaForCausalLM(
    LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
)
config = MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8, num_tasks=3)
model = get_peft_model(base, config)
model.print_trainable_parameters()

ids = torch.randint(1, 128, (4, 16))
tasks = torch.tensor([0, 2, 1, 0])  # the task of each row
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
for _ in range(3):
    model(input_ids=ids, labels=ids, task_ids=tasks).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
model.save_pretrained("adapter")

model.eval()
logits = model(input_ids=ids, task_ids=tasks).logits
