"""Ranks hold the same parameters to the last bit, and a run whose ranks differ ends with a line that says so."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from nanochat.common import UserError, compute_cleanup, compute_init
from nanochat.dataloader import IGNORE, shift
from nanochat.distributed import HASH_CHUNK, find_drift, fingerprint, gather_objects, rank_slice
from nanochat.run_keeper import RunKeeper
from nanochat.training import accumulate_gradients, make_scaler, optimizer_step, set_rates
from tests.ranks import on_ranks
from tests.stages import small_stage
from tests.tiny import tiny_model

ROOT = Path(__file__).parent.parent
# Of the long runs below. 200 is the length at which they are worth reading: RANK_STEPS=200 pytest -m slow
STEPS = int(os.environ.get("RANK_STEPS", "4"))


def sha256_of(tensors):
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


# -----------------------------------------------------------------------------
# The hash


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_last_bit_anywhere_changes_the_hash(dtype):
    tensor = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert fingerprint(tensor) == fingerprint(tensor.clone()) == fingerprint(tensor.T.contiguous().T)
    for place in range(0, 150, 7):
        other = tensor.clone()
        flat = other.view(-1)
        flat[place] = torch.nextafter(flat[place], torch.tensor(torch.inf, dtype=dtype))
        assert fingerprint(other) != fingerprint(tensor)


def test_a_last_bit_up_and_one_down_change_the_hash():
    """A plain sum of the bits would not see it."""
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0)).abs() + 1
    for a in range(0, 400, 13):
        other = tensor.clone()
        other[a] = torch.nextafter(tensor[a], torch.tensor(torch.inf))
        other[a + 500] = torch.nextafter(tensor[a + 500], torch.tensor(-torch.inf))
        bits, changed = tensor.view(torch.int32), other.view(torch.int32)
        assert bits.sum() == changed.sum() and fingerprint(other) != fingerprint(tensor)


def test_the_hash_of_a_large_tensor_goes_over_all_of_it():
    tensor = torch.zeros(2 * HASH_CHUNK + 5)
    hashes = {int(fingerprint(tensor))}
    for place in (0, HASH_CHUNK - 1, HASH_CHUNK, 2 * HASH_CHUNK, 2 * HASH_CHUNK + 4):
        tensor[place] += 1
        hashes.add(int(fingerprint(tensor)))
    assert len(hashes) == 6


def test_zeros_of_two_signs_differ_and_not_a_number_equals_itself():
    assert fingerprint(torch.tensor([0.0])) != fingerprint(torch.tensor([-0.0]))
    assert fingerprint(torch.tensor([torch.nan])) == fingerprint(torch.tensor([torch.nan]))


# -----------------------------------------------------------------------------
# A run whose ranks differ


def drift_on_rank(guilty, names, out):
    """Rank `guilty` changes the last bit of an element of each named parameter; what the others notice goes to out."""
    rank, _, _, _ = compute_init("cpu")
    keeper = RunKeeper(small_stage(out / f"checkpoints{rank}"), 10, "data")
    keeper.check_ranks(1)  # nothing yet
    parameters = dict(keeper.stage.model.named_parameters())
    with torch.no_grad():
        for name in names if rank == guilty else ():
            flat = parameters[name].view(-1)
            flat[-1] = torch.nextafter(flat[-1], torch.tensor(torch.inf))
    try:
        keeper.save(2)
        keeper.stage.manager.finish_saving(keeper.stage.device)
        said = "nothing"
    except UserError as error:
        said = str(error)
    saved = list((out / f"checkpoints{rank}").rglob("*.safetensors"))
    (out / f"{rank}.json").write_text(json.dumps([said, len(saved)]))
    compute_cleanup()


@pytest.mark.parametrize("world_size, guilty, num_changed, said", [
    (2, 1, 1, "after step 2 {} on rank 1 differ from rank 0; nothing since the start was saved"),
    (3, 0, 2, "after step 2 {} and 1 others on rank 1, 2 differ from rank 0"), (2, 1, 0, "nothing")])
def test_a_run_whose_ranks_differ_ends_on_all_and_saves_nothing(world_size, guilty, num_changed, said, tmp_path):
    names = [name for name, _ in tiny_model().named_parameters()][:num_changed]
    said = said.format(*names)
    on_ranks(world_size, partial(drift_on_rank, guilty, names, tmp_path))
    for rank in range(world_size):
        text, num_saved = json.loads((tmp_path / f"{rank}.json").read_text())
        assert said in text and (num_saved > 0) == (not names and rank == 0), text


def test_one_rank_has_nothing_to_compare():
    assert find_drift([("x", torch.zeros(1))]) is None


# -----------------------------------------------------------------------------
# Runs whose ranks stay equal


def train(out, num_rows, steps):
    """Steps of which the ranks have uneven shares. Every rank's parameters, loss scale and rates after each step."""
    rank, _, world_size, device = compute_init("cpu")
    torch.set_num_threads(1)
    model = tiny_model(n_layer=2, value_embeds=True)
    optimizers = model.setup_optimizers()
    scaler = make_scaler(device)
    seen = []
    for step in range(steps):
        rows = torch.randint(0, 100, (num_rows, 33), generator=torch.Generator().manual_seed(step)).int().numpy()
        rows[0, 4:] = IGNORE
        set_rates(optimizers, 1 - step / 40, weight_decay=0.1)
        inputs, targets = shift(rows)
        mine = rank_slice(len(rows), rank, world_size)
        accumulate_gradients(model, inputs[mine], targets[mine], int((targets >= 0).sum()), 2, None, scaler)
        optimizer_step(model, optimizers, scaler)
        assert find_drift(model.named_parameters()) is None
        rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        seen.append([sha256_of(model.parameters()), scaler.get_scale(), *rates])
    # A checkpoint's optimizer state, from which every rank takes its part again
    state = {name: value for optimizer in optimizers for name, value in optimizer.full_state().items()}
    state = gather_objects([state])[0]
    before = sha256_of(value for optimizer in optimizers for value in local_state(optimizer))
    for optimizer in optimizers:
        optimizer.load_full_state(state)
    after = sha256_of(value for optimizer in optimizers for value in local_state(optimizer))
    everyone = gather_objects([seen])
    if rank == 0:
        out.write_text(json.dumps([everyone, before == after]))
    compute_cleanup()


