"""dev/pictures.py on a tiny model: the pictures of README can be made again."""

import pytest

from dev import pictures
from nanochat.common import UserError
from nanochat.curves import to_svg
from tests.page_driver import open_browser

TAG = "d1"


def test_the_curves_of_all_stages_are_drawn(base_dir):
    svg = to_svg(pictures.draw_curves())
    assert all(title in svg for title in pictures.CURVES.values())


def test_a_stage_without_losses_is_named(base_dir):
    (base_dir / "mid_checkpoints" / TAG / "metrics.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="no train/loss in .*mid_checkpoints"):
        pictures.draw_curves()


@pytest.mark.slow  # a server and a browser
def test_the_page_is_photographed_with_its_answers(base_dir, tmp_path):
    with open_browser():
        pass  # skips where there is none
    path = tmp_path / "page.png"
    turns = pictures.photograph_page(path, "rl", ["Hello"])
    assert turns[0] == "Hello" and len(turns) == 2
    assert path.read_bytes().startswith(b"\x89PNG")
