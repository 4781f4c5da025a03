"""
OpenAI's Responses API, /v1/responses: requests for one answer in text or a call of the client's
functions, and the answers, whole or streamed.

The server keeps no responses, so a conversation is sent whole in every request. A calculation, which
the Responses API has no form for, is left out; its result is in the text.
"""

import time
import uuid
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from nanochat.api import MAX_TOP_LOGPROBS, AnswerTokens, CompletionFields
from nanochat.api_fields import UNSUPPORTED, ModelName, Text
from nanochat.api_messages import ANY_OBJECT, MAX_TOOLS, Function, FunctionName, check_tools
from nanochat.chat_response import ChatResponse, sse

STATELESS = "the server keeps no responses: send the whole conversation as input"
REFUSED = {
    "previous_response_id": STATELESS,
    "conversation": STATELESS,
    "background": STATELESS,
    "prompt": "send its text as instructions",
    "messages": "use input",
    "response_format": "use text.format",
    "functions": "use tools",
    "truncate_prompt_tokens": "use truncation",
}

# -----------------------------------------------------------------------------
# Requests


class TextPart(BaseModel):
    type: Literal["input_text", "output_text", "text"]
    text: Text


Content = Text | Annotated[list[TextPart], Field(max_length=1000, fail_fast=True)]


def join_parts(content):
    """The text of a Content."""
    return content if isinstance(content, str) else "".join(part.text for part in content)


class MessageItem(BaseModel):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content

    def as_turn(self):
        return {"role": self.role, "content": join_parts(self.content)}


class CallItem(BaseModel):
    """A call of a function that the model made."""
    type: Literal["function_call"]
    name: FunctionName
    arguments: Text

    def as_turn(self):
        function = {"name": self.name, "arguments": self.arguments}
        return {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}


class ResultItem(BaseModel):
    """What the function gave."""
    type: Literal["function_call_output"]
    output: Content

    def as_turn(self):
        return {"role": "tool", "content": join_parts(self.output)}


Items = Annotated[
    list[MessageItem | CallItem | ResultItem],
    Field(min_length=1, max_length=2000, fail_fast=True),
]


class TextFormat(BaseModel):
    """As api_messages.ResponseFormat, with the schema beside the type."""
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: dict | None = Field(None, alias="schema")

    @model_validator(mode="after")
    def need_schema(self):
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("a format of type json_schema needs the field schema")
        return self


class TextOptions(BaseModel):
    format: TextFormat = TextFormat()


class FunctionTool(Function):
    type: Literal["function"]


def keep_functions(tools):
    """
    Of a request's tools, those that are functions. Coding agents also offer what OpenAI's server
    runs itself (web_search) or groups of tools: the model is not told of them, so it calls none.
    """
    def is_other(tool):
        return isinstance(tool, dict) and isinstance(tool.get("type"), str) and tool["type"] != "function"

    return [tool for tool in tools if not is_other(tool)] if isinstance(tools, list) else tools


Tools = Annotated[
    list[FunctionTool],
    Field(max_length=MAX_TOOLS, fail_fast=True),
    BeforeValidator(keep_functions),
]


class NamedFunction(BaseModel):
    type: Literal["function"]
    name: FunctionName


class ResponsesRequest(CompletionFields):
    """Has what service.begin_chat reads of a ChatRequest: turns, answer_schema, functions, ..."""
    prompt_field: ClassVar = "input"
    refused: ClassVar = UNSUPPORTED | REFUSED

    input: Text | Items
    instructions: Text | None = None
    n: Literal[1] = 1
    max_output_tokens: AnswerTokens | None = None
    truncation: Literal["auto", "disabled"] = "disabled"  # whether old messages may be left out
    include: list[ModelName] = []                         # of it, "message.output_text.logprobs"
    top_logprobs: int = Field(0, ge=0, le=MAX_TOP_LOGPROBS)
    text: TextOptions = TextOptions()
    tools: Tools = []
    tool_choice: Literal["none", "auto", "required"] | NamedFunction = "auto"
    metadata: Annotated[dict[str, Text], Field(max_length=16)] = {}

    @model_validator(mode="after")
    def check(self):
        self.max_tokens = self.max_output_tokens or self.max_tokens
        check_tools([tool.name for tool in self.tools], self.tool_choice, self._chosen_name())
        return self

    def _chosen_name(self):
        return self.tool_choice.name if isinstance(self.tool_choice, NamedFunction) else None

    def num_top(self):
        """As in ChatRequest."""
        wanted = self.top_logprobs or "message.output_text.logprobs" in self.include
        return self.top_logprobs if wanted else None

    def turns(self):
        """The conversation in the form of the tokenizer."""
        turns = []
        if self.instructions:
            turns.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*turns, {"role": "user", "content": self.input}]
        return turns + [item.as_turn() for item in self.input]

    def answer_schema(self):
        """As in ChatRequest."""
        format = self.text.format
        return ANY_OBJECT if format.type == "json_object" else format.json_schema

    def functions(self):
        """As in ChatRequest."""
        if self.tool_choice == "none":
            return []
        functions = []
        for tool in self.tools:
            if self._chosen_name() in (None, tool.name):
                functions.append(tool.model_dump(exclude={"type"}, exclude_none=True))
        return functions

    def may_answer_in_text(self):
        """As in ChatRequest."""
        return self.tool_choice == "auto"


