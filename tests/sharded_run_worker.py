"""Runs of a process that accelerate launched: `python sharded_run_worker.py FOLDER OUT`.

Each training runs in one go, and in two parts; the checkpoint in between is kept for a third run. What share of the
layers' matrices a process holds is written to `OUT/TRAINING.PROCESS`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from torch.distributed.tensor import DTensor

from sharded_run_maker import RUNS


def main(folder: Path, out: Path) -> None:
    for name, run in RUNS.items():
        trainer = run(folder, out / "whole" / name)
        trainer.run()
        (out / f"{name}.{trainer.accelerator.process_index}").write_text(str(held(trainer)))
        first = run(folder, out / "parts" / name)
        first.run(stop_after_s=1e-9)
        if first.accelerator.is_main_process:
            shutil.copytree(out / "parts" / name, out / "alone" / name)
        last = run(folder, out / "parts" / name)
        last.run(resume=True)
    last.close()


def held(trainer: Any) -> float:
    matrices = [value for value in trainer.lm.backbone.decoder.layers.parameters() if value.dim() > 1]
    own = sum(value.to_local().numel() if isinstance(value, DTensor) else value.numel() for value in matrices)
    return own / sum(value.numel() for value in matrices)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
