"""Serves a bundle on both hosts and keeps steady load on the first one's proxy, while the test kills the second host.

    python drive_serving.py FOLDER USERS

FOLDER is a folder of bundles, USERS a file of user ids. Prints "loaded" once both hosts answer, reads the line that
says that the second is dead, and prints what clients saw as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import ray
from hosts import ADDRESSES
from steady_load import SteadyLoad

from serve.deployment import Scaling
from serve.server import NAME, serving
from serve.settings import Settings
from serve.store import open_store

ITEMS = ["music-00001", "podcast-00002", "audiobook-00003"]
STORE = f"redis://{ADDRESSES[0]}:6390/0"


def replicas() -> list[str]:
    """The hosts on which a replica runs."""
    from ray.serve._private.constants import SERVE_NAMESPACE

    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace=SERVE_NAMESPACE)
    details = ray.get(controller.get_serve_instance_details.remote())
    found = details["applications"][NAME]["deployments"]["recommendations"]["replicas"]
    return [nodes[one["node_id"]] for one in found if one["state"] == "RUNNING" and one["node_id"] in nodes]


def until(holds, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def main(bundles: Path, users: Path) -> None:
    words = ["redis-server", "--port", "6390", "--bind", ADDRESSES[0], "--protected-mode", "no", "--save", ""]
    redis = subprocess.Popen([*words, "--dir", tempfile.mkdtemp()], stdout=subprocess.DEVNULL)
    names = json.loads(users.read_text())
    settings = Settings(store=STORE, log=False)
    with serving(bundles, "127.0.0.1", 8000, Scaling(2), "auto", False, settings) as url:
        until(lambda: sorted(replicas()) == sorted(ADDRESSES))
        until(lambda: httpx.get(f"{url}/healthz").status_code == 200)
        with SteadyLoad(url, names, ITEMS, 40.0) as load:
            time.sleep(3)
            print("loaded", flush=True)
            sys.stdin.readline()
            killed = time.monotonic()
            until(lambda: replicas() == [ADDRESSES[0]] * 2)
            back = time.monotonic()
            time.sleep(2)
        told = load.since(0)
        store = open_store(STORE)
        kept = {event.event_id for event in store.events_after("", 1_000_000)[0]}
        refused = [one for one in told.failed if one.statuses[-1] == 503 and "store" in one.told.get("detail", "")]
        figures = {
            "text": str(told), "gap": told.gap, "lost": len(told.acknowledged - kept), "refused": len(refused),
            "recommendations failed": len([one for one in told.failed if one.event_id is None]),
            "events failed": len([one for one in told.failed if one.event_id is not None and one not in refused]),
            "repeated after": [round(one.at - killed, 2) for one in told.repeated], "replaced": round(back - killed, 1),
            "sent since": len(load.since(back).asked),
        }  # fmt: skip
    redis.kill()
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
