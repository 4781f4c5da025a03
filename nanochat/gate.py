"""
What every request passes before its route, and the errors in OpenAI's shape.

`Gate` checks the key, the host name, the size of head and body, notes who asks, and counts the
response. A `BodyRoute` reads large bodies off the event loop.
"""

import asyncio
import hmac
import json

from fastapi import HTTPException
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException as StarletteHTTPException

from nanochat.api import error_body, explain

MAX_HEAD_BYTES = 16 * 2**10   # of a request: its path and headers
MAX_BODY_BYTES = 4 * 2**20    # of a request
LARGE_BODY_BYTES = 2**16      # from here on a body is parsed in a worker thread
# An evaluation's largest request has 128 prompts of 2,047 token ids. Parsing so many values takes
# 0.03 s, in which no other thread runs either: Python's parser holds the lock of the interpreter
MAX_COMMAS = 300_000
OPEN_PATHS = ("/", "/health", "/ready", "/favicon.ico")  # need no key


def split_keys(text):
    """
    The keys in a text, with commas between them. Blank ones are no keys.

    >>> split_keys("one, two,, ")
    ['one', 'two']
    """
    keys = [key.strip() for key in (text or "").split(",")]
    return [key for key in keys if key]


# -----------------------------------------------------------------------------
# Middleware


class Gate:
    """
    The middleware around the routes. api_keys: one of these is needed, [] = none is. hosts: the
    names of this server that are answered without a key. A web page may give itself our address by
    DNS (rebinding), and then calls us by its own name.

    The client's name in `scope["nanochat_client"]` is its key, where there are several. A single
    key is the same for all, so then, and without keys, it is the address.
    """

    def __init__(self, app, service, api_keys, hosts):
        self.app = app
        self.service = service
        self.api_keys = api_keys
        self.hosts = hosts

    async def __call__(self, scope, receive, send):
        # lifespan messages pass
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 500  # unless a response begins

        async def send_and_note_status(message):
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            app = self.refuse(scope) or self.app
            await app(scope, limit_body(receive), send_and_note_status)
        finally:
            # the route, not the path of the request, which may be anything
            path = getattr(scope.get("route"), "path", "other")
            self.service.responses.labels(path, str(status)).inc()

    def refuse(self, scope):
        """The response to a request with a long head, a strange host, or without a key, or None."""
        if count_head_bytes(scope) > MAX_HEAD_BYTES:
            return long_head_response()
        address = scope.get("client") or ("",)
        scope["nanochat_client"] = address[0]
        # browsers always send a host name
        host = strip_port(Headers(scope=scope).get("host", ""))
        if host and not self.api_keys and host not in self.hosts:
            return strange_host_response(host)
        if not self.api_keys or scope["path"] in OPEN_PATHS:
            return None

        # headers are bytes, which starlette decodes as latin-1
        given = Headers(scope=scope).get("authorization", "").removeprefix("Bearer ")
        given = given.encode("latin-1")
        # all are compared, so that the time tells nothing
        matches = [key for key in self.api_keys if hmac.compare_digest(given, key.encode())]
        if matches:
            if len(self.api_keys) > 1:
                scope["nanochat_client"] = matches[0]
            return None
        message = "Invalid or missing API key: send it as 'Authorization: Bearer KEY'"
        return error_response(401, message, headers={"WWW-Authenticate": "Bearer"})


def count_head_bytes(scope):
    """Bytes of a request's path and headers."""
    num_bytes = len(scope.get("raw_path") or b"") + len(scope.get("query_string", b""))
    for name, value in scope["headers"]:
        num_bytes += len(name) + len(value)
    return num_bytes


def strip_port(host):
    """
    The name in a Host header, in lower case.

    >>> [strip_port(host) for host in ("Localhost:8000", "[::1]:8000", "[::1]")]
    ['localhost', '[::1]', '[::1]']
    """
    name, _, port = host.lower().rpartition(":")
    return name if name and port.isdigit() else host.lower()


def limit_body(receive):
    """`receive` for a body of limited size; its content-length may be missing or wrong."""
    num_bytes = 0

    async def receive_and_count():
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > MAX_BODY_BYTES:
            raise HTTPException(413, f"The request is longer than {MAX_BODY_BYTES} bytes")
        return message

    return receive_and_count


# -----------------------------------------------------------------------------
# Large bodies


class BodyRequest(HTTPRequest):
    """A request whose JSON is parsed in a worker thread if it is long."""

    async def json(self):
        # FastAPI calls this, after `body`
        body = await self.body()
        if len(body) <= LARGE_BODY_BYTES:
            return await super().json()
        # at least as many as there are values, for a hundredth of the time
        num_commas = body.count(b",")
        if num_commas > MAX_COMMAS:
            message = f"The request has {num_commas} commas; at most {MAX_COMMAS} are read"
            raise HTTPException(413, message)
        return await asyncio.to_thread(json.loads, body)


class BodyRoute(APIRoute):
    """A route that gets a BodyRequest."""

    def get_route_handler(self):
        handle = super().get_route_handler()

        async def handle_body_request(request):
            return await handle(BodyRequest(request.scope, request.receive))

        return handle_body_request


# -----------------------------------------------------------------------------
# Errors in OpenAI's shape


def error_response(status, message, param=None, code=None, headers=None):
    return JSONResponse(error_body(message, status, param, code), status, headers)


def long_head_response():
    message = f"The request's path and headers are longer than {MAX_HEAD_BYTES} bytes"
    # the rest of such a request is not worth reading
    return error_response(431, message, headers={"Connection": "close"})


def strange_host_response(host):
    message = (
        f"Without a key only requests to this machine's own names are answered, not to {host!r:.100}:"
        f" start the server with --allow_host={host:.100}, or with a key in NANOCHAT_API_KEY"
    )
    return error_response(400, message, code="host_not_allowed")


async def on_http_error(request, error):
    detail = error.detail if isinstance(error.detail, dict) else {"message": str(error.detail)}
    # Starlette's own errors, of a path or a method without a route
    if error.detail == "Not Found":
        detail = {"message": f"There is no {request.url.path!r:.200} here. There is: {list_paths(request.app)}"}
    elif error.detail == "Method Not Allowed":
        allowed = (error.headers or {}).get("Allow", "")
        detail = {"message": f"{request.url.path} takes {allowed}, not {request.method}"}
    return error_response(error.status_code, **detail, headers=error.headers)


def list_paths(app):
    """The paths that an app answers, as text."""
    paths = []
    for route in app.routes:
        if isinstance(route, APIRoute) and route.include_in_schema:
            paths.append(f"{'/'.join(route.methods)} {route.path}")
    return ", ".join(paths)


async def on_invalid_request(request, error):
    # pydantic's errors of a body that is no JSON, that does not say it is, or that has wrong fields
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        reason = f"{first['ctx']['error']} at character {first['loc'][1]}"
        return error_response(400, f"The body is not JSON: {reason}")
    if first["loc"] == ("body",) and "json" not in request.headers.get("content-type", ""):
        return error_response(415, "The request has no header 'Content-Type: application/json'")
    field, message = explain(error.errors())
    return error_response(400, f"{field or 'body'}: {message}", param=field or None)


async def on_failure(request, error):
    return error_response(500, "The server failed; its log has the details")


ERROR_HANDLERS = {
    StarletteHTTPException: on_http_error,
    RequestValidationError: on_invalid_request,
    Exception: on_failure,
}
