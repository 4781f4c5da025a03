"""
The parts of a chat request: its messages, the functions that the client offers, and the form that
the answer must have. conversation.py says what becomes of messages, constraint.py of forms.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

from nanochat.api_fields import ModelName, Text

MAX_TOOLS = 128

# -----------------------------------------------------------------------------
# Messages


class Part(BaseModel):
    type: Literal["text", "python", "python_output"] = "text"
    text: Text


class FunctionCall(BaseModel):
    name: ModelName
    arguments: Text | dict


class ToolCall(BaseModel):
    function: FunctionCall


class Message(BaseModel):
    # conversation.py says what each role becomes
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | Annotated[list[Part], Field(max_length=1000, fail_fast=True)] | None = None
    # what an assistant called: the newer form, and the older one
    tool_calls: Annotated[list[ToolCall], Field(max_length=100, fail_fast=True)] | None = None
    function_call: FunctionCall | None = None

    @model_validator(mode="after")
    def need_content(self):
        """A content may be null, but a message without one is a mistake."""
        if not (self.model_fields_set & {"content", "tool_calls", "function_call"}):
            raise ValueError("content is missing")
        return self

    def text(self):
        """The content as one str, including tool calls and their results."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content or [])

    def as_turn(self):
        """The message in the form of the tokenizer."""
        # Only the assistant's parts mean something to the tokenizer: those of others are joined
        turn = self.model_dump()
        if self.role != "assistant" and self.content is not None:
            turn["content"] = self.text()
        return turn


Messages = Annotated[list[Message], Field(min_length=1, max_length=2000, fail_fast=True)]

# -----------------------------------------------------------------------------
# The form of an answer: constraint.py

ANY_OBJECT = {"type": "object"}
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class JsonSchema(BaseModel):
    name: ModelName = ""
    json_schema: dict = Field(alias="schema")


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def need_schema(self):
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("a format of type json_schema needs the field json_schema")
        return self

    def answer_schema(self):
        """The JSON schema of the answer, a dict; None = plain text."""
        if self.type == "json_schema":
            return self.json_schema.json_schema
        return ANY_OBJECT if self.type == "json_object" else None


class Function(BaseModel):
    """A function of the client's, which the model may call."""
    name: FunctionName
    description: Text | None = None
    # left out: it takes no arguments
    parameters: dict = {"type": "object", "properties": {}, "additionalProperties": False}


class Tool(BaseModel):
    type: Literal["function"]
    function: Function


class Name(BaseModel):
    name: FunctionName


class FunctionChoice(BaseModel):
    type: Literal["function"]
    function: Name


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)]


def check_tools(names, choice, chosen_name):
    """
    ValueError if the names of the tools and the choice of one do not fit. choice: 'none', 'auto',
    'required', or anything else with chosen_name, the name of one.
    """
    if len(set(names)) < len(names):
        raise ValueError("two tools have the same name")
    if choice == "required" and not names:
        raise ValueError("tool_choice is 'required', and there are no tools")
    if chosen_name is not None and chosen_name not in names:
        raise ValueError(f"tool_choice names {chosen_name}, which no tool has")
