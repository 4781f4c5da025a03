"""Progress of long loops: a bar on a terminal, lines elsewhere, nothing for what is short, other ranks and threads."""

import io
import sys
import threading

import pytest

from nanochat import progress as module
from nanochat.progress import show_progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def shown(monkeypatch):
    """As for a user: conftest.py switches progress off for all tests."""
    monkeypatch.delenv("TQDM_DISABLE")


@pytest.fixture
def clock(monkeypatch, shown):
    """A clock that the test moves: clock[0] is the time in seconds."""
    now = [1000.0]
    make_bar = module.Bar.__init__

    def with_this_clock(self, *args, **settings):
        make_bar(self, *args, **settings)
        self._time = lambda: now[0]
        self.start_t = self.last_print_t = now[0]

    monkeypatch.setattr(module.Bar, "__init__", with_this_clock)
    return now


def run(clock, stream, num_items=45, seconds_each=1.0, **settings):
    """Go through items that take so long each. Returns what stands on the stream before the loop ends, and after it."""
    before_the_end = ""
    for item in show_progress(range(num_items), "scoring", "rows", stream=stream, **settings):
        clock[0] += seconds_each
        if item == num_items - 1:
            before_the_end = stream.getvalue()
    return before_the_end, stream.getvalue()


def test_elsewhere_than_on_a_terminal_it_is_a_line_every_ten_seconds(clock):
    _, text = run(clock, io.StringIO())
    lines = text.splitlines()
    counts = ("22% 10/45", "44% 20/45", "67% 30/45", "89% 40/45")
    shown = [line.split(" [")[0] for line in lines]
    assert shown == [*(f"scoring:  {count}" for count in counts), "scoring: 100% 45/45"]
    assert "[00:10<00:35,  1.00 rows/s]" in lines[0]
    assert "\r" not in text


def test_without_a_total_the_lines_count(clock):
    lines = []
    stream = io.StringIO()
    for _ in show_progress(iter(range(25)), "reading", "documents", stream=stream):
        clock[0] += 1.0
    lines = stream.getvalue().splitlines()
    assert [line.split(" [")[0] for line in lines] == ["reading: 10 documents", "reading: 20 documents",
                                                       "reading: 25 documents"]


def test_on_a_terminal_it_is_a_bar_that_goes_when_the_loop_ends(clock):
    before_the_end, text = run(clock, Terminal())
    assert "scoring:  49%|" in before_the_end and "\n" not in text
    *_, last_state, nothing = text.split("\r")
    assert last_state.strip() == "" and nothing == ""


@pytest.mark.parametrize("stream, seconds", [(Terminal(), 1.9), (io.StringIO(), 9.9)])
def test_what_is_short_shows_nothing(clock, stream, seconds):
    assert run(clock, stream, num_items=100, seconds_each=seconds / 100) == ("", "")


def test_a_loop_that_is_left_early_ends_its_bar(clock):
    stream = io.StringIO()
    for item in show_progress(range(1000), "scoring", "rows", stream=stream):
        clock[0] += 5.0
        if item == 3:
            break
    assert stream.getvalue().splitlines()[-1].startswith("scoring:   0% 3/1000")


def test_bytes_are_counted_by_update(clock):
    stream = io.StringIO()
    with show_progress(None, "downloading", "B", total=200_000_000, stream=stream) as bar:
        for _ in range(2):
            clock[0] += 20.0
            bar.update(100_000_000)
    assert stream.getvalue().splitlines()[0].startswith("downloading:  50% 100M/200M [00:20<00:20, 5.00MB/s]")


def test_a_loop_inside_another_one_moves_no_cursor(clock):
    stream = io.StringIO()
    for _ in show_progress(range(2), "files", "files", stream=stream):
        run(clock, stream, num_items=20)
    lines = stream.getvalue().splitlines()
    assert lines and all(line.startswith(("files: ", "scoring: ")) for line in lines)


def test_other_ranks_and_threads_show_nothing(clock, monkeypatch):
    stream = io.StringIO()
    thread = threading.Thread(target=run, args=(clock, stream))
    thread.start()
    thread.join()
    monkeypatch.setenv("RANK", "1")
    run(clock, stream)
    assert stream.getvalue() == ""


def test_tests_show_nothing(clock, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    stream = Terminal()
    assert list(show_progress(range(3), "scoring", "rows", stream=stream)) == [0, 1, 2]
    assert run(clock, stream) == ("", "")


def test_it_starts_no_thread_and_writes_to_stderr(shown, capsys, monkeypatch):
    monkeypatch.setattr(module, "LINE_EVERY_S", 0)
    before = threading.active_count()
    for _ in show_progress(range(2), "scoring", "rows"):
        assert threading.active_count() == before
    out, err = capsys.readouterr()
    assert out == "" and "scoring: 100% 2/2" in err
    assert sys.stderr.isatty() is False
