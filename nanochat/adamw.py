"""
AdamW, sharded over ranks: for embeddings, the output head and scalars.

Source: Loshchilov & Hutter, arXiv 1711.05101. The update is a pure function; the class adds state and the two
collectives. Every tensor is flattened and cut into one equal piece per rank (the last one padded), so any shape and
any number of ranks work, and a single rank runs the same code.
"""

import torch

from nanochat import cpu_kernels
from nanochat.common import ceil_div
from nanochat.distributed import all_gather, rank, reduce_scatter_sum, world_size


def adamw_update(param, grad, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay):
    """One AdamW step on float32 tensors of one shape, in place on all but grad. `step` counts from 1."""
    beta1, beta2 = betas
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (exp_avg_sq / (1 - beta2**step)).sqrt_().add_(eps)
    param.mul_(1 - lr * weight_decay)
    param.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))


class DistAdamW(torch.optim.Optimizer):
    """
    AdamW over any number of ranks. Gradients are SUMMED over ranks: divide the loss by the global number of target
    tokens beforehand. Not for the blocks' matrices (see muon.py).

    param_groups: dicts with `named_params` [(name, parameter)], `lr`, and optionally betas, eps, weight_decay.
    """

    def __init__(self, param_groups, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0):
        groups = []
        for group in param_groups:
            names, params = zip(*group["named_params"], strict=True)
            rest = {key: value for key, value in group.items() if key != "named_params"}
            groups.append({"params": list(params), "names": names, **rest})
        super().__init__(groups, dict(betas=betas, eps=eps, weight_decay=weight_decay))
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]
        self.grad_sq = 0.0  # this rank's part of the squared gradient norm of the last step

    def _my_shard(self, tensor):
        """This rank's (n,) piece of a full tensor, padded with zeros to an equal cut."""
        piece = ceil_div(tensor.numel(), world_size())
        shard = tensor.reshape(-1)[rank() * piece: (rank() + 1) * piece]
        return shard if shard.numel() == piece else torch.nn.functional.pad(shard, (0, piece - shard.numel()))

    def _state(self, p):
        state = self.state[p]
        if not state:
            zeros = torch.zeros_like(self._my_shard(p))
            state.update(step=0, exp_avg=zeros, exp_avg_sq=zeros.clone())
        return state

    @torch.no_grad()
    def step(self):
        self.grad_sq = 0.0
        for group in self.param_groups:
            for p in group["params"]:
                self._step_one(p, group)

    def _step_one(self, p, group):
        state, ranks = self._state(p), world_size()
        state["step"] += 1
        # a rank without rows has no gradient, and takes part in the collectives all the same
        flat = (torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1)
        padding = -flat.numel() % ranks
        grad = reduce_scatter_sum(torch.nn.functional.pad(flat, (0, padding)) if padding else flat)
        shard = self._my_shard(p)
        self.grad_sq = self.grad_sq + torch.linalg.vector_norm(grad).square()
        fits = p.device.type == "cpu" and shard.dtype == grad.dtype == torch.float32
        update = cpu_kernels.adamw_update if fits else adamw_update
        update(shard, grad, state["exp_avg"], state["exp_avg_sq"], state["step"], group["lr"], group["betas"],
               group["eps"], group["weight_decay"])
        if ranks > 1:
            p.copy_(all_gather(shard)[: p.numel()].view_as(p))

    # A checkpoint holds full tensors by parameter name, so it loads on any number of ranks.

    @torch.no_grad()
    def full_state(self):
        """{'<name>.exp_avg': full tensor on the CPU, ...} on rank 0, {} on the others. Collective."""
        tensors = {}
        for group in self.param_groups:
            for name, p in zip(group["names"], group["params"], strict=True):
                state = self._state(p)
                for key in ("exp_avg", "exp_avg_sq"):
                    full = all_gather(state[key])[: p.numel()].view_as(p)
                    if rank() == 0:  # a copy: what is saved at step n must not change at step n + 1
                        tensors[f"{name}.{key}"] = full.to("cpu", copy=True)
                        tensors[f"{name}.step"] = torch.tensor(state["step"])
        return tensors

    @torch.no_grad()
    def load_full_state(self, tensors):
        """Take this rank's shards out of what `full_state` returned, on however many ranks that was."""
        for group in self.param_groups:
            for name, p in zip(group["names"], group["params"], strict=True):
                state = self._state(p)
                for key in ("exp_avg", "exp_avg_sq"):
                    state[key].copy_(self._my_shard(tensors[f"{name}.{key}"].to(p.device)))
                state["step"] = int(tensors[f"{name}.step"])
