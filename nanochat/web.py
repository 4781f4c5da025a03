"""
What the web servers share: how their pages are sent, and the socket that they listen on.
"""

import errno
import secrets
import socket
from pathlib import Path

from starlette.responses import HTMLResponse

from nanochat.files import UserError

LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
STALLED_S = 60  # seconds in which a client must take some of what was sent to it (Linux only)
# nothing but the page's own script and style, and calls of this server
CSP = ("default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; connect-src 'self'; "
       "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


def page_response(name):
    """The response with a page of this folder, an HTML file."""
    # a new nonce each time lets the page's own scripts and styles run, and no others
    nonce = secrets.token_urlsafe(16)
    html = Path(__file__).with_name(name).read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": CSP.format(nonce),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }
    return HTMLResponse(html.replace("__NONCE__", nonce), headers=headers)


def listen(host, port, script="chat_web"):
    """A socket on this address, before anything is loaded. UserError if there can be none."""
    try:
        # of a name with several addresses (localhost) the IPv4 one
        family, *_, address = min(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        sock = socket.create_server(address, family=family)
    except (OSError, UnicodeError) as error:  # UnicodeError: no machine can have such a name
        flag = "--host=127.0.0.1"
        # a port that is taken, or below 1024 and not ours to take
        if getattr(error, "errno", 0) in (errno.EADDRINUSE, errno.EACCES):
            other_port = port + 1 if 1023 < port < 65535 else 8001
            flag = f"-p {other_port}"
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on --host={host} --port={port}: {reason}",
                        f"python -m scripts.{script} {flag}") from error

    # connections inherit it from the socket that accepts them
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * STALLED_S)
    return sock
