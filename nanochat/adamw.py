"""
AdamW, sharded over ranks: for embeddings, the output head and scalars.

Source: Loshchilov & Hutter, arXiv 1711.05101. The update is a pure function; the class adds the
state and two collectives. Every tensor is flattened and cut into one equal piece per rank, the last
one padded. So any shape and any number of ranks work, and a single rank runs the same code.
"""

import torch
import torch.nn.functional as F

from nanochat import cpu_kernels
from nanochat.common import ceil_div, copy_to_cpu
from nanochat.distributed import all_gather, rank, reduce_scatter_sum, world_size


def adamw_update(param, grad, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay):
    """
    One AdamW step on float32 tensors of one shape, in place except for grad. `step` counts from 1.
    """
    beta1, beta2 = betas
    # Running means of the gradient and of its square
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2)
    exp_avg_sq.addcmul_(grad, grad, value=1 - beta2)
    # Both start at 0, which these divisors make up for
    correction1 = 1 - beta1**step
    correction2 = 1 - beta2**step
    denominator = (exp_avg_sq / correction2).sqrt_().add_(eps)
    # Decoupled weight decay, then the step
    param.mul_(1 - lr * weight_decay)
    param.addcdiv_(exp_avg, denominator, value=-lr / correction1)


class DistAdamW:
    """
    AdamW over any number of ranks. Gradients are SUMMED over ranks: divide the loss by the number
    of target tokens of all ranks beforehand. Not for the matrices of the blocks (see muon.py).

    param_groups: dicts with `named_params` [(name, parameter)] and `lr`, and perhaps betas, eps,
    weight_decay. Rates may be changed in `param_groups` from step to step.

    Not a torch.optim.Optimizer: its constructor imports torch's compiler, which takes seconds.
    """

    def __init__(self, param_groups, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0):
        # The form of a group in torch, with the names beside the parameters
        self.param_groups = []
        for settings in param_groups:
            group = {"betas": betas, "eps": eps, "weight_decay": weight_decay, **settings}
            names, params = zip(*group.pop("named_params"), strict=True)
            group["names"] = names
            group["params"] = list(params)
            group["initial_lr"] = group["lr"]
            self.param_groups.append(group)
        self.state = {}     # parameter -> its running means, on this rank's shard
        self.grad_sq = 0.0  # this rank's part of the squared gradient norm of the last step

    def _my_shard(self, tensor):
        """
        This rank's (n,) piece of a full tensor. Zeros at the end make all pieces equally long.
        """
        n = ceil_div(tensor.numel(), world_size())  # the same on all ranks
        start = rank() * n
        shard = tensor.reshape(-1)[start: start + n]
        if shard.numel() < n:
            return F.pad(shard, (0, n - shard.numel()))
        return shard  # a view of the tensor where no padding is needed

    def _state(self, p):
        # made at the first use, on this rank's shard alone
        if p not in self.state:
            shard = self._my_shard(p)
            self.state[p] = {
                "step": 0,
                "exp_avg": torch.zeros_like(shard),
                "exp_avg_sq": torch.zeros_like(shard),
            }
        return self.state[p]

    @torch.no_grad()
    def step(self):
        self.grad_sq = 0.0
        # every rank goes through the parameters in the same order, as collectives require
        for group in self.param_groups:
            for p in group["params"]:
                self._step_one(p, group)

    def _step_one(self, p, group):
        state = self._state(p)
        state["step"] += 1

        # This rank's shard of the gradient's sum over ranks. A rank without rows has no gradient,
        # but it must take part in the collectives
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        grad = grad.reshape(-1)  # (numel,)
        padding = -grad.numel() % world_size()
        if padding:
            grad = F.pad(grad, (0, padding))
        grad = reduce_scatter_sum(grad)  # (n,)
        self.grad_sq = self.grad_sq + torch.linalg.vector_norm(grad).square()

        # Update this rank's shard of the parameter. Our kernel is for float32 on a CPU
        shard = self._my_shard(p)  # (n,)
        on_cpu = p.device.type == "cpu" and shard.dtype == grad.dtype == torch.float32
        update = cpu_kernels.adamw_update if on_cpu else adamw_update
        update(
            shard,
            grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            state["step"],
            group["lr"],
            group["betas"],
            group["eps"],
            group["weight_decay"],
        )

        # Collect the shards. One rank's shard is the parameter itself
        if world_size() > 1:
            p.copy_(self._full(shard, p))

    def _full(self, shard, p):
        """All ranks' shards (n,) as a tensor of p's shape, without the padding. Collective."""
        return all_gather(shard)[: p.numel()].view_as(p)

    def _named_states(self):
        """Yield (name, parameter, state) of every parameter."""
        for group in self.param_groups:
            for name, p in zip(group["names"], group["params"], strict=True):
                yield name, p, self._state(p)

    # A checkpoint holds full tensors by parameter name, so it loads on any number of ranks.

    @torch.no_grad()
    def full_state(self, copy=copy_to_cpu):
        """
        {'<name>.exp_avg': full tensor on the CPU, ...} on rank 0, {} on the others. Collective.
        copy(name, tensor) makes each of them.
        """
        tensors = {}
        for name, p, state in self._named_states():
            for key in ("exp_avg", "exp_avg_sq"):
                full = self._full(state[key], p)
                if rank() == 0:
                    tensors[f"{name}.{key}"] = copy(f"{name}.{key}", full)
                    tensors[f"{name}.step"] = torch.tensor(state["step"])
        return tensors

    @torch.no_grad()
    def load_full_state(self, tensors):
        """Take this rank's shards from what `full_state` returned on any number of ranks."""
        for name, p, state in self._named_states():
            for key in ("exp_avg", "exp_avg_sq"):
                full = tensors[f"{name}.{key}"]
                full = full.to(p.device)
                state[key].copy_(self._my_shard(full))
            state["step"] = int(tensors[f"{name}.step"])
