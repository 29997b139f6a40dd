"""Replicas of the server in Ray Serve. Every replica has its own model and queue."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

from ..base.errors import FoveateError
from ..serving.wire import Settings
from ..vlm.vlm import VLM
from .ray import last_line, running_ray

NAME = "foveate"
SPARE = 16  # further requests that a replica takes, such as /healthz and /metrics
DRAIN = 600.0  # seconds in which a replica may finish what it holds


def run_replicas(
    load: Callable[[], VLM],
    settings: Settings,
    host: str,
    port: int,
    replicas: int,
) -> None:
    """Serve from `replicas` processes until SIGINT or SIGTERM; what they hold is finished.

    Uses the cluster that RAY_ADDRESS names, else starts Ray on this machine. Every replica gets a
    GPU where there are any, else an equal share of the CPUs.

    Args:
        load: gives the model; called in every replica.
        settings: of each replica.

    Raises:
        FoveateError: Ray is missing, cannot be had, or has no room for the replicas.
    """
    stopped = threading.Event()

    def stop(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once
        stopped.set()

    def build() -> Any:
        from ..serving.app import create_app

        return create_app(load(), settings)

    with running_ray() as ray:
        try:
            from ray import serve
        except ImportError as error:
            raise FoveateError(
                "This needs Ray Serve: install it with `pip install 'foveate[ray]'`."
            ) from error
        for number in (signal.SIGINT, signal.SIGTERM):  # Ray has set its own
            signal.signal(number, stop)
        try:
            needs = _share(ray.cluster_resources(), replicas)
            deployment: Any = serve.deployment(
                serve.ingress(build)(),
                name=NAME,
                num_replicas=replicas,
                ray_actor_options=needs,
                max_ongoing_requests=settings.queue + settings.batch + SPARE,
                graceful_shutdown_timeout_s=DRAIN,
                graceful_shutdown_wait_loop_s=0.5,
            )
            serve.start(http_options={"host": host, "port": port})
            serve.run(deployment.bind(), name=NAME)
            print(f"foveate: {replicas} replicas at http://{host}:{port}/v1", flush=True)
            stopped.wait()
            serve.delete(NAME)  # nothing new comes in, and they finish
        except (ray.exceptions.RayError, RuntimeError) as error:
            raise FoveateError(f"Ray Serve gave up ({last_line(error)}).") from error
        finally:
            serve.shutdown()


def _share(resources: dict[str, float], replicas: int) -> dict[str, float]:
    """The resources of each replica. One that asks for more than there is would wait for ever."""
    if gpus := resources.get("GPU", 0):
        if replicas > gpus:
            raise FoveateError(f"{replicas} replicas need as many GPUs, and Ray has {gpus:g}.")
        return {"num_gpus": 1, "num_cpus": 1}
    return {"num_cpus": resources.get("CPU", 1) / replicas}
