"""What the chat page looks like: the theme, the colours of code, and whether all of it can be read."""

import pytest
from page_driver import FIXTURES, open_page
from page_server import Answer, demo_answer

browser, server, chat = FIXTURES

PYTHON = '''def greet(name="you", *, times=2):  # "not a string"
    """Doc 'string' of
    two lines."""
    return f'Hi {name}' * times if name is not None else 'it\\'s'
'''
JAVASCRIPT = '''// one
const n = 0x1f, text = `a ${n}
b`; /* two
lines */ if (n >= 1.5) { throw new Error("http://x"); } // {"a": null}
'''
SHELL = '''# list
for f in *.txt; do echo "$f" 'a#b' ${HOME} $1 x#y; done
'''


def paint(chat, text, language):
    """{kind: [pieces]} of a text; '' is what stays plain. Nothing of the text may be lost."""
    pieces = chat.page.evaluate("([text, language]) => colourCode(text, language)", [text, language])
    assert "".join(piece for _, piece in pieces) == text
    kinds = {}
    for kind, piece in pieces:
        kinds.setdefault(kind, []).append(piece)
    return kinds


def test_python_javascript_and_shell_are_coloured(chat):
    kinds = paint(chat, PYTHON, "python")
    assert kinds["comment"] == ['# "not a string"']
    assert kinds["string"] == ['"you"', "\"\"\"Doc 'string' of\n    two lines.\"\"\"", "f", "'Hi {name}'", "'it\\'s'"]
    assert kinds["value"] == ["2", "None"] and kinds["word"] == ["def", "return", "if", "is", "not", "else"]
    kinds = paint(chat, JAVASCRIPT, "JS")
    assert kinds["comment"] == ["// one", "/* two\nlines */", '// {"a": null}']
    assert kinds["string"] == ["`a ${n}\nb`", '"http://x"']
    assert kinds["value"] == ["0x1f", "1.5"] and kinds["word"] == ["const", "if", "throw", "new"]
    assert paint(chat, '{"a": [null, -1.5e3]}', "json")["value"] == ["null", "1.5e3"]
    kinds = paint(chat, SHELL, "bash")
    assert kinds["comment"] == ["# list"] and kinds["string"] == ['"$f"', "'a#b'"]
    assert kinds["value"] == ["${HOME}", "$1"] and kinds["word"] == ["for", "in", "do", "echo", "done"]


@pytest.mark.parametrize("language", ["", "text", "constructor", "__proto__", "{.python"])
def test_other_languages_stay_plain(chat, language):
    assert list(paint(chat, PYTHON, language)) == [""]


def test_code_that_is_still_arriving_is_coloured_at_every_length(chat):
    for text, language in ((PYTHON, "python"), (JAVASCRIPT, "js"), (SHELL, "sh")):
        for length in range(len(text)):
            paint(chat, text[:length], language)
    assert paint(chat, 'x = """a\nb', "python")["string"] == ['"""a\nb']
    assert paint(chat, 'x = "a\ny = 1', "python")["string"] == ['"a']


def test_a_code_block_shows_its_colours_while_it_streams_and_copies_as_it_is(chat, server):
    server.script = [Answer(["```python\nif x:", " # now\n", "    y = '<b>'\n```\n"], hold=1)]
    chat.send("Code?")
    chat.page.wait_for_selector(".code .word:has-text('if')")
    chat.page.evaluate("document.querySelector('.code .word').id = 'kept'")
    server.release.set()
    chat.wait()
    spans = chat.answer().locator(".code code span[class]:not([class=''])")
    assert spans.all_inner_texts() == ["if", "# now", "'<b>'"]
    assert chat.page.locator("#kept").inner_text() == "if"  # what stood there was not drawn again
    colours = {spans.nth(i).evaluate("e => getComputedStyle(e).color") for i in range(3)}
    assert len(colours) == 3
    chat.button("Copy code").click()
    assert chat.page.evaluate("navigator.clipboard.readText()") == "if x: # now\n    y = '<b>'"


