"""The service as an application of Ray Serve: a gateway, an encoder, and a deployment for each shard of each index.

``python -m pipelines serve`` runs it; KubeRay's RayService imports ``build``.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from grpc import RpcError
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.schema import LoggingConfig

from data.filesystem import is_local, to_path
from pipelines.retrieval.sharded_index import Record, read_manifest
from pipelines.serving.api import create_app
from pipelines.serving.encoders import Encoders
from pipelines.serving.environment import hashed_token
from pipelines.serving.gateway import Gateway, Side
from pipelines.serving.guard import Limits
from pipelines.serving.lines import Line
from pipelines.serving.served import Choice
from pipelines.serving.shard_deployment import ShardDeployment

NAME = "hashbridge"  # of the application
UNREACHABLE = (ray.exceptions.RayActorError, RayServeException, RpcError, ConnectionError)
QUIET = LoggingConfig(enable_access_log=False, log_level="WARNING")  # a line a request costs a tenth of the rate
SOON: Record = {"health_check_period_s": 2.0, "health_check_timeout_s": 30.0, "graceful_shutdown_timeout_s": 5.0, "max_ongoing_requests": 10_000}


@dataclass
class Settings:
    """What is served.

    Attributes:
        index: folder of the index.
        model: as ``open_encoder`` takes it; "" for the one that the index names.
        compare: folder of a second index, which the page shows beside the first; "" for none.
        compare_model: its model.
        storage, tracking, cache: of runs, of the registry, of copies of registered models.
        replicas: of each deployment; at most so many with ``most``.
        most: replicas up to which each deployment grows with its load; 0 for a fixed number.
        cpus: that each replica reserves.
        gpu: whether encoders have a GPU each.
        values: of queries and of the index's image files, as in ``decode``.
        timeout: seconds for a request.
        poll: seconds between looks at the index and the alias.
        waiting, body: as in ``Limits``, the body in MiB.
        token: SHA-256 of the token that requests need, in hexadecimal; "" for none.
    """

    index: str
    model: str = ""
    compare: str = ""
    compare_model: str = ""
    storage: str = "runs"
    tracking: str = ""
    cache: str = str(Path.home() / ".cache" / "hashbridge")
    replicas: int = 1
    most: int = 0
    cpus: float = 0.5
    gpu: bool = False
    values: tuple[float, float] | None = None
    timeout: float = 30.0
    poll: float = 2.0
    waiting: int = 128
    body: int = 32
    token: str = ""


class EncoderDeployment(Encoders):
    """The deployment of the encoders."""


@serve.ingress()
class GatewayDeployment:
    """The deployment that answers HTTP requests."""

    def __init__(self, settings: Record, shards: dict[str, list[Any]], encoder: Any) -> None:
        """Args:
        settings: fields of ``Settings``.
        shards: handles by the name of their index.
        """
        self.settings = Settings(**settings)
        own = self.settings
        given = dict(zip(shards, ((own.index, own.model), (own.compare, own.compare_model)), strict=False))
        if max(own.replicas, own.most) == 1:  # else Ray Serve chooses the replica
            machine = ray.get_runtime_context().get_node_id()
            shards = {name: [Line(handle, machine) for handle in handles] for name, handles in shards.items()}
        sides = [Side(name, Choice(*given[name], own.storage, own.tracking), handles) for name, handles in shards.items()]
        self.gateway = Gateway(sides, encoder, UNREACHABLE, own.poll, own.timeout)

    def __serve_build_asgi_app__(self) -> Any:
        """What Ray Serve passes requests to."""
        return create_app(self.gateway, Limits(body=self.settings.body * 2**20, waiting=self.settings.waiting), self.settings.token, self.settings.values)


def absolute(path: str) -> str:
    """A path as replicas, which have another working folder, must have it."""
    found = to_path(path)
    return str(found.resolve()) if is_local(found) else path


def application(settings: Settings) -> Any:
    """The application of these settings.

    Raises:
        ValueError: an index does not exist or cannot be read.
    """
    cpus: Record = {"num_cpus": math.floor(settings.cpus * 100) / 100}
    scale: Record = {"num_replicas": settings.replicas}
    if settings.most > settings.replicas:
        load = {"target_ongoing_requests": 4, "upscale_delay_s": 10, "downscale_delay_s": 120}
        scale = {"autoscaling_config": {"min_replicas": settings.replicas, "max_replicas": settings.most} | load}

    def deployed(kind: type, name: str, actor: Record) -> Any:
        return serve.deployment(kind, name=name, ray_actor_options=actor, logging_config=QUIET, **scale, **SOON)

    shards: dict[str, list[Any]] = {}
    for folder in (settings.index, settings.compare):
        if folder:
            name = Path(folder).name
            name = name if name not in shards else f"{name}-2"
            count = len(read_manifest(to_path(folder))["shards"])
            shards[name] = [deployed(ShardDeployment, f"{name}-shard-{number}", cpus).bind() for number in range(count)]
    encoder = deployed(EncoderDeployment, "encoder", cpus | {"num_gpus": int(settings.gpu)}).bind(
        settings.storage, settings.tracking, settings.cache, settings.gpu, settings.values
    )
    return deployed(GatewayDeployment, "gateway", cpus).bind(asdict(settings), shards, encoder)


def build(arguments: dict[str, Any]) -> Any:
    """The application for a configuration file of Ray Serve; its ``args`` are fields of ``Settings``, the token is the environment's.

    Raises:
        ValueError: a field is unknown or missing, or there is no token.
    """
    known = set(Settings.__dataclass_fields__) - {"token"}
    if unknown := sorted(set(arguments) - known):
        raise ValueError(f"no setting {unknown[0]!r}: there are {', '.join(sorted(known))}")
    if not arguments.get("index"):
        raise ValueError("setting index is missing: the folder of the index")
    return application(Settings(**arguments, token=hashed_token(needed=True)))
