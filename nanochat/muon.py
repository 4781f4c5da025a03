"""
Muon for the matrices of the blocks, sharded over ranks.

It is momentum SGD whose update is replaced by the nearest semi-orthogonal matrix, so that every
direction of the weight moves equally fast (Jordan et al. 2024; at scale: Liu et al., arXiv
2502.16982). This version adds:
  - the orthogonalisation polynomial of Polar Express (Amsel et al., arXiv 2505.16932),
  - a running scale per neuron, NorMuon (Li et al., arXiv 2510.05491),
  - weight decay only where it has the same sign as the update: cautious weight decay (arXiv
    2510.12402), an idea from cautious optimizers (Liang et al., arXiv 2411.16085).

The update is a pure function of stacked matrices (K, M, N): all matrices of one shape are updated
together. With several ranks, each rank updates K / ranks of them.
"""

import torch

from nanochat.common import ceil_div, compiles, copy_to_cpu, one_thread
from nanochat.distributed import all_gather, rank, reduce_scatter_sum, world_size
from nanochat.precision import get_precision_dtype

# Coefficients (a, b, c) of X <- aX + b(XX')X + c(XX')^2 X, step by step: optimal for singular
# values in [1e-3, 1] (arXiv 2505.16932). The paper divides all but an exact last step by powers of
# 1.01 against rounding in bf16.
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
_SAFETY = 1.01


def orthogonalize(G, dtype=torch.bfloat16):
    """
    (K, M, N) -> about U V' of its SVD, same shape, in `dtype`. Singular values of at least a
    thousandth of the matrix's norm become 0.87 to 1.13. Smaller ones grow a thousandfold at most; in
    16 bits even a matrix of low rank has such small ones, from rounding.
    """
    X = G.to(dtype)
    tall = X.size(-2) > X.size(-1)
    if tall:
        X = X.mT  # so that the Gram matrix X @ X.mT below has the smaller of the two sizes
    norm = X.norm(dim=(-2, -1), keepdim=True)
    X = X / (norm * _SAFETY + 1e-7)
    for a, b, c in _POLAR_EXPRESS:
        a /= _SAFETY
        b /= _SAFETY**3
        c /= _SAFETY**5
        A = X @ X.mT                                 # (K, M, M), M the smaller size
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # bA + cA^2
        X = torch.baddbmm(X, B, X, beta=a)           # aX + BX
    return X.mT if tall else X


def muon_update(
    params,
    grads,
    momentum_buffer,
    second_moment,
    lr,
    momentum,
    beta2,
    weight_decay,
    dtype,  # of the orthogonalisation
):
    """
    One step on stacked float32 matrices (K, M, N), in place except for grads.

    momentum_buffer (K, M, N); second_moment (K, M, 1): the mean square of each output neuron's
    update. lr, momentum and weight_decay are floats, or 0-d tensors, which a compiled update takes
    without recompiling.
    """
    # Nesterov: look ahead along the averaged gradient
    momentum_buffer.lerp_(grads, 1 - momentum)
    lookahead = grads.lerp(momentum_buffer, momentum)
    update = orthogonalize(lookahead, dtype).float()

    # NorMuon: divide each neuron by its running scale, then give the matrix its old norm back. Both
    # factors follow from the neurons' mean squares, so the matrix is scaled once and needs no copy
    norms = torch.linalg.vector_norm(update, dim=-1, keepdim=True)  # (K, M, 1)
    squares = norms.square() / update.size(-1)  # means over N
    second_moment.lerp_(squares, 1 - beta2)
    factor = second_moment.clamp(min=1e-10).rsqrt()
    old_sum = squares.sum(dim=-2, keepdim=True)  # (K, 1, 1)
    new_sum = (squares * factor.square()).sum(dim=-2, keepdim=True)
    factor *= (old_sum / new_sum.clamp(min=1e-20)).sqrt()

    # A tall matrix (more outputs than inputs) needs a larger step for the same change of its
    # outputs
    aspect = max(1.0, params.size(-2) / params.size(-1))
    update.mul_(factor * (lr * aspect**0.5))

    # Cautious weight decay: only where it has the sign of the update
    if torch.is_tensor(weight_decay) or weight_decay:
        agrees = (update * params) > 0
        update.addcmul_(params, agrees * (lr * weight_decay))
    params.sub_(update)


def _stack(tensors):
    """
    A list of tensors of one shape as one tensor, with zeros at its end so that all ranks get
    equally many.
    """
    missing = -len(tensors) % world_size()
    padded = tensors + [torch.zeros_like(tensors[0])] * missing
    with one_thread():  # for each small matrix torch would wake all of them
        return torch.stack(padded)


def _my_part(stack):
    """This rank's part (K / ranks, M, N) of a stack (K, M, N), a view."""
    count = len(stack) // world_size()
    return stack[rank() * count: (rank() + 1) * count]


