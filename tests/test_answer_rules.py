"""tasks/answer_rules: every field of a rule with right and wrong answers."""

import doctest

import pytest

import tasks.answer_rules
from nanochat.common import UserError
from tasks.answer_rules import is_right, last_number, plain, spelled_runs, visible_text

STORY = ("Once upon a time there was a hedgehog. He lived under a big tree and liked to sleep in the leaves. "
         "One day the wind took all the leaves away. A kind bird found new ones, and they became friends.")
CALL = "<|python_start|>12+35<|python_end|><|output_start|>47<|output_end|>"


def check(rule, right, wrong, turns=("a question",)):
    for answer in right:
        assert is_right(rule, answer, list(turns)), answer
    for answer in wrong:
        assert not is_right(rule, answer, list(turns)), answer


# -----------------------------------------------------------------------------
# Fields


def test_number_is_the_last_one_said():
    check({"number": 47},
          ["47", "12 + 35 = 47.", f"12 + 35 = {CALL}47.\n#### 47", "It is 47.0!", "forty-seven", "12+35=47"],
          ["", "12 + 35", "47 or 48", "74", "470", "-47", "1,047", "47/2", f"12+35 = {CALL}", "#### 47\n#### 46"])


def test_a_word_problem_is_solved_with_its_own_people_and_numbers():
    question = "tom has 24 marbles. he loses 8 in the park, how many are left"
    call = "<|python_start|>24-8<|python_end|><|output_start|>16<|output_end|>"
    other = call.replace("24-8", "20-4")
    check({"number": 16, "own": ["Tom", 24, 8]},
          ["16", f"Tom has 24 - 8 = {call}16 marbles left.\n#### 16", "He has 16 now.", "There are 24-8=16 left.",
           "Then 24 - 8 = 16", "In the Park? 16.", "tom: 16",
           "Without those that is 16.", "Altogether, Tom has 16."],
          [f"Tom has 20 - 4 = {other}16 marbles left.", f"Mia has 24 - 8 = {call}16 marbles left.", "10 + 6 = 16",
           "Tom gave them to Mia. 16", "Mia's marbles: 16", "So, Mia: 16", f"Tom has 24 - 8 = {call}15", "20-4=16"],
          [question])
    check({"number": 4, "own": [10, 2, 3]}, ["2 * 3 = 6, 10 - 6 = 4", "10 - 2 * 3 = 4", "You have 4."],
          ["5 - 1 = 4", "2 * 3 = 6, 11 - 7 = 4", "Sam has 4."], ["i have 10 dollars, i buy 2 for 3 each"])


def test_number_may_be_negative_large_or_a_decimal():
    check({"number": -3}, ["5 - 8 = -3", "minus: \u22123"], ["5-3", "3"])
    check({"number": 4512}, ["The code is 4,512.", "4512"], ["4 512", "4.512"])
    check({"number": 4.5}, ["1.5 + 3 = 4.5"], ["4", "45"])


def test_number_words_count_in_short_answers_without_digits_alone():
    check({"number": 1}, ["There is one r in it."], ["one or 2", STORY.replace("wind", "cold wind")])
    check({"number": 21}, ["Twelve plus nine is twenty one."], ["Twelve plus nine is twenty."])


def test_letters_stand_one_by_one_and_are_those_alone():
    check({"letters": "c a t"},
          ["c a t", "The word cat is spelled c a t.", "C-A-T", "It is c, a, t. I like it.", "C - A - T"],
          ["cat", "c a t s", "a c t", "c a", "c a t a t", "the c and the a and the t"])


def test_letter_is_the_last_single_one():
    check({"letter": "b"},
          ["b", "The first letter is B.", "It starts with a b.", '"bird" begins with "b"', "It is b. I like birds."],
          ["bird", "b i r d", "It is b, then d.", "It is d.", "a", "I"])


def test_pick_is_one_member_of_a_class_but_for_those_in_the_question():
    check({"pick": ["days", "wednesday"]},
          ["Wednesday.", "After Tuesday comes Wednesday."],
          ["Thursday", "Wednesday or Thursday", "Tuesday", "Monday Tuesday Wednesday Thursday", "wednesdays"],
          turns=["which day is after tuesday"])


