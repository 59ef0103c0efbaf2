"""The HTTP API over one recommender. It does not know Ray: ``create_app`` is tested without it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI

from serve import gorse
from serve.context import Context, Live
from serve.errors import add_handlers
from serve.gate import Gate
from serve.logs import failed
from serve.metrics import Meter, Metrics
from serve.routes import changes, facts, items, recommendations, releases, users
from serve.settings import Settings

_LOOK_S = 5.0  # seconds between two looks at what gauges show


def create_app(live: Live, settings: Settings | None = None, meter: Meter | None = None) -> FastAPI:
    """All routes. Without ``settings`` everybody is answered, without ``meter`` nothing is counted. Raises ConfigError
    for files that cannot be read."""
    settings, metrics = settings or Settings(), Metrics(meter)
    context = Context(live, metrics)
    app = FastAPI(
        title="recsys-ray",
        version="1",
        description="What should this user get next?",
        separate_input_output_schemas=False,
        lifespan=lambda _: _watched(context),
    )
    app.state.guard = settings.guard()
    add_handlers(app)
    for module in (recommendations, changes, items, users, facts, releases, gorse):
        app.include_router(module.router(context))
    app.add_middleware(Gate, max_body=settings.max_body, timeout=settings.timeout, metrics=metrics)
    return app


@asynccontextmanager
async def _watched(context: Context) -> AsyncIterator[None]:
    """Gauges are set while the app is up."""
    task = asyncio.create_task(_watch(context))
    yield
    task.cancel()


async def _watch(context: Context) -> None:
    version = None
    while True:
        try:
            recommender = context.live.recommender
            if recommender.version != version:
                await context.run(partial(context.metrics.bundle, recommender))
                version = recommender.version
            store = context.live.answers.store
            up = None if store is None else await context.run(partial(context.live.answers.take_changes, recommender))
            damaged = 0 if store is None else store.damaged
            context.metrics.state(recommender.live, context.live.refused is not None, up, damaged)
        except Exception as error:  # answers continue without gauges
            failed("gauges", error)
        await asyncio.sleep(_LOOK_S)
