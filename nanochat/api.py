"""
The data of the API: OpenAI's request fields with their limits, and its responses, whole or
streamed.

Beyond OpenAI's there are the fields `top_k` and `min_p`, the parts of a tool call in an assistant's
message, and the field `nanochat`. In a whole response or the first chunk, `nanochat` has the seed,
the context size and the number of messages left out. In a message or delta it has the parts of a
tool call. Unknown fields are ignored, as by OpenAI's server.
"""

import asyncio
import json
import secrets
import time
import uuid
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, Field, model_validator

MAX_CHARS = 400_000           # of a text in a request
MAX_TOKENIZE_CHARS = 100_000  # of a request to /tokenize, whose answer is many times as long
MAX_PROMPTS = 128             # in one request
MAX_CHOICES = 16              # `n`
MAX_TOP_LOGPROBS = 20

# -----------------------------------------------------------------------------
# Requests

Text = Annotated[str, Field(max_length=MAX_CHARS)]
TokenId = Annotated[int, Field(ge=0, strict=True)]
ModelName = Annotated[str, Field(max_length=200)]
StopString = Annotated[str, Field(min_length=1, max_length=200)]

# fail_fast: only the first wrong item is reported. A list of 400,000 of them took 15 s, in which
# the server did nothing else
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_CHARS, fail_fast=True)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
TokenLists = Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]

# Fields that would change the answer and are not implemented, each with an alternative
UNSUPPORTED = {
    "tools": "the model calls its calculator by itself",
    "functions": "the model calls its calculator by itself",
    "response_format": "the model answers in plain text",
    "logit_bias": "use top_k, top_p or min_p",
    "presence_penalty": "use temperature, top_k, top_p or min_p",
    "frequency_penalty": "use temperature, top_k, top_p or min_p",
    "suffix": "the model continues a prompt",
    "best_of": "ask for several answers with n",
}
# Values of these fields that change nothing; empty ones and 0 do not either
HARMLESS = {"response_format": {"type": "text"}, "best_of": 1}


class Part(BaseModel):
    type: Literal["text", "python", "python_output"] = "text"
    text: Text


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(max_length=1000, fail_fast=True)]

    def text(self):
        """The content as one str, including tool calls and their results."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)

    def as_turn(self):
        """The message in the form of the tokenizer."""
        # `developer` is OpenAI's newer name for `system`. Only the assistant's parts mean something
        # to the tokenizer: those of others are joined
        turn = self.model_dump()
        if self.role == "developer":
            turn["role"] = "system"
        if self.role != "assistant":
            turn["content"] = self.text()
        return turn


def _check_last_message(messages):
    # the prompt would leave it out, so the question before it would be answered again
    if messages[-1].role == "assistant":
        raise ValueError("the last one is the assistant's: there is nothing to answer")
    return messages


Messages = Annotated[
    list[Message],
    Field(min_length=1, max_length=2000, fail_fast=True),
    AfterValidator(_check_last_message),
]


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class CompletionFields(BaseModel):
    """
    The fields of both kinds of completion. A None is replaced by the server's default, which its
    flags set (service.with_defaults).
    """
    model: ModelName = ""  # "" = the first one that is served
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: int = Field(1, ge=1, le=MAX_CHOICES)  # completions of each prompt

    # a missing seed is drawn and sent with the answer, so that the answer can be repeated
    seed: int = Field(default_factory=lambda: secrets.randbelow(2**31), ge=-(2**63), lt=2**63)
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] = []
    max_tokens: int | None = Field(None, ge=1, le=2**31)  # of each completion

    # sampling parameters, named as in sampling.Sampling
    temperature: float | None = Field(None, ge=0, le=10, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1, le=2**31)  # -1 = off, as in vLLM; 0 too
    top_p: float = Field(1.0, gt=0, le=1)             # 1 = off
    min_p: float = Field(0.0, ge=0, le=1)             # 0 = off

    @model_validator(mode="before")
    @classmethod
    def drop_nulls_and_refuse(cls, data):
        """Null is the same as a missing field. Unsupported fields are refused."""
        if not isinstance(data, dict):
            return data
        # before the null fields go, since unknown fields are ignored afterwards
        for name, instead in UNSUPPORTED.items():
            value = data.get(name)
            if value and value != HARMLESS.get(name):
                raise ValueError(f"{name} is not supported: {instead}")
        return {name: value for name, value in data.items() if value is not None}

    def stops(self):
        """The stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class ChatRequest(CompletionFields):
    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)  # the newer name of max_tokens
    logprobs: bool = False  # of the tokens that the model chose, not of those that a tool forced
    top_logprobs: int = Field(0, ge=0, le=MAX_TOP_LOGPROBS)

    @model_validator(mode="after")
    def prefer_newer_name(self):
        self.max_tokens = self.max_completion_tokens or self.max_tokens
        return self

    def num_top(self):
        """Alternatives to report per token; None = no log-probabilities at all (Row.num_top)."""
        return self.top_logprobs if self.logprobs else None


