"""
A run on two "machines" (two torchrun agents of this one, two gloo ranks each) that loses a rank, an agent, everything:
it goes on from its last checkpoint without being told, and its losses are those of the unbroken run.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NUM_STEPS = 150
WAIT_S = 600  # for whatever a test waits for, on a busy machine
pytestmark = pytest.mark.slow


@pytest.fixture
def cluster(tmp_path, tokenizer, story):
    cluster = Cluster(tmp_path, tokenizer, story)
    yield cluster
    cluster.kill_all()


class Cluster:
    """Starts and kills agents of torchrun; knows all processes below them."""

    def __init__(self, folder, tokenizer, story):
        self.folder = folder
        self.agents = []
        self.workers = set()
        tokenizer.save(folder / "tokenizer")
        self.data = folder / "corpus.jsonl"
        lines = [json.dumps({"text": f"{i} {story}"}) for i in range(30)]
        self.data.write_text("\n".join(lines), encoding="utf-8")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]

    def start(self, tag, host):
        """An agent of a run of that name. host: whether it keeps the store in which the agents meet."""
        flags = ["--depth=1", "--max_seq_len=32", "--total_batch_size=256", f"--num_iterations={NUM_STEPS}",
                 "--eval_tokens=200", "--device_batch_size=2", "--save_every=5", "--eval_every=-1",
                 "--sample_every=-1", f"--data={self.data}", f"--model_tag={tag}", "--auto_resume=True"]
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2", "--max_restarts=5",
            "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{self.port}", f"--rdzv_id={tag}",
            "--local_addr=127.0.0.1", f"--rdzv_conf=is_host={int(host)},last_call_timeout=2,join_timeout=120",
            "-m", "scripts.base_train", "--", *flags]
        env = {**os.environ, "NANOCHAT_BASE_DIR": str(self.folder), "OMP_NUM_THREADS": "1",
               "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # see dev/cluster/README.md
        log = open(self.folder / f"{tag}.log", "ab")
        # a group of its own, so that what is left can be found and ended
        agent = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True)
        log.close()
        self.agents.append(agent)
        return agent

    def start_both(self, tag):
        return self.start(tag, host=True), self.start(tag, host=False)

    def workers_of(self, agent):
        """Process ids of an agent's ranks."""
        listing = subprocess.run(["ps", "-o", "pid=", "--ppid", str(agent.pid)], capture_output=True, text=True).stdout
        found = [int(pid) for pid in listing.split()]
        self.workers.update(found)
        return found

    def curve(self, tag):
        path = self.folder / "base_checkpoints" / tag / "metrics.jsonl"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]

    def wait_for_step(self, tag, step):
        """Until a run has done so many steps; it may go back meanwhile."""
        self.wait(lambda: any(line["step"] >= step for line in self.curve(tag)), tag, f"step {step}")

    def wait(self, condition, tag, what):
        end = time.monotonic() + WAIT_S
        while not condition():
            if time.monotonic() > end:
                log = (self.folder / f"{tag}.log").read_text()
                raise AssertionError(f"no {what}: {log[-4000:]}")
            time.sleep(0.02)

    def kill_all(self):
        for agent in self.agents:
            if agent.poll() is None:
                self.workers_of(agent)
                agent.kill()
                agent.wait()
        for pid in self.workers:
            kill(pid)


def kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def losses(curve):
    """Of each step and each evaluation; the curve also has a line of samples."""
    found = [line.get("train/loss", line.get("val/bpb")) for line in curve]
    return [loss for loss in found if loss is not None]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_a_run_that_loses_a_rank_an_agent_and_everything_has_the_losses_of_the_unbroken_one(cluster):
    for agent in cluster.start_both("unbroken"):
        assert agent.wait(timeout=WAIT_S) == 0
    host, other = cluster.start_both("broken")

    # A rank of the second machine
    cluster.wait_for_step("broken", 12)
    kill(cluster.workers_of(other)[0])
    cluster.wait_for_step("broken", 35)
    assert host.poll() is None and other.poll() is None

    # An agent: its ranks notice, save, and end; another machine takes its place
    orphans = cluster.workers_of(other)
    other.kill()
    other.wait()
    cluster.wait(lambda: not any(map(is_alive, orphans)), "broken", "end of the ranks without an agent")
    other = cluster.start("broken", host=False)
    cluster.wait_for_step("broken", 70)

    # Everything: the job is put back into the queue and starts again
    everything = [*cluster.workers_of(host), *cluster.workers_of(other)]
    for pid in (host.pid, other.pid, *everything):
        kill(pid)
    lost = cluster.curve("broken")[-1]["step"]
    for agent in cluster.start_both("broken"):
        assert agent.wait(timeout=WAIT_S) == 0

    log = (cluster.folder / "broken.log").read_text()
    resumed = [int(line.split()[2]) for line in log.splitlines() if line.startswith("resuming step")]
    assert len(resumed) == 3 and resumed == sorted(resumed)
    assert resumed[0] >= 10 and resumed[1] >= 35 and resumed[2] >= lost - 10  # at most what was not yet saved
    assert "torchrun is gone: saving, then ending" in log
    assert losses(cluster.curve("broken")) == losses(cluster.curve("unbroken"))
    assert len(losses(cluster.curve("broken"))) == NUM_STEPS + 1


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_processes_whose_torchrun_was_killed_save_and_give_the_folder_back(cluster):
    host, other = cluster.start_both("orphaned")
    cluster.wait_for_step("orphaned", 12)
    orphans = [*cluster.workers_of(host), *cluster.workers_of(other)]
    assert len(orphans) == 4
    for agent in (host, other):
        agent.kill()
        agent.wait()
    done = cluster.curve("orphaned")[-1]["step"]
    cluster.wait(lambda: not any(map(is_alive, orphans)), "orphaned", "end of the ranks")
    log = (cluster.folder / "orphaned.log").read_text()
    stopped = [int(line.split()[3].rstrip(";")) for line in log.splitlines() if line.startswith("stopped at step")]
    assert len(stopped) == 1 and stopped[0] >= done


LATE_RANK = """
import os, time
import torch
import torch.distributed as dist
from nanochat.common import compute_cleanup, compute_init

restart = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
rank = int(os.environ["RANK"])
time.sleep(3 * rank * restart)  # so rank 0 comes first after a restart
compute_init("cpu")
total = torch.ones(1)
dist.all_reduce(total)
print(f"restart {restart}: {total.item():g} ranks", flush=True)
if restart == 0:
    os._exit(1)
dist.barrier()
compute_cleanup()
"""


def test_a_restarted_rank_waits_for_the_others_and_not_for_those_that_died(tmp_path):
    """torchrun's store still has their addresses; see start_process_group."""
    (tmp_path / "late_rank.py").write_text(LATE_RANK, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=1",
               str(tmp_path / "late_rank.py")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=WAIT_S)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.count("restart 1: 2 ranks") == 2
