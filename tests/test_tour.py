"""dev/tour.py does what it says, and stays short."""

import contextlib
import io
import math
import re
from collections import Counter
from pathlib import Path

import pytest

from dev import tour

MAX_LINES = 120


@pytest.fixture(scope="module")
def printed():
    """What the tour prints."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        tour.main()
    return output.getvalue().rstrip()


def test_it_is_short_and_readme_says_how_short():
    num_lines = len(Path(tour.__file__).read_text(encoding="utf-8").splitlines())
    readme = (Path(tour.__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert num_lines <= MAX_LINES and f"\n{num_lines} lines, " in readme


def test_the_first_merge_is_the_most_frequent_pair(printed):
    pairs = Counter()
    for piece in re.findall(r" ?\w+|[^\w\s]", tour.PARAGRAPH):
        pairs.update(zip(piece, piece[1:], strict=False))
    first = re.search(r"first merges: \[b'(..)'", printed)[1]
    assert pairs[tuple(first)] == max(pairs.values())


def test_more_merges_make_fewer_tokens_of_the_same_text(printed):
    cuts = re.findall(r"after +(\d+) merges: (.*)", printed)
    assert [int(number) for number, _ in cuts] == [0, 5, 40]
    pieces = [text.split("|") for _, text in cuts]
    assert all("".join(tokens) == " the river" for tokens in pieces)
    assert len(pieces[0]) == len(" the river") > len(pieces[1]) > len(pieces[2])


def test_only_what_the_assistant_says_is_trained_on(printed):
    chat = printed.partition("2. chat")[2].partition("3. rows")[0]
    user, assistant = chat.split("<|assistant_start|>")
    assert "trained on" not in user.partition("\n")[2]
    assert all(line.endswith("trained on") for line in assistant.strip().splitlines()[1:])


def test_the_loss_begins_at_a_blind_guess_and_falls(printed):
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+) \|", printed)]
    assert losses[0] == pytest.approx(math.log(tour.VOCAB_SIZE), abs=0.001)
    assert losses[-1] < 0.5 < losses[1]


def test_the_sample_begins_as_a_sentence_of_the_paragraph(printed):
    text = printed.splitlines()[-1].strip(" '")
    first_words = " ".join(text.split()[:5])
    assert first_words.startswith("The ") and first_words in tour.PARAGRAPH