class CompletionRequest(CompletionFields):
    prompt: Text | TokenIds | Texts | TokenLists
    # 16 is OpenAI's default; 0 with echo gives the log-probabilities of the prompt alone
    max_tokens: int = Field(16, ge=0, le=2**31)
    # more than 4, since evaluations send many
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] = []
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)  # as top_logprobs in a chat
    echo: bool = False  # begin with the prompt, and with its log-probabilities
    # read only that many last tokens of each prompt; named as in vLLM
    truncate_prompt_tokens: int | None = Field(None, ge=1)

    def num_top(self):
        """As in ChatRequest."""
        # at least 1: evaluations ask whether the chosen token was the likeliest
        return None if self.logprobs is None else max(1, self.logprobs)

    def prompts(self):
        """The prompts, each a str or a list of ids."""
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else self.prompt


class TokenizeRequest(BaseModel):
    model: ModelName | None = None
    prompt: str | None = Field(None, max_length=MAX_TOKENIZE_CHARS)
    messages: Messages | None = None

    @model_validator(mode="after")
    def check_fields(self):
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        # each message is shorter than MAX_CHARS already, but there may be many
        num_chars = sum(len(message.text()) for message in self.messages or [])
        if num_chars > MAX_TOKENIZE_CHARS:
            limit = MAX_TOKENIZE_CHARS
            raise ValueError(f"the messages together are longer than {limit} characters")
        return self


# -----------------------------------------------------------------------------
# Errors

# HTTP status -> `type` of OpenAI's error
ERROR_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "unavailable_error",
}


def error_body(message, status, param=None, code=None):
    """OpenAI's error document."""
    default = "invalid_request_error" if status < 500 else "server_error"
    error_type = ERROR_TYPES.get(status, default)
    return {"error": {"message": message, "type": error_type, "param": param, "code": code}}


def explain(errors):
    """
    (field, message) of a wrong field, from pydantic's errors: ('messages.0.role', 'Input should be
    ...'). Where a field may have several types, each type reports an error. The deepest one belongs
    to the type that was meant.
    """
    messages = {}  # place of an error -> its messages
    for error in errors:
        # leave out 'body', and pydantic's names of types: 'list[constrained-str]'
        parts = [str(part) for part in error["loc"][1:]]
        place = tuple(part for part in parts if "-" not in part and "[" not in part)
        messages.setdefault(place, []).append(error["msg"].removeprefix("Value error, "))

    # the first one of equally deep ones
    deepest = max(messages, key=len)
    return ".".join(deepest), ", or: ".join(dict.fromkeys(messages[deepest]))


# -----------------------------------------------------------------------------
# Responses


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

    def delta(self, event):
        # a tool call is not content; the last event, with the finish reason, has no content either
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
