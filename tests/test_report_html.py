"""The report card as one HTML file: what it shows first, that no text becomes markup, how it looks and prints."""

import doctest
import re
from html.parser import HTMLParser

import pytest
from page_driver import open_browser

from nanochat import report_text
from nanochat.report import Report
from nanochat.report_text import mark_tokens, split_metric
from tests.test_report import write_metrics

EVIL = '"><b id=evil>&amp; </details></title></style></svg> {{ 7 * 7 }} \u202e <|user_start|>'
# how the card shows it: a special token as its name
SHOWN = EVIL.replace("<|user_start|>", "user_start")


class Page(HTMLParser):
    """What a browser makes of the card: text, elements as (name, attributes), the text of the first screen."""

    def __init__(self, text):
        super().__init__()
        self.elements = []
        self.text = ""
        self.first_screen = None  # the text before anything that is folded
        self.open = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "details" and self.first_screen is None:
            self.first_screen = self.text
        self.elements.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def report(tmp_path):
    return Report(tmp_path / "report")


def read(report, **settings):
    return report.generate(**settings).with_name("report.html").read_text("utf-8")


def log_run(report, tmp_path):
    """A run of all kinds of sections. Returns the card's text."""
    report.log("Tokenizer training", {"vocab size": 1024, "hash": "0123456789abcdef", "rows without text": "none"})
    rows = [{"step": i, "train/loss": 5 - i / 100, "val/bpb": 2 - i / 400, "lrm": 1.0} for i in range(400)]
    report.log("Base model training", {
        "config": {"depth": 3, "max_seq_len": 256, "run": "dummy"}, "parameters": 1_720_320, "tokens": 819_200,
        "curves": write_metrics(tmp_path / "base" / "metrics.jsonl", rows), "metrics": {"bpb": 0.9676},
        "samples": [{"prompt": "The sky is", "text": "The sky is blue"}]})
    rewards = [{"step": i, "train/loss": 0.0, "reward": i / 50} for i in range(50)]
    report.log("Chat RL", {"curves": write_metrics(tmp_path / "rl" / "metrics.jsonl", rewards)})
    answers = [{"prompt": f"question {i}", "text": f"answer {i}"} for i in range(4)]
    answers[1]["text"] = "<|python_start|>6*7<|python_end|><|output_start|>42<|output_end|> it is"
    report.log("Chat evaluation sft", {
        "model": "d3_step_9", "metrics": {"GSM8K": {"value": 0.82, "stderr": 0.02717, "n": 200}},
        "samples": [{"prompt": "an earlier stage", "text": "is not shown"}]})
    report.log("Chat evaluation rl", {
        "model": "d3_step_50", "metrics": {"GSM8K": {"value": 0.8312, "stderr": 0.0061, "n": 1319}}, "samples": answers,
        "tables": {"By task": [{"task": "GSM8K", "accuracy": 0.83}]}})
    return read(report)


def test_the_first_screen_has_model_answers_metrics_curves_time_and_cost(report, tmp_path):
    page = Page(log_run(report, tmp_path))
    text = " ".join(page.first_screen.split())
    parts = [
        "nanochat d3", "parameters 1,720,320", "layers 3", "tokens of context 256", "tokens of vocabulary 1,024",
        "tokens of pretraining 819,200", "asked: question 0", "answered: answer 0", "answered: 6*7 = 42 it is",
        "Metrics by stage", "0.820 ± 0.027", "0.8312 ± 0.0061", "200 to 1,319", "Base model training: loss",
        "Chat RL: reward", "in the stages", "cost",
    ]
    for part in parts:
        assert part in text, part
    assert "question 3" not in text and "an earlier stage" not in text  # three answers, of the last stage


def test_hashes_and_what_was_skipped_come_last(report, tmp_path):
    page = Page(log_run(report, tmp_path))
    before, _, after = page.text.partition("Hashes, and what was skipped")
    for part in ("0123456789abcdef", "rows without text", "have not run: Tokenizer evaluation"):
        assert part in after
    assert "0123456789abcdef" not in before and "Settings" not in after
    assert len(page.all("details")) == 5 + 1 + 3 + 1  # stages, settings, time and commands and machine, hashes
    assert not any("open" in attributes for attributes in page.all("details"))


def test_the_file_is_whole_loads_nothing_and_runs_nothing(report, tmp_path):
    text = log_run(report, tmp_path)
    page = Page(text)
    names = {name for name, _ in page.elements}
    assert not names & {"script", "link", "img", "iframe", "object", "image", "foreignobject"}
    for _, attributes in page.elements:
        assert "src" not in attributes and not any(name.startswith("on") for name in attributes)
        assert all(value.startswith("#") for name, value in attributes.items() if name.endswith("href"))
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?(.)", text))
    (policy,) = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_curves_are_drawn_in_the_colours_of_the_page_and_said_in_words(report, tmp_path):
    text = log_run(report, tmp_path)
    page = Page(text)
    pictures = [svg for svg in page.all("svg")]
    labels = [svg["aria-label"] for svg in pictures]
    # one of each panel below, and one of each stage on the first screen
    assert labels.count("loss: train/loss from 5 at step 0 to 1.01 at step 399") == 2
    assert len(pictures) == 3 + 2 + 2
    drawn = "".join(re.findall(r"<svg role.*?</svg>", text, re.DOTALL))
    strokes = set(re.findall(r"stroke: ([^;\"]+)", drawn))
    assert strokes <= {"currentColor", "var(--curve-1)", "var(--curve-2)", "#b0b0b0", "none"}
    # a <use> would take the shape of another picture if two had the same id
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    used = set(re.findall(r'[("]#([mp][0-9a-f]{10})[")]', text))
    assert len(ids) == len(set(ids)) and set(ids) == used


