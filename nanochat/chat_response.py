"""
The responses to chat completions and text completions, whole or streamed, in OpenAI's form.

Beyond OpenAI's there is the field `nanochat`. In a whole response or the first chunk it has the
seed, the context size and the number of messages left out; in a message or delta, the parts of a
call of the calculator.
"""

import asyncio
import json
import time
import uuid


def sse(data):
    """A server-sent event."""
    return f"data: {json.dumps(data)}\n\n"


def token_text(tokenizer, token):
    """A token as text, or 'bytes:\\xe2\\x82' where it is not valid UTF-8 alone."""
    raw = tokenizer.decode_bytes([token])
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class Response:
    """
    Turns the events of some requests (scheduler.py) into a response. `opening`, `chunk` and
    `closing` make the stream, `whole` the JSON document. A subclass makes the choices in a chunk
    (`delta`) and in the document (`choice`).
    """

    def __init__(self, model, requests, prompt_tokens, about):
        """about: the `nanochat` field, a dict."""
        self.model = model
        self.tokenizer = requests[0].tokenizer
        self.requests = requests  # one for each choice
        self.prompt_tokens = prompt_tokens
        self.about = about

        # the events of all choices come through one queue
        self.queue = asyncio.Queue()
        for request in requests:
            request.queue = self.queue

        # fields of the document and of each chunk
        self.head = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def completion_tokens(self):
        """Tokens generated so far, including those that a tool forced."""
        return sum(len(request.row.tokens) for request in self.requests)

    def usage(self):
        generated = self.completion_tokens()
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self.prompt_tokens + generated,
        }

    def data(self, choices, **more):
        return sse({**self.head, "object": self.chunk_name, "choices": choices, **more})

    def opening(self):
        return ": nanochat\n\n"  # a comment, with which the headers leave

    def chunk(self, event):
        """The event's part of the stream; "" where there is nothing to say yet."""
        return self.data([self.delta(event)])

    def closing(self, include_usage):
        # OpenAI sends the usage as a chunk without choices
        usage = self.data([], usage=self.usage()) if include_usage else ""
        return usage + "data: [DONE]\n\n"

    def whole(self, events):
        # events of the choices come interleaved
        choices = []
        for request in self.requests:
            own_events = [event for event in events if event.request is request]
            choices.append(self.choice(request, own_events))
        return {
            **self.head,
            "object": self.object_name,
            "choices": choices,
            "usage": self.usage(),
            "nanochat": self.about,
        }


class ChatResponse(Response):
    id_prefix = "chatcmpl"
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def opening(self):
        # the role comes once for each choice, before its text
        delta = {"role": "assistant", "content": ""}
        choices = []
        for request in self.requests:
            choices.append({
                "index": request.index,
                "delta": delta,
                "logprobs": None,
                "finish_reason": None,
            })
        return self.data(choices, nanochat=self.about)

    def chunk(self, event):
        if not event.request.may_be_call:
            return super().chunk(event)

        # what may become a call is held until its end, and then sent in one piece
        request = event.request
        request.held_events.append(event)
        if event.finish_reason is None:
            return ""
        held = self.choice(request, request.held_events)
        delta = held["message"]
        del delta["role"]
        for i, call in enumerate(delta.get("tool_calls", [])):
            call["index"] = i
        logprobs = held["logprobs"]
        place = {"index": request.index}
        first = {**place, "delta": delta, "logprobs": logprobs, "finish_reason": None}
        last = {**place, "delta": {}, "logprobs": None, "finish_reason": held["finish_reason"]}
        return self.data([first]) + self.data([last])

    def delta(self, event):
        # a calculation is not content; the last event, with the finish reason, has no content either
        delta = {}
        if event.kind != "text":
            delta = {"content": "", "nanochat": {"type": event.kind, "text": event.text}}
        elif event.finish_reason is None:
            delta = {"content": event.text}
        return {
            "index": event.request.index,
            "delta": delta,
            "logprobs": self.logprobs([event]),
            "finish_reason": event.finish_reason,
        }

    def choice(self, request, events):
        # neighbouring events of one kind become one part
        parts = []
        for event in events:
            if parts and parts[-1]["type"] == event.kind:
                parts[-1]["text"] += event.text
            elif event.text:
                parts.append({"type": event.kind, "text": event.text})

        content = "".join(part["text"] for part in parts if part["type"] == "text")
        call = request.read_call(content)
        if call and events[-1].finish_reason == "stop":
            return self.call_choice(request, *call)

        # a client sends `parts` back to continue a conversation with tool calls
        message = {"role": "assistant", "content": content}
        if any(part["type"] != "text" for part in parts):
            message["nanochat"] = {"parts": parts}
        return {
            "index": request.index,
            "message": message,
            "logprobs": self.logprobs(events),
            "finish_reason": events[-1].finish_reason,
        }

    def call_choice(self, request, name, arguments):
        """The choice of a request whose answer calls a function of the client's."""
        function = {"name": name, "arguments": arguments}
        call = {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}
        return {
            "index": request.index,
            "message": {"role": "assistant", "content": None, "tool_calls": [call]},
            "logprobs": None,
            "finish_reason": "tool_calls",
        }

    def logprobs(self, events):
        content = []
        for event in events:
            for token, (logprob, top), _ in event.logprobs:
                entry = self.token_entry(token, logprob)
                entry["top_logprobs"] = [self.token_entry(*other) for other in top]
                content.append(entry)
        return {"content": content, "refusal": None} if content else None

    def token_entry(self, token, logprob):
        raw = list(self.tokenizer.decode_bytes([token]))
        return {"token": token_text(self.tokenizer, token), "logprob": logprob, "bytes": raw}


class TextResponse(Response):
    id_prefix = "cmpl"
    object_name = chunk_name = "text_completion"

    def delta(self, event):
        return self.choice(event.request, [event])

    def choice(self, request, events):
        return {
            "index": request.index,
            "text": "".join(event.text for event in events),
            "logprobs": self.logprobs(events),
            "finish_reason": events[-1].finish_reason,
        }

    def logprobs(self, events):
        """Four lists with an entry per token."""
        columns = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for event in events:
            for token, entry, start in event.logprobs:
                # entry: (log-probability, [(id, log-probability)]); None for a prompt's first token
                logprob, top = entry or (None, None)
                columns["tokens"].append(token_text(self.tokenizer, token))
                columns["token_logprobs"].append(logprob)
                columns["top_logprobs"].append(self.top_logprobs(token, logprob, top))
                columns["text_offset"].append(start)
        return columns if columns["tokens"] else None

    def top_logprobs(self, token, logprob, top):
        """{text: log-probability} of the likeliest tokens and the chosen one."""
        if top is None:
            return None
        # several tokens may have the same text: the likeliest counts
        by_text = {}
        for other, other_logprob in [*top, (token, logprob)]:
            by_text.setdefault(token_text(self.tokenizer, other), other_logprob)
        return by_text
