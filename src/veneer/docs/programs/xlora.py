import torch
from transformers import LlamaConfig, LlamaForCausalLM

from veneer import LoraConfig, XLoraConfig, get_peft_model


def base():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    )


for folder in ("experts/cooking", "experts/law"):  # trained LoRAs; these two are fresh
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    get_peft_model(base(), lora).save_pretrained(folder)

config = XLoraConfig(
    task_type="CAUSAL_LM", hidden_size=64, adapters={"cooking": "experts/cooking", "law": "experts/law"}
)
model_base = base()
model_base.config.use_cache = False
model = get_peft_model(model_base, config)
model.print_trainable_parameters()

ids = torch.randint(1, 128, (4, 16))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
for _ in range(3):
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
model.save_pretrained("adapter")
