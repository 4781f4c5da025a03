"""1, 2, 3 and 4 gloo ranks: the same parameters, the same losses, and checkpoints that move between rank counts."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from nanochat.common import compute_cleanup, compute_init
from nanochat.dataloader import IGNORE, shift
from nanochat.distributed import rank_slice
from nanochat.training import accumulate_gradients, optimizer_step, set_rates
from tests.ranks import on_ranks
from tests.tiny import tiny_model

ROOT = Path(__file__).parent.parent


def train(out, load=None, steps=10, num_rows=7):
    """
    Some steps on fixed rows with few targets in one of them, as rank of whatever world this process is in. Rank 0
    writes parameters, optimizer state and losses to `out`.
    """
    rank, _, world_size, _ = compute_init("cpu")
    torch.set_num_threads(1)
    model = tiny_model(n_layer=3, value_embeds=True)
    # Adam divides by the gradient: at a large rate, rounding in a tiny gradient would move its weight visibly
    optimizers = model.setup_optimizers(embedding_lr=0.003)
    first = 0
    if load:
        saved = torch.load(load)
        model.load_state_dict(saved["model"])
        for optimizer in optimizers:
            optimizer.load_full_state(saved["optimizer"])
        first = saved["step"]
    losses, norms = [], []
    for step in range(first, first + steps):
        rows = torch.randint(0, 100, (num_rows, 33), generator=torch.Generator().manual_seed(step)).int().numpy()
        rows[0, 4:] = IGNORE
        set_rates(optimizers, 1 - step / 40, weight_decay=0.1)
        inputs, targets = shift(rows)
        mine = rank_slice(len(rows), rank, world_size)
        loss, _ = accumulate_gradients(model, inputs[mine], targets[mine], int((targets >= 0).sum()), 2)
        norms.append(optimizer_step(model, optimizers))
        torch.distributed.is_initialized() and torch.distributed.all_reduce(loss)
        losses.append(loss.item())
    state = {k: v for optimizer in optimizers for k, v in optimizer.full_state().items()}
    if rank == 0:
        torch.save({"model": model.state_dict(), "optimizer": state, "step": first + steps, "losses": losses,
                    "norms": norms}, out)
    compute_cleanup()


def launch(world_size, out, **kwargs):
    on_ranks(world_size, partial(train, out, **kwargs))
    return torch.load(out)


def assert_same_run(a, b):
    for part in ("model", "optimizer"):
        assert a[part].keys() == b[part].keys()
        for name in a[part]:
            torch.testing.assert_close(a[part][name], b[part][name], atol=5e-4, rtol=1e-3)
    torch.testing.assert_close(torch.tensor(a["losses"]), torch.tensor(b["losses"]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.tensor(a["norms"]), torch.tensor(b["norms"]), atol=1e-4, rtol=1e-3)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    tiny_model().setup_optimizers()  # torch imports its compiler with the first optimizer: once, before the forks
    return launch(1, tmp_path_factory.mktemp("one") / "one.pt")


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_give_the_same_parameters_after_ten_steps(world_size, one_rank, tmp_path):
    # 18 matrices of three shapes: neither 3 nor 4 ranks divide them evenly. The tolerance is for single weights whose
    # cautious decay switches on another sign of an update that is almost 0.
    assert_same_run(one_rank, launch(world_size, tmp_path / "n.pt"))


def test_a_rank_without_rows_takes_part(tmp_path):
    """More ranks than rows: nobody waits for ever, and the result is that of one rank."""
    one, four = (launch(world_size, tmp_path / f"{world_size}.pt", steps=2, num_rows=2) for world_size in (1, 4))
    assert_same_run(one, four)


@pytest.mark.parametrize("save_at, resume_at", [(2, 1), (2, 3)])
def test_a_run_goes_on_with_another_number_of_ranks(save_at, resume_at, one_rank, tmp_path):
    launch(save_at, tmp_path / "half.pt", steps=5)
    resumed = launch(resume_at, tmp_path / "end.pt", steps=5, load=str(tmp_path / "half.pt"))
    resumed["losses"] = one_rank["losses"][:5] + resumed["losses"]
    resumed["norms"] = one_rank["norms"][:5] + resumed["norms"]
    assert_same_run(one_rank, resumed)


@pytest.mark.slow
def test_base_train_has_the_same_losses_on_two_ranks(tmp_path, tokenizer, story):
    """The whole script under torchrun on CPU: a process group starts, rank 0 speaks, the losses agree."""
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": f"{i} {story}"}) for i in range(30)), encoding="utf-8")
    curves = []
    for world_size in (1, 2):
        base = tmp_path / f"base{world_size}"
        tokenizer.save(base / "tokenizer")
        flags = [f"--data={corpus}", "--depth=1", "--max_seq_len=32", "--total_batch_size=96", "--num_iterations=3",
                 "--eval_tokens=200", "--device_batch_size=2"]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if world_size == 2 else []
        env = {**os.environ, "NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *launcher, "-m", "scripts.base_train", "--", *flags], cwd=ROOT, env=env,
                              capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = (base / "base_checkpoints" / "d1" / "metrics.jsonl").read_text().splitlines()
        curves.append([line.get("train/loss", line.get("val/bpb")) for line in map(json.loads, lines)])
    assert len(curves[0]) == 5 and curves[0] == pytest.approx(curves[1], abs=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["mid", "sft", "rl"])
def test_a_chat_stage_has_the_same_losses_on_two_ranks(stage, trained_dir, tmp_path, monkeypatch):
    """Under torchrun on CPU; and what two ranks saved goes on with one."""
    from tests.stages import curve, run_stage
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(trained_dir / "mirror"))
    settings = dict(num_iterations=4, save_every=2, eval_every=-1)
    names = ("step", "train/loss", "grad_norm", "reward", "val/bpb", "val/loss", "pass@1")

    def losses():
        return [{name: line[name] for name in names if name in line} for line in curve(stage)]

    def new_base_dir(name):
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(shutil.copytree(trained_dir / "base", tmp_path / name)))

    new_base_dir("one")
    run_stage(stage, **settings)
    one = losses()
    new_base_dir("two")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "tests.stages"]
    done = subprocess.run([sys.executable, *launcher, stage, json.dumps(settings)], cwd=ROOT, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    two = losses()
    run_stage(stage, **settings, resume_from_step=2)
    assert [line["step"] for line in one] == [1, 2, 3, 4, 4] and any(line.get("grad_norm") for line in one)
    for expected, *others in zip(one, two, losses(), strict=True):
        assert others == [pytest.approx(expected, abs=2e-5, rel=1e-5)] * 2
