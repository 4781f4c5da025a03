#!/usr/bin/env bash
# huggingface_hub: a stream breaks at a line separator inside the text, and without a space after data:
#
# Expected: InferenceClient(base_url=...) reads what any server of OpenAI's API streams. In an event
#   stream lines end with CR, LF or both, and the space after "data:" may be missing; JSON may hold
#   U+2028 (line separator, common in text from the web) and U+0085 as they are.
# Happens:  lines are cut by httpx2's `iter_lines`, which also cuts at U+2028, U+2029 and U+0085, so half an
#   event goes to the JSON parser; and the end mark is known with its space alone, so "data:[DONE]" goes to
#   the JSON parser too. Both end the answer with a JSONDecodeError. The client of the package openai
#   reads all three. A server is safe if it escapes what is not ASCII, as Python's json.dumps does.
#
# Versions: huggingface_hub 2.4.0, openai 3.57.0, Python 3.11. Seen: 2026-11-30.
# Needs: bash, uv. A server on 127.0.0.1 answers with fixed bytes.
#
# Output seen:
#   plain       huggingface_hub 'one two'             openai 'one two'
#   U+2028      huggingface_hub JSONDecodeError       openai 'one\u2028 two'
#   U+0085      huggingface_hub JSONDecodeError       openai 'one\x85 two'
#   no space    huggingface_hub JSONDecodeError       openai 'one two'
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
uv venv -q venv
uv pip install -q --python venv/bin/python huggingface_hub==2.4.0 openai==3.57.0
cat > try.py <<'PYTHON'
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from huggingface_hub import InferenceClient
from openai import OpenAI

CASES = {  # name -> first piece of text, what stands before the data
    "plain": ("one", "data: "),
    "U+2028": ("one\u2028", "data: "),
    "U+0085": ("one\u0085", "data: "),
    "no space": ("one", "data:"),
}
MESSAGES = [{"role": "user", "content": "count"}]


def chunk(text, finish_reason=None):
    choice = {"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}


class Server(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        text, before = CASES[list(CASES)[int(self.path.split("/")[1])]]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.end_headers()
        for data in (chunk(text), chunk(" two"), chunk("", "stop")):
            self.wfile.write(f"{before}{json.dumps(data, ensure_ascii=False)}\n\n".encode())
        self.wfile.write(f"{before}[DONE]\n\n".encode())

    def log_message(self, *args):
        pass


def ask_hub(base_url):
    client = InferenceClient(base_url=base_url, api_key="none")  # a client without a name closes its stream
    stream = client.chat_completion(MESSAGES, stream=True)
    return "".join(event.choices[0].delta.content for event in stream)


def ask_openai(base_url):
    client = OpenAI(base_url=base_url, api_key="none", max_retries=0)
    stream = client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
    return "".join(event.choices[0].delta.content for event in stream)


def outcome(ask, base_url):
    try:
        return ascii(ask(base_url))
    except ValueError as error:
        return type(error).__name__


server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
seen = {}
for index, name in enumerate(CASES):
    base_url = f"http://127.0.0.1:{server.server_port}/{index}/v1"
    hub, openai = outcome(ask_hub, base_url), outcome(ask_openai, base_url)
    print(f"{name:<11} huggingface_hub {hub:<21} openai {openai}")
    seen[name] = hub == openai
sys.exit(seen != {"plain": True, "U+2028": False, "U+0085": False, "no space": False})
PYTHON
HF_HUB_DISABLE_TELEMETRY=1 NO_PROXY=127.0.0.1 venv/bin/python try.py
