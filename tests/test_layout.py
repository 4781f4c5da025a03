"""The house rules that a machine can check: who imports whom, how long files are, and that imports do nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What each room of the core may import of ours (STYLE: a room imports only from rooms above its own).
ROOMS = {
    "common": [], "configurator": [], "execution": [], "curves": [], "cpu_kernels": [], "gpu_kernels": [],
    "cuda_graphs": [], "protocol": [],
    "distributed": ["common"], "precision": ["common"],
    "adamw": ["common", "cpu_kernels", "distributed"], "muon": ["common", "distributed", "precision"],
    "loss_eval": ["common", "distributed", "precision"], "download": ["common"], "documents": ["common"],
    "dataset": ["common", "configurator", "documents", "download"], "tokenizer": ["common"],
    "report": ["common", "configurator", "curves"], "core_eval": ["common", "distributed", "download", "precision"],
    "dataloader": ["common", "dataset"],
    "gpt": ["common", "precision", "adamw", "muon", "gpu_kernels", "cpu_kernels"],
    "sampling": ["common"], "engine": ["common", "execution", "cuda_graphs", "precision", "sampling"],
    "serving": ["common", "engine"],
    "service": ["engine", "protocol", "sampling", "serving"],
    "checkpoint_manager": ["common", "distributed", "precision", "gpt", "tokenizer"],
    "training": ["common", "distributed", "precision", "dataloader"],
    "head_start": ["common", "distributed", "precision", "dataloader", "adamw", "gpt", "training"],
}

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


def test_the_tokenizers_rust_sources_forbid_unsafe_code():
    folder = ROOT / "rustbpe" / "src" / "bpe"
    sources = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.rs")}
    attribute = "#![forbid(unsafe_code)]"
    assert attribute in sources["mod.rs"] and len(sources) > 4
    for name, text in sources.items():
        assert "unsafe" not in text.replace(attribute, ""), name


@pytest.mark.parametrize("path", python_files("scripts", "tasks"), ids=lambda p: f"{p.parent.name}.{p.stem}")
def test_scripts_and_tasks_import_no_scripts_dev_or_tests(path):
    allowed = {"nanochat", "tasks"}
    assert {name.split(".")[0] for name in imports_of(path)} <= allowed


def test_importing_everything_does_nothing(tmp_path):
    """No output, no files, no working folder, and none of the optional packages."""
    files = python_files("nanochat", "scripts", "tasks")
    left_out = ("__init__", "gpu_kernels")  # gpu_kernels.py needs Triton
    modules = [f"{path.parent.name}.{path.stem}" for path in files if path.stem not in left_out]
    code = (f"import sys, importlib; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['x', '--nonsense']\n"
            f"for name in {modules!r}: importlib.import_module(name)\n"
            "bad = [m for m in ('wandb', 'datasets', 'matplotlib', 'triton', 'transformers') if m in sys.modules]\n"
            "assert not bad, bad")
    home = tmp_path / "home"
    home.mkdir()
    env = {"PATH": "/usr/bin:/bin", "HOME": str(home), "NANOCHAT_BASE_DIR": str(home / "base"), "OMP_NUM_THREADS": "1",
           "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and list(home.iterdir()) == []
