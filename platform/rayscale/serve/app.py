"""The Ray Serve application that `serve_configs/*.yaml` name. The only file here that knows Ray Serve.

`Rollout`, one replica, reads the registry; `Gateway` answers HTTP, with an engine of its own (one tier: CPUs) or with
those of the deployment `Engine` (two tiers: GPUs, which many gateways then fill and which scale by themselves), and
one more for each pool of models.
Decisions are made in `rollout.py`, `engine.py`, `remote.py`, `lines.py` and `gateway.py`; this is their shell.
"""

# No `from __future__ import annotations`: Ray Serve reads the type of `build`'s argument.
import asyncio
import functools
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal, Self

import pydantic
import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayTaskError
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from rayscale import storage
from rayscale.errors import ConfigError, nearest
from rayscale.imaging import Limits
from rayscale.memory import keep_freed_memory
from rayscale.observe import log, setup_logging
from rayscale.serve import follower, keys, lines, remote
from rayscale.serve.api import create_app
from rayscale.serve.engine import Engine, EngineSettings, Runner
from rayscale.serve.follower import EngineFollower, Follower, GatewayFollower
from rayscale.serve.gateway import Gateway, GatewaySettings
from rayscale.serve.keeper import Keeper, RegistrySource
from rayscale.serve.lines import Lines, Offer
from rayscale.serve.meters import RayMeters
from rayscale.serve.pools import PooledEngine, check_pools, deployment_of
from rayscale.serve.remote import LostError, RemoteEngine
from rayscale.serve.rollout import Orders, Report, Rollout
from rayscale.serve.table import Table

SYNC_TIMEOUT_S = 5.0


class EngineArgs(pydantic.BaseModel, extra="forbid", frozen=True):
    """Where models run. How many engines there are is Serve's: `deployments:`, `name: Engine`."""

    tiers: Literal["one", "two"] = "one"  # one: in the gateway; two: in replicas of their own
    max_batch: int = pydantic.Field(default=1, ge=1)  # tiles of one shape in one run; on CPUs more gains nothing
    memory_mb: int = pydantic.Field(default=0, ge=0)  # of loaded models in one engine; 0: all stay loaded
    window: int = pydantic.Field(default=4, ge=1)  # two tiers: chunks of one request in flight
    pools: dict[str, tuple[str, ...]] = {}
    """Two tiers: pool -> names of its models, with `*`. Each is a deployment `Engine-POOL`; `Engine` has the others."""

    @pydantic.model_validator(mode="after")
    def _has_effect(self) -> Self:
        for name in ("window", "pools"):
            if self.tiers == "one" and name in self.model_fields_set:
                found = getattr(self, name)
                raise ConfigError(f"args.engines.{name}", found, "has no effect with one tier", "set tiers: two")
        return self


