"""The report card: what a stage records, what the page and the curves show, and that missing facts break nothing."""

import json
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from nanochat.curves import MAX_POINTS, PANELS, draw, read_panels, shorten, to_svg
from nanochat.report import Report, get_report, main
from nanochat.report_page import SECTIONS
from nanochat.run_facts import get_environment, get_process_start

ROOT = Path(__file__).parent.parent
HOUR = 3600  # seconds


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The start.json of a real reset, made once: it lists every package."""
    report = Report(tmp_path_factory.mktemp("start") / "report")
    report.reset()
    return (report.report_dir / "start.json").read_text("utf-8")


@pytest.fixture
def report(tmp_path, start):
    report = Report(tmp_path / "report")
    report.report_dir.mkdir()
    (report.report_dir / "start.json").write_text(start, "utf-8")
    return report


def read(report, **kwargs):
    return report.generate(**kwargs).read_text("utf-8")


def use_gpus(report, num_gpus):
    """Change the card's record of the machine: it has this number of GPUs."""
    path = report.report_dir / "start.json"
    start = json.loads(path.read_text("utf-8"))
    start["environment"]["num_gpus"] = num_gpus
    path.write_text(json.dumps(start), "utf-8")


def write_metrics(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", "utf-8")
    return path


# -----------------------------------------------------------------------------
# Recording


def test_log_writes_one_json_per_section_in_the_order_of_the_pipeline(report):
    report.log("Chat SFT", {})
    report.log("Tokenizer training", {"vocab_size": 256})
    names = sorted(path.name for path in report.report_dir.glob("[0-9]*"))
    assert names == ["01-tokenizer-training.json", "09-chat-sft.json"]
    record = json.loads((report.report_dir / names[0]).read_text("utf-8"))
    assert record["vocab_size"] == 256 and record["start_time"] <= record["end_time"] and record["command"]


def test_a_section_logged_again_replaces_the_first(report):
    report.log("Base model loss", {"metrics": {"bpb": 2.0}})
    report.log("Base model loss", {"metrics": {"bpb": 1.25}})
    assert "| bpb | 1.2500 |" in read(report) and "2.0000" not in read(report)


def test_only_rank_0_writes(report, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    report.log("Chat SFT", {})
    assert not list(report.report_dir.glob("[0-9]*"))


def test_the_command_under_torchrun_is_one_that_can_be_typed(report, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python3", "-u", "-m", "scripts.base_train", "--depth=4"])
    report.log("Base model training", {})
    assert "\ntorchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth=4\n" in read(report)


def test_tensors_and_paths_are_written_as_numbers_and_text(report, tmp_path):
    report.log("Chat SFT", {"loss": torch.tensor(0.5), "folder": tmp_path})
    assert "- **loss**: 0.5\n" in read(report)


def test_reset_keeps_the_card_before_it(report):
    report.log("Chat SFT", {})
    report.reset()
    assert "09-chat-sft.json" not in {path.name for path in report.report_dir.iterdir()}
    assert (report.report_dir.parent / "report_previous" / "09-chat-sft.json").exists()


def test_environment_survives_without_git_or_any_tool(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    environment = get_environment()
    assert environment["facts"]["Code"] == "not a git checkout"
    assert f"torch {torch.__version__}" in environment["facts"]["Software"]
    assert f"pytest {pytest.__version__}" in environment["packages"]


def test_a_stage_began_when_its_process_did(tmp_path):
    """Measured in a child process that first sleeps: the clock of this one may have started minutes ago."""
    code = "import time; time.sleep(1); from nanochat.run_facts import get_process_start; print(get_process_start())"
    before = time.time()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert before - 0.5 < float(done.stdout) < time.time() - 1
    assert get_process_start() < before


# -----------------------------------------------------------------------------
# The page


def test_a_card_without_a_reset_or_a_stage_still_renders(tmp_path):
    text = read(Report(tmp_path / "report"))
    assert "No stage has recorded a metric yet." in text and "unknown (no reset before the run)" in text


def test_missing_stages_are_named(report):
    for section in SECTIONS:
        if section not in ("Midtraining", "Chat RL"):
            report.log(section, {})
    assert "Not in this card, since they have not run: Midtraining, Chat RL.\n" in read(report)


def test_metrics_have_a_column_per_stage_with_error_and_count(report):
    report.log("Base model evaluation", {"metrics": {"CORE": {"value": 0.21, "stderr": 0.006, "n": 48211}}})
    report.log("Chat evaluation sft", {"metrics": {"GSM8K": {"value": 0.05, "stderr": 0.006, "n": 1319}, "own": 3}})
    report.log("Chat evaluation rl", {"metrics": {"GSM8K": 0.08}})
    text = read(report)
    assert "| CORE | 0.2100 ± 0.0060 (n=48,211) | – | – | – |" in text
    assert "| GSM8K | – | – | 0.0500 ± 0.0060 (n=1,319) | 0.0800 |" in text
    assert "| own | – | – | 3 | – |" in text


def test_a_metric_of_two_sections_of_one_stage_shows_the_later_one(report):
    report.log("Base model training", {"metrics": {"bpb": 0.9}})
    report.log("Base model loss", {"metrics": {"bpb": 0.8}})
    assert "| bpb | 0.8000 | – | – | – |" in read(report)


def test_a_table_of_metrics_of_our_own_has_all_columns(report):
    report.log("Chat SFT", {"metrics": {"own": 0.5}})
    header = "| metric | base | mid | sft | rl |\n| --- | --- | --- | --- | --- |\n"
    assert header + "| own | – | – | 0.5000 | – |\n" in read(report)


def test_cost_is_rate_times_gpus_times_hours_and_shared_time_counts_once(report):
    use_gpus(report, 8)
    report.log("Base model training", {"start_time": 0, "end_time": 3 * HOUR, "world_size": 8})
    report.log("Base model loss", {"start_time": 2 * HOUR, "end_time": 4 * HOUR, "world_size": 8})
    assert "- **Cost**: \\$96.00 (8 x \\$3.00 an hour)" in read(report)  # 8 GPUs, 4 hours, $3
    assert "- **Cost**: \\$64.00 (8 x \\$2.00 an hour)" in read(report, gpu_hourly_rate=2.0)
    assert "| **all** |  | **4h 00m** |" in read(report)


def test_a_cpu_run_has_a_cost_only_if_a_rate_is_given(report):
    use_gpus(report, 0)
    report.log("Base model training", {"start_time": 0, "end_time": HOUR, "world_size": 4})
    assert "not counted" in read(report)
    assert "\\$0.50 (1 x \\$0.50 an hour)" in read(report, gpu_hourly_rate=0.5)


def test_samples_and_settings_cannot_break_the_page(report):
    sample = {"prompt": "Say <script>", "text": "a|b *c* `d` [e](f)\n# no heading"}
    report.log("Base model training", {"samples": [sample], "config": {"run": "x|y"}})
    text = read(report)
    assert "> **Say &lt;script&gt;** a\\|b \\*c\\* \\`d\\` \\[e\\](f)<br>\\# no heading\n" in text
    assert "| `run` | `x\\|y` |" in text


AWKWARD = "</details> <b> & {{ 7 * 7 }} {% raw %} [x](javascript:y) ![i](z) | ``` ~~~ $x$ _a_ <!-- \\ \n\n# h"
ESCAPED = ("&lt;/details&gt; &lt;b&gt; &amp; {{ 7 \\* 7 }} {% raw %} \\[x\\](javascript:y) !\\[i\\](z) \\| "
           "\\`\\`\\` \\~\\~\\~ \\$x\\$ \\_a\\_ &lt;!-- \\\\ <br><br>\\# h")


def test_nothing_that_a_stage_records_is_taken_as_markup_or_as_a_template(report):
    report.log("Base model training", {
        "metrics": {AWKWARD: 1.0}, "samples": [{"prompt": AWKWARD, "text": AWKWARD}, {"prompt": "", "text": AWKWARD}],
        "tables": {AWKWARD: [{AWKWARD: AWKWARD}]}, "a fact " + AWKWARD: AWKWARD, "command": AWKWARD})
    text = read(report)
    for line in (f"- **{ESCAPED}**: 1.0000", f"- **a fact {ESCAPED}**: {ESCAPED}", f"> **{ESCAPED}** ", f"> {ESCAPED}",
                 f"**{ESCAPED}**", f"| {ESCAPED} |\n| --- |\n| {ESCAPED} |"):
        assert f"\n{line}\n" in text
    # a command is shown as it is, in a block that it cannot end
    assert text.count(f"```text\n{AWKWARD.replace('```', chr(39) * 3)}\n```\n") == text.count("<b>") == 2


def test_a_sample_that_repeats_its_prompt_shows_it_once(report):
    report.log("Base model training", {"samples": [{"prompt": "The sky is", "text": "The sky is blue"}]})
    assert "\n> **The sky is** blue\n" in read(report)


def test_the_command_of_several_nodes_names_their_number(report, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "scripts.chat_sft"])
    report.log("Chat SFT", {})
    assert "\ntorchrun --nnodes=2 --nproc_per_node=8 -m scripts.chat_sft --\n" in read(report)


def test_nan_and_none_are_shown_and_do_not_stop_the_page(report):
    report.log("Chat RL", {"metrics": {"loss": float("nan"), "reward": {"value": None, "n": 0}}})
    assert "| loss | – | – | – | nan |" in read(report) and "| reward | – | – | – | – |" in read(report)


def test_long_tables_are_folded_and_short_ones_are_not(report):
    rows = [{"task": f"t{i}", "accuracy": i / 100} for i in range(22)]
    report.log("Base model evaluation", {"tables": {"Long": rows, "Short": rows[:2]}})
    assert "<details><summary>Long</summary>" in read(report) and "**Short**\n\n| task | accuracy |" in read(report)


def test_generate_copies_page_and_pictures(report, tmp_path):
    folder = tmp_path / "here"
    folder.mkdir()
    curves = write_metrics(tmp_path / "run" / "metrics.jsonl", [{"step": i, "train/loss": 5 - i} for i in range(4)])
    report.log("Base model training", {"curves": curves})
    text = read(report, copy_to=folder)
    assert {path.name for path in folder.iterdir()} == {"report.html", "report.md", "report-base-model-training.svg"}
    assert (folder / "report.md").read_text("utf-8") == text and "](report-base-model-training.svg)" in text


def test_curves_are_found_after_the_base_directory_has_moved(report, tmp_path):
    base = report.report_dir.parent
    report.log("Chat SFT", {"curves": write_metrics(base / "sft" / "metrics.jsonl", [{"step": 1, "loss": 2}])})
    moved = base.rename(base.with_name(base.name + "_moved"))
    assert "![Curves of Chat SFT]" in read(Report(moved / "report"))


def test_a_missing_metrics_file_is_reported(report, tmp_path):
    report.log("Chat SFT", {"curves": tmp_path / "none.jsonl"})
    assert "No curves: the file of metrics is missing" in read(report)


def test_command_line_makes_a_card(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.chdir(tmp_path)
    for arguments in (["reset"], ["generate", "--gpu_hourly_rate=3.0"]):
        monkeypatch.setattr(sys, "argv", ["report", *arguments])
        main()
    text = (tmp_path / "report.md").read_text("utf-8")
    assert text.startswith("# nanochat report card\n") and "an hour)" in text
    for name in ("report.md", "report.html"):
        assert (get_report().report_dir / name).read_text("utf-8") == (tmp_path / name).read_text("utf-8")


# -----------------------------------------------------------------------------
# Curves


def test_panels_read_what_a_killed_and_resumed_run_left(tmp_path):
    path = write_metrics(tmp_path / "metrics.jsonl", [
        {"step": 0, "loss": 5.0}, {"step": 1, "loss": 4.0}, {"step": 2, "loss": float("nan")},
        {"step": 1, "loss": 3.0}])
    path.write_text(path.read_text("utf-8") + '{"step": 2, "lo', "utf-8")
    assert read_panels(path) == {"loss": {"loss": {0: 5.0, 1: 3.0}}}
    assert read_panels(tmp_path / "missing.jsonl") == {}


def test_train_and_val_share_a_panel_and_other_keys_have_none(tmp_path):
    row = {"step": 0, "train/loss": 5, "val/loss": 6, "val/bpb": 1, "pass@1": 0.1, "pass@8": 0.3, "epoch": 0}
    panels = read_panels(write_metrics(tmp_path / "metrics.jsonl", [row]))
    names = {panel: list(curves) for panel, curves in panels.items()}
    assert names == {"loss": ["train/loss", "val/loss"], "bpb": ["val/bpb"], "pass": ["pass@1", "pass@8"]}


def test_long_curves_are_averaged_and_keep_mean_and_last_step():
    steps, values = shorten({i: i % 2 for i in range(1500)})
    assert len(steps) == len(values) == MAX_POINTS and (steps[-1], values[-1]) == (1499, 0.6)


@pytest.mark.filterwarnings("error")  # matplotlib warns of axes without a range
@pytest.mark.parametrize("curve", [
    {0: 0.0}, {7: 3.5}, {0: -1e-9, 1: 1e-9}, {0: 1e12, 10**6: 3e12}, {5: 2.0, 6: 2.0}, {i: -i for i in range(3)}])
def test_a_picture_is_svg_with_titles_names_and_last_values_as_text(curve):
    svg = to_svg(draw({panel: {f"train/{panel}": curve} for panel in PANELS}))
    text = "\n".join(ElementTree.fromstring(svg).itertext())
    assert all(title in text and f"train/{panel} " in text for panel, (title, _) in PANELS.items())


def test_a_picture_shows_all_points_and_zero_only_where_it_is_a_measure():
    figure = draw({"loss": {"train/loss": {0: 2.5, 10: 2.25}}, "lrm": {"lrm": {0: 1.0, 10: 0.5}}})
    loss, rate = figure.axes
    assert loss.lines[0].get_xydata().tolist() == [[0, 2.5], [10, 2.25]]
    assert loss.get_ylim()[0] > 2 and rate.get_ylim()[0] <= 0
    assert loss.get_legend().texts[0].get_text() == "train/loss 2.25"


def test_equal_curves_give_equal_files():
    panels = {"loss": {"train/loss": {0: 2.5, 10: 2.25}}}
    assert to_svg(draw(panels)) == to_svg(draw(panels))
