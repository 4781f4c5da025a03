"""Rendering of conversations: which tokens, in which order, and which of them are trained on."""

import copy
import doctest

import pytest

from nanochat import conversation
from nanochat.common import UserError
from nanochat.conversation import normalize_messages
from nanochat.tokenizer import HuggingFaceTokenizer, RustBPETokenizer


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


def text(text):
    return {"type": "text", "text": text}


CALCULATION = [text("Let me see: "), {"type": "python", "text": "12*3"}, {"type": "python_output", "text": "36"},
               text("It's 36.")]


def expected(tokenizer, *pieces):
    """[(special name or text, trained)] -> (ids, mask), each piece encoded for itself."""
    special = set(tokenizer.get_special_tokens())
    ids, mask = [], []
    for piece, trained in pieces:
        tokens = [tokenizer.encode_special(piece)] if piece in special else tokenizer.encode(piece)
        ids += tokens
        mask += [trained] * len(tokens)
    return ids, mask


@pytest.mark.parametrize("kind", [RustBPETokenizer, HuggingFaceTokenizer])
def test_a_question_and_an_answer(tokenizer, kind):
    tokenizer = kind(tokenizer.mergeable)
    assert tokenizer.render_conversation({"messages": [user("Who sang?"), assistant("Mira did.")]}) == expected(
        tokenizer, ("<|bos|>", 0), ("<|user_start|>", 0), ("Who sang?", 0), ("<|user_end|>", 0),
        ("<|assistant_start|>", 0), ("Mira did.", 1), ("<|assistant_end|>", 1))


def test_tool_calls_are_trained_on_and_their_outputs_are_not(tokenizer):
    assert tokenizer.render_conversation({"messages": [user("12*3?"), assistant(CALCULATION)]}) == expected(
        tokenizer, ("<|bos|>", 0), ("<|user_start|>", 0), ("12*3?", 0), ("<|user_end|>", 0),
        ("<|assistant_start|>", 0), ("Let me see: ", 1), ("<|python_start|>", 1), ("12*3", 1), ("<|python_end|>", 1),
        ("<|output_start|>", 0), ("36", 0), ("<|output_end|>", 0), ("It's 36.", 1), ("<|assistant_end|>", 1))


def test_a_batch_gives_the_ids_of_each_conversation(tokenizer):
    conversations = [{"messages": [user("What is 12*3?"), assistant(CALCULATION), user("¿Seguro?"), assistant("")]},
                     {"messages": [system("Be short."), user("Hi"), assistant("Hello <|bos|>")]}]
    rows = tokenizer.render_batch(conversations)
    assert [row.tolist() for row in rows] == [tokenizer.render_conversation(c)[0] for c in conversations]
    assert tokenizer.render_batch([]) == []


def test_a_system_message_heads_the_first_user_turn(tokenizer):
    with_system = {"messages": [system("Be kind."), user("Hi"), assistant("Hello"), user("Bye")]}
    merged = {"messages": [user("Be kind.\n\nHi"), assistant("Hello"), user("Bye")]}
    assert tokenizer.render_conversation(with_system) == tokenizer.render_conversation(merged)


def test_text_parts_of_a_user_are_one_text(tokenizer):
    parts = {"messages": [system([text("Be "), text("kind.")]), user([text("the li"), text("ghthouse")])]}
    whole = {"messages": [system("Be kind."), user("the lighthouse")]}
    assert tokenizer.render_conversation(parts) == tokenizer.render_conversation(whole)


def test_rendering_leaves_the_conversation_as_it_was(tokenizer):
    conversation = {"messages": [system("Be kind."), user("12*3?"), assistant(CALCULATION)]}
    before = copy.deepcopy(conversation)
    tokenizer.render_conversation(conversation)
    tokenizer.render_for_completion(conversation)
    assert conversation == before


@pytest.mark.parametrize("max_tokens", [1, 7, 2048])
def test_ids_and_mask_are_cut_to_max_tokens(tokenizer, max_tokens):
    conversation = {"messages": [user("12*3?"), assistant("word " * 3000)]}
    ids, mask = tokenizer.render_conversation(conversation, max_tokens=max_tokens)
    whole_ids, whole_mask = tokenizer.render_conversation(conversation, max_tokens=None)
    assert len(whole_ids) == len(whole_mask) > 3000
    assert (ids, mask) == (whole_ids[:max_tokens], whole_mask[:max_tokens])


def test_no_space_comes_before_the_first_letter_of_a_message(tokenizer):
    ids, _ = tokenizer.render_conversation({"messages": [user("A"), assistant("B")]})
    names = [tokenizer.id_to_token(token) for token in ids]
    assert names == ["<|bos|>", "<|user_start|>", "A", "<|user_end|>", "<|assistant_start|>", "B", "<|assistant_end|>"]


# -----------------------------------------------------------------------------
# For completion