class AppArgs(pydantic.BaseModel, extra="forbid", frozen=True):
    """`args:` of an application in `serve_configs/*.yaml`. Sides and areas are in pixels of the input."""

    models: tuple[str, ...] = pydantic.Field(("*@champion",), min_length=1)
    """What is served: "name@alias", with `*` in the name for all that have the alias."""
    require_gate: bool = False  # follow an alias only to what passed its gate, or was forced through it
    default_model: str = ""  # "name[@alias]" for requests without one; "": the only one there is
    tracking_uri: str = ""  # MLflow; "": MLFLOW_TRACKING_URI, or the embedded one under RAYSCALE_HOME
    state_uri: str = ""  # where the routing table is kept; "": under RAYSCALE_HOME (one node only)
    cache_dir: str = ""  # of fetched artifacts, on each node; "": under RAYSCALE_HOME
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = pydantic.Field(0, ge=0)  # of ONNX Runtime in a replica; 0: its num_cpus
    engines: EngineArgs = EngineArgs()
    tile_px: int = pydantic.Field(256, ge=16)
    whole_max_px: int = pydantic.Field(512 * 512, ge=1)  # area that runs untiled
    max_bytes: int = pydantic.Field(64 << 20, ge=1)
    max_held_bytes: int = pydantic.Field(0, ge=0)  # of the bodies of all requests in a gateway; 0: 8 * max_bytes
    max_pixels: int = pydantic.Field(64_000_000, ge=1)
    max_output_pixels: int = pydantic.Field(128_000_000, ge=1)
    max_method_pixels: int = pydantic.Field(4_000_000, ge=1)  # of pictures for classical filters and comparisons
    max_items: int = pydantic.Field(64, ge=1)  # generated, embedded or compared in one request
    api_keys: str = ""  # URI of hashed bearer keys (serve/keys.py); "": RAYSCALE_API_KEYS, or everyone may ask
    timeout_s: float = pydantic.Field(60.0, gt=0)
    codec_threads: int = pydantic.Field(2, ge=1)  # beside one for small pictures
    quality: int = pydantic.Field(95, ge=1, le=100)  # of JPEG and WebP answers
    poll_s: float = pydantic.Field(1.0, gt=0)  # how often the registry is read
    sync_s: float = pydantic.Field(0.5, gt=0, le=2.0)  # how often a replica reports
    probation_s: float = pydantic.Field(600.0, ge=0)  # a new version is watched so long, a canary at a time; 0: never
    ready_wait_s: float = pydantic.Field(60.0, ge=0)  # a starting replica waits so long for its models

    @pydantic.model_validator(mode="after")
    def _holds_one(self) -> Self:
        if 0 < self.max_held_bytes < 2 * self.max_bytes:
            rule = f"must be at least twice max_bytes ({self.max_bytes}): in JSON a picture is a third longer"
            raise ConfigError("args.max_held_bytes", self.max_held_bytes, rule, "raise it, or lower max_bytes")
        return self

    @pydantic.model_validator(mode="wrap")
    @classmethod
    def _in_one_line(cls, data: Any, handler: pydantic.ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(data)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            unknown = first["type"] == "extra_forbidden"
            rule = "no such argument" if unknown else first["msg"]
            known = EngineArgs.model_fields if first["loc"][0] == "engines" else cls.model_fields
            remedy = nearest(str(first["loc"][-1]), known) if unknown else "correct the application's args"
            raise ConfigError(f"args.{name}", first.get("input"), rule, remedy) from None

    @pydantic.model_validator(mode="after")
    def _pools_serve(self) -> Self:
        check_pools(self.engines.pools, self.models)
        return self

    def source(self) -> RegistrySource:
        return RegistrySource(self.tracking_uri or None, self.models, require_gate=self.require_gate)

    def engine(self, threads: int) -> EngineSettings:
        return EngineSettings(
            device=self.device,
            threads=self.threads or threads,
            tile_px=self.tile_px,
            whole_max_px=self.whole_max_px,
            max_batch=self.engines.max_batch,
            memory_bytes=self.engines.memory_mb << 20,
        )

    def gateway(self) -> GatewaySettings:
        return GatewaySettings(
            limits=Limits(max_bytes=self.max_bytes, max_pixels=self.max_pixels),
            max_output_pixels=self.max_output_pixels,
            max_method_pixels=self.max_method_pixels,
            max_items=self.max_items,
            max_held_bytes=self.max_held_bytes or 8 * self.max_bytes,
            keys=keys.load(self.api_keys),
            default_model=self.default_model,
            timeout_s=self.timeout_s,
            codec_threads=self.codec_threads,
            quality=self.quality,
        )


class RolloutReplica:
    """Reads the registry every `poll_s`, answers the replicas' syncs, keeps the table."""

    def __init__(self, args: AppArgs) -> None:
        setup_logging()
        store, meters = storage.open_store(args.state_uri or storage.home() / "serve"), RayMeters()

        def new(table: Table) -> Rollout:
            now, pools = time.monotonic(), args.engines.pools
            return Rollout(table, now=now, probation_s=args.probation_s, pools=pools, meters=meters)

        self._keeper = Keeper(args.source(), store, new, poll_s=args.poll_s)
        self._task = asyncio.create_task(self._keeper.run())

    async def sync(self, report: Report) -> Orders:
        return await self._keeper.sync(report)

    async def check_health(self) -> None:
        if self._task.done():
            self._task.result()  # raises what ended it: Ray Serve shows it and starts another replica


def _sync(rollout_handle: DeploymentHandle) -> Callable[[Report], Awaitable[Orders]]:
    async def sync(report: Report) -> Orders:
        return await asyncio.wait_for(rollout_handle.sync.remote(report), SYNC_TIMEOUT_S)

    return sync


def _engine(
    args: AppArgs, rollout_handle: DeploymentHandle, meters: RayMeters, pool: str = ""
) -> tuple[Engine, EngineFollower]:
    """An engine in this process, with the threads of its CPUs, and what keeps it in step."""
    cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1.0)
    engine = Engine(args.engine(max(1, int(cpus))))
    cache = Path(args.cache_dir or storage.home() / "cache") / "artifacts"
    return engine, EngineFollower(
        serve.get_replica_context().replica_id.unique_id,
        engine,
        _sync(rollout_handle),
        functools.partial(follower.fetch, cache=cache, tracking_uri=args.tracking_uri or None),
        ThreadPoolExecutor(1, thread_name_prefix="prepare"),
        meters,
        grace_s=_grace_s(args),
        pool=pool,
    )


def _grace_s(args: AppArgs) -> float:
    return 2 * args.timeout_s  # a body may take as long to arrive as its picture to be made