def test_a_panel_of_one_point_is_no_picture(report, tmp_path):
    rows = [{"step": i, "train/loss": 5 - i} for i in range(4)] + [{"step": 4, "val/bpb": 1.5}]
    report.log("Base model training", {"curves": write_metrics(tmp_path / "metrics.jsonl", rows)})
    assert {svg["aria-label"].split(":")[0] for svg in Page(read(report)).all("svg")} == {"loss"}


def test_nothing_that_a_stage_records_is_taken_as_markup_or_as_a_template(report, tmp_path):
    evil = {
        "metrics": {EVIL: 1.0}, "samples": [{"prompt": EVIL, "text": EVIL}], "tables": {EVIL: [{EVIL: EVIL}]},
        EVIL: EVIL, "hash": EVIL, "command": EVIL, "config": {EVIL: EVIL, "model_tag": EVIL}, "model": EVIL}
    for section in ("Base model training", "Chat evaluation rl", EVIL):
        report.log(section, evil)
    page = Page(read(report))
    assert not [attributes for _, attributes in page.elements if attributes.get("id") == "evil"]
    assert "49" not in page.text.partition("Stages")[0]
    # as text it is whole wherever it stands: the title, the first answer, and each part of three sections
    assert page.text.count(EVIL) + page.text.count(SHOWN) > 30
    assert len(page.all("details")) == 3 * 2 + 4 and page.text.rstrip().endswith("Chat RL.")


def test_bytes_of_a_file_name_that_are_no_text_do_not_stop_the_card(report):
    report.log("Chat SFT", {"command": "python -m scripts.chat_sft --data=caf\udce9.jsonl"})
    assert "--data=caf\\udce9.jsonl" in read(report)


def test_without_a_chat_model_the_base_model_shows_how_it_goes_on(report):
    report.log("Base model loss", {"samples": [{"prompt": "The sky is", "text": "The sky is blue"}]})
    page = Page(read(report))
    assert "The sky is blue" in page.first_screen and "asked:" not in page.first_screen


def test_a_card_without_a_stage_says_so(report):
    text = Page(read(report)).text
    assert "No stage has saved an answer yet." in text and "No stage has recorded a metric yet." in text


def test_a_rented_machine_has_the_cost_of_each_stage(report):
    report.log("Base model training", {"start_time": 0, "end_time": 1800, "world_size": 1})
    report.log("Chat SFT", {"start_time": 1800, "end_time": 2700})
    text = Page(read(report, gpu_hourly_rate=4.0)).text
    assert "$3.00 (1 x $4.00 an hour)" in text and "$2.00" in text and "$1.00" in text


# -----------------------------------------------------------------------------
# Text


def test_the_examples_of_report_text_are_right():
    assert doctest.testmod(report_text).failed == 0


@pytest.mark.parametrize("metric, texts", [
    ({"value": 0.4837, "stderr": 0.03684}, ("0.484", "0.037")),
    ({"value": 0.2, "stderr": 0.00061}, ("0.20000", "0.00061")),
    ({"value": 41.3, "stderr": 12.4}, ("41", "12")),
    ({"value": 0.0, "stderr": 0.0}, ("0.0000", None)),
    ({"value": 0.5, "stderr": float("nan")}, ("0.5000", None)),
    ({"value": None, "stderr": None, "n": 0}, ("–", None)),
    (0.9675634, ("0.9676", None)),
])
def test_a_value_has_as_many_decimals_as_its_error_is_worth(metric, texts):
    assert split_metric(metric) == texts


def test_calls_of_the_calculator_and_special_tokens_are_marked():
    text = "<|python_start|>1/0<|python_end|> none <|assistant_end|> -> 0"
    assert mark_tokens(text) == '<code class="call">1/0</code> none <span class="token">assistant_end</span> -&gt; 0'


# -----------------------------------------------------------------------------
# In a browser


def test_the_card_in_a_browser(report, tmp_path):
    """Nothing is asked for or refused, a narrow window needs no scrolling to the side, print shows what is folded."""
    log_run(report, tmp_path)
    heard = []
    with open_browser() as browser:
        page = browser.new_page(viewport={"width": 360, "height": 800}, color_scheme="dark")
        page.on("console", lambda message: heard.append(message.text))
        page.on("request", lambda request: heard.append(request.url))
        address = (report.report_dir / "report.html").as_uri()
        page.goto(address)
        assert heard == [address]
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(27, 27, 26)"

        command = page.locator("details pre").first
        assert not command.is_visible()
        page.locator("summary").first.click()
        assert command.is_visible()

        page.emulate_media(media="print", color_scheme="dark")
        for box in page.locator("details pre").all():
            assert box.bounding_box()["height"] > 10
        assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light"
