"""The admin port's pages and answers, as a Starlette application."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import sqlalchemy as sa
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import (
    FileResponse,
    JSONResponse,
    PlainTextResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from coordinator.admin.guard import Guard
from coordinator.admin.live import Live
from coordinator.errors import StoreError
from coordinator.store import views
from coordinator.store.sightings import DeviceState

PAGE: Final = Path(__file__).parent / "page"
TEXT_MAX: Final = 64  # as long as a device's id may be

Result = TypeVar("Result")


class ReadStore(Protocol):
    """Runs a view on a connection of its own, away from the event loop and the rounds' writing."""

    async def __call__(self, view: Callable[[sa.Connection], Result]) -> Result: ...


@dataclass(frozen=True, slots=True)
class Sources:
    """What the pages are made of."""

    read: ReadStore
    live: Live
    metrics: Callable[[], bytes]
    problems: Callable[[], Awaitable[list[str]]]  # why the coordinator is not ready, if so


def admin_app(sources: Sources, token: str) -> Starlette:
    """The application; a `token` of none lets in whoever calls this machine by its local names."""
    middleware = [Middleware(Guard, token=token), Middleware(GZipMiddleware, minimum_size=1000)]
    answers = _Answers(sources)
    return Starlette(
        routes=[
            Route("/", answers.page),
            Route("/livez", answers.alive),
            Route("/readyz", answers.ready),
            Route("/metrics", answers.metrics),
            Route("/api/federations", answers.federations),
            Route("/api/rounds", answers.rounds),
            Route("/api/devices", answers.devices),
            Route("/api/live", answers.live),
            Mount("/page", StaticFiles(directory=PAGE)),
        ],
        middleware=middleware,
        exception_handlers={HTTPException: _told, StoreError: _unavailable},
    )


class _Answers:
    def __init__(self, sources: Sources) -> None:
        self._sources = sources

    async def page(self, _: Request) -> Response:
        return FileResponse(PAGE / "index.html")

    async def alive(self, _: Request) -> Response:
        return PlainTextResponse("alive\n")

    async def ready(self, _: Request) -> Response:
        problems = await self._sources.problems()
        return PlainTextResponse(
            "\n".join(problems or ["ready"]) + "\n", status_code=503 if problems else 200
        )

    async def metrics(self, _: Request) -> Response:
        return Response(self._sources.metrics(), media_type=CONTENT_TYPE_LATEST)

    async def federations(self, request: Request) -> Response:
        _Query(request, set())
        found = await self._sources.read(views.all_federations)
        return JSONResponse({"federations": [views.as_json(one) for one in found]})

    async def rounds(self, request: Request) -> Response:
        query = _Query(request, {"federation", "limit", "before"})
        found = await self._of_federation(
            query.federation(),
            partial(
                views.last_rounds,
                limit=query.number("limit", views.PAGE_MAX, 1, views.PAGE_MAX),
                before=query.number("before", None, 1),
            ),
        )
        return JSONResponse({"rounds": [views.as_json(one) for one in found]})

    async def devices(self, request: Request) -> Response:
        query = _Query(
            request, {"federation", "limit", "offset", "order", "direction", "state", "contains"}
        )
        page = await self._of_federation(
            query.federation(),
            partial(
                views.some_devices,
                limit=query.number("limit", 100, 1, views.PAGE_MAX),
                offset=query.number("offset", 0, 0),
                order=query.choice("order", "last_seen_at", views.DEVICE_ORDERS),
                descending=query.choice("direction", "down", ("up", "down")) == "down",
                state=query.choice("state", None, [state.value for state in DeviceState]),
                contains=query.text("contains"),
            ),
        )
        return JSONResponse(views.as_json(page))

    async def live(self, request: Request) -> Response:
        _Query(request, set())
        if self._sources.live.is_full:
            raise HTTPException(503, "too many listen already; come back later")
        return StreamingResponse(
            self._sources.live.events(),
            media_type="text/event-stream",
            headers={"x-accel-buffering": "no"},
        )

    async def _of_federation(self, name: str, view: Callable[..., Result]) -> Result:
        def look(db: sa.Connection) -> Result:
            names = views.federation_names(db)
            if name not in names:
                raise HTTPException(404, f"federation: there is no {name[:40]!r}, but {names}")
            return view(db, federation=name)

        return await self._sources.read(look)


class _Query:
    """A request's parameters, each checked; what is wrong is told by name with a 400."""

    def __init__(self, request: Request, known: set[str]) -> None:
        self._given = request.query_params
        for name in self._given:
            if name not in known:
                there_are = f"there are {sorted(known)}" if known else "there are none here"
                raise HTTPException(400, f"{name[:40]}: is unknown; {there_are}")
            if len(self._given.getlist(name)) > 1:
                raise HTTPException(400, f"{name}: is given more than once")

    def federation(self) -> str:
        if "federation" not in self._given:
            raise HTTPException(400, "federation: is missing")
        return self._given["federation"]

    def text(self, name: str) -> str:
        text = self._given.get(name, "")
        if len(text) > TEXT_MAX:
            raise HTTPException(400, f"{name}: expected {TEXT_MAX} characters at most")
        return text

    def number(self, name: str, default: Any, low: int, high: int = 2**53) -> Any:
        text = self._given.get(name)
        if text is None:
            return default
        is_number = text.isascii() and text.isdigit() and len(text) <= len(str(high))
        if not (is_number and low <= int(text) <= high):
            raise HTTPException(400, f"{name}: expected {low} to {high}, got {text[:40]!r}")
        return int(text)

    def choice(self, name: str, default: Any, options: Any) -> Any:
        text = self._given.get(name)
        if text is not None and text not in options:
            raise HTTPException(400, f"{name}: expected one of {list(options)}, got {text[:40]!r}")
        return default if text is None else text


async def _told(_: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)


async def _unavailable(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 503)
