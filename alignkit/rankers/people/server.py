"""`alignkit rank serve`: the page on which people compare two videos, for this machine alone.

The browser learns a pair's key, its prompt and two addresses that say left and right: no file names, kinds or dates.
"""

import hashlib
import hmac
import json
import secrets
import socket
import threading
import webbrowser
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.errors import AlignkitError, DataError
from alignkit.progress import say
from alignkit.rankers.asking import digests_of
from alignkit.rankers.people.comparisons import Pair, is_inside, read_comparisons
from alignkit.rankers.people.votes import open_votes, rater_name, read_votes, record, take_back, take_skips_back

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.types import ASGIApp

LOOPBACK = "127.0.0.1"
OWN_NAMES = (LOOPBACK, "localhost")  # any other name in a request is another site's that points at this machine
LARGEST_BODY = 4096  # bytes
FILES = Path(__file__).parent
TYPES = {"page.js": "text/javascript", "page.css": "text/css"}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; media-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
VIDEO_HEADERS = {
    "cache-control": "private, max-age=3600",
    # The file's own would tell which videos were made together.
    "last-modified": "Thu, 01 Jan 1970 00:00:00 GMT",
}
Facts = tuple[int, int]  # of a file: bytes, and when it was changed in ns


class Refused(Exception):
    """A request that is not answered: an HTTP status and a sentence that says why."""

    def __init__(self, status: int, why: str):
        super().__init__(why)
        self.status = status


@dataclass(frozen=True)
class Shown:
    """A pair as the server knows it. key: its name in the browser; facts: of both files as the digest saw them."""

    pair: Pair
    digest: str
    key: str
    facts: list[Facts] | None


def serve(folder: Path, port: int = 0, open_browser: bool = False) -> None:
    """Say the page's address and serve it until interrupted. port: 0 takes a free one.

    Raises DataError for a folder that cannot be used and a port that cannot be had.
    """
    app = application(folder)
    import uvicorn

    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((LOOPBACK, port))
            listener.listen()
        except (OSError, OverflowError) as error:
            raise DataError(f"port {port} cannot be had ({error}); choose another one, or 0 for any") from None
        address = f"http://{LOOPBACK}:{listener.getsockname()[1]}/"
        say(f"people compare videos at {address} (stop with Ctrl-C; every vote is kept)")
        if open_browser:
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        settings = uvicorn.Config(
            app,
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=1,  # seconds; a browser keeps its connections
        )
        with suppress(KeyboardInterrupt):
            uvicorn.Server(settings).run(sockets=[listener])


