"""The application for Ray Serve: ``serve deploy configs/serve/cluster.yaml`` imports it, and so does serve/server.py.

Another bundle takes over when it is promoted in the served folder, or when only ``user_config.bundle`` changes and is
deployed again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from recsys_ray.core.errors import UserError
from serve.replica import RecommendationService
from serve.settings import load_settings

if TYPE_CHECKING:
    from ray.serve import Application


@dataclass(frozen=True)
class Scaling:
    """The number of replicas, and when to add some.

    ``ongoing`` is autoscaling's target for requests running or waiting in one replica; when ``queued`` more are
    waiting, the answer is 429. A replica that is too many for ``idle_s`` seconds ends."""

    replicas: int = 1
    max_replicas: int | None = None
    ongoing: int = 8
    queued: int = 200
    idle_s: float = 300.0

    def options(self) -> dict[str, Any]:
        from ray.serve.config import BackpressureConfig

        fixed = {
            "max_ongoing_requests": 4 * self.ongoing,
            "max_queued_requests": self.queued,
            "health_check_period_s": 1,  # by which a killed replica is noticed and replaced; it is 10 s
            "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=1),
        }
        if self.max_replicas is None or self.max_replicas <= self.replicas:
            return fixed | {"num_replicas": self.replicas}
        delays = {"upscale_delay_s": 10, "downscale_delay_s": self.idle_s}
        limits = {"min_replicas": self.replicas, "max_replicas": self.max_replicas}
        return fixed | {"autoscaling_config": limits | delays | {"target_ongoing_requests": self.ongoing}}


def application(args: Mapping[str, Any]) -> Application:
    """Serve's application builder.

    Args:
        args: ``bundle`` (path or URI that every node can read; may be overridden by ``user_config`` of the deployment),
            ``examples`` (bool), ``settings`` (see serve/settings.py), and the fields of :class:`Scaling`.
    """
    from ray import serve
    from ray.serve.schema import LoggingConfig

    names = {field.name for field in fields(Scaling)}
    unknown = set(args) - names - {"bundle", "examples", "settings"}
    if unknown:
        raise UserError(f"{sorted(unknown)[0]!r} is not an argument of the application; see configs/serve/cluster.yaml")
    settings = load_settings(args.get("settings"))
    settings.check()
    options = Scaling(**{name: args[name] for name in names & set(args)}).options()
    service: Any = serve.deployment(name="recommendations")(serve.ingress()(RecommendationService))
    if "bundle" in args:
        options["user_config"] = {"bundle": str(args["bundle"])}
    options["logging_config"] = LoggingConfig(enable_access_log=False)  # it writes paths, and paths hold ids of users
    return service.options(ray_actor_options={"num_cpus": 1}, **options).bind(
        examples=bool(args.get("examples", False)), settings=settings
    )
