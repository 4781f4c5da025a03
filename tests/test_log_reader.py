"""The reader of metrics.jsonl: while it grows, after a kill and a resume, thinned out, with whatever else is in it."""

import json

import pytest

from nanochat.log_reader import CHUNK_BYTES, MAX_BUCKETS, NOT_DRAWN, LogReader
from nanochat.metrics_log import STEP_KEYS, MetricsLog


def step_line(step, loss, **more):
    return {"step": step, "time": 1e9 + step, "tokens": 100 * step, "train/loss": loss, **more}


def append(path, *rows):
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def losses(reader, metric="train/loss", part="last"):
    """{step: value} of all buckets."""
    columns = reader.curves()["columns"]
    pairs = zip(columns["step"]["last"], columns[metric][part], strict=False)
    return {step: value for step, value in pairs if value is not None}


class Watcher:
    """Keeps the curves as the page does: it asks for the buckets that may be new, and puts them in their place."""

    def __init__(self):
        self.columns = {}
        self.generation = 0

    def update(self, reader):
        start = max(0, len(self.columns.get("step", [])) - 1)
        answer = reader.curves(self.generation, start)
        if answer["start"] == 0:
            self.columns = {}
        for name, column in answer["columns"].items():
            known = self.columns.setdefault(name, [])
            del known[answer["start"]:]
            known.extend([None] * (answer["start"] - len(known)))
            known.extend(column["last"])
        self.generation = answer["generation"]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_a_growing_log_is_read_on_from_where_it_was_left(path):
    reader = LogReader(path)
    reader.read()
    assert reader.curves()["columns"] == {}
    append(path, step_line(1, 5.0), step_line(2, 4.0))
    reader.read()
    generation = reader.generation
    append(path, {"step": 2, "val/bpb": 1.5}, step_line(3, 3.0))
    reader.read()
    assert losses(reader) == {1: 5.0, 2: 4.0, 3: 3.0} and losses(reader, "val/bpb") == {2: 1.5}
    new = reader.curves(generation, start=3)
    assert reader.generation == generation and new["columns"]["train/loss"]["last"] == [3.0]
    assert reader.curves(generation + 1, start=3)["start"] == 0


def test_only_what_is_new_is_read(path, monkeypatch):
    parsed = []
    monkeypatch.setattr("nanochat.log_reader.json.loads", lambda line: parsed.append(line) or {"step": len(parsed)})
    reader = LogReader(path)
    for _ in range(3):
        append(path, *[step_line(step, 1.0) for step in range(10)])
        reader.read()
    reader.read()
    assert len(parsed) == 30


def test_a_line_that_is_half_written_waits_for_its_rest(path):
    line = json.dumps(step_line(2, 4.0)) + "\n"
    append(path, step_line(1, 5.0))
    reader = LogReader(path)
    for cut in (1, 10, len(line) - 1):
        path.write_text(json.dumps(step_line(1, 5.0)) + "\n" + line[:cut])
        reader.read()
        assert losses(reader) == {1: 5.0} and reader.fraction == 1.0
    path.write_text(json.dumps(step_line(1, 5.0)) + "\n" + line)
    reader.read()
    assert losses(reader) == {1: 5.0, 2: 4.0}


def test_a_resumed_run_replaces_the_file_and_its_steps_count_once(path):
    log = MetricsLog(path)
    for step in range(1, 9):
        log.log(step_line(step, 10.0 - step))
    log.log({"step": 8, "samples": [{"prompt": "a", "text": "ab"}]})
    log.close()
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"step": 9, "train/lo')  # killed
    reader = LogReader(path)
    watcher = Watcher()
    reader.read()
    watcher.update(reader)
    log = MetricsLog(path, step=5)
    for step in range(6, 12):
        log.log(step_line(step, 20.0 - step))
        reader.read()
        watcher.update(reader)
    log.close()
    expected = {**{step: 10.0 - step for step in range(1, 6)}, **{step: 20.0 - step for step in range(6, 12)}}
    assert losses(reader) == expected and reader.samples == []
    assert dict(zip(watcher.columns["step"][1:], watcher.columns["train/loss"][1:], strict=True)) == expected


def test_steps_that_come_again_in_the_same_file_replace_the_first_ones(path):
    append(path, *[step_line(step, 1.0) for step in range(1, 9)], {"step": 8, "samples": [{"prompt": "", "text": "x"}]})
    append(path, {"step": 4, "val/bpb": 2.0}, *[step_line(step, 2.0) for step in range(5, 7)])
    reader = LogReader(path)
    reader.read()
    assert losses(reader) == {1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 2.0, 6: 2.0}
    assert losses(reader, part="low") == losses(reader, part="high") and reader.samples == []


