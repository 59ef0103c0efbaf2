"""DGL's partition servers as Ray actors: one partition per host, for one attempt of one training.

A DGL server takes a fixed number of clients, once. So servers belong to one attempt of a training function: rank 0
starts them, sends :attr:`PartitionServers.address` to the other ranks, and they stop with it.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor

from recsys_ray.core.errors import ArtifactError, UserError
from recsys_ray.graph.dgl.sampling import GRAPH_JSON, LocalGraph, NodeTable, feature_key
from recsys_ray.storage.artifacts import load_arrays

_SHARED = Path("/dev/shm")
_PREFIX = "recsysray"
_PREPARE_S = 900.0


class PartitionServers:
    """The servers of one attempt. Use it as a context manager, or call :meth:`stop`.

    Args:
        graph_dir: the graph stage's folder, readable at this path on every host.
        clients: how many clients will connect; all of them must.
        hosts: Ray node ids, one a partition and no two alike; partition p is served on ``hosts[p]``. Clients have to
            run on these hosts. Default: this host, for a graph of one partition.
        features: more node features: name -> folder with ``part-*.safetensors`` (gid int64 [n], embedding [n, d]).
        on_failure: called with the error if a server dies while in use. Default: end this process, because a client
            that waits for a dead server waits for ever; Ray Train then starts the next attempt.

    Raises:
        UserError: fewer hosts than partitions, or not enough shared memory.
        ArtifactError: the graph or the features cannot be read.
    """

    def __init__(
        self,
        graph_dir: Path,
        clients: int,
        hosts: Sequence[str] | None = None,
        features: Mapping[str, Path] | None = None,
        on_failure: Callable[[Exception], None] | None = None,
    ) -> None:
        parts = count_partitions(graph_dir)
        hosts = list(dict.fromkeys(hosts or [ray.get_runtime_context().get_node_id()]))
        if len(hosts) < parts:
            raise UserError(
                f"the graph has {parts} partitions, but {len(hosts)} host(s) are available: each host serves one; "
                "set graph.partitions to the number of hosts and run graph again"
            )
        self._name = name = f"{_PREFIX}{uuid.uuid4().hex[:12]}"
        server = ray.remote(num_cpus=0, max_restarts=0)(_Server)
        self._actors: list[Any] = [
            server.options(scheduling_strategy=NodeAffinitySchedulingStrategy(host, soft=False)).remote()
            for host in hosts[:parts]
        ]
        self._stopping = threading.Event()
        self._serving: list[Any] = []
        self._on_failure = on_failure or _end_process
        try:
            places = _get([actor.reserve.remote() for actor in self._actors])
            addresses = [ip for ip, _ in places]
            if parts == 1:  # its clients are on this host. DGL unpickles what it is sent: nobody else may reach it
                places = [("127.0.0.1", port) for _, port in places]
            wanted = {key: str(folder) for key, folder in (features or {}).items()}
            arguments = (str(graph_dir), name, places, clients, wanted)
            _get([actor.prepare.remote(p, *arguments) for p, actor in enumerate(self._actors)])
        except BaseException:
            self.stop()
            raise
        self.address: str = json.dumps(
            {"name": name, "servers": places, "hosts": addresses, "features": ["text", "gid", *wanted]}
        )
        self._serving = [actor.serve.remote() for actor in self._actors]
        threading.Thread(target=self._watch, daemon=True, name="partition-servers").start()

    def _watch(self) -> None:
        waiting = list(self._serving)
        while waiting and not self._stopping.is_set():
            done, waiting = ray.wait(waiting, timeout=0.5)
            try:
                ray.get(done)
            except Exception as error:
                if not self._stopping.is_set():
                    self._on_failure(error)
                return

    def stop(self, timeout: float = 5.0) -> None:
        """End the servers; those whose clients have all left end by themselves within ``timeout`` seconds."""
        self._stopping.set()
        if self._serving:
            ray.wait(self._serving, num_returns=len(self._serving), timeout=timeout)
        for actor in self._actors:
            ray.kill(actor)
        lock = _SHARED / f"{self._name}.lock"
        for _ in range(20):  # a killed server of this host holds its lock a moment longer
            remove_leftovers()
            if not lock.exists():
                break
            time.sleep(0.1)

    def __enter__(self) -> PartitionServers:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def count_partitions(graph_dir: Path) -> int:
    """Number of partitions that a graph was cut into.

    Raises:
        ArtifactError: there is no graph.
    """
    return _describe(graph_dir)["num_parts"]


def write_ip_config(servers: Sequence[tuple[str, int]]) -> str:
    """DGL's list of servers, in a temporary file; returns its path. DGL reads it at once: remove it after that."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt", prefix=f"{_PREFIX}-", delete=False) as file:
        file.writelines(f"{ip} {port}\n" for ip, port in servers)
    return file.name


