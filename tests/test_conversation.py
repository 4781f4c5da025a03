"""Rendering of conversations: which tokens, in which order, and which of them are trained on."""

import copy
import doctest

import pytest

from nanochat import conversation
from nanochat.common import UserError
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


# -----------------------------------------------------------------------------
# Malformed conversations are refused, by the index of the message


@pytest.mark.parametrize("messages, complaint", [
    ([], "non-empty list"),
    ("hello", "non-empty list"),
    ([assistant("Hi")], "message 0 has role 'assistant', needed 'user'"),
    ([user("a"), user("b")], "message 1 has role 'user', needed 'assistant'"),
    ([user("a"), assistant("b"), assistant("c")], "message 2 has role 'assistant', needed 'user'"),
    ([user("a"), system("b")], "message 1 has role 'system', needed 'assistant'"),
    ([system("a"), assistant("b")], "message 1 has role 'assistant', needed 'user'"),
    ([system("a")], "message 0 is a system message, and no user message follows it"),
    ([user("a"), {"role": "tool", "content": "b"}], "message 1 needs a role"),
    ([user("a"), {"content": "b"}], "message 1 needs a role"),
    ([user("a"), "b"], "message 1 needs a role"),
    ([user(None)], "message 0 has content of type NoneType"),
    ([{"role": "user"}], "message 0 has content of type NoneType"),
    ([user("a"), assistant([text("b"), {"type": "image", "text": "c"}])], "part 1 of message 1 .assistant. needs a"),
    ([user("a"), assistant(["b"])], "part 0 of message 1"),
    ([user("a"), assistant([{"type": "python", "text": 7}])], "part 0 of message 1"),
    ([user([{"type": "python", "text": "1+1"}])], "part 0 of message 0 .user. needs a type, one of text, and a text"),
])
def test_a_malformed_conversation_is_refused(tokenizer, messages, complaint):
    for render in (tokenizer.render_conversation, tokenizer.render_for_completion):
        with pytest.raises(UserError, match=complaint):
            render({"messages": messages})


def test_what_is_no_conversation_at_all_is_refused(tokenizer):
    with pytest.raises(UserError, match="non-empty list under 'messages'"):
        tokenizer.render_conversation([user("a")])


# -----------------------------------------------------------------------------
# For people


def test_visualization_colours_by_mask_and_keeps_to_one_line(tokenizer):
    ids, mask = tokenizer.render_conversation({"messages": [user("a\nb"), assistant("c")]})
    line = tokenizer.visualize_tokenization(ids, mask)
    assert "\n" not in line and line.count("|\033[") == len(ids) - 1
    assert "\033[32mc\033[0m" in line and "\033[31mb\033[0m" in line and "\033[32m<|assistant_end|>" in line


def test_the_example_in_the_docstring_is_right():
    assert doctest.testmod(conversation) == (0, 3)  # (failed, attempted)


def test_the_two_tables_of_part_types_agree():
    fences = {part_type: names for part_type, names in conversation.PART_FENCES.items() if names}
    expected = {start: part_type for part_type, (start, _) in fences.items()}
    expected |= {end: "text" for _, end in fences.values()}
    assert conversation.PART_AFTER == expected