def local_state(optimizer):
    return [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]


@pytest.mark.parametrize("precision, world_size, num_rows", [
    ("float32", 2, 7), ("float32", 4, 3), ("bfloat16", 3, 7), ("bfloat16", 3, 2), ("float16", 3, 7), ("float16", 2, 1)])
def test_ranks_stay_equal_to_the_last_bit(precision, world_size, num_rows, tmp_path, monkeypatch):
    """Uneven shares; where there are fewer rows than ranks, one has none."""
    monkeypatch.setenv("NANOCHAT_PRECISION", precision)
    tiny_model().setup_optimizers()  # torch imports its compiler with the first optimizer: once, before the forks
    on_ranks(world_size, partial(train, tmp_path / "seen.json", num_rows, 4))
    everyone, state_is_whole = json.loads((tmp_path / "seen.json").read_text())
    assert len(everyone) == world_size and all(seen == everyone[0] for seen in everyone) and state_is_whole
    hashes = [seen[0] for seen in everyone[0]]
    assert len(set(hashes)) >= 3  # steps that float16's scaler skips change nothing


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("stage", ["base", "sft", "rl"])
def test_a_stage_keeps_its_ranks_equal(stage, world_size, precision, trained_dir, tmp_path, monkeypatch):
    """The script under torchrun, with the check after every step: 3 rows a step leave one of 4 ranks without any."""
    base = shutil.copytree(trained_dir / "base", tmp_path / "base")
    rows = {"base": {"total_batch_size": 192}, "sft": {"examples_per_step": 3}, "rl": {"examples_per_step": 3}}
    settings = {"num_iterations": STEPS, "eval_every": -1, "save_every": -1, **rows[stage]}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}", "-m",
               "tests.stages", stage, json.dumps(settings)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "NANOCHAT_BASE_DIR": str(base), "NANOCHAT_PRECISION": precision,
           "NANOCHAT_DATA_DIR": str(trained_dir / "mirror")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300 + 30 * STEPS)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = base / {"base": "base_checkpoints", "sft": "chatsft_checkpoints", "rl": "chatrl_checkpoints"}[stage]
    assert list(folder.rglob(f"step_{STEPS:06d}/model.safetensors"))