@pytest.mark.parametrize("last", [[], [assistant("Mira did.")]], ids=["ends with the user", "ends with the assistant"])
def test_for_completion_the_prompt_ends_where_the_assistant_begins(tokenizer, last):
    ids = tokenizer.render_for_completion({"messages": [user("Who sang?"), *last]})
    assert ids == expected(tokenizer, ("<|bos|>", 0), ("<|user_start|>", 0), ("Who sang?", 0), ("<|user_end|>", 0),
                           ("<|assistant_start|>", 0))[0]


def test_a_prompt_for_completion_is_a_prefix_of_the_whole_conversation(tokenizer):
    conversation = {"messages": [system("Be kind."), user("Hi"), assistant("Hello"), user("12*3?"),
                                 assistant(CALCULATION)]}
    ids, mask = tokenizer.render_conversation(conversation)
    prompt = tokenizer.render_for_completion(conversation)
    assert ids[:len(prompt)] == prompt
    assert mask[len(prompt)] == 1 and mask[-1] == 1


@pytest.mark.parametrize("parts", [[text("It's ")], CALCULATION[:3], []], ids=["text", "a tool's result", "nothing"])
def test_a_message_of_the_assistant_can_be_continued(tokenizer, parts):
    begun = {"messages": [user("12*3?"), assistant(parts)]}
    ids = tokenizer.render_for_completion(begun, continue_final_message=True)
    whole, _ = tokenizer.render_conversation(begun)
    assert ids == whole[:-1] and whole[-1] == tokenizer.encode_special("<|assistant_end|>")


def test_without_a_message_of_the_assistant_there_is_nothing_to_continue(tokenizer):
    question = {"messages": [user("12*3?")]}
    prompt = tokenizer.render_for_completion(question)
    assert tokenizer.render_for_completion(question, continue_final_message=True) == prompt


# -----------------------------------------------------------------------------
# The messages of the world: each line of the rule in conversation.py


def tool(content):
    return {"role": "tool", "content": content, "tool_call_id": "call_1"}


def call(content, *arguments):
    """An assistant's message with tool calls, as OpenAI's clients send it back."""
    calls = [{"id": "call_1", "type": "function", "function": {"name": "add", "arguments": text}} for text in arguments]
    return {"role": "assistant", "content": content, "tool_calls": calls}


ADD = '{"name": "add", "arguments": {"a": 1}}'
DEVELOPER = {"role": "developer", "content": "Be brief."}
SHAPES = {
    "two system messages": ([system("s"), system("t"), user("a")], [user("s\n\nt\n\na")]),
    "system and developer": ([system("s"), DEVELOPER, user("a")], [user("s\n\nBe brief.\n\na")]),
    "a later system message": ([user("a"), assistant("b"), system("s"), user("c")],
                               [user("a"), assistant("b"), user("s\n\nc")]),
    "a system message before the answer": ([user("a"), system("s"), assistant("b")], [user("a\n\ns"), assistant("b")]),
    "a system message alone": ([system("s")], [user("s")]),
    "user after user": ([user("a"), user("b"), assistant("c")], [user("a\n\nb"), assistant("c")]),
    "assistant after assistant": ([user("a"), assistant("b"), assistant("c")], [user("a"), assistant("b\n\nc")]),
    "assistant first": ([assistant("a"), user("b"), assistant("c")], [assistant("a"), user("b"), assistant("c")]),
    "system, assistant first": ([system("s"), assistant("a"), user("b")], [user("s"), assistant("a"), user("b")]),
    "null": ([user("a"), assistant(None), user("b")], [user("a\n\nb")]),
    "null at the end": ([user("a"), assistant(None)], [user("a")]),
    "empty texts": ([system(""), user("a"), user(""), assistant("")], [user("a"), assistant("")]),
    "parts": ([user([text("a"), text("b")]), assistant([text("c"), text("d")])], [user("ab"), assistant("cd")]),
    "a tool's result": ([user("a"), call(None, '{"a": 1}'), tool("3"), assistant("It is 3.")],
                        [user("a"), assistant(ADD), user("3"), assistant("It is 3.")]),
    "two calls after a text": ([user("a"), call("Wait.", '{"a": 1}', {"a": "é"}), tool("3"), tool([text("4")])],
                               [user("a"), assistant(f'Wait.\n\n{ADD}\n\n{{"name": "add", "arguments": {{"a": "é"}}}}'),
                                user("3\n\n4")]),
    "the older form of a call": ([user("a"), {"role": "assistant", "content": None,
                                              "function_call": {"name": "add", "arguments": '{"a": 1}'}},
                                  {"role": "function", "name": "add", "content": "3"}],
                                 [user("a"), assistant(ADD), user("3")]),
    "a result without a call": ([user("a"), assistant("b"), tool("3"), user("c")],
                                [user("a"), assistant("b"), user("3\n\nc")]),
    "a call of the calculator, then a text": ([user("a"), assistant(CALCULATION[:3]), assistant("b")],
                                              [user("a"), assistant([*CALCULATION[:3], text("\n\nb")])]),
}


