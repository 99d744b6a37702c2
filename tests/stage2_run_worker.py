"""A stage-2 run in a process of its own: `python stage2_run_worker.py DATA OUT [key=value …]`; prints each step."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from stage2_run_maker import tiny_stage2_trainer


def main(documents: str, out: str, *settings: str) -> None:
    """Go on from the checkpoint in `out`, or start; the last line printed says how many processes took part."""
    pairs = (setting.split("=") for setting in settings)
    changes: dict[str, Any] = {key: json.loads(value) for key, value in pairs}
    trainer = tiny_stage2_trainer(Path(out), Path(documents), **changes)
    trainer.on_row = lambda row: print(row["step"], flush=True)
    trainer.run(resume=True)
    if trainer.accelerator.is_main_process:
        print(f"processes {trainer.accelerator.num_processes}", flush=True)
    trainer.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
