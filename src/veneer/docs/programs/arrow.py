import torch
from transformers import LlamaConfig, LlamaForCausalLM

from veneer import ArrowConfig, LoraConfig, create_arrow_model, get_peft_model


def base():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    )


ids = torch.randint(1, 128, (4, 16))
for folder in ("adapter/cooking", "adapter/law"):  # a LoRA for each task
    model = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)

model = create_arrow_model(base(), ["adapter/cooking", "adapter/law"], ArrowConfig(top_k=2))
model.eval()
logits = model(input_ids=ids).logits