@pytest.mark.parametrize("num_lines", [1, 3, 50])
def test_another_file_of_any_length_is_read_from_its_start(path, tmp_path, num_lines):
    append(path, *[step_line(step, 1.0) for step in range(10)])
    reader = LogReader(path)
    reader.read()
    other = tmp_path / "other"
    append(other, *[step_line(step, 2.0) for step in range(num_lines)])
    other.replace(path)
    reader.read()
    assert losses(reader) == dict.fromkeys(range(num_lines), 2.0)
    path.unlink()
    reader.read()
    assert reader.curves()["columns"] == {}


def test_a_long_log_takes_few_buckets_and_loses_no_peak(path):
    num_steps = 20 * MAX_BUCKETS + 7
    rows = [step_line(step, 2.0 - step / num_steps) for step in range(1, num_steps + 1)]
    rows[12345]["train/loss"] = 99.0
    rows[333]["train/loss"] = -5.0
    reader = LogReader(path)
    watcher = Watcher()
    for start in range(0, num_steps, 3000):
        append(path, *rows[start: start + 3000])
        reader.read(seconds=10)
        watcher.update(reader)
    column = reader.curves()["columns"]["train/loss"]
    assert MAX_BUCKETS / 2 <= len(column["last"]) <= MAX_BUCKETS
    assert max(column["high"]) == 99.0 and min(column["low"]) == -5.0
    assert losses(reader)[num_steps] == 2.0 - 1.0 and losses(reader, "tokens")[num_steps] == 100 * num_steps
    assert watcher.columns["train/loss"] == column["last"]


def test_a_long_log_is_read_in_short_turns(path):
    rows = [step_line(step, 1.0, more="x" * 1000) for step in range(3 * CHUNK_BYTES // 1000)]
    append(path, *rows)
    reader = LogReader(path)
    fractions = []
    while not fractions or fractions[-1] < 1:
        reader.read(seconds=0)
        fractions.append(reader.fraction)
    assert len(fractions) >= 3 and 0 < fractions[0] and fractions == sorted(set(fractions))
    assert losses(reader)[len(rows) - 1] == 1


def test_a_long_log_is_shown_as_a_whole_before_it_is_read(path, monkeypatch):
    monkeypatch.setattr("nanochat.log_reader.LONG_BYTES", 2 * CHUNK_BYTES)
    num_steps = 4 * CHUNK_BYTES // 1000
    append(path, *[step_line(step, 1.0, more="x" * 1000) for step in range(num_steps)])
    reader = LogReader(path)
    watcher = Watcher()
    reader.read(seconds=0)
    watcher.update(reader)
    first = losses(reader)
    assert reader.fraction < 1 and len(first) > MAX_BUCKETS / 3
    assert min(first) < 0.01 * num_steps and max(first) > 0.99 * num_steps
    while reader.fraction < 1:
        reader.read(seconds=0)
    append(path, step_line(num_steps, 7.0))
    reader.read()
    watcher.update(reader)
    assert losses(reader)[num_steps] == 7.0 and watcher.columns["step"][-1] == num_steps


@pytest.mark.parametrize("line", [
    "", "nonsense", "[1, 2]", "7", "null", '{"step": "1"}', '{"step": 1.5, "a": 1}', '{"step": -1, "a": 1}', "\x00\x01",
    '{"a": 1}', '{"step": null}', "[" * 5000, '{"step": 2, "a": NaN, "b": Infinity, "c": 1' + "0" * 400 + "}", "\xff"])
def test_a_line_of_another_kind_is_left_out(path, line):
    path.write_bytes(b'{"step": 1, "a": 1}\n' + line.encode("latin-1") + b'\n{"step": 3, "a": 3}\n')
    reader = LogReader(path)
    reader.read()
    assert losses(reader, "a") == {1: 1, 3: 3}
    json.dumps(reader.curves(), allow_nan=False)


def test_what_has_no_line_end_for_long_is_skipped(path):
    path.write_bytes(b"x" * (CHUNK_BYTES + 5) + b'\n{"step": 3, "a": 3}\n')
    reader = LogReader(path)
    reader.read()
    assert losses(reader, "a") == {3: 3}


def test_what_is_not_drawn_is_among_the_keys_of_the_log():
    assert NOT_DRAWN - {"stderr"} <= STEP_KEYS.keys()
