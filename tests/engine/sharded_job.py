"""Two gloo processes train adapters: `python sharded_job.py ddp|fsdp FOLDER METHOD...`.

Each process has half of the rows; the mean of their losses is that of one process with all rows. FOLDER gets
found.json, {method: losses, or what went wrong}, and the adapters, saved by both processes, in folders of their names.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import veneer
from veneer import registry
from veneer.docs.facts import settings
from veneer.docs.layers import language_model
from veneer.sharded import whole

STEPS = 3


def adapted(method: str) -> Any:
    torch.manual_seed(0)
    base = language_model()
    torch.manual_seed(1)
    options = settings(registry.method(method))
    return veneer.get_peft_model(base, registry.config_class(method)(task_type="CAUSAL_LM", **options))


def rows() -> torch.Tensor:
    return (torch.arange(4 * 8).reshape(4, 8) * 7) % 30


def train(model: Any, batch: torch.Tensor) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def shard(model: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def run(way: str, method: str, folder: str, rank: int) -> list[float]:
    model = adapted(method)
    batch = rows()[2 * rank : 2 * rank + 2]
    if way == "ddp":
        losses = torch.tensor(train(torch.nn.parallel.DistributedDataParallel(model), batch))
        model.save_pretrained(folder, is_main_process=rank == 0)
    else:
        shard(model)
        losses = torch.tensor(train(model, batch))
        model.save_pretrained(folder)
        dist.barrier()
        again = adapted(method)
        shard(again)
        again.load_adapter(folder, "default", is_trainable=True)
        mine, read = (whole(veneer.get_peft_model_state_dict(m)) for m in (model, again))
        for name, value in mine.items():
            if not torch.allclose(value, read[name], rtol=1e-6, atol=1e-7):
                raise ValueError(f"{name} came back with other values")
    dist.all_reduce(losses)
    return (losses / 2).tolist()


def work(rank: int, way: str, folder: str, methods: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    for method in methods:
        try:
            found[method] = run(way, method, f"{folder}/{method}", rank)
        except (RuntimeError, ValueError, NotImplementedError, TypeError, KeyError, AttributeError):
            found[method] = traceback.format_exc()
        if rank == 0:
            Path(folder, "found.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.multiprocessing.spawn(work, args=(sys.argv[1], sys.argv[2], sys.argv[3:]), nprocs=2)