def test_long_code_is_coloured_quickly_and_very_long_code_stays_plain(chat):
    colour = """([text, language]) => Math.min(...[1, 2, 3].map(() => { const begin = performance.now();
        colourCode(text, language); return performance.now() - begin; }))"""
    for piece in ('"', "'", '"""', "/*", "`", "#", "${", "f'", "1.", "if ", "\\", "$'"):
        for language in ("python", "js", "sh"):
            took_ms = chat.page.evaluate(colour, [piece * (20_000 // len(piece)), language])
            assert took_ms < 1000, (piece, language)  # on a busy machine; 1 to 50 on an idle one
    assert list(paint(chat, "if " * 6_667, "python")) == [""]


def test_the_theme_is_chosen_in_the_header_and_lasts(chat):
    scheme = "getComputedStyle(document.documentElement).colorScheme"
    assert chat.page.evaluate(scheme) == "light dark"
    chat.button("Theme: system").click()
    assert chat.page.evaluate(scheme) == "light"
    chat.button("Theme: light").click()
    chat.reload()
    assert chat.page.evaluate(scheme) == "dark"
    chat.button("Theme: dark").click()
    assert chat.page.evaluate(scheme) == "light dark"


def test_a_whole_conversation_is_copied_as_text(chat, server):
    server.script = [Answer(["Sure.", ("python", "1+1"), ("python_output", "2"), "**Two**."]), Answer(status=400)]
    assert chat.button("Copy conversation").count() == 0
    chat.say("1+1?")
    chat.say("Refused")
    chat.button("Copy conversation").click()
    chat.see("Copied.")
    assert chat.page.evaluate("navigator.clipboard.readText()") == (
        "## You\n\n1+1?\n\n## d4-sft\n\nSure.\n\n```python\n1+1\n```\n\n\n\n```python_output\n2\n```\n\n**Two**.\n\n"
        "## You\n\nRefused\n")


# Texts with too little contrast, by WCAG's formula: 3 for large ones, 4.5 for others. Colours that the style sheet
# mixes are read from a canvas; what lies behind a text is painted there first.
FAINT = """() => {
    const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const paint = (colours) => {
        for (const colour of ["white", ...colours]) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
        const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map((c) => linear(c / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const faint = [];
    for (const element of document.querySelectorAll("body *")) {
        const text = [...element.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data.trim()).join("");
        const isShown = element.checkVisibility({ opacityProperty: true }) && !element.closest(":disabled, script");
        if (!text || !isShown) continue;
        const behind = [];
        for (let at = element; at; at = at.parentElement) behind.unshift(getComputedStyle(at).backgroundColor);
        const { color, fontSize } = getComputedStyle(element);
        const [a, b] = [paint(behind), paint([...behind, color])].sort((x, y) => y - x);
        const ratio = (a + 0.05) / (b + 0.05);
        if (ratio < (parseFloat(fontSize) >= 24 ? 3 : 4.5)) faint.push([text.slice(0, 30), ratio.toFixed(2)]);
    }
    return faint;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_enough_contrast(browser, server, scheme):
    server.models = {"d4-sft": {"stage": "sft", "examples": ["One?"]}, "d4-rl": {"stage": "rl"}}
    server.scripts = {"d4-sft": [demo_answer()], "d4-rl": [Answer(["Half", " of it"], cut=1)]}
    with open_page(browser, server, color_scheme=scheme) as chat:
        assert chat.page.evaluate(FAINT) == []
        chat.page.select_option("#other", "d4-rl")
        chat.say("How many r?")
        assert chat.page.evaluate(FAINT) == []
        chat.button("Tokens").click()
        chat.button("Settings").click()
        assert chat.page.evaluate(FAINT) == []
        chat.page.evaluate("document.querySelector('.note.error').style.color = 'rgb(from gray r g b / .5)'")
        assert len(chat.page.evaluate(FAINT)) == 1  # the check does see a faint text
