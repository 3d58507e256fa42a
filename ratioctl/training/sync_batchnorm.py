"""Batch normalization with the statistics of a batch that several processes share.

On a GPU this is torch's `SyncBatchNorm`; that has no CPU implementation, so here is one. Both compute the
statistics of the whole batch, so that several processes train as one would.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ratioctl.errors import UsageError
from ratioctl.models.network import Classifier

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def training_copy(model: Classifier, *, synchronize: bool) -> Classifier:
    """A copy that shares all parameters and buffers with `model`, for the differentiated forward pass.

    Args:
        synchronize: batch norms normalize with the statistics of the batch of all processes.

    Raises:
        UsageError: a kind of batch norm that cannot be synchronized.
    """
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    if not synchronize:
        return twin
    for name, module in list(twin.named_modules()):
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        if type(module) not in _PLAIN:
            kind = type(module).__name__
            reason = f"has batch norms of the kind {kind}, which cannot be synchronized over processes"
            raise UsageError("model.architecture", reason, "Use --set optim.sync_batchnorm=false.")
        on_gpu = next(model.parameters()).device.type == "cuda"
        twin.set_submodule(
            name, nn.SyncBatchNorm.convert_sync_batchnorm(module) if on_gpu else _SyncBatchNorm(module)
        )
    return twin


class _SyncBatchNorm(nn.Module):
    """`norm` with the statistics of all processes in train mode; in eval mode the same function."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        for name, parameter in norm._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in norm._buffers.items():
            self.register_buffer(name, buffer)
        self.eps, self.momentum = norm.eps, norm.momentum

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and self.running_mean is not None:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        factor = 0.0
        if self.training and self.running_mean is not None:
            self.num_batches_tracked.add_(1)
            factor = 1.0 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        return _Normalized.apply(
            x, self.weight, self.bias, self.running_mean, self.running_var, factor, self.eps
        )


class _Normalized(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias over all processes; running statistics in place."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        factor: float,
        eps: float,
    ) -> Tensor:
        # In fp32 also of bf16 images, which it is with buffers in fp32.
        unused = torch.zeros(2, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
        own_mean, own_var = torch.batch_norm_update_stats(x, unused[0], unused[1], 0.0)
        count = own_mean.new_full((1,), x.numel() / x.shape[1])
        own = torch.cat([own_mean, own_var, count])
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        gathered = torch.stack(parts)
        means, variances = gathered[:, : x.shape[1]], gathered[:, x.shape[1] : -1]
        share = gathered[:, -1:] / gathered[:, -1].sum()
        mean = (share * means).sum(0)
        var = (share * (variances + (means - mean).square())).sum(0)
        if running_mean is not None and running_var is not None:
            total = float(gathered[:, -1].sum())
            running_mean.lerp_(mean, factor)
            running_var.lerp_(var * (total / max(total - 1, 1)), factor)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.total = eps, float(gathered[:, -1].sum())
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        # With fixed statistics: d_x = weight / sd * gradient, and the sums over this process's images.
        d_x, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.cat([d_weight, d_bias]).float()
        dist.all_reduce(sums)
        along, total = sums.chunk(2)  # sum of gradient * (x - mean) / sd, and of the gradient
        scale = (var + ctx.eps).rsqrt()
        outer = scale if weight is None else scale * weight
        shape = (1, -1) + (1,) * (x.dim() - 2)
        slope = (-outer * scale * along / ctx.total).view(shape)
        shift = (-outer * total / ctx.total).view(shape) - slope * mean.view(shape)
        d_x = (d_x.float() + torch.addcmul(shift, slope, x.float())).to(d_x.dtype)
        return d_x, d_weight if weight is not None else None, d_bias, None, None, None, None
