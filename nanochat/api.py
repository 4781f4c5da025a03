"""
The requests of the API: OpenAI's fields with their limits, and its errors. chat_response.py has the
answers.

Beyond OpenAI's there are vLLM's `top_k`, `min_p` and `repetition_penalty`, a `max_tokens` and a
`seed` of -1, and the parts of a tool call in an assistant's message. A field that would change the
text is honoured or refused; other unknown fields are ignored, as by OpenAI's server.
"""

import secrets
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, model_validator

from nanochat.api_fields import CHAT_ONLY, COMPLETION_ONLY, MAX_CHARS, UNSUPPORTED, ModelName, Text, clean_fields
from nanochat.api_messages import FunctionChoice, Messages, ResponseFormat, Tools, check_tools

MAX_TOKENIZE_CHARS = 100_000  # of a request to /tokenize, whose answer is many times as long
MAX_PROMPTS = 128             # in one request
MAX_CHOICES = 16              # `n`
MAX_TOP_LOGPROBS = 20
MAX_BIASES = 1024             # tokens in `logit_bias`

# -----------------------------------------------------------------------------
# Completions

TokenId = Annotated[int, Field(ge=0, strict=True)]
StopString = Annotated[str, Field(min_length=1, max_length=200)]

# fail_fast: only the first wrong item is reported. A list of 400,000 of them took 15 s, in which
# the server did nothing else
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_CHARS, fail_fast=True)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
TokenLists = Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]


class StreamOptions(BaseModel):
    include_usage: bool | None = None


def _draw_seed():
    return secrets.randbelow(2**31)


def _replace_seed(seed):
    # as in llama.cpp; the drawn one is sent with the answer
    return _draw_seed() if seed == -1 else seed


def _check_number_of_biases(biases):
    # before they are checked one by one
    if isinstance(biases, dict) and len(biases) > MAX_BIASES:
        raise ValueError(f"{len(biases)} tokens, at most {MAX_BIASES}")
    return biases


Bias = Annotated[float, Field(ge=-100, le=100)]
Biases = Annotated[
    dict[Annotated[int, Field(ge=0)], Bias],
    BeforeValidator(_check_number_of_biases),
]
Penalty = Annotated[float, Field(ge=-2, le=2)]
MaxTokens = Annotated[int, Field(ge=-1, le=2**31)]


class CompletionFields(BaseModel):
    """
    The fields of all kinds of completion. A None is replaced by the server's default, which its
    flags set (service.with_defaults).
    """
    refused: ClassVar = UNSUPPORTED

    model: ModelName = ""  # "" = the first one that is served
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: int = Field(1, ge=1, le=MAX_CHOICES)  # completions of each prompt

    # a missing seed is drawn and sent with the answer, so that the answer can be repeated (as far as
    # Engine.generate_rows says); -1 too
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63), AfterValidator(_replace_seed)] = Field(
        default_factory=_draw_seed
    )
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] = []
    max_tokens: MaxTokens | None = None  # of each completion; -1 = as many as fit

    # sampling parameters, named as in sampling.Sampling
    temperature: float | None = Field(None, ge=0, le=10, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1, le=2**31)  # -1 = off, as in vLLM; 0 too
    top_p: float = Field(1.0, gt=0, le=1)             # 1 = off
    min_p: float = Field(0.0, ge=0, le=1)             # 0 = off
    repetition_penalty: float = Field(1.0, gt=0, le=100)  # 1 = off
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: Biases = {}  # token id -> added to its logit

    @model_validator(mode="before")
    @classmethod
    def drop_nulls_and_refuse(cls, data):
        """Null is the same as a missing field. Unsupported fields are refused."""
        return clean_fields(data, cls.refused) if isinstance(data, dict) else data

    def stops(self):
        """The stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


def _check_room(max_tokens):
    if max_tokens == 0:
        raise ValueError("need 1 or more, or -1 for as many as fit")
    return max_tokens


AnswerTokens = Annotated[MaxTokens, AfterValidator(_check_room)]


class ChatRequest(CompletionFields):
    prompt_field: ClassVar = "messages"
    truncation: ClassVar = "auto"  # leave out the oldest messages where the context is full
    refused: ClassVar = UNSUPPORTED | COMPLETION_ONLY

    messages: Messages
    max_tokens: AnswerTokens | None = None
    max_completion_tokens: AnswerTokens | None = None  # the newer name of max_tokens
    logprobs: bool = False  # of the tokens that the model chose, not of those that a tool forced
    top_logprobs: int = Field(0, ge=0, le=MAX_TOP_LOGPROBS)

    response_format: ResponseFormat = ResponseFormat(type="text")
    tools: Tools = []
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice = "auto"

    # vLLM's: an assistant's last message is always continued here
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None

    @model_validator(mode="after")
    def check_last_message(self):
        continues = self.messages[-1].role == "assistant"
        if self.continue_final_message is not None and self.continue_final_message != continues:
            last = self.messages[-1].role
            raise ValueError(
                f"continue_final_message is {self.continue_final_message}, and the last message is "
                f"of role {last}: the answer goes on from it if it is the assistant's"
            )
        if self.add_generation_prompt is False and not continues:
            raise ValueError("add_generation_prompt=False: only an assistant's last message goes on")
        return self

    @model_validator(mode="after")
    def prefer_newer_name(self):
        self.max_tokens = self.max_completion_tokens or self.max_tokens
        return self

    @model_validator(mode="after")
    def check_tool_choice(self):
        names = [tool.function.name for tool in self.tools]
        check_tools(names, self.tool_choice, self._chosen_name())
        return self

    def _chosen_name(self):
        is_named = isinstance(self.tool_choice, FunctionChoice)
        return self.tool_choice.function.name if is_named else None

    def num_top(self):
        """Alternatives to report per token; None = no log-probabilities at all (Row.num_top)."""
        return self.top_logprobs if self.logprobs else None

    def turns(self):
        """The messages in the form of the tokenizer."""
        return [message.as_turn() for message in self.messages]

    def answer_schema(self):
        """The JSON schema of an answer that is no call; None = free text."""
        return self.response_format.answer_schema()

    def functions(self):
        """The functions that the model may call, dicts."""
        if self.tool_choice == "none":
            return []
        functions = []
        for tool in self.tools:
            if self._chosen_name() in (None, tool.function.name):
                functions.append(tool.function.model_dump(exclude_none=True))
        return functions

    def may_answer_in_text(self):
        """Whether an answer may be no call, though there are functions."""
        return self.tool_choice == "auto"


class CompletionRequest(CompletionFields):
    prompt_field: ClassVar = "prompt"
    refused: ClassVar = UNSUPPORTED | CHAT_ONLY

    prompt: Text | TokenIds | Texts | TokenLists
    # 16 is OpenAI's default; 0 with echo gives the log-probabilities of the prompt alone
    max_tokens: MaxTokens = 16
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


def overflow_error(reason, max_length, field):
    """
    The fields of OpenAI's error for a prompt that does not fit in the context. Clients look for the
    code, or for the beginning of the message.
    """
    return {
        "message": f"This model's maximum context length is {max_length} tokens. However, {reason}",
        "param": field,
        "code": "context_length_exceeded",
    }


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
