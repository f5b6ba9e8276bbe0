"""Two gloo processes train recipes: `torchrun --nproc-per-node 2 processes_job.py FILE`.

FILE is JSON: {name: {"recipe": flags, "stop": a step or null}}. A run with a step to stop at is ended there, where a
signal could, and started again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from veneer.train import load_recipe, processes, run


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def main() -> None:
    processes.begin()
    for name, job in json.loads(Path(sys.argv[1]).read_text()).items():
        if job["stop"]:
            try:
                run(load_recipe(None, **job["recipe"]), callbacks=[StopAt(job["stop"])])
            except KeyboardInterrupt:
                processes.wait()
        result = run(load_recipe(None, **job["recipe"]))
        told = processes.from_main(result.after)
        assert told == result.after, name
    processes.end()


if __name__ == "__main__":
    main()
