#!/usr/bin/env bash
# @huggingface/jinja: x.strip('\n') strips all white space
#
# Expected: chat templates give the same prompt in JavaScript as in Python. `strip`, `lstrip` and `rstrip`
#   with an argument, as templates of models that think use them on the parts of an answer, take off
#   those characters alone.
# Happens:  the argument is ignored and white space is taken off, without an error: code at the start of
#   an answer loses its indentation, and other characters are not taken off at all. The prompt is another
#   one than the model was trained on.
#
# Versions: @huggingface/jinja 0.5.11 (node 20), jinja2 3.1.6 (Python 3.11). Seen: 2026-11-30.
# Needs: bash, npm and node, uv.
#
# Output seen:
#   {{ x.strip('\n') }}    Python "  return 1  "     JavaScript "return 1"
#   {{ x.lstrip('\n') }}   Python "  return 1  \n"   JavaScript "return 1  \n"
#   {{ x.rstrip('\n') }}   Python "\n  return 1  "   JavaScript "\n  return 1"
#   {{ x.strip('\n r') }}  Python "eturn 1"          JavaScript "return 1"
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
uv venv -q venv
uv pip install -q --python venv/bin/python jinja2==3.1.6
npm install --silent --no-audit --no-fund --prefix . @huggingface/jinja@0.5.11
cat > cases.json <<'JSON'
["{{ x.strip('\\n') }}", "{{ x.lstrip('\\n') }}", "{{ x.rstrip('\\n') }}", "{{ x.strip('\\n r') }}"]
JSON
cat > try.py <<'PYTHON'
import json

from jinja2.sandbox import ImmutableSandboxedEnvironment

environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
for template in json.load(open("cases.json")):
    print(json.dumps(environment.from_string(template).render(x="\n  return 1  \n")))
PYTHON
cat > try.mjs <<'NODE'
import { readFileSync } from "fs";
import { Template } from "@huggingface/jinja";

for (const template of JSON.parse(readFileSync("cases.json"))) {
  console.log(JSON.stringify(new Template(template).render({ x: "\n  return 1  \n" })));
}
NODE
cat > names <<'NAMES'
{{ x.strip('\n') }}
{{ x.lstrip('\n') }}
{{ x.rstrip('\n') }}
{{ x.strip('\n r') }}
NAMES
venv/bin/python try.py > python.txt
node try.mjs > node.txt
paste -d '|' names python.txt node.txt |
  while IFS='|' read -r name python node; do
    printf '%-22s Python %-18s JavaScript %s\n' "$name" "$python" "$node"
  done
cat > node_as_seen.txt <<'TEXT'
"return 1"
"return 1  \n"
"\n  return 1"
"return 1"
TEXT
cat > python_as_seen.txt <<'TEXT'
"  return 1  "
"  return 1  \n"
"\n  return 1  "
"eturn 1"
TEXT
cmp python.txt python_as_seen.txt
cmp node.txt node_as_seen.txt
