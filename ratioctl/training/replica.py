"""The network whose forward pass is differentiated: the model itself, or one of several replicas (DDP)."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from ratioctl.models.network import Classifier
from ratioctl.recipe import Recipe
from ratioctl.training.distributed import Processes
from ratioctl.training.sync_batchnorm import training_copy


class Replica:
    """Pixels to logits of `model` in train mode.

    With several processes, backward passes leave the mean gradient of all of them in `model`'s parameters.
    """

    def __init__(self, model: Classifier, recipe: Recipe, processes: Processes) -> None:
        self.model, self.recipe, self.processes = model, recipe, processes
        self.network: torch.nn.Module = model
        self._only: frozenset[str] | None = None
        self._wrapped = False

    def train(self, only: frozenset[str] | None = None) -> None:
        """Set train mode. With names of parameters, these alone change, and no batch statistics."""
        if not self._wrapped or only != self._only:
            for name, parameter in self.model.network.named_parameters():
                parameter.requires_grad_(only is None or name in only)
            self._only, self._wrapped = only, True
            if self.processes.world > 1:
                self.network = self._replica()
        self.network.train(only is None)

    def _replica(self) -> DistributedDataParallel:
        optim, device = self.recipe.optim, next(self.model.parameters()).device
        network = training_copy(self.model, synchronize=optim.sync_batchnorm)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.14 has another name for the option
            replica = DistributedDataParallel(
                network,
                device_ids=[device] if device.type == "cuda" else None,
                broadcast_buffers=False,  # batch statistics agree, see `average_statistics`
                gradient_as_bucket_view=True,
            )
        if optim.allreduce_dtype == "bf16":
            replica.register_comm_hook(None, default_hooks.bf16_compress_hook)
        return replica

    def __call__(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        return logits

    @torch.no_grad()
    def average_statistics(self) -> None:
        """Average the running statistics that every process has computed of its own images."""
        if self.processes.world == 1 or self.recipe.optim.sync_batchnorm or self._only is not None:
            return
        statistics = [b for b in self.model.network.buffers() if b.is_floating_point()]
        if not statistics:
            return
        flat = torch.cat([b.flatten() for b in statistics])
        dist.all_reduce(flat)
        flat /= self.processes.world
        parts = flat.split([b.numel() for b in statistics])
        for buffer, part in zip(statistics, parts, strict=True):
            buffer.copy_(part.view_as(buffer))
