"""
What goes over the wire: OpenAI's request fields with their limits, and its responses, whole or streamed.

Beyond OpenAI: `top_k` and `min_p`; messages of the assistant may hold the parts of a tool call; and a field `nanochat`
tells, in the first chunk or the whole response, the seed, the context's size and how many messages were dropped, and
in a message or delta the parts of a tool call. Unknown fields are ignored, as OpenAI's server does.
"""

import codecs
import json
import time
import uuid
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, Field, model_validator

MAX_CHARS = 400_000      # of a text in a request
MAX_COUNTED = 100_000    # characters to /tokenize, whose answer is many times as long
MAX_PROMPTS = 128        # in one request
MAX_CHOICES = 16         # `n`
MAX_TOP_LOGPROBS = 20

Text = Annotated[str, Field(max_length=MAX_CHARS)]
TokenId = Annotated[int, Field(ge=0, strict=True)]
# the first wrong item of a list is enough: hundreds of thousands of errors take seconds, in which nobody is served
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_CHARS, fail_fast=True)]
StopString = Annotated[str, Field(min_length=1, max_length=200)]

# -----------------------------------------------------------------------------
# Requests

# fields that would change the answer and that we cannot honour; an empty value or one that says "as usual" is fine
UNSUPPORTED = {"tools": "the model calls its calculator by itself",
               "functions": "the model calls its calculator by itself",
               "response_format": "the model answers in plain text", "logit_bias": "use top_k, top_p or min_p",
               "suffix": "the model continues a prompt", "best_of": "ask for several answers with n"}


class Part(BaseModel):
    type: Literal["text", "python", "python_output"] = "text"
    text: Text


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(max_length=1000, fail_fast=True)]

    def as_turn(self):
        """What the tokenizer renders; `developer` is OpenAI's newer name for `system`."""
        if self.role == "assistant" and not isinstance(self.content, str):
            return {"role": "assistant", "content": [part.model_dump() for part in self.content]}
        return {"role": "system" if self.role == "developer" else self.role, "content": self.text()}

    def text(self):
        """The content as one str, calls of tools and their results included."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


def _end_with_a_question(messages):
    if messages[-1].role == "assistant":  # it would be left out, and the turn before it answered once more
        raise ValueError("the last one is the assistant's: there is nothing to answer")
    return messages


Messages = Annotated[list[Message], Field(min_length=1, max_length=2000, fail_fast=True),
                     AfterValidator(_end_with_a_question)]


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class SamplingFields(BaseModel):
    """What both kinds of completion share. None = the server's default, which its flags set."""
    model: str | None = Field(None, max_length=200)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=10, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31)  # -1 = off, as in vLLM
    min_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    max_tokens: int | None = Field(None, ge=1, le=2**31)
    presence_penalty: float | None = Field(None, ge=0, le=0)   # not implemented: 0 alone is accepted
    frequency_penalty: float | None = Field(None, ge=0, le=0)

    @model_validator(mode="before")
    @classmethod
    def refuse_unsupported(cls, data):
        for name, instead in UNSUPPORTED.items() if isinstance(data, dict) else ():
            value = data.get(name)
            if value and value not in (1, {"type": "text"}):
                raise ValueError(f"{name} is not supported: {instead}")
        return data

    def stops(self):
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(SamplingFields):
    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)  # OpenAI's newer name for max_tokens
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    def num_top(self):
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(SamplingFields):
    prompt: (Text | TokenIds | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
             | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)])
    max_tokens: int | None = Field(None, ge=0, le=2**31)  # 0 with echo: the scores of the prompt alone
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None  # evaluations send many
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool | None = None

    def num_top(self):
        return None if self.logprobs is None else max(1, self.logprobs)  # always the likeliest: is it the chosen one?

    def prompts(self):
        """The prompts, each a str or a list of ids."""
        return [self.prompt] if isinstance(self.prompt, str) or isinstance(self.prompt[0], int) else self.prompt


class TokenizeRequest(BaseModel):
    model: str | None = Field(None, max_length=200)
    prompt: str | None = Field(None, max_length=MAX_COUNTED)
    messages: Messages | None = None

    @model_validator(mode="after")
    def need_one(self):
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        if sum(len(message.text()) for message in self.messages or []) > MAX_COUNTED:
            raise ValueError(f"the messages together are longer than {MAX_COUNTED} characters")
        return self


# -----------------------------------------------------------------------------
# Responses


def error_body(message, status, param=None, code=None):
    kinds = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error",
             429: "rate_limit_error", 503: "unavailable_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def explain(errors):
    """
    Where a request is wrong ('messages.0.role'), and how, from pydantic's errors: those of the first wrong field. Where
    a field may be one of several kinds each kind complains; the complaint that goes deepest comes from the likely one.
    """
    def where(error):  # without pydantic's names for the kinds: 'list[constrained-str]'
        return tuple(part for part in map(str, error["loc"][1:]) if not set("-[") & set(part))

    field = [error for error in errors if where(error)[:1] == where(errors[0])[:1]]
    place = max(map(where, field), key=len)
    messages = dict.fromkeys(error["msg"].removeprefix("Value error, ") for error in field if where(error) == place)
    return ".".join(place), ", or: ".join(messages)