@pytest.mark.parametrize("messages, same_as", SHAPES.values(), ids=SHAPES.keys())
def test_the_shapes_of_the_world_become_turns(tokenizer, messages, same_as):
    turns = normalize_messages(messages)
    assert turns == normalize_messages(same_as)
    assert normalize_messages(turns) == turns
    rendered = tokenizer.render_conversation({"messages": messages})
    assert rendered == tokenizer.render_conversation({"messages": same_as})
    assert tokenizer.decode(rendered[0]).count("_start|>") == len(same_as) + str(same_as).count("'python")


def test_a_turn_of_weight_0_is_not_trained_on(tokenizer):
    messages = [user("a"), {**assistant(CALCULATION), "weight": 0}, user("b"), {**assistant("c"), "weight": 1}]
    ids, mask = tokenizer.render_conversation({"messages": messages})
    unweighted = [user("a"), assistant(CALCULATION), user("b"), assistant("c")]
    assert ids == tokenizer.render_conversation({"messages": unweighted})[0]
    trained = [token for token, wanted in zip(ids, mask, strict=True) if wanted]
    assert tokenizer.decode(trained) == "c<|assistant_end|>"


@pytest.mark.parametrize("field", ["weight", "train", "loss"])
def test_the_fields_of_several_trainers_leave_a_message_out(tokenizer, field):
    ids, mask = tokenizer.render_conversation({"messages": [user("a"), {**assistant("b"), field: False}]})
    assert len(ids) == len(mask) and not any(mask)
    assert any(tokenizer.render_conversation({"messages": [user("a"), {**assistant("b"), field: True}]})[1])


def test_nothing_is_trained_on_in_a_turn_that_joins_a_message_of_weight_0(tokenizer):
    messages = [user("a"), assistant("b"), {**assistant("c"), "weight": 0}]
    assert sum(tokenizer.render_conversation({"messages": messages})[1]) == 0


# -----------------------------------------------------------------------------
# Malformed conversations are refused, by the index of the message


@pytest.mark.parametrize("messages, complaint", [
    ([], "non-empty list"),
    ("hello", "non-empty list"),
    ([user(None), assistant(None)], "no message has a content"),
    ([user("a"), {"role": "bot", "content": "b"}], "message 1 needs a role, one of system, developer, user, tool, "),
    ([user("a"), {"content": "b"}], "message 1 needs a role"),
    ([user("a"), "b"], "message 1 needs a role"),
    ([{"role": ["user"], "content": "b"}], "message 0 needs a role"),
    ([{"role": "user", "text": "a"}], "message 0 has no content"),
    ([user(7)], "message 0 has content of type int"),
    ([user("a"), assistant([text("b"), {"type": "image", "text": "c"}])], "part 1 of message 1 .assistant. needs a"),
    ([user("a"), assistant(["b"])], "part 0 of message 1"),
    ([user("a"), assistant([{"type": "python", "text": 7}])], "part 0 of message 1"),
    ([user([{"type": "python", "text": "1+1"}])], "part 0 of message 0 .user. needs a type, one of text, and a text"),
    ([user("a"), {**assistant("b"), "weight": 0.5}], "message 1 has weight 0.5, needed: 0 or 1"),
    ([{**user("a"), "weight": 1}, assistant("b")], "message 0 .user. has weight 1, needed: 0 or none"),
    ([user("a"), {**call(None, "{}"), "tool_calls": [{"name": "add"}]}], "message 1 has tool calls of another form"),
])
def test_a_malformed_conversation_is_refused(tokenizer, messages, complaint):
    for render in (tokenizer.render_conversation, tokenizer.render_for_completion):
        with pytest.raises(UserError, match=complaint):
            render({"messages": messages})


@pytest.mark.parametrize("conversation", [None, "a", {}, {"message": [user("a")]}])
def test_what_is_no_conversation_at_all_is_refused(tokenizer, conversation):
    with pytest.raises(UserError, match="messages need to be a non-empty list"):
        tokenizer.render_conversation(conversation)


# -----------------------------------------------------------------------------
# For people


def test_visualization_colours_by_mask_and_keeps_to_one_line(tokenizer):
    ids, mask = tokenizer.render_conversation({"messages": [user("a\nb"), assistant("c")]})
    line = tokenizer.visualize_tokenization(ids, mask)
    assert "\n" not in line and line.count("|\033[") == len(ids) - 1
    assert "\033[32mc\033[0m" in line and "\033[31mb\033[0m" in line and "\033[32m<|assistant_end|>" in line


def test_the_example_in_the_docstring_is_right():
    assert doctest.testmod(conversation) == (0, 5)  # (failed, attempted)


def test_the_two_tables_of_part_types_agree():
    fences = {part_type: names for part_type, names in conversation.PART_FENCES.items() if names}
    expected = {start: part_type for part_type, (start, _) in fences.items()}
    expected |= {end: "text" for _, end in fences.values()}
    assert conversation.PART_AFTER == expected