class DistMuon:
    """
    Muon over any number of ranks. Only for matrices inside the blocks: not for embeddings, the
    head, or tensors that are not 2-D (see adamw.py). Gradients are SUMMED over ranks.

    named_params: [(name, parameter)]. lr: step in units of the orthogonal update (0.02 is a good
    start). weight_decay: per unit of lr, applied cautiously. Both may be changed in `param_groups`
    from step to step. compile: whether to compile the update on a GPU; None = if Triton is there.
    """

    def __init__(
        self,
        named_params,
        lr=0.02,
        momentum=0.95,
        beta2=0.95,
        weight_decay=0.0,
        compile=None,
    ):
        # One group for each shape, so that its matrices can be stacked
        defaults = {
            "lr": lr,
            "initial_lr": lr,
            "momentum": momentum,
            "beta2": beta2,
            "weight_decay": weight_decay,
        }
        groups = {}
        for name, p in named_params:
            if p.ndim != 2:
                shape = tuple(p.shape)
                raise ValueError(
                    f"Muon takes matrices, {name} has shape {shape}; give it to DistAdamW"
                )
            new = {"name": "matrix", "params": [], "names": [], **defaults}
            group = groups.setdefault(p.shape, new)
            group["params"].append(p)
            group["names"].append(name)
        self.param_groups = list(groups.values())
        self.state = {}  # first parameter of a group -> the running means of all, stacked

        # The matrices of a group become views of one tensor (K, M, N), which is updated as a whole
        self._stacks = []
        for group in self.param_groups:
            stack = _stack([p.data for p in group["params"]])
            self._stacks.append(stack)
            for p, matrix in zip(group["params"], stack, strict=False):  # without the padding
                p.data = matrix

        # The polynomial runs in the compute dtype
        device = self.param_groups[0]["params"][0].device
        self.dtype = get_precision_dtype(device.type)
        if self.dtype == torch.float16:
            self.dtype = torch.float32  # the polynomial's intermediate values leave float16's range
        self.grad_sq = 0.0  # this rank's part of the squared gradient norm of the last step
        self._update = muon_update
        if compiles(device, compile):
            self._update = torch.compile(muon_update, dynamic=False)

    def _state(self, group):
        p = group["params"][0]
        if p not in self.state:
            count = ceil_div(len(group["params"]), world_size())
            M, N = p.shape
            self.state[p] = {
                "momentum_buffer": p.new_zeros(count, M, N),
                "second_moment": p.new_zeros(count, M, 1),
            }
        return self.state[p]

    @torch.no_grad()
    def step(self):
        self.grad_sq = 0.0
        for group, stack in zip(self.param_groups, self._stacks, strict=True):
            self._step_group(group, stack)

    def _step_group(self, group, stack):
        params = group["params"]
        state = self._state(group)

        # This rank's matrices and their gradients, summed over ranks. A rank without rows has no
        # gradients
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        grads = _stack(grads)  # (K, M, N)
        grads = reduce_scatter_sum(grads)  # (K / ranks, M, N)
        self.grad_sq = self.grad_sq + torch.linalg.vector_norm(grads).square()
        mine = _my_part(stack)

        # On a GPU rates are tensors, not floats: values that change every step must not recompile
        # the update
        lr = group["lr"]
        momentum = group["momentum"]
        weight_decay = group["weight_decay"]
        if mine.is_cuda:
            lr = torch.tensor(lr)
            momentum = torch.tensor(momentum)
            weight_decay = torch.tensor(weight_decay)
        self._update(
            mine,
            grads,
            state["momentum_buffer"],
            state["second_moment"],
            lr,
            momentum,
            group["beta2"],
            weight_decay,
            self.dtype,
        )

        # Every rank gets all of them. One rank's part is the whole
        if world_size() > 1:
            stack.copy_(all_gather(mine))

    @torch.no_grad()
    def full_state(self, copy=copy_to_cpu):
        """
        {'<name>.momentum_buffer': (M, N) on the CPU, ...} on rank 0, {} on the others. Collective.
        copy(name, tensor) makes each of them.
        """
        tensors = {}
        for group in self.param_groups:
            for key, value in self._state(group).items():
                full = all_gather(value)
                if rank() > 0:
                    continue
                for name, tensor in zip(group["names"], full, strict=False):
                    tensors[f"{name}.{key}"] = copy(f"{name}.{key}", tensor)
        return tensors

    @torch.no_grad()
    def load_full_state(self, tensors):
        """Take this rank's matrices from what `full_state` returned on any number of ranks."""
        for group in self.param_groups:
            for key, value in self._state(group).items():
                # All matrices of the group, of which this rank takes its part
                full = [tensors[f"{name}.{key}"] for name in group["names"]]
                value.copy_(_my_part(_stack(full)))


Muon = DistMuon  # one class for 1 and N ranks, under both of the field's names