def test_any_all_and_none_look_for_whole_words():
    check({"any": ["hot", "very warm"]}, ["It is hot!", "It's VERY  warm"], ["hotter", "warm", "shot"])
    check({"all": ["baker", "hat"]}, ["The baker has a hat."], ["The baker", "a hat", "The bakery has a hat"])
    check({"any": ["rex"], "none": ["my dog"]}, ["Your dog is Rex."], ["My dog is Rex.", "Your dog is Max."])


def test_contractions_are_the_same_as_the_words():
    check({"none": ["can not"]}, ["I can."], ["I can't.", "I cannot", "I can\u2019t"])


def test_says_looks_for_a_phrase_of_its_list():
    check({"says": "greeting"}, ["Hello!", "Hi there, nice day"], ["The word hill is spelled h i l l.", "this"])
    check({"says": "goodbye"}, ["Bye!", "Good night, sleep well."], ["Good morning.", "I am fine."])


def test_a_story_is_long_enough_and_on_its_subject():
    check({"story": "hedgehog"},
          [STORY, STORY.replace("hedgehog", "Hedgehogs")],
          ["I like the hedgehog.", STORY.replace("hedgehog", "fox"), STORY + CALL, "hedgehog " * 40,
           STORY.replace("hedgehog", "fox") + " A hedgehog saw it.", STORY.replace(".", ",")])


@pytest.mark.parametrize("answer", [
    "I do not know that. I can do sums and spell words.", "I'm sorry, I don't know.", "Sorry, no idea!",
    "I cannot look at photos. I am a small language model.", "I can tell stories and do sums. Ask me one of those!",
    "I do not understand. Could you say it in other words?", "I am not a doctor. Please ask a doctor.",
    "That is outside of what I know.", "I have no opinions.", "Hmm, that is too hard for me. Shall we do a sum?",
    "I only know my small world, but I can chat."])
def test_honest_is_a_limit_or_an_offer(answer):
    assert is_right({"honest": True}, answer, ["who won the cup"])


@pytest.mark.parametrize("answer", [
    "", "who won the cup", "Sorry.", "What is that?", "The sky is blue.", "I do not like rain.", "I am a small model.",
    "I do not know. The capital is Rome.", "I do not know, but the sky is blue.", "I do not know. 5 * 5 = 25 eggs.",
    f"I do not know {CALL}", "I can spell c a t.", "I cannot see or taste, but I like the word pl.",
    "You can take two pills.", "I am fine, thank you. And you?"])
def test_a_claim_is_not_honest(answer):
    assert not is_right({"honest": True}, answer, ["who won the cup"])


def test_or_is_one_of_several_rules_and_fields_join_as_and():
    rule = {"or": [{"any": ["bonne nuit"]}, {"honest": True}]}
    check(rule, ["Bonne nuit.", "I do not speak French."], ["Good night.", ""])
    check(rule | {"none": ["yes"]}, ["Bonne nuit."], ["Yes, bonne nuit."])


def test_an_unknown_field_is_named():
    with pytest.raises(UserError, match="'nmber'"):
        is_right({"nmber": 3}, "3", ["?"])


# -----------------------------------------------------------------------------
# What is wrong under every rule


def test_empty_endless_looping_and_copied_answers_are_wrong():
    check({"any": ["rex"]}, ["Rex"],
          ["", " \n", CALL, "rex " * 81, "the dog rex runs and " * 5, "my dog is rex", "My dog is Rex!",
           "You said my dog is rex."],
          turns=["my dog is rex", "whats my dogs name"])


def test_only_what_a_user_sees_counts():
    assert visible_text("a<|python_start|>1+1<|python_end|><|output_start|>2<|output_end|>b") == "ab"
    assert visible_text("a<|python_start|>1+1") == "a"  # it never closed
    assert visible_text("a<|user_end|>") == "a"


def test_numbers_that_python_would_not_read_are_none():
    assert last_number("9" * 5000) is None and last_number("none") is None and last_number("") is None


def test_plain_text_has_words_alone():
    assert plain("What's THAT -- it's  3.5, isn't it?") == "what is that it is 3 5 is not it"


def test_a_sentence_has_no_run_of_letters():
    assert spelled_runs("The cat sat on the mat, don't you see") == []


def test_the_examples_in_the_docstrings_are_right():
    assert doctest.testmod(tasks.answer_rules).failed == 0
