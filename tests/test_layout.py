"""The rules of the code that a machine can check: imports, density, length, and that importing does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Every module of nanochat/, and which others of nanochat/ it may import. They are ordered so that a module imports only
# those above it: the imports have no cycle, and a reader can take the files from the top down.
MAY_IMPORT = {
    # settings, files, devices
    "files": [],
    "common": ["files"],
    "locks": [],
    "progress": ["common"],
    "configurator": ["files"],
    "distributed": ["common"],
    "device_speed": ["common"],
    "precision": ["common", "device_speed", "distributed"],
    # the model
    "cpu_kernels": [],
    "gpu_kernels": [],
    "adamw": ["common", "cpu_kernels", "distributed"],
    "muon": ["common", "distributed", "precision"],
    "ops": ["common", "cpu_kernels", "gpu_kernels"],
    "gpt": ["adamw", "common", "muon", "ops", "precision"],
    "hf_format": ["common", "gpt", "ops"],
    "fp8": ["gpt", "precision"],
    # text
    "conversation": ["common"],
    "split_patterns": [],
    "tokenizer_readers": ["split_patterns"],
    "tokenizer_files": ["common"],
    "tokenizer": ["common", "conversation", "split_patterns", "tokenizer_files"],
    "documents": ["common", "progress"],
    "download": ["common", "documents", "locks", "progress"],
    "dataset": ["common", "configurator", "documents", "download", "progress"],
    "packing": ["common", "progress"],
    "dataloader": ["common", "dataset", "packing", "progress", "split_patterns"],
    # generation
    "calculator": [],
    "streaming": ["calculator"],
    "sampling": ["common"],
    "kv_cache": [],
    "cuda_graphs": [],
    "inference": ["cuda_graphs", "gpt", "ops", "precision"],
    "decoder": ["common", "cuda_graphs", "kv_cache", "precision", "sampling", "streaming"],
    "engine": ["common", "conversation", "decoder", "sampling", "streaming"],
    "fair_queue": [],
    "scheduler": ["common", "conversation", "decoder", "fair_queue", "inference", "streaming"],
    "batcher": ["scheduler"],
    "api_fields": [],
    "api_messages": ["api_fields"],
    "api": ["api_fields", "api_messages"],
    "chat_response": [],
    "constraint": ["common"],
    "api_responses": ["api", "api_fields", "api_messages", "chat_response"],
    "service": [
        "api", "api_responses", "batcher", "chat_response", "constraint", "decoder", "engine", "sampling",
        "scheduler", "streaming",
    ],
    "gate": ["api"],
    "connections": ["gate", "service"],
    "web": ["files"],
    # training
    "checkpoint_files": ["common", "progress"],
    "background_writer": [],
    "checkpoint_folders": ["checkpoint_files", "common", "files"],
    "checkpoint_manager": ["background_writer", "checkpoint_files", "checkpoint_folders", "common", "distributed",
                           "gpt", "inference", "locks", "precision", "tokenizer"],
    "training": ["common", "dataloader", "distributed", "precision"],
    "scaling_law": ["gpt"],
    "horizon": ["common", "precision"],
    "time_limit": ["common", "horizon", "scaling_law"],
    "metrics_log": ["common"],
    "trackers": ["common"],
    "stage": ["checkpoint_manager", "common", "device_speed", "gpt", "precision", "tokenizer", "training"],
    "head_start": ["adamw", "common", "dataloader", "distributed", "ops", "precision", "progress", "training"],
    # evaluation
    "confinement": [],
    "sandbox_child": [],  # it runs in a process of its own, where confinement.py lies beside it
    "execution": ["confinement", "sandbox_child"],
    "loss_eval": ["common", "distributed", "precision", "progress"],
    "core_bundle": ["common", "distributed", "download"],
    "core_eval": ["distributed", "progress"],
    "curves": [],
    "run_facts": [],
    "run_file": ["common", "run_facts"],
    "report_text": [],
    "report_page": ["curves", "report_text"],
    "report": ["common", "configurator", "curves", "report_page", "report_text", "run_facts"],
    "stop_signal": ["common", "distributed"],
    "run_keeper": ["common", "distributed", "metrics_log", "report", "run_file", "stop_signal", "trackers",
                   "training"],
    # watching
    "log_reader": [],
    "run_status": ["files", "locks"],
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
def test_a_core_module_imports_only_what_it_may(path):
    if path.stem == "__init__":
        return
    assert path.stem in MAY_IMPORT, f"add nanochat/{path.name} to MAY_IMPORT, with the modules that it may import"
    imported = {name.split(".")[1] for name in imports_of(path) if name.count(".")}
    assert imported <= set(MAY_IMPORT[path.stem])
    assert all(name.split(".")[0] == "nanochat" for name in imports_of(path))


def test_the_imports_of_the_core_have_no_cycle():
    order = list(MAY_IMPORT)
    for module, imported in MAY_IMPORT.items():
        assert all(order.index(above) < order.index(module) for above in imported), module


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


# -- density. Measured on nanoGPT, gpt-fast, tiktoken and starlette: 4.2 to 5.8 nodes a line

MAX_NODES_PER_LINE = 6.0        # AST expressions and statements, without docstrings, comments and blank lines
MAX_PACKED_PER_1000 = 12        # assignments of the form a, b = x, y
MAX_NESTED_PER_1000 = 1         # comprehensions inside comprehensions
MAX_FILE_LINES = 450
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def count_code_lines(text, tree):
    """Lines that hold code."""
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node):
            first = node.body[0]
            docstrings |= set(range(first.lineno, first.end_lineno + 1))
    count = 0
    for number, line in enumerate(text.splitlines(), start=1):
        is_code = line.strip() and not line.strip().startswith("#")
        count += bool(is_code) and number not in docstrings
    return count


def is_packed(node):
    if not isinstance(node, ast.Assign):
        return False
    return isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)


def has_comprehension_inside(node):
    if not isinstance(node, COMPREHENSIONS):
        return False
    return any(isinstance(inner, COMPREHENSIONS) for inner in ast.walk(node) if inner is not node)


@pytest.mark.parametrize("folder", ["nanochat", "scripts", "tasks"])
def test_the_code_is_not_dense(folder):
    lines = nodes = packed = nested = 0
    for path in python_files(folder):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        lines += count_code_lines(text, tree)
        for node in ast.walk(tree):
            nodes += isinstance(node, ast.expr | ast.stmt)
            packed += is_packed(node)
            nested += has_comprehension_inside(node)
    assert nodes / lines <= MAX_NODES_PER_LINE
    assert 1000 * packed / lines <= MAX_PACKED_PER_1000
    assert 1000 * nested / lines <= MAX_NESTED_PER_1000


def source_files():
    files = [*(ROOT / "rustbpe" / "src").rglob("*.rs"), *ROOT.glob("*.sh"), *ROOT.glob("dev/*.sh")]
    for folder in ("nanochat", "scripts", "tasks", "tests", "dev"):
        files += (ROOT / folder).rglob("*.py")
    return sorted(files)


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_long(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES


def test_importing_everything_does_nothing(tmp_path):
    """No output, no files, no working folder, and none of the optional packages."""
    files = python_files("nanochat", "scripts", "tasks")
    left_out = ("__init__", "gpu_kernels")  # gpu_kernels.py needs Triton
    modules = [f"{path.parent.name}.{path.stem}" for path in files if path.stem not in left_out]
    code = (f"import sys, importlib; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['x', '--nonsense']\n"
            f"for name in {modules!r}: importlib.import_module(name)\n"
            "optional = ('wandb', 'trackio', 'tensorboard', 'mlflow', 'datasets', 'matplotlib', 'triton',\n"
            "            'transformers', 'llguidance')\n"
            "bad = [m for m in optional if m in sys.modules]\n"
            "assert not bad, bad")
    home = tmp_path / "home"
    home.mkdir()
    env = {"PATH": "/usr/bin:/bin", "HOME": str(home), "NANOCHAT_BASE_DIR": str(home / "base"), "OMP_NUM_THREADS": "1",
           "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and list(home.iterdir()) == []
