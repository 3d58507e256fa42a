"""3x3 convolutions of networks whose weights stand still, with a fourth of the multiplications, on a CPU.

Winograd's minimal filtering F(4x4, 3x3) (Lavin and Gray 2016): the 16 outputs of a tile from 36 products
instead of 144, as 36 matrix products over all tiles, between transforms that only add. For a stride of 1
the gradient of the input is such a convolution too. In fp32 its error is 1e-5 of the largest output, ten
times that of the direct sum and a hundredth of bf16's.
"""

from __future__ import annotations

import threading
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_G = (  # of the weights; the transforms of tiles and of products are written out below
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
# The direct convolution's time over this one's, a core with AVX2: 1.1 with 64 channels at 32x32, 1.4 with 128
# at 16x16, 1.7 with 256 at 8x8, 1.8 with 512 at 4x4 (16 images); 0.5 with 32 at 16x16 (64 images).
_LEAST_CHANNELS = 128
_LEAST_TILES = 12  # of a batch: below, reading the weights of 36 products costs more
_BLOCK = 1 << 19  # values of an input worked on at once: the transforms stay in the cache

_scratch = threading.local()
_lock = threading.Lock()
_Network = TypeVar("_Network", bound=nn.Module)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution, stride 1, padding 1, no gradient of its weights; made by `quicken`.

    Falls back to the direct one for small batches, other types than fp32, under autocast and off the CPU.
    """

    _ready: dict[bool, Tensor]  # of `products`
    _seen: tuple[int, int]  # place and version of the `weight` they were made from

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        small = b * ((h + 3) // 4) * ((w + 3) // 4) < _LEAST_TILES
        if small or x.dtype != torch.float32 or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return F.conv2d(x, self.weight, self.bias, padding=1)
        return _Winograd.apply(x, self)  # type: ignore[no-any-return]

    def products(self, backward: bool) -> Tensor:
        """The transformed weights (36, C_in, C_out), or those of the gradient; anew when `weight` changed."""
        with _lock, torch.inference_mode(False):
            seen = (self.weight.data_ptr(), self.weight._version)
            if self._seen != seen:
                self._ready, self._seen = {}, seen
            if backward not in self._ready:
                w = self.weight.detach()
                w = w.flip(2, 3) if backward else w.transpose(0, 1)
                g = w.new_tensor(_G)
                self._ready[backward] = torch.einsum("ik,abkl,jl->ijab", g, w, g).flatten(0, 1).contiguous()
            return self._ready[backward]


def quicken(network: _Network) -> _Network:
    """Replace, in place, the convolutions of a frozen network that `Conv3x3` can compute; returns it.

    For searches: forward pass and gradient of a ResNet-18 of width 64 take three quarters of their time (31
    and 42 images a second and core), of width 16 the same. What is shown is computed by the network without.
    """
    for name, module in list(network.named_modules()):
        if (
            type(module) is nn.Conv2d
            and module.kernel_size == (3, 3)
            and module.stride == module.padding == module.dilation == (1, 1)
            and module.groups == 1
            and module.padding_mode == "zeros"
            and min(module.in_channels, module.out_channels) >= _LEAST_CHANNELS
            and not module.weight.requires_grad
        ):
            quick = Conv3x3.__new__(Conv3x3)
            quick.__dict__.update(module.__dict__)
            quick._ready, quick._seen = {}, (0, 0)
            network.set_submodule(name, quick)
    return network


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Conv3x3) -> Tensor:
        ctx.layer = layer
        return _convolve(x, layer.products(backward=False), layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _convolve(gradients[0], ctx.layer.products(backward=True), None), None


def _convolve(x: Tensor, products: Tensor, bias: Tensor | None) -> Tensor:
    """x (B, C, H, W) with weights (36, C, K) -> (B, K, H, W), channels_last."""
    b, c, h, w = x.shape
    k = products.shape[2]
    rows, columns = (h + 3) // 4, (w + 3) // 4  # tiles
    result = torch.empty((b, k, h, w), memory_format=torch.channels_last)
    out = result.permute(0, 2, 3, 1)
    size = max(1, _BLOCK // (h * w * max(c, k)))
    for start in range(0, b, size):
        part = x[start : start + size].permute(0, 2, 3, 1)
        n = len(part)
        phases, lines, tiles, product, half, pixels = _buffers(
            (4, n, 4 * rows + 2, columns + 1, c),
            (6, n, 4 * rows + 2, columns, c),
            (6, 6, n, rows, columns, c),
            (6, 6, n, rows, columns, k),
            (4, 6, n, rows, columns, k),
            (4, 4, n, rows, columns, k),
        )
        # Column 4t + j of the padded image is phases[j, :, :, t]: after one strided copy all is contiguous.
        phases.zero_()
        for j in range(4):
            source = part[:, :, (j + 3) % 4 :: 4]
            phases[j, :, 1 : h + 1, j == 0 :][:, :, : source.shape[2]] = source
        _tile_transform([phases[j % 4, :, :, j // 4 :][:, :, :columns] for j in range(6)], lines)
        _tile_transform([lines[:, :, i : i + 4 * rows - 3 : 4] for i in range(6)], tiles)
        torch.bmm(tiles.view(36, -1, c), products, out=product.view(36, -1, k))
        _product_transform(product, half)
        _product_transform(half.unbind(1), pixels)
        target = pixels.permute(2, 3, 1, 4, 0, 5)  # pixels[column, row] of a tile
        if bias is not None:
            pixels += bias
        if (4 * rows, 4 * columns) == (h, w):
            out[start : start + n].view(n, rows, 4, columns, 4, k).copy_(target)
        else:
            out[start : start + n] = target.reshape(n, 4 * rows, 4 * columns, k)[:, :h, :w]
    return result


def _tile_transform(d: Any, out: Any) -> None:
    """out_i = sum_j B^T_ij d_j for the six values of a tile's side."""
    d0, d1, d2, d3, d4, d5 = d
    o0, o1, o2, o3, o4, o5 = out
    torch.sub(d4, d2, alpha=5, out=o0).add_(d0, alpha=4)
    torch.sub(d4, d2, alpha=4, out=o1)
    torch.sub(d3, d1, alpha=4, out=o3)
    torch.sub(o1, o3, out=o2)
    o1.add_(o3)
    torch.sub(d4, d2, out=o4)
    torch.sub(d3, d1, out=o5)
    torch.add(o4, o5, alpha=2, out=o3)
    o4.sub_(o5, alpha=2)
    torch.sub(d5, d3, alpha=5, out=o5).add_(d1, alpha=4)


def _product_transform(m: Any, out: Any) -> None:
    """out_i = sum_j A^T_ij m_j: six products to four pixels; overwrites m."""
    m0, m1, m2, m3, m4, m5 = m
    o0, o1, o2, o3 = out
    torch.add(m1, m2, out=o2)
    m1.sub_(m2)
    torch.add(m3, m4, out=m2)
    m3.sub_(m4)
    torch.add(m0, o2, out=o0).add_(m2)
    torch.add(m1, m3, alpha=2, out=o1)
    o2.add_(m2, alpha=4)
    torch.add(m5, m1, out=o3).add_(m3, alpha=8)


def _buffers(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Uninitialised fp32 tensors in memory this thread keeps: fresh pages would cost as much as the sums."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    memory = getattr(_scratch, "memory", None)
    if memory is None or len(memory) < sum(sizes):
        with torch.inference_mode(False):
            memory = _scratch.memory = torch.empty(sum(sizes))
    return [flat.view(shape) for flat, shape in zip(memory[: sum(sizes)].split(sizes), shapes, strict=True)]