def application(folder: Path) -> "Starlette":
    """The page as a Starlette application. Raises DataError for a folder that cannot be used."""
    try:
        import starlette.applications  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise DataError("people rank on a page that needs two more packages: pip install 'alignkit[rank]'") from None
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.requests import Request
    from starlette.responses import FileResponse, JSONResponse, Response
    from starlette.routing import Route

    pairs = _shown(folder)
    open_votes(folder)
    by_key = {shown.key: shown for shown in pairs}
    token = secrets.token_urlsafe(24)
    page = (FILES / "page.html").read_text(encoding="utf-8").replace("{token}", token)

    def find(key: object) -> Shown:
        shown = by_key.get(key) if isinstance(key, str) else None
        if shown is None:
            raise Refused(409, "This pair is not among the comparisons any more. Reload the page.")
        return shown

    def check_unchanged(shown: Shown) -> None:
        if shown.facts is None or shown.facts != _facts(shown.pair):
            raise Refused(409, "A video of this pair was changed or deleted. Start the server again.")

    def show_page(request: Request) -> Response:
        return Response(page, media_type="text/html", headers={"cache-control": "no-store"})

    def show_file(request: Request) -> Response:
        name = request.url.path.removeprefix("/")
        return Response((FILES / name).read_bytes(), media_type=TYPES[name], headers={"cache-control": "no-cache"})

    def show_video(request: Request) -> Response:
        shown = find(request.path_params["key"])
        left = left_side(shown.pair.id, _rater(request.query_params.get("rater")))
        side = request.path_params["side"]
        if side not in ("left", "right"):
            raise Refused(404, "A video is left or right.")
        check_unchanged(shown)
        path = shown.pair.video_a if (left == "a") == (side == "left") else shown.pair.video_b
        if not is_inside(path, folder):
            raise Refused(404, "This video is not in the folder any more.")
        headers = VIDEO_HEADERS | {"etag": f'"{shown.key}-{side}"'}
        return FileResponse(path, headers=headers, stat_result=path.stat())

    def show_next(request: Request) -> Response:
        return JSONResponse(state(folder, pairs, _rater(request.query_params.get("rater"))))

    def vote(body: dict[str, Any]) -> dict[str, Any]:
        rater, shown = _rater(body.get("rater")), find(body.get("pair"))
        left = left_side(shown.pair.id, rater)
        sides = {"left": left, "right": "b" if left == "a" else "a", "tie": "tie", "skip": "skip"}
        answer = body.get("answer")
        if not isinstance(answer, str) or answer not in sides:
            raise Refused(400, "A vote is one of left, right, tie and skip.")
        if answer != "skip":
            check_unchanged(shown)
        record(folder, rater, shown.pair.id, shown.digest, sides[answer], left)
        return state(folder, pairs, rater)

    def undo(body: dict[str, Any]) -> dict[str, Any]:
        rater, shown = _rater(body.get("rater")), find(body.get("pair"))
        if not take_back(folder, rater, shown.pair.id, shown.digest, left_side(shown.pair.id, rater)):
            raise Refused(409, "You have voted on another pair since, perhaps in another window. Reload the page.")
        return state(folder, pairs, rater)

    def again(body: dict[str, Any]) -> dict[str, Any]:
        rater = _rater(body.get("rater"))
        take_skips_back(folder, rater)
        return state(folder, pairs, rater)

    def taking(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            from starlette.concurrency import run_in_threadpool

            body = await _body(request, token)
            return JSONResponse(await run_in_threadpool(change, body))

        return endpoint

    def refuse(request: Request, error: Exception) -> Response:
        status = error.status if isinstance(error, Refused) else getattr(error, "status_code", 500)
        return JSONResponse({"error": getattr(error, "detail", None) or str(error)}, status)

    return Starlette(
        routes=[
            Route("/", show_page),
            *(Route(f"/{name}", show_file) for name in TYPES),
            Route("/next", show_next),
            Route("/video/{key}/{side}", show_video),
            Route("/vote", taking(vote), methods=["POST"]),
            Route("/undo", taking(undo), methods=["POST"]),
            Route("/again", taking(again), methods=["POST"]),
        ],
        middleware=[Middleware(_guard)],
        exception_handlers={Refused: refuse, AlignkitError: refuse, HTTPException: refuse},
    )


def left_side(comparison: str, rater: str) -> str:
    """Which video, "a" or "b", this rater sees on the left: always the same, and half of the raters see the other."""
    return "ab"[_hash("left", comparison, rater)[0] % 2]


def state(folder: Path, pairs: list[Shown], rater: str) -> dict[str, Any]:
    """What the page shows to a rater: the next pair (None at the end), how far they are, and what can be taken back.

    Each rater has an order of their own. Raises DataError where the votes cannot be read.
    """
    by_digest = {(shown.pair.id, shown.digest): shown for shown in pairs}
    own = [vote for vote in read_votes(folder) if vote.rater == rater and (vote.comparison, vote.digest) in by_digest]
    done = {(vote.comparison, vote.digest) for vote in own}
    left = [shown for name, shown in by_digest.items() if name not in done]
    following = min(left, key=lambda shown: _hash("order", shown.pair.id, rater), default=None)
    return {
        "pair": following and {"key": following.key, "prompt": following.pair.prompt},
        "total": len(pairs),
        "done": len(own),
        "skipped": sum(vote.answer == "skip" for vote in own),
        "last": by_digest[own[-1].comparison, own[-1].digest].key if own else None,
    }


def _shown(folder: Path) -> list[Shown]:
    pairs = read_comparisons(folder)
    facts = [_facts(pair) for pair in pairs]  # before their bytes are read, so that a change in between is seen
    digests = digests_of(pairs)
    return [
        Shown(pair, digests[pair.id], _hash("key", pair.id, digests[pair.id]).hex()[:24], known)
        for pair, known in zip(pairs, facts, strict=True)
    ]


def _facts(pair: Pair) -> list[Facts] | None:
    try:
        found = [path.stat() for path in (pair.video_a, pair.video_b)]
    except OSError:
        return None
    return [(one.st_size, one.st_mtime_ns) for one in found]


def _hash(*texts: str) -> bytes:
    return hashlib.sha256(json.dumps(texts).encode()).digest()


def _rater(name: object) -> str:
    try:
        return rater_name(name)
    except DataError as error:
        raise Refused(400, f"{error}.".capitalize()) from None


async def _body(request: Any, token: str) -> dict[str, Any]:
    """What the page has sent. Raises Refused for what another site can make a browser send, and what is no object."""
    headers = request.headers
    if headers.get("content-type", "").split(";")[0].strip() != "application/json":
        raise Refused(415, "Votes are sent as application/json.")
    if headers.get("origin") != f"http://{headers['host']}":
        raise Refused(403, "Votes are taken from this page alone.")
    if not hmac.compare_digest(headers.get("x-token", "").encode(), token.encode()):
        raise Refused(403, "This page is from an earlier start of the server. Reload it.")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST_BODY:
            raise Refused(413, f"A vote has at most {LARGEST_BODY} bytes.")
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Refused(400, "A vote is a JSON object.")
    return found


def _guard(app: "ASGIApp") -> "ASGIApp":
    """Answers nothing that was asked under another name or by another site, and adds `HEADERS` to every answer."""
    from starlette.datastructures import Headers, MutableHeaders
    from starlette.responses import JSONResponse
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        hosts, site = headers.getlist("host"), headers.get("sec-fetch-site", "none")
        answer: ASGIApp = app
        if len(hosts) != 1 or hosts[0].partition(":")[0] not in OWN_NAMES:
            answer = JSONResponse({"error": f"This page is at {LOOPBACK} and localhost alone."}, 403)
        elif site not in ("same-origin", "none") and scope["path"] != "/":
            answer = JSONResponse({"error": "This is not for other sites."}, 403)
        await answer(scope, receive, send_with_headers)

    return guarded
