"""The toy world's conversations: every answer is right, whatever is asked and however it is typed."""

import json
import re
from collections import Counter

import pytest

from dev import gen_synthetic_data as gen
from dev.toyworld import chat, choices, games, memory, persona, problems, spelling, stories, sums, talk, text, village
from dev.toyworld.calculate import result_of, solve, to_gsm8k, to_text
from dev.toyworld.grammar import DATA, Pool, Rng, expand, fill, read_words, repair
from dev.toyworld.mirror import small_program
from dev.toyworld.typed import typed
from nanochat.calculator import use_calculator
from nanochat.common import UserError
from tasks.common import check_messages
from tasks.final_answer import parse_answer
from tasks.gsm8k import solution_parts

EXCHANGES = [(name, make) for name, (_, make) in chat.EXCHANGES.items()]


def words_of(text):
    return re.sub(r"[\W_]+", " ", text.lower()).strip()


def draw_many(make, count, split="train"):
    """`count` items, each from a generator of its own."""
    items = []
    for i in range(count):
        rng = Rng(f"test:{i}")
        rng.split = split
        items.append(make(rng))
    return items


def all_turns(make, count, split="train"):
    return [turn for turns in draw_many(make, count, split) for turn in turns]


# -----------------------------------------------------------------------------
# Right answers


def check_calls(answer):
    """Every call's output is what the calculator says, and the last one is the final answer."""
    calls = [part["text"] for part in answer if part["type"] == "python"]
    outputs = [part["text"] for part in answer if part["type"] == "python_output"]
    assert outputs == [use_calculator(call) for call in calls]
    assert result_of(answer) == outputs[-1]
    return calls


def test_a_solution_survives_gsm8ks_notation():
    parts = solve("There are ", "12+35", " apples.")
    assert to_gsm8k(parts) == "There are 12 + 35 = <<12+35=47>>47 apples.\n#### 47"
    assert solution_parts(to_gsm8k(parts)) == parts
    assert to_text(parts) == "There are 12 + 35 = 47 apples.\n#### 47"


def number_of(word):
    words = {**{word: i for i, word in enumerate(problems.number_word(i) for i in range(21))}}
    return str(words.get(word, word))


def numbers_in(text):
    """All numbers of a text, in digits, those in words, too."""
    return {number_of(word) for word in re.findall(r"\d+|[a-z]+", text.lower()) if number_of(word).isdigit()}


def test_every_sum_is_right_and_copies_the_numbers_of_its_question():
    for question, answer in draw_many(sums.one_sum, 1000):
        calls = check_calls(answer)
        told = set(re.findall(r"\d+(?:\.\d+)?", question)) or None  # else in words
        used = set(re.findall(r"\d+(?:\.\d+)?", calls[0]))
        if told:
            assert told <= used and used - told <= {"2", "3", "4", "100"}, (question, calls)


def test_a_further_step_goes_on_from_the_result_before():
    found = 0
    for turns in draw_many(sums.sum_exchange, 600):
        for (_, before), (_, after) in zip(turns, turns[1:], strict=False):
            if not isinstance(after, str):
                found += 1
                assert check_calls(after)[0].startswith(result_of(before))
    assert found > 50


def test_word_problems_are_right_and_copy_numbers_and_names():
    for problem in draw_many(problems.draw_problem, 1500):
        calls = check_calls(problem.parts)
        answer = to_text(problem.parts)
        used = set(re.findall(r"\d+", " ".join(calls)))
        assert set(problem.numbers) <= used, problem
        assert int(result_of(problem.parts)) >= 0
        if problem.name not in ("", "There", "there", "You", "you"):
            noun = re.sub("^(Your|The|your|the|my) ", "", problem.name)
            assert noun in problem.question and noun in answer, problem


def test_a_plain_word_problem_reads_as_sentences():
    for problem in draw_many(lambda rng: problems.draw_problem(rng, plain=True), 500):
        assert re.match(r"[A-Z0-9]", problem.question) and problem.question.endswith("?"), problem.question
        assert not re.search(r"[{}\[\]|]|  | \?|\bI (has|shares|gives|buys)\b", problem.question), problem.question


def test_letters_are_counted_right():
    for question, answer in all_turns(spelling.spelling_exchange, 1500):
        written = to_text(answer)
        word, letters = re.search(r"The word ([a-z]+) is spelled ([a-z ]+)\.", written).groups()
        assert " ".join(word) == letters and word in question.lower()
        if isinstance(answer, list):
            check_calls(answer)
            letter = re.search(r"Counting ([a-z]):", written)[1]
            assert parse_answer(written) == word.count(letter)
        elif "vowels" in written:
            assert parse_answer(written) == len(re.findall("[aeiou]", word))
        elif "####" in written:
            assert parse_answer(written) == len(word)
        elif "begins" in written:
            assert written.endswith(f"{word[0]}.")
        elif "ends" in written:
            assert written.endswith(f"{word[-1]}.")
        elif "Backwards" in written:
            assert written.endswith(f"{' '.join(reversed(word))}.")