def remove_leftovers() -> None:
    """Free the shared memory of killed servers on this host.

    A server holds a lock on a file next to its shared memory; if the lock is free, the server is gone."""
    for path in _SHARED.glob(f"{_PREFIX}*.lock"):
        with suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _free(path.stem)


def _free(name: str) -> None:
    """Remove an attempt's shared memory from this host; the lock last, so that a kill in between is made good."""
    for path in sorted(_SHARED.glob(f"*{name}*"), key=lambda path: path.suffix == ".lock"):
        path.unlink(missing_ok=True)


def _hold(name: str) -> Any:
    """The locked file that says an attempt lives; the kernel opens the lock however this process ends."""
    aside = _SHARED / f".{name}"  # locked before it gets the name under which others look for it
    lock = aside.open("wb")
    fcntl.flock(lock, fcntl.LOCK_EX)
    aside.rename(_SHARED / f"{name}.lock")
    return lock


def _describe(graph_dir: Path) -> dict[str, Any]:
    try:
        return json.loads((Path(graph_dir) / GRAPH_JSON).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{Path(graph_dir) / GRAPH_JSON} cannot be read ({error}); run graph again") from None


def _get(references: list[Any]) -> list[Any]:
    """ray.get, with our own errors as they were raised."""
    try:
        return ray.get(references, timeout=_PREPARE_S)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise


def _end_process(error: Exception) -> None:
    print(f"a partition server died, so this worker stops: {error}", file=sys.stderr, flush=True)
    os._exit(70)


class _Server:
    """One partition's server, in a process of its own. DGL's state is per thread: every method runs on the actor's one
    thread."""

    def reserve(self) -> tuple[str, int]:
        """This host's address and a port that stays taken until the server is ready."""
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        remove_leftovers()
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.bind(("", 0))
        return ray.util.get_node_ip_address(), self._socket.getsockname()[1]

    def prepare(
        self,
        part: int,
        graph_dir: str,
        name: str,
        places: list[tuple[str, int]],
        clients: int,
        features: dict[str, str],
    ) -> None:
        """Load the partition into shared memory, so that what can fail fails before any client waits."""
        from dgl.distributed import DistGraphServer, rpc

        from recsys_ray.graph.dgl import service

        torch.set_num_threads(1)
        description = _describe(Path(graph_dir))
        table = NodeTable.load(Path(graph_dir), description)
        arrays = _features(Path(graph_dir), description, table, part, features)
        _check_shared_memory(sum(a.numel() * a.element_size() for a in arrays.values()), Path(graph_dir), part)
        self._name, self._lock = name, _hold(name)
        rpc.reset()
        with tempfile.TemporaryDirectory(prefix=f"{_PREFIX}-") as folder:
            config = _renamed(Path(graph_dir), description, part, name, Path(folder))
            ip_config = write_ip_config(places)
            self._server = DistGraphServer(part, ip_config, 1, clients, str(config), graph_format=("csc",))
        self._ip_config = ip_config
        for kind, feature in list(arrays):
            key = feature_key(name, kind, feature)
            policy = key.rsplit("~", 1)[0]
            self._server.init_data(name=key, policy_str=policy, data_tensor=arrays.pop((kind, feature)))
            self._server.orig_data.add(key)
        service.serve(LocalGraph(self._server.client_g, Path(graph_dir), table, part))

    def serve(self) -> None:
        """Answer until every client has left."""
        with closing(self._socket):
            pass
        try:
            self._server.start()
        finally:
            Path(self._ip_config).unlink(missing_ok=True)
            _free(self._name)  # nothing else does if the actor is killed rather than ended
            self._lock.close()


def _renamed(graph_dir: Path, description: dict[str, Any], part: int, name: str, folder: Path) -> Path:
    """The partition's JSON under the attempt's name, without node features: those are added by their own names."""
    from dgl.data.utils import save_tensors

    save_tensors(str(folder / "none.dgl"), {})
    source = (graph_dir / GRAPH_JSON).parent.resolve()
    files = {"node_feats": "none.dgl", "edge_feats": "none.dgl"}
    files["part_graph"] = str(source / description[f"part-{part}"]["part_graph"])
    path = folder / "graph.json"
    path.write_text(json.dumps({**description, "graph_name": name, f"part-{part}": files}), encoding="utf-8")
    return path


def _features(
    graph_dir: Path, description: dict[str, Any], table: NodeTable, part: int, extra: Mapping[str, str]
) -> dict[tuple[int, str], Tensor]:
    """Tensors of a partition's own nodes by (type, feature), rows in DGL's order."""
    from dgl.data.utils import load_tensors

    path = (graph_dir / GRAPH_JSON).parent / description[f"part-{part}"]["node_feats"]
    stored = load_tensors(str(path))
    arrays = {}
    for key in list(stored):
        kind, feature = key.split("/")
        tensor = stored.pop(key)
        # Text was float16 before it came into the graph: nothing is lost, and half the memory.
        arrays[int(kind[1:]), feature] = tensor.half() if feature == "text" else tensor
    for name, folder in extra.items():
        rows, found = _read_embeddings(Path(folder), table, part)
        for i in range(table.num_types):
            gids = arrays[i, "gid"]
            if not bool(found[gids[gids >= 0]].all()):
                raise ArtifactError(f"{folder} does not contain an embedding for every item; run hgnn again")
            arrays[i, name] = rows[table.local[gids.clamp(min=0)].long()]
    return arrays


def _read_embeddings(folder: Path, table: NodeTable, part: int) -> tuple[Tensor, Tensor]:
    """float32 [own nodes, d], rows by number inside the partition; and which gids were found, bool [items]."""
    files = sorted(folder.glob("part-*.safetensors"))
    if not files:
        raise ArtifactError(f"{folder} contains no embeddings; run hgnn again")
    nodes = int(table.part_start[part + 1] - table.part_start[part])
    found = torch.zeros(len(table.part), dtype=torch.bool)
    rows = torch.empty(0)
    for file in files:
        arrays = load_arrays(file)
        gids, embedding = torch.from_numpy(arrays["gid"]), torch.from_numpy(arrays["embedding"])
        own = table.part[gids] == part
        rows = torch.zeros(nodes, embedding.shape[1]) if file == files[0] else rows
        rows[table.local[gids[own]].long()] = embedding[own].float()
        found[gids] = True
    return rows, found


def _check_shared_memory(feature_bytes: int, graph_dir: Path, part: int) -> None:
    """DGL crashes with a bus error if /dev/shm is full; raise a clear error instead."""
    needed = feature_bytes + 2 * (graph_dir / GRAPH_JSON.parent / f"part{part}" / "graph.dgl").stat().st_size
    free = os.statvfs(_SHARED).f_bavail * os.statvfs(_SHARED).f_frsize
    if needed > free:
        raise UserError(
            f"a graph partition needs {needed / 2**20:,.0f} MiB of shared memory, {_SHARED} has {free / 2**20:,.0f} "
            "MiB free; enlarge it (docker run --shm-size), or use more hosts"
        )
