"""Evaluation on Ray: one model per GPU (or per machine without any) of a cluster, samples shared out among them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Collection, Iterable, Iterator
from types import TracebackType
from typing import Any

from ..errors import UserError
from .answering import Answered, Batch, LocalAnswerer
from .shards import MAX_LOSSES, LostShardError, share_out
from .variants import Variant

LOCAL = "local"
_CONNECT_S = 5.0


class RayShards:
    """Answers on the shards of a Ray cluster (an `Answerer`, and the `Shards` that it shares out to).

    Use as a context manager: leaving it ends the shards.

    Args:
        address: of a running cluster ("auto", "10.0.0.1:6379", "ray://…"), or "local" to use this machine alone.
        make: builds what answers, in each shard; must be picklable, and what it names must be there on all machines.
        provenance: facts of this run, for samples that no shard came back from.
        num_shards: None = one per GPU, or one per machine where there is none.

    Raises:
        UserError: Ray is not installed, the cluster can't be reached or is too small.
    """

    def __init__(
        self,
        address: str,
        make: Callable[[], LocalAnswerer],
        provenance: dict[str, Any],
        num_shards: int | None = None,
    ) -> None:
        self._ray = _connected(address)
        try:
            self._resources, self.num_shards = _plan(self._ray, num_shards)
        except UserError:
            self._ray.shutdown()
            raise
        self._make = make
        self._provenance = provenance
        self._workers = [self._worker() for _ in range(self.num_shards)]

    def facts(self, variant: Variant) -> dict[str, Any]:
        """See `Answerer`."""
        for _ in range(MAX_LOSSES):
            try:
                found: dict[str, Any] = self._get(self._workers[0].facts.remote(variant))
                return found
            except LostShardError as error:
                lost = error
                self.replace(0)
        raise lost

    def answers(self, variant: Variant, batches: Iterable[Batch]) -> Iterator[list[Answered]]:
        """See `Answerer`."""
        return share_out(self, variant, batches, self._provenance)

    def start(self, shard: int, variant: Variant, batch: Batch) -> Any:
        """See `Shards`."""
        return self._workers[shard].answer.remote(variant, list(batch))

    def wait(self, tickets: Collection[Any]) -> Any:
        """See `Shards`."""
        ready, _ = self._ray.wait(list(tickets), num_returns=1)
        return ready[0]

    def result(self, ticket: Any) -> list[Answered]:
        """See `Shards`."""
        found: list[Answered] = self._get(ticket)
        return found

    def replace(self, shard: int) -> None:
        """See `Shards`."""
        self._workers[shard] = self._worker()

    def __enter__(self) -> RayShards:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ray.shutdown()

    def _worker(self) -> Any:
        return self._ray.remote(ShardWorker).options(**self._resources).remote(self._make)

    def _get(self, reference: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except errors.RayTaskError as error:
            raise (error.cause or error) from None
        except errors.RayError as error:
            raise LostShardError(f"the shard was lost ({type(error).__name__})") from None


class ShardWorker:
    """What runs in a shard: one model, opened with the first request so that its errors come back as answers do."""

    def __init__(self, make: Callable[[], LocalAnswerer]) -> None:
        self._make = make
        self._answerer: LocalAnswerer | None = None

    def facts(self, variant: Variant) -> dict[str, Any]:
        """Facts of a variant."""
        return self._opened().facts(variant)

    def answer(self, variant: Variant, batch: Batch) -> list[Answered]:
        """Answers of one batch."""
        return self._opened().answer(variant, batch)

    def _opened(self) -> LocalAnswerer:
        if self._answerer is None:
            self._answerer = self._make()
        return self._answerer


def _connected(address: str) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster started here reports to nobody
    try:
        import ray
    except ImportError:
        raise UserError("--ray needs Ray: pip install 'retrolm[ray]'.") from None
    _require_listener(address)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "ignore_reinit_error": False}
    try:
        if address == LOCAL:
            ray.init(address="local", include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"No Ray cluster can be used at {address!r} ({reason}). Give its address, or local.") from None
    return ray


def _require_listener(address: str) -> None:
    """Raise `UserError` where nobody listens at HOST:PORT or ray://HOST:PORT, which Ray itself finds out in minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), _CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"No Ray cluster can be used at {address!r} ({error}). Give its address, or local.") from None


def _plan(ray: Any, num_shards: int | None) -> tuple[dict[str, float], int]:
    """Resources of a shard, and the number of shards; raises `UserError` if the cluster is too small."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return shard_resources([(node.get("CPU", 0), node.get("GPU", 0)) for node in nodes], num_shards)


def shard_resources(nodes: list[tuple[float, float]], num_shards: int | None) -> tuple[dict[str, float], int]:
    """Share out machines of (CPUs, GPUs) each.

    Returns:
        What each shard takes ({"num_cpus", "num_gpus"}), and the number of shards.

    Raises `UserError` for more shards than GPUs, or than CPUs where there are no GPUs.
    """
    num_gpus, num_cpus = (int(sum(node[kind] for node in nodes)) for kind in (1, 0))
    wanted = num_shards or num_gpus or len(nodes)
    if (num_gpus and wanted > num_gpus) or wanted > num_cpus:
        there = f"{num_gpus} GPUs" if num_gpus else f"{num_cpus} CPUs"
        raise UserError(f"--shards {wanted} is more than the cluster's {there}. Ask for fewer.")
    per_node = -(-wanted // len(nodes))
    cpus = 1 if num_gpus else max(1, int(min(cpus for cpus, _ in nodes)) // per_node)
    return {"num_cpus": cpus, "num_gpus": 1 if num_gpus else 0}, wanted