def token_text(tokenizer, token):
    """A token as text; one that is no whole character as OpenAI writes it: 'bytes:\\xe2\\x82'."""
    raw = tokenizer.decode_bytes([token])
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class Reply:
    """
    A response under way: `feed` takes the events of its choices; `opening`, `chunk` and `closing` make the stream,
    `whole` the response in one piece. Subclasses say what a choice looks like.
    """

    def __init__(self, model, tokenizer, prompt_tokens, about):
        self.tokenizer, self.prompt_tokens, self.about = tokenizer, prompt_tokens, about
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "object": self.kind, "created": int(time.time()),
                     "model": model}
        self.num_tokens, self.events = {}, {}  # by choice

    def feed(self, event):
        self.num_tokens[event.index] = max(event.num_tokens, self.num_tokens.get(event.index, 0))
        self.events.setdefault(event.index, []).append(event)

    def usage(self):
        generated = sum(self.num_tokens.values())
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": generated,
                "total_tokens": self.prompt_tokens + generated}

    def data(self, choices, **more):
        return f"data: {json.dumps({**self.head, 'choices': choices, **more})}\n\n"

    def chunk(self, event):
        return self.data([self.delta(event)])

    def closing(self, include_usage):
        return (self.data([], usage=self.usage()) if include_usage else "") + "data: [DONE]\n\n"

    def whole(self):
        choices = [self.choice(index, events) for index, events in sorted(self.events.items())]
        return {**self.head, "choices": choices, "usage": self.usage(), "nanochat": self.about}


class ChatReply(Reply):
    prefix, kind = "chatcmpl", "chat.completion"

    def __init__(self, *args, num_choices=1, stream=False):
        super().__init__(*args)
        self.num_choices = num_choices
        if stream:
            self.head["object"] = "chat.completion.chunk"

    def opening(self):
        return self.data([{"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None,
                           "finish_reason": None} for index in range(self.num_choices)], nanochat=self.about)

    def delta(self, event):
        delta = {}
        if event.finish_reason is None:
            delta["content"] = event.text if event.kind == "text" else ""
            if event.kind != "text":
                delta["nanochat"] = {"type": event.kind, "text": event.text}
        return {"index": event.index, "delta": delta, "logprobs": self._logprobs([event]),
                "finish_reason": event.finish_reason}

    def choice(self, index, events):
        parts = []
        for event in events:
            if parts and parts[-1]["type"] == event.kind:
                parts[-1]["text"] += event.text
            elif event.text:
                parts.append({"type": event.kind, "text": event.text})
        message = {"role": "assistant", "content": "".join(p["text"] for p in parts if p["type"] == "text")}
        if any(part["type"] != "text" for part in parts):
            message["nanochat"] = {"parts": parts}
        return {"index": index, "message": message, "logprobs": self._logprobs(events),
                "finish_reason": events[-1].finish_reason}

    def _logprobs(self, events):
        scores = [score for event in events for score in event.scores]
        if not scores:
            return None
        return {"content": [{**self._token(token, logprob), "top_logprobs": [self._token(*other) for other in top]}
                            for token, (logprob, top) in scores], "refusal": None}

    def _token(self, token, logprob):
        return {"token": token_text(self.tokenizer, token), "logprob": logprob,
                "bytes": list(self.tokenizer.decode_bytes([token]))}


class TokenReply(ChatReply):
    """The stream of the first nanochat servers: {"token": text} events, then {"done": true}."""

    def opening(self):
        return ": nanochat\n\n"

    def chunk(self, event):
        more = {} if event.kind == "text" else {"type": event.kind}
        return f"data: {json.dumps({'token': event.text, **more})}\n\n" if event.text else ""

    def closing(self, include_usage):
        return 'data: {"done": true}\n\n'


class TextReply(Reply):
    """A completion: the text, after the prompt's own text where `echo` asks for it."""
    prefix, kind = "cmpl", "text_completion"

    def __init__(self, *args, echoes=None, hidden=0):
        """hidden: characters of a prompt's tokens that its echo does not show, a <|bos|> in front."""
        super().__init__(*args)
        self.echoes = echoes or {}  # by choice: the prompt's text
        self.offsets = {index: -hidden for index in self.echoes}  # by choice: characters so far, for `text_offset`

    def opening(self):
        return "".join(self.data([{"index": index, "text": text, "logprobs": None, "finish_reason": None}])
                       for index, text in self.echoes.items()) + ": nanochat\n\n"

    def delta(self, event):
        return {"index": event.index, "text": event.text, "logprobs": self._logprobs(event.index, event.scores),
                "finish_reason": event.finish_reason}

    def choice(self, index, events):
        scores = [score for event in events for score in event.scores]
        return {"index": index, "text": self.echoes.get(index, "") + "".join(event.text for event in events),
                "logprobs": self._logprobs(index, scores), "finish_reason": events[-1].finish_reason}

    def _logprobs(self, index, scores):
        """Four lists, one entry per token; a prompt's first token has no log-probability."""
        if not scores:
            return None
        columns = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token, entry in scores:
            text = token_text(self.tokenizer, token)
            top = None
            if entry is not None:
                top = {}
                for other, logprob in [*entry[1], (token, entry[0])]:  # the likeliest first, the chosen one too
                    top.setdefault(token_text(self.tokenizer, other), logprob)
            offset = self.offsets.get(index, 0)
            values = (text, entry[0] if entry else None, top, max(0, offset))
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
            self.offsets[index] = offset + len(utf8.decode(self.tokenizer.decode_bytes([token])))
        return columns