class EngineReplica:
    """The second tier. Ray Serve awaits an engine's start, then has it lend lines to gateways."""

    async def __init__(  # type: ignore[misc]
        self, args: AppArgs, rollout_handle: DeploymentHandle, pool: str = ""
    ) -> None:
        setup_logging()
        keep_freed_memory()
        self._name = serve.get_replica_context().replica_id.unique_id
        self._engine, self._follower = _engine(args, rollout_handle, RayMeters(), pool)
        await self._follower.start(args.ready_wait_s, args.sync_s)
        self._task = asyncio.create_task(self._follower.follow(args.sync_s))

    async def lend(self, offer: Offer) -> None:
        await lines.lend(offer, self._name, functools.partial(remote.answer, self._engine, self._name))

    async def wake(self) -> None:
        """Asked for where no engine runs, so that Serve starts one."""

    async def check_health(self) -> None:
        if self._task.done():
            self._task.result()
        self._follower.check()


class EngineCalls:
    """What a gateway asks of the engines of one pool by their deployment's handle."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._waking: asyncio.Future[None] | None = None

    async def lend(self, offer: Offer) -> None:
        """One line, for as long as it lasts. Raises: LostError."""
        try:
            await self._handle.lend.remote(offer)
        except Exception as error:  # of a dead replica: by actor call, by gRPC, before or after: each has its own class
            cause = error.cause if isinstance(error, RayTaskError) else error
            why = str(cause).partition("\n")[0]
            log.warning("an engine's line is lost: %s", why)
            raise LostError("", f"lent no line: {why}") from error

    def wake(self) -> None:
        if self._waking is None or self._waking.done():
            self._waking = asyncio.ensure_future(self._wake())

    async def _wake(self) -> None:
        try:
            await self._handle.wake.remote()
        except Exception as error:
            log.warning("no engine starts: %r", error)


class GatewayReplica:
    """One gateway, with its engine or with lines to those of the second tier."""

    def __init__(
        self, args: AppArgs, rollout_handle: DeploymentHandle, engine_handles: dict[str, DeploymentHandle] | None = None
    ) -> None:
        """`engine_handles`: of the second tier, by pool."""
        setup_logging()
        keep_freed_memory()
        self._args, meters = args, RayMeters()
        self._follower: Follower
        self._lines: list[Lines] = []
        engine: Runner
        if engine_handles is None:
            engine, self._follower = _engine(args, rollout_handle, meters)
        else:
            engine = PooledEngine({pool: self._remote(handle) for pool, handle in engine_handles.items()})
            name = serve.get_replica_context().replica_id.unique_id
            self._follower = GatewayFollower(name, engine, _sync(rollout_handle), grace_s=_grace_s(args))
        self._gateway = Gateway(args.gateway(), engine, self._follower, meters)
        self._task: asyncio.Task[None] | None = None

    def _remote(self, handle: DeploymentHandle) -> RemoteEngine:
        calls = EngineCalls(handle)
        self._lines.append(Lines(calls.lend))
        return RemoteEngine(self._args.engine(0), self._lines[-1].carry, calls.wake, window=self._args.engines.window)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._gateway, self._lifespan, behind_ray=True)

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Ray Serve sends requests to a replica once this has started."""
        for each in self._lines:
            await each.start(ray.util.get_node_ip_address())
        await self._follower.start(self._args.ready_wait_s, self._args.sync_s)
        self._task = asyncio.create_task(self._follower.follow(self._args.sync_s))
        yield
        self._task.cancel()
        self._gateway.close()
        for each in self._lines:
            each.close()

    async def check_health(self) -> None:
        if self._task is not None and self._task.done():
            self._task.result()
        self._follower.check()


RolloutDeployment = serve.deployment(
    name="Rollout", num_replicas=1, max_ongoing_requests=256, ray_actor_options={"num_cpus": 0}
)(RolloutReplica)
EngineDeployment = serve.deployment(
    name="Engine", max_ongoing_requests=64, logging_config={"enable_access_log": False}
)(EngineReplica)  # the gateway's log has the request
# Who is refused, and when it may come back, the gateway decides; Ray knows neither cost nor deadline. Its own limits
# are for what no gateway can hold: more connections than these, refused in plain text.
GatewayDeployment = serve.deployment(
    name="Gateway",
    max_ongoing_requests=1000,
    max_queued_requests=1000,
    backpressure_config={"retry_after_s": 5},
    # Ours says more; at INFO Ray makes a record of each request all the same, and then throws it away.
    logging_config={"enable_access_log": False, "log_level": "WARNING"},
)(serve.ingress()(GatewayReplica))


def build(args: AppArgs) -> Application:
    """`import_path: rayscale.serve.app:build`."""
    uri = args.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    args = args.model_copy(update={"tracking_uri": uri})
    rollout_app = RolloutDeployment.bind(args)
    if args.engines.tiers == "one":
        return GatewayDeployment.bind(args, rollout_app)
    engines = {
        pool: EngineDeployment.options(name=deployment_of(pool)).bind(args, rollout_app, pool)
        for pool in ("", *args.engines.pools)
    }
    return GatewayDeployment.bind(args, rollout_app, engines)
