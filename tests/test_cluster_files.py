"""The files in dev/cluster/, as far as they can be checked without a cluster: each by its tool's own validator."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

CLUSTER = Path(__file__).parent.parent / "dev" / "cluster"

# Stand-ins of Slurm's commands. srun takes a second and a signal, as the real one with torchrun below it
SRUN = """#!/usr/bin/env bash
echo "srun $*" >> "$CALLS"
trap 'echo "signal USR1" >> "$CALLS"; exit 138' USR1
for _ in $(seq 100); do sleep 0.1; [ -e "$CALLS.end" ] && exit 0; done
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >> "$CALLS"
if [ "$1" = show ]; then printf 'n1\\nn2\\n'; fi
"""


def load(name):
    return yaml.safe_load((CLUSTER / name).read_text(encoding="utf-8"))


def test_the_files_say_that_they_were_not_run_on_a_cluster():
    for path in CLUSTER.iterdir():
        assert "run on a real cluster" in path.read_text(encoding="utf-8"), path.name


@pytest.fixture
def slurm(tmp_path):
    """Starts slurm.sbatch as Slurm would, with stand-ins; returns the process and the file of what was called."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls), "SLURM_NNODES": "2",
           "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "42"}
    process = subprocess.Popen(["bash", CLUSTER / "slurm.sbatch", "--depth=20"], env=env)
    end = time.monotonic() + 20
    while not (calls.exists() and "srun" in calls.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    yield process, calls
    process.kill()


def test_slurms_warning_reaches_the_run_and_the_job_goes_back_into_the_queue(slurm):
    process, calls = slurm
    time.sleep(0.5)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=20) == 138
    lines = calls.read_text().splitlines()
    assert "--rdzv_endpoint=n1:29500" in lines[1] and lines[1].endswith("--auto_resume=True --depth=20")
    assert lines[2:] == ["signal USR1", "scontrol requeue 42"]


def test_a_slurm_job_that_ends_by_itself_is_not_put_back(slurm):
    process, calls = slurm
    calls.with_name("calls.end").touch()
    assert process.wait(timeout=20) == 0
    assert "requeue" not in calls.read_text()


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck")
def test_the_slurm_script_passes_shellcheck():
    subprocess.run(["shellcheck", CLUSTER / "slurm.sbatch"], check=True)


def test_the_train_job_is_one_of_kubeflows():
    models = pytest.importorskip("kubeflow_trainer_api.models")
    document = load("trainjob.yaml")
    job = models.TrainerV1alpha1TrainJob.from_dict(document)
    # fields that the models do not know would be missing
    assert job.to_dict() == document


def test_skypilot_parses_its_file():
    if subprocess.run([sys.executable, "-c", "import sky"], capture_output=True).returncode != 0:
        pytest.skip("no skypilot")
    path = str(CLUSTER / "skypilot.yaml")
    code = f"import sky; task = sky.Task.from_yaml({path!r}); print(task.num_nodes, task.name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split()[-2:] == ["2", "nanochat-d20"], done.stderr[-2000:]


@pytest.mark.parametrize("name", ["slurm.sbatch", "trainjob.yaml", "skypilot.yaml"])
def test_every_file_resumes_by_itself_under_a_name(name):
    text = (CLUSTER / name).read_text(encoding="utf-8")
    assert "--auto_resume=True" in text and "--model_tag=d20" in text and "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" in text
