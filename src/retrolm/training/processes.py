"""The group of processes a run is shared by, through accelerate.

Under FSDP2 only the frozen backbone is sharded. What is trained is small beside it, stays whole in every process and is
trained data-parallel, so checkpoints and artefacts are those of any run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from torch.distributed.device_mesh import init_device_mesh

from ..engine.model import RetroLM
from ..engine.sharding import is_sharded, shard_layers
from ..errors import UserError
from .run_log import require_trackers

DATA_PARALLEL = "configs/accelerate/data-parallel.yaml"
SHARDED = "configs/accelerate/fsdp2.yaml"
_FSDP = "ACCELERATE_USE_FSDP"


def join() -> PartialState:
    """Join the processes this one was launched with; its GPU becomes the current one, where models are put.

    Raises:
        UserError: launched for a way of sharing that isn't supported.
    """
    _check_launch()
    return PartialState(cpu=_is_set("ACCELERATE_USE_CPU"))


def backbone_place() -> Callable[[Any], None] | None:
    """What spreads a loaded backbone over the processes, or None: each loads the whole. Joins; raises as `join`."""
    state = join()
    if not _shards(state):
        return None
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # or transformers would load nothing but in one process
    mesh = init_device_mesh(state.device.type, (state.num_processes,))
    reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true"
    return partial(shard_layers, mesh=mesh, device=state.device, reshard=reshard)


def new_accelerator(lm: RetroLM, trackers: Sequence[Any], out: Path, find_unused: bool) -> Accelerator:
    """An accelerator with these trackers for what is trained on `lm`.

    Args:
        find_unused: some trained weights may get no gradient in a step.

    Raises:
        UserError: a tracker that is unknown or not installed; a launch that isn't supported, or that is to shard the
        backbone, which is whole.
    """
    if _shards(join()) and not is_sharded(lm.model):
        raise UserError("The run was launched to shard the backbone, which is whole. Load it with `load_backbone`.")
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=find_unused)]
    try:
        with _without_fsdp():
            accelerator = Accelerator(log_with=list(trackers) or None, project_dir=out, kwargs_handlers=handlers)
    except ValueError as error:
        raise UserError(f"Unknown tracker in {', '.join(map(str, trackers))}: {error}") from None
    require_trackers(accelerator, trackers)
    return accelerator


def require_whole(lm: RetroLM, option: str) -> None:
    """Raise `UserError` if the backbone is sharded, which `option` doesn't work with."""
    if is_sharded(lm.model):
        raise UserError(f"{option} doesn't work with a backbone sharded by FSDP. Leave it out, or use {DATA_PARALLEL}.")


def own_share(accumulate: int, num_processes: int) -> int:
    """Forward passes of each process per step; raises `UserError` if they can't be shared evenly."""
    if accumulate % num_processes:
        raise UserError(
            f"accumulate={accumulate} forward passes can't be shared by {num_processes} processes. "
            f"Use a multiple of {num_processes}: --set accumulate={num_processes}"
        )
    return accumulate // num_processes


def _check_launch() -> None:
    works = f"Launch with {DATA_PARALLEL}, or with {SHARDED} for a backbone too large for one GPU."
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        raise UserError(f"Training under DeepSpeed isn't supported. {works}")
    if not _is_set(_FSDP):
        return
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise UserError(f"Training under FSDP {version} isn't supported, only under FSDP 2. {works}")
    if _is_set("FSDP_OFFLOAD_PARAMS"):
        raise UserError(f"fsdp_offload_params isn't supported. Set it to false, as in {SHARDED}.")


def _shards(state: PartialState) -> bool:
    return _is_set(_FSDP) and state.num_processes > 1


@contextmanager
def _without_fsdp() -> Iterator[None]:
    """Let accelerate see a data-parallel run, or it would shard what is trained and nothing else."""
    asked = os.environ.pop(_FSDP, None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ[_FSDP] = asked


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true")