def test_counting_lists_and_comparisons_are_right():
    for _, answer in all_turns(games.game_exchange, 800):
        numbers = [int(n) for n in re.findall(r"\d+", answer)]
        if re.fullmatch(r"[\d, ]+\.", answer):
            assert {abs(a - b) for a, b in zip(numbers, numbers[1:], strict=False)} == {1}
        elif re.fullmatch(r"\d+ is bigger than \d+\.", answer):
            assert numbers[0] > numbers[1]
        elif re.fullmatch(r"\d+ is (even|odd)\.", answer):
            assert ("odd" in answer) == bool(numbers[0] % 2)


def test_what_is_to_be_repeated_is_repeated():
    for message, answer in draw_many(games.echo, 300):
        assert answer.lower() in message.lower()


def test_a_story_is_about_what_was_asked_for():
    for hero in ["fox", "owl", "robot", "teapot", "Annabel", "Zun", *stories.ANIMALS.test[:10]]:
        for i in range(10):
            assert hero in stories.story(Rng(f"{hero}:{i}"), hero)
    for message, answer in all_turns(stories.story_exchange, 600):
        asked = re.search(r"story about (?:an? )([a-z]+)[?.!]?$", message.lower())
        if asked:
            assert asked[1] in answer.lower(), (message, answer)


def test_stories_are_whole_and_varied():
    told = draw_many(lambda rng: stories.story(rng, stories.draw_hero(rng)), 800)
    assert len(set(told)) > 790
    for story in told:
        assert not re.search(r"[\[\]{}|/]|\.\.|  | ,|\ba [aeiou](?!ni)|\ban [^aeiou]", story), story
        assert story.count('"') % 2 == 0 and story[-1] in '.!"', story


def test_memory_gives_back_what_was_told():
    for turns in draw_many(lambda rng: memory.memory_conversation(rng, games.game_exchange, chat.ask_back), 500):
        answer = turns[-1][1]
        found = re.search(r"^(?:Your name is|You said|The number is|The word is) (.+)\.$", answer)
        if found:
            earlier = " ".join(message for message, _ in turns)
            assert found[1].lower() in earlier.lower(), turns


def test_every_offer_and_question_back_is_the_end_of_some_answer():
    """What follows an answer is found by its last words, so an answer that is worded anew may lose it."""
    answers = {answer for _, answer in all_turns(chat.draw_turns, 4000) if isinstance(answer, str)}
    for ending in (*chat.OFFERS, *talk.FOLLOW_UPS):
        assert any(answer.endswith(ending) for answer in answers), ending


def test_village_answers_are_the_facts():
    for message, answer in all_turns(village.ask_yes_no, 400):
        friend = next(friend for friend in village.FRIENDS if friend.name in answer)
        values = [village.value(friend, attribute) for attribute in village.ATTRIBUTES]
        assert any(value in answer for value in values)
        said = any(re.search(rf"\b{value}\b", message.lower()) for value in map(str.lower, values))
        assert answer.startswith("Yes" if said else "No"), (message, answer)


def test_choices_are_four_and_exactly_one_is_right():
    """Checked against the table of facts, for every question that names a friend."""
    for item in draw_many(lambda rng: choices.choice_item(rng, ["friends"]), 500):
        subject, question, options, answer = item
        friend = next(friend for friend in village.FRIENDS if re.search(rf"\b{friend}\b", question))
        value = getattr(friend, subject)
        assert len(set(options)) == 4
        assert [option.split()[-1] == value for option in options] == [k == answer for k in range(4)]


def test_answers_stand_equally_often_at_each_letter():
    counts = Counter(item[3] for item in draw_many(lambda rng: choices.choice_item(rng, choices.ALL_SUBJECTS), 2000))
    assert all(420 < counts[k] < 580 for k in range(4))


@pytest.mark.parametrize("field", ["name", "animal", "home", "job", "food", "thing"])
def test_no_two_friends_share_what_a_backward_question_asks_for(field):
    assert len({getattr(friend, field) for friend in village.FRIENDS}) == len(village.FRIENDS)


def test_a_word_is_of_one_kind_only():
    words = [word for kind in choices.KINDS.values() for word in set(kind)]
    assert len(words) == len(set(words))


def test_programs_pass_their_own_checks():
    for row in draw_many(small_program, 50):
        space = {}
        exec(row["prompt"] + row["canonical_solution"] + row["test"], space)
        space["check"](space[row["entry_point"]])


# -----------------------------------------------------------------------------
# Who the model is


