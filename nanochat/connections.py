"""
The HTTP server, with limits on what a connection may take without a request. uvicorn has limits for
the time between two requests and for a shutdown; here are those for a request that is not whole.
"""

import asyncio
import http
from functools import partial

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from nanochat.gate import MAX_HEAD_BYTES, error_response, long_head_response
from nanochat.service import GRACE_S

REQUEST_S = 20  # seconds in which a request must come in whole, from connecting or its first byte
IDLE_S = 20     # that a connection stays open between requests: clients keep theirs for some 10 s

# -----------------------------------------------------------------------------
# Connections


class LimitedProtocol(HttpToolsProtocol):
    """
    A connection that is closed if a request does not come in whole within request_s, or if its head
    is too long. The time of a response is not limited here.
    """

    def __init__(self, *args, request_s=REQUEST_S, **kwargs):
        super().__init__(*args, **kwargs)
        self.request_s = request_s

    def connection_made(self, transport):
        super().connection_made(transport)
        self.head_bytes = 0  # of the request that comes next; None while its body comes
        self.timer = None    # runs while a request is not whole
        self._start_timer()

    def connection_lost(self, exc):
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data):
        if self.head_bytes is not None:
            self._start_timer()
            self.head_bytes += len(data)
        super().data_received(data)
        # the head has not ended with this piece. The Gate counts those that have
        if (self.head_bytes or 0) > MAX_HEAD_BYTES:
            self._close_with(long_head_response())

    def on_headers_complete(self):
        self.head_bytes = None
        self._start_timer()
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0":
            send_plain(self.cycle)

    def on_message_complete(self):
        super().on_message_complete()
        self.head_bytes = 0
        self._stop_timer()

    def shutdown(self):
        """The server is to end. uvicorn would wait for the rest of a request that is not whole."""
        if self.timer is not None and not self._is_answering():
            self.transport.close()
        super().shutdown()

    def _start_timer(self):
        if self.timer is None:
            self.timer = self.loop.call_later(self.request_s, self._on_timeout)

    def _stop_timer(self):
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def _on_timeout(self):
        self.timer = None
        if self._is_answering():
            self._start_timer()
        elif self.head_bytes == 0:
            self.transport.close()  # nothing was asked
        else:
            message = f"The request did not come in whole within {self.request_s} s"
            self._close_with(error_response(408, message))

    def _is_answering(self):
        """Whether the response to a request before the one that is not whole is still open."""
        if self.head_bytes is None:
            return bool(self.pipeline)
        return self.cycle is not None and not self.cycle.response_complete

    def _close_with(self, response):
        """Close the connection, with a response if none has begun."""
        in_body = self.head_bytes is None
        has_begun = in_body and self.cycle.response_started
        if not has_begun and not self._is_answering() and not self.transport.is_closing():
            status = response.status_code
            lines = [f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}".encode()]
            lines += [name + b": " + value for name, value in response.raw_headers]
            lines += [b"connection: close", b"", response.body]
            self.transport.write(b"\r\n".join(lines))
        self.transport.close()


def send_plain(cycle):
    """
    Let a response, uvicorn's RequestResponseCycle, be sent as it is: its end is the end of the
    connection. uvicorn would send it in chunks with their sizes, which HTTP/1.0 does not know.
    """
    send = cycle.send
    cycle.chunked_encoding = False

    async def send_any_length(message):
        # uvicorn compares the length of the whole body with what is left of the announced one
        cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    cycle.send = send_any_length


# -----------------------------------------------------------------------------
# The server


class Server(uvicorn.Server):
    """
    Serves an app, with a Service behind it, until a signal. That first stops the service, so that
    open streams get grace_s seconds. What is still open a second later is cut off.
    """

    def __init__(self, app, service, grace_s=GRACE_S, request_s=REQUEST_S, log_level="warning"):
        protocol = partial(LimitedProtocol, request_s=request_s)
        config = uvicorn.Config(app, http=protocol, ws="none", log_level=log_level,
                                access_log=False, timeout_keep_alive=IDLE_S,
                                timeout_graceful_shutdown=grace_s + 2)
        super().__init__(config)
        self.service = service
        self.grace_s = grace_s

    def handle_exit(self, sig, frame):
        self.service.stop(self.grace_s)
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets=None):
        # clients that do not read their response; uvicorn would end their tasks with a traceback
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self.grace_s + 1, self._abort_connections)
        await super().shutdown(sockets)
        timer.cancel()

    def _abort_connections(self):
        for connection in list(self.server_state.connections):
            connection.transport.abort()
