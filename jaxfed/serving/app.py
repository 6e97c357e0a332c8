"""The HTTP server: what is asked and answered, in JSON, and a page to try it out."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from jaxfed import __version__
from jaxfed.core.excerpt import printable, shorten
from jaxfed.serving.batching import make_batcher
from jaxfed.serving.engine import (
    RefusedQuestionError,
    ServedExport,
    explain_items,
    find_similar,
    number_items,
)
from jaxfed.serving.rate_limit import RateLimit, guard_request_rate
from jaxfed.serving.requests import (
    RecommendBody,
    SimilarBody,
    check_length,
    list_items,
    make_question,
    search_titles,
)

LARGEST_BODY = 1 << 20  # bytes
STATUS = {"unknown": 404, "wrong": 422, "busy": 503}
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 1.0)
HTML, SCRIPT, STYLE = (f"text/{kind}; charset=utf-8" for kind in ("html", "javascript", "css"))
POLICY = b"default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
SAFE = {b"content-security-policy": POLICY, b"x-content-type-options": b"nosniff"}


class Serving:
    """What a server holds: the export that answers now, and what is counted."""

    def __init__(self, served: ServedExport) -> None:
        self.served = served
        self.registry = CollectorRegistry()
        self.requests = Counter("jaxfed_requests", "Requests.", ("path", "status"), registry=self.registry)
        self.seconds = Histogram(
            "jaxfed_request_seconds", "Seconds of a request.", ("path",), registry=self.registry, buckets=BUCKETS
        )
        self.swaps = Counter("jaxfed_swaps", "Exports that replaced another one.", registry=self.registry)
        self.model = Gauge("jaxfed_model_info", "The export that answers.", ("digest",), registry=self.registry)
        self.model.labels(served.digest[:12]).set(1)

    def swap(self, served: ServedExport) -> None:
        """Answers with another export from now on; questions that wait are answered by the one before."""
        self.model.clear()
        self.served = served
        self.swaps.inc()
        self.model.labels(served.digest[:12]).set(1)


def guard_requests(app: Any, serving: Serving) -> Any:
    """The app behind a door: bodies larger than `LARGEST_BODY` do not pass, requests are counted, answers get headers
    that keep browsers safe."""

    async def guarded(scope, receive, send):
        if scope["type"] != "http":
            return await app(scope, receive, send)
        begin, seen, status = time.perf_counter(), 0, 500
        length = dict(scope["headers"]).get(b"content-length", b"0")

        async def counted():
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > LARGEST_BODY:  # of a length that was not said: whoever reads it stops
                return {"type": "http.disconnect"}
            return message

        async def answer(message):
            nonlocal status
            if message["type"] == "http.response.start":
                if seen > LARGEST_BODY:
                    message = {**message, "status": 413}
                status = message["status"]
                message = {**message, "headers": [*message["headers"], *SAFE.items()]}
            await send(message)

        if not length.isdigit() or int(length) > LARGEST_BODY:
            await JSONResponse({"detail": "the body is too large"}, 413)(scope, receive, answer)
        else:
            await app(scope, counted, answer)
        path = getattr(scope.get("route"), "path", "other")
        serving.seconds.labels(path).observe(time.perf_counter() - begin)
        serving.requests.labels(path, status).inc()
        return None

    return guarded


def make_app(
    served: ServedExport,
    watch: Callable[[Serving], Any] | None = None,
    hosts: Sequence[str] = ("*",),
    rate: float = 0,
) -> FastAPI:
    """Builds the server of an export.

    Args:
        served: the export.
        watch: watch(serving) -> a coroutine that runs beside the server, and may swap its export.
        hosts: The names by which the server may be asked: a page of another name, which a browser believes to be this
            machine, is answered by 400.
        rate: Requests a second that one address may make, see `RateLimit`; 0: no limit.

    Returns:
        The app.
    """
    serving = Serving(served)

    @contextlib.asynccontextmanager
    async def run_lifespan(app: FastAPI) -> AsyncIterator[None]:
        with ThreadPoolExecutor(1) as executor:  # one batch at a time: it has all cores
            app.state.ask, task = make_batcher(executor)
            others = [asyncio.create_task(watch(serving))] if watch else []
            yield
            for each in (task, *others):
                each.cancel()

    app = FastAPI(title="jaxfed", version=__version__, lifespan=run_lifespan, docs_url=None, redoc_url=None)
    app.state.serving = serving
    add_question_routes(app, serving)
    add_page_routes(app, serving)

    @app.exception_handler(RefusedQuestionError)
    async def refuse(request: Request, error: RefusedQuestionError) -> JSONResponse:
        reason, problem = error.args
        headers = {"retry-after": "1"} if problem == "busy" else None
        return JSONResponse({"detail": printable(reason)}, STATUS[problem], headers)

    @app.exception_handler(RequestValidationError)
    async def refuse_body(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]  # what was sent is not sent back: it may be large, and no text
        where = ".".join(str(word) for word in first["loc"][1:])
        if not where and "json" not in request.headers.get("content-type", ""):
            first = {"msg": "the body must be JSON, with content-type: application/json"}
        return JSONResponse(
            {"detail": printable(shorten(f"{where}: {first['msg']}" if where else first["msg"], 200))}, 422
        )

    @app.exception_handler(RecursionError)
    async def refuse_depth(request: Request, error: RecursionError) -> JSONResponse:
        return JSONResponse({"detail": "the body is nested too deeply"}, 422)

    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    if rate:
        app.add_middleware(guard_request_rate, limit=RateLimit(rate))
    app.add_middleware(guard_requests, serving=serving)
    return app


def add_question_routes(app: FastAPI, serving: Serving) -> None:
    """Adds what answers questions."""
    too_often = "this address asks too often: Retry-After says in how many seconds to ask again"
    rate_limited: dict[int | str, Any] = {429: {"description": too_often}}
    refused = rate_limited | {
        404: {"description": "there is no such user or item"},
        413: {"description": "the body is too large"},
        503: {"description": "too many questions wait"},
    }

    @app.post("/recommend", responses=refused)
    async def recommend(body: RecommendBody) -> dict[str, Any]:
        """The best items for a user."""
        now = serving.served  # what answers may be swapped meanwhile
        question = make_question(now, body)
        numbers, scores = await app.state.ask(now, question)
        items = list_items(now, numbers[: body.k], scores[: body.k])
        if body.explain:
            found = [number for number in numbers[: body.k].tolist() if number >= 0]
            for item, why in zip(items, explain_items(now, question.history, found), strict=True):
                item["why"] = list_items(now, *zip(*why, strict=True)) if why else []
        return {"items": items, "model": now.digest[:12]}

    @app.post("/similar", responses=refused)
    async def similar(body: SimilarBody) -> dict[str, Any]:
        """The items most like one."""
        now = serving.served
        check_length(now, body.k)
        (item,) = number_items(now, [body.item])
        found = await asyncio.to_thread(find_similar, now, item, body.k)
        return {"items": list_items(now, *found), "model": now.digest[:12]}

    @app.get("/items", responses=rate_limited)
    async def search(query: Annotated[str, Query(max_length=200)] = "") -> list[dict[str, str]]:
        """Items whose title or id holds some words."""
        return await asyncio.to_thread(search_titles, serving.served, query)


def add_page_routes(app: FastAPI, serving: Serving) -> None:
    """Adds the page to try it out, the description of the requests, and what operators read."""

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Whether the server answers, and with what."""
        about = serving.served.export.manifest
        return {
            "status": "ok",
            "model": serving.served.digest[:12],
            "num_items": about["num_items"],
            "most_items": about["most_items"],
            "users": len(serving.served.users.numbers) if serving.served.users else 0,
            "reads": [kind for kind in ("history", "user", "private") if kind in serving.served.programs],
            "leaky": about["leaky"],
        }

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counts for Prometheus."""
        return Response(generate_latest(serving.registry), media_type=CONTENT_TYPE_LATEST)

    def add_file(path: str, package: str, name: str, kind: str) -> None:
        content = files(package).joinpath(name).read_bytes()
        app.add_api_route(path, lambda: Response(content, media_type=kind), include_in_schema=False)

    own = "jaxfed.serving"
    add_file("/", own, "page/index.html", HTML)
    add_file("/page.js", own, "page/page.js", SCRIPT)
    add_file("/icon.svg", own, "page/icon.svg", "image/svg+xml")
    add_file("/page.css", own, "page/page.css", STYLE)
    add_file("/docs", own, "page/docs.html", HTML)
    add_file("/docs.js", own, "page/docs.js", SCRIPT)
    add_file("/swagger-ui.js", "fastapi_offline", "static/swagger-ui-bundle.js", SCRIPT)
    add_file("/swagger-ui.css", "fastapi_offline", "static/swagger-ui.css", STYLE)
