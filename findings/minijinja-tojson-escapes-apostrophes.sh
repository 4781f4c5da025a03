#!/usr/bin/env bash
# minijinja: tojson writes an apostrophe as \u0027, so a function's description is another prompt
#
# Expected: servers that render chat templates by minijinja give a model the same text for its tools as
#   transformers does. Its Python binding copies the rest: True, None and the separators ", " and ": ".
# Happens:  ' < > & become \u0027 \u003c \u003e \u0026 (meant for HTML), also with automatic escaping off;
#   transformers' own tojson leaves them as they are. A model was not trained on them. A float of 1e-07
#   becomes 1e-7, and `text is sequence` is false, so a template may take another branch.
#
# Versions: minijinja 3.1.0, transformers 5.24.0, jinja2 3.1.6, Python 3.11. Seen: 2026-11-30.
# Needs: bash, uv.
#
# Output seen:
#   transformers {"description": "it's 1 < 2", "step": 1e-07} True
#   minijinja    {"description": "it\u0027s 1 \u003c 2", "step": 1e-7} False
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
uv venv -q venv
uv pip install -q --python venv/bin/python minijinja==3.1.0 transformers==5.24.0 jinja2==3.1.6 numpy==2.4.6
cat > try.py <<'PYTHON'
import sys

import minijinja
from transformers.utils.chat_template_utils import render_jinja_template

TEMPLATE = "{{ tools[0] | tojson }} {{ 'text' is sequence }}"
tool = {"description": "it's 1 < 2", "step": 1e-07}

rendered, _ = render_jinja_template(conversations=[[]], tools=[tool], chat_template=TEMPLATE)
by_transformers = rendered[0]
print("transformers", by_transformers)
environment = minijinja.Environment(
    trim_blocks=True, lstrip_blocks=True, auto_escape_callback=lambda name: False
)
by_minijinja = environment.render_str(TEMPLATE, tools=[tool])
print("minijinja   ", by_minijinja)

as_seen = (
    '{"description": "it\'s 1 < 2", "step": 1e-07} True',
    '{"description": "it\\u0027s 1 \\u003c 2", "step": 1e-7} False',
)
sys.exit((by_transformers, by_minijinja) != as_seen)
PYTHON
HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 venv/bin/python try.py