# -----------------------------------------------------------------------------
# Answers


class ResponsesResponse(ChatResponse):
    """An answer, which is one item: a message or a call. It has the events of a single request."""
    id_prefix = "resp"

    def __init__(self, model, requests, prompt_tokens, about, body):
        super().__init__(model, requests, prompt_tokens, about)
        self.body = body
        self.events = []
        self.num_sent = 0      # server-sent events so far
        self.item_open = False
        self.message_id = f"msg_{uuid.uuid4().hex}"

    def usage(self):
        generated = self.completion_tokens()
        return {
            "input_tokens": self.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": generated,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.prompt_tokens + generated,
        }

    def document(self, status, output=()):
        """The response as JSON. status: 'in_progress', 'completed' or 'incomplete'."""
        body = self.body
        ended = status != "in_progress"
        return {
            "id": self.head["id"],
            "object": "response",
            "created_at": self.head["created"],
            "completed_at": int(time.time()) if status == "completed" else None,
            "model": self.model,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata,
            "output": list(output),
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "text": body.text.model_dump(by_alias=True, exclude_none=True),
            "tool_choice": body.model_dump(include={"tool_choice"})["tool_choice"],
            "tools": [tool.model_dump(exclude_none=True) for tool in body.tools],
            "top_p": body.top_p,
            "truncation": body.truncation,
            "usage": self.usage() if ended else None,
            "nanochat": self.about,
        }

    def whole(self, events):
        (request,) = self.requests
        choice = self.choice(request, events)
        status = "incomplete" if choice["finish_reason"] == "length" else "completed"
        calls = choice["message"].get("tool_calls")
        if calls:
            item = self.call_item(calls[0])
        else:
            item = self.message_item(status, [self.text_part(choice)])
        return self.document(status, [item])

    def message_item(self, status, content):
        return {
            "type": "message",
            "id": self.message_id,
            "status": status,
            "role": "assistant",
            "content": content,
        }

    def text_part(self, choice=None):
        """The text of an answer; of an unfinished one, an empty text."""
        text = choice["message"]["content"] if choice else ""
        logprobs = choice["logprobs"] if choice else None
        return {
            "type": "output_text",
            "text": text,
            "annotations": [],
            "logprobs": logprobs["content"] if logprobs else [],
        }

    @staticmethod
    def call_item(call):
        return {
            "type": "function_call",
            "id": f"fc_{uuid.uuid4().hex}",
            "call_id": call["id"],
            "status": "completed",
            **call["function"],  # name and arguments
        }

    # -- the stream

    def event(self, kind, **fields):
        data = {"type": kind, "sequence_number": self.num_sent, **fields}
        self.num_sent += 1
        return f"event: {kind}\n{sse(data)}"

    def opening(self):
        document = self.document("in_progress")
        created = self.event("response.created", response=document)
        return created + self.event("response.in_progress", response=document)

    def chunk(self, event):
        self.events.append(event)
        # what may become a call is sent at its end, in `closing`, and so is the end of a text
        is_text = event.kind == "text" and event.text
        if event.request.may_be_call or not is_text:
            return ""
        opened = self.open_message()
        logprobs = self.logprobs([event])
        return opened + self.event(
            "response.output_text.delta",
            **self.place(),
            delta=event.text,
            logprobs=logprobs["content"] if logprobs else [],
        )

    def place(self):
        return {"item_id": self.message_id, "output_index": 0, "content_index": 0}

    def open_message(self):
        if self.item_open:
            return ""
        self.item_open = True
        item = self.message_item("in_progress", [])
        added = self.event("response.output_item.added", output_index=0, item=item)
        part = self.text_part()
        return added + self.event("response.content_part.added", **self.place(), part=part)

    def closing(self, include_usage):
        document = self.whole(self.events)
        (item,) = document["output"]
        is_call = item["type"] == "function_call"
        text = self.close_call(item) if is_call else self.close_message(item)
        text += self.event("response.output_item.done", output_index=0, item=item)
        return text + self.event(f"response.{document['status']}", response=document)

    def close_call(self, item):
        begun = {**item, "arguments": "", "status": "in_progress"}
        text = self.event("response.output_item.added", output_index=0, item=begun)
        place = {"item_id": item["id"], "output_index": 0}
        arguments = item["arguments"]
        text += self.event("response.function_call_arguments.delta", **place, delta=arguments)
        done = "response.function_call_arguments.done"
        return text + self.event(done, **place, name=item["name"], arguments=arguments)

    def close_message(self, item):
        (part,) = item["content"]
        text = ""
        if not self.item_open:  # nothing was sent yet: an empty text, or one that was held
            text = self.open_message()
            text += self.event("response.output_text.delta", **self.place(), delta=part["text"], logprobs=[])
        done = {"text": part["text"], "logprobs": part["logprobs"]}
        text += self.event("response.output_text.done", **self.place(), **done)
        return text + self.event("response.content_part.done", **self.place(), part=part)
