"""A frozen backbone whose decoder layers are spread over the processes of a run (torch's `fully_shard`, FSDP2)."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from ..errors import UserError


def shard_layers(model: Any, mesh: DeviceMesh, device: torch.device, reshard: bool = True) -> None:
    """Leave each process its part of every decoder layer's matrices, and freeze the model.

    A layer is put together for its forward and its backward pass. Embedding, head, norms and biases stay whole in every
    process, since they are read outside of these.

    Args:
        model: on the host, whole in every process. mesh: all processes. device: this process's.
        reshard: take a layer apart again after its forward pass.

    Raises:
        UserError: the weights are quantised.
    """
    if getattr(model, "is_quantized", False):
        raise UserError(
            "A quantised backbone can't be sharded by FSDP. Take the model itself, or train data-parallel, "
            "where each process holds the whole (configs/accelerate/data-parallel.yaml)."
        )
    model.requires_grad_(False)
    decoder = model.get_decoder()
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": reshard}
    for layer in decoder.layers:
        vectors = {value for value in layer.parameters() if value.dim() < 2}
        fully_shard(layer, ignored_params=vectors, **options)
    # The decoder holds no part of its own, but lets a layer be fetched while the one before it computes.
    whole = {value for value in decoder.parameters() if not isinstance(value, DTensor)}
    fully_shard(decoder, ignored_params=whole, **options)
    for value in (*model.parameters(), *model.buffers()):
        if not isinstance(value, DTensor):
            value.data = value.data.to(device)


def is_sharded(model: Any) -> bool:
    """Whether `shard_layers` was called: a forward pass is then one of all processes, which must each make as many."""
    return isinstance(model.get_decoder(), FSDPModule)