def test_every_identity_answer_holds_an_accepted_phrase():
    toy = persona.load_persona("toy")
    for i in range(400):
        _, answer, accept = persona.identity_exchange(Rng(i), toy, persona.self_intents())
        assert any(phrase.lower() in answer.lower() for phrase in accept), answer


def test_another_persona_is_another_model_everywhere(tmp_path):
    fields = json.loads(persona.PERSONA_FILE.read_text(encoding="utf-8"))
    mine = {"mine": {name: f"qq{name}" for name in fields["toy"]}}
    (tmp_path / "persona.json").write_text(json.dumps(mine), encoding="utf-8")
    other = persona.load_persona("mine", tmp_path / "persona.json")
    for i in range(300):
        turns = persona.identity_conversation(Rng(i), other, persona.self_intents())
        said = " ".join(f"{message} {answer}" for message, answer in turns).lower()
        assert "nanochat" not in said and "dellbrook" not in said
        assert not re.search(r"[{}\[\]|]", said), said
    with pytest.raises(UserError, match="no persona"):
        persona.load_persona("nobody")
    with pytest.raises(UserError, match="placeholder"):
        persona.load_persona("run")


def test_a_real_run_gets_its_own_size_and_no_village(tmp_path):
    path = tmp_path / "identity.jsonl"
    params = gen.write_run_identity(path, seed=1, depth=20, vocab_size=65536, data="the web", count=300)
    assert round(params / 1e6) == 561
    written = path.read_text(encoding="utf-8")
    assert "561 million parameters in 20 layers" in written and "the web" in written
    assert "Dellbrook" not in written and "two million" not in written
    assert persona.say_count(1_900_000_000) == "1.9 billion"
    assert all(check_messages(json.loads(line), "line") for line in written.splitlines())


# -----------------------------------------------------------------------------
# Language


def test_expand_nests_choices_and_fill_fills_slots():
    found = {expand("[a|b[c|]] {x}", Rng(i)) for i in range(50)}
    assert found == {"a {x}", "bc {x}", "b {x}"}
    assert fill("{Thing} and a {thing}", thing="owl") == "Owl and an owl"
    assert repair("two mouses, a apple, a unicorn") == "two mice, an apple, a unicorn"


def test_a_pool_holds_out_none_of_its_commonest_words():
    words = read_words("names.txt")
    pool = Pool(words, keep=40)
    assert set(words[:40]) <= set(pool.train) and set(pool.train) | set(pool.test) == set(words)


def test_typing_changes_the_frame_and_never_what_fills_it():
    for i in range(400):
        message = typed("what is the capital of {country}", Rng(i), country="Kenya")
        assert "kenya" in message.lower() and "{" not in message
        assert "Xq7" in typed("say {exact}", Rng(i), exact="Xq7")


def test_many_ways_to_say_the_same():
    said = {typed("what is your name", Rng(i)) for i in range(300)}
    assert len(said) > 60


@pytest.mark.parametrize(("name", "make"), EXCHANGES, ids=[name for name, _ in EXCHANGES])
def test_exchanges_are_whole(name, make):
    for message, answer in all_turns(make, 400):
        written = to_text(answer)
        assert message.strip() and written.strip()
        assert not re.search(r"[{}\[\]|]|@\w", written), written
        assert not re.search(r"\{\w+\}|@\w|\|", message), message


def test_every_intent_of_the_data_files_is_drawn_and_has_answers():
    for source in (talk.small_talk(), talk.facts()):
        for intent in source.intents:
            assert intent[">"] and intent["<"], intent["name"]
            assert intent["table"] is None or source.tables[intent["table"]], intent["name"]
    for intent in talk.outside().intents:
        assert intent[">"] and not intent["<"], intent["name"]


def test_no_way_to_say_something_belongs_to_two_intents():
    """The same words in two intents would teach the model to toss a coin."""
    owners = {}
    for source in (talk.small_talk(), talk.outside()):
        for intent in source.intents:
            for phrase in intent[">"]:
                if "{" not in phrase and "[" not in phrase and "@" not in phrase:
                    owners.setdefault(words_of(phrase) or phrase, set()).add(intent["name"])
    double = {phrase: names for phrase, names in owners.items() if len(names) > 1}
    assert not double


def test_the_shares_add_up():
    assert sum(share for share, _ in chat.EXCHANGES.values()) == 100
    assert sum(share for share, _ in text.DOCUMENTS.values()) == 100


def test_an_echo_sheet_can_be_known_from_its_first_readings():
    for sheet in draw_many(text.echo, 100):
        read = sheet.split("\n")
        assert read == [line for line in read[::3] for _ in range(3)] and len(set(read)) == 3


def test_data_files_are_plain_text_without_tabs():
    for path in DATA.glob("*.txt"):
        written = path.read_text(encoding="utf-8")
        assert "\t" not in written and written.endswith("\n"), path.name
