"""
Fields of a request that are refused or renamed. Several servers speak OpenAI's protocol, each with
fields of its own. One that would change the text is honoured or refused, never ignored. Also the
types of fields that several requests have.
"""

from typing import Annotated

from pydantic import Field

MAX_CHARS = 400_000  # of a text in a request

Text = Annotated[str, Field(max_length=MAX_CHARS)]
ModelName = Annotated[str, Field(max_length=200)]

# Fields of OpenAI's server, vLLM's and llama.cpp's that would change the text and are not
# implemented, each with an alternative
FILTERS = "use temperature, top_k, top_p or min_p"
FORMATS = "use response_format"
UNSUPPORTED = {
    "functions": "use tools",
    "function_call": "use tool_choice",
    "suffix": "the model continues a prompt",
    "best_of": "ask for several answers with n",
    "use_beam_search": "ask for several answers with n",
    "length_penalty": "it is for beam search",
    "ignore_eos": "ban the end token with logit_bias",
    "min_tokens": "ban the end token with logit_bias",
    "allowed_token_ids": "ban tokens with logit_bias",
    "bad_words": "ban tokens with logit_bias",
    "stop_token_ids": "use stop",
    "include_stop_str_in_output": "the text ends before a stop string",
    "n_predict": "use max_tokens",
    "num_predict": "use max_tokens",
    "options": "its fields belong into the request itself",
    "repeat_last_n": "repetition_penalty looks at the whole text",
    "mirostat": FILTERS,
    "typical_p": FILTERS,
    "tfs_z": FILTERS,
    "top_a": FILTERS,
    "top_n_sigma": FILTERS,
    "xtc_probability": FILTERS,
    "dry_multiplier": FILTERS,
    "dynatemp_range": FILTERS,
    "samplers": FILTERS,
    "grammar": FORMATS,
    "json_schema": FORMATS,
    "structured_outputs": FORMATS,
    "guided_json": FORMATS,
    "guided_regex": FORMATS,
    "guided_choice": FORMATS,
    "guided_grammar": FORMATS,
    "chat_template": "the tokenizer has one form of conversations",
    "chat_template_kwargs": "the tokenizer has one form of conversations",
}
# What only chats have, or only completions
CHAT_ONLY = dict.fromkeys(("tools", "response_format"), "use /v1/chat/completions")
COMPLETION_ONLY = dict.fromkeys(("echo", "truncate_prompt_tokens"), "use /v1/completions")

# Values of these fields that change nothing; empty ones and 0 do not either
HARMLESS = {
    "response_format": {"type": "text"},
    "function_call": "none",
    "best_of": 1,
    "length_penalty": 1,
    "repeat_last_n": -1,
    "typical_p": 1,
    "tfs_z": 1,
    "top_n_sigma": -1,
}
# Other names of a field
ALIASES = {"repeat_penalty": "repetition_penalty"}  # llama.cpp's and Ollama's


def clean_fields(data, refused):
    """
    The fields of a request, a dict: without nulls, and by the names that api.py has. ValueError at
    a field in `refused`, {name: what to do instead}.

    >>> clean_fields({"repeat_penalty": 1.1, "stop": None}, UNSUPPORTED)
    {'repetition_penalty': 1.1}
    """
    for name, instead in refused.items():
        value = data.get(name)
        if value and value != HARMLESS.get(name):
            raise ValueError(f"{name} is not supported: {instead}")

    fields = {name: value for name, value in data.items() if value is not None}
    for alias, name in ALIASES.items():
        if alias in fields and name in fields:
            raise ValueError(f"{alias} is another name of {name}: give one of them")
        if alias in fields:
            fields[name] = fields.pop(alias)
    return fields
