"""The house rules that a machine can check: who imports whom, how long files are, and that imports do nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What each room of the core may import of ours (STYLE: a room imports only from rooms above its own).
ROOMS = {
    "common": [], "configurator": [], "execution": [], "curves": [],
    "precision": ["common"], "native": [], "adamw": ["common", "native"], "muon": ["common", "precision"],
    "loss_eval": ["common", "precision"], "download": ["common"], "documents": ["common"],
    "dataset": ["common", "configurator", "documents", "download"], "tokenizer": ["common"],
    "report": ["common", "configurator", "curves"], "core_eval": ["common", "download", "precision"],
    "dataloader": ["common", "dataset"], "kernels": [],
    "gpt": ["common", "precision", "adamw", "muon", "kernels", "native"],
    "sampling": ["common"], "graphs": [], "engine": ["common", "execution", "graphs", "precision", "sampling"],
    "serving": ["common", "engine"], "protocol": [],
    "service": ["engine", "protocol", "sampling", "serving"],
    "checkpoint_manager": ["common", "precision", "gpt", "tokenizer"],
    "training": ["common", "precision", "dataloader"],
    "bigrams": ["common", "precision", "dataloader", "adamw", "gpt", "training"],
}

# Lines with comments and blank lines. Raising one is a reviewed change that says why in dev/LOG.md.
BUDGETS = {
    "nanochat/gpt.py": 554, "nanochat/engine.py": 470, "nanochat/tokenizer.py": 395, "nanochat/dataloader.py": 350,
    "nanochat/bigrams.py": 203,
    "nanochat/dataset.py": 235, "nanochat/documents.py": 190, "nanochat/download.py": 310, "nanochat/adamw.py": 120,
    "nanochat/muon.py": 190, "nanochat/checkpoint_manager.py": 380, "nanochat/common.py": 370,
    "nanochat/configurator.py": 145, "nanochat/precision.py": 185, "nanochat/core_eval.py": 330,
    "nanochat/loss_eval.py": 70, "nanochat/execution.py": 370, "nanochat/report.py": 335, "nanochat/curves.py": 130,
    "nanochat/training.py": 490, "nanochat/serving.py": 315, "nanochat/service.py": 280, "nanochat/protocol.py": 315,
    "nanochat/sampling.py": 140, "tests/test_training.py": 305,
    "scripts/tok_train.py": 110, "scripts/tok_eval.py": 220, "scripts/base_train.py": 300, "scripts/base_loss.py": 90,
    "scripts/base_eval.py": 150, "scripts/mid_train.py": 320, "scripts/chat_sft.py": 260, "scripts/chat_rl.py": 310,
    "scripts/export_hf.py": 220,
    "scripts/chat_eval.py": 155, "scripts/chat_cli.py": 180, "scripts/chat_web.py": 350,
    "tasks/common.py": 255, "tasks/evaluate.py": 200, "tasks/spellingbee.py": 300,
    "nanochat/ui.html": 1225, "tests/test_rustbpe.py": 330, "speedrun.sh": 130, "run1000.sh": 60,
}
TOTALS = {"nanochat": 7000, "scripts": 2500, "tasks": 1100, "dev": 2050, "tests": 11050}  # Python of a whole room
DEFAULT_BUDGET = {"nanochat": 140, "scripts": 140, "tasks": 120, "tests": 300, "dev": 600}


def python_files(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).glob("*.py"))]


def imports_of(path):
    """Dotted names of our own modules that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names if node.module in ("nanochat", "tasks")}
    return {name for name in found if name.split(".")[0] in ("nanochat", "scripts", "tasks", "dev", "tests")}


@pytest.mark.parametrize("path", python_files("nanochat"), ids=lambda p: p.stem)
def test_core_imports_only_the_rooms_above(path):
    if path.stem == "__init__":
        return
    assert path.stem in ROOMS, f"a new room: add nanochat/{path.name} to ROOMS with what it may import"
    rooms = {name.split(".")[1] for name in imports_of(path) if name.count(".")}
    assert rooms <= set(ROOMS[path.stem])
    assert all(name.split(".")[0] == "nanochat" for name in imports_of(path))


def test_the_rooms_have_no_cycle():
    order = list(ROOMS)
    assert all(order.index(above) < order.index(room) for room, rooms in ROOMS.items() for above in rooms)


@pytest.mark.parametrize("path", python_files("scripts", "tasks"), ids=lambda p: f"{p.parent.name}.{p.stem}")
def test_scripts_and_tasks_import_no_scripts_dev_or_tests(path):
    allowed = {"nanochat", "tasks"}
    assert {name.split(".")[0] for name in imports_of(path)} <= allowed


@pytest.mark.parametrize("path", [p for p in python_files("nanochat", "scripts", "tasks", "tests", "dev")],
                         ids=lambda p: f"{p.parent.name}.{p.stem}")
def test_files_stay_within_their_budget(path):
    name = f"{path.parent.name}/{path.name}"
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= BUDGETS.get(name, DEFAULT_BUDGET[path.parent.name])


@pytest.mark.parametrize("room, budget", TOTALS.items())
def test_each_room_as_a_whole_stays_within_its_budget(room, budget):
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in python_files(room)) <= budget


@pytest.mark.parametrize("name", ["nanochat/ui.html", "speedrun.sh", "run1000.sh"])
def test_other_files_stay_within_their_budget(name):
    if (ROOT / name).exists():
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= BUDGETS[name]


def test_the_rust_crate_stays_under_its_budget():
    sources = [p for p in (ROOT / "rustbpe" / "src").glob("*.rs")]
    assert sum(len(p.read_text(encoding="utf-8").splitlines()) for p in sources) < 2250


def test_importing_everything_does_nothing(tmp_path):
    """No output, no files, no working folder, and none of the optional packages."""
    files = python_files("nanochat", "scripts", "tasks")
    left_out = ("__init__", "kernels")  # kernels.py needs Triton
    modules = [f"{path.parent.name}.{path.stem}" for path in files if path.stem not in left_out]
    code = (f"import sys, importlib; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['x', '--nonsense']\n"
            f"for name in {modules!r}: importlib.import_module(name)\n"
            "bad = [m for m in ('wandb', 'datasets', 'triton', 'transformers') if m in sys.modules]\n"
            "assert not bad, bad")
    home = tmp_path / "home"
    home.mkdir()
    env = {"PATH": "/usr/bin:/bin", "HOME": str(home), "NANOCHAT_BASE_DIR": str(home / "base"), "OMP_NUM_THREADS": "1",
           "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and list(home.iterdir()) == []
