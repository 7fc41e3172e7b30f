"""The tokenizers of LlamaGen (arXiv 2406.06525) and VAR (arXiv 2404.02905): VQ-GAN's convolutional encoder and decoder
(arXiv 2012.09841) with a grid of tokens, or tokens of several scales. Parameters have the names of VAR's public file."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from distill.nets.scales import SCALES, Scales
from distill.nets.tokenizer import TokenizerNet

NORM_GROUPS = 32


class Residual(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution of x where the channels change."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = normalised(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = normalised(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        out: Tensor = hidden + (x if self.nin_shortcut is None else self.nin_shortcut(x))
        return out


class Attention(nn.Module):
    """Attention of one head over all pixels, added to x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = normalised(width)
        self.qkv, self.proj_out = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts: Tensor = self.qkv(self.norm(x))
        query, key, value = parts.flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, -1)
        mixed = F.scaled_dot_product_attention(query, key, value)[:, 0]
        out: Tensor = x + self.proj_out(mixed.transpose(1, 2).unflatten(-1, x.shape[2:]))
        return out


class Resize(nn.Module):
    """Half the side (a convolution of stride 2, zeros behind the last row and column) or twice (nearest pixels and a
    convolution)."""

    def __init__(self, width: int, *, up: bool) -> None:
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(width, width, 3, padding=1) if up else nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0) if self.up else F.pad(x, (0, 1, 0, 1))
        out: Tensor = self.conv(x)
        return out


class Level(nn.Module):
    """Residual blocks at one resolution, with attention behind each where `attention`, and a resize where `resize`."""

    def __init__(self, widths: Sequence[int], *, attention: bool, resize: str | None) -> None:
        super().__init__()
        self.block = nn.ModuleList([Residual(a, b) for a, b in pairwise(widths)])
        self.attn = nn.ModuleList([Attention(width) for width in widths[1:]] if attention else [])
        self.downsample = Resize(widths[-1], up=False) if resize == "down" else None
        self.upsample = Resize(widths[-1], up=True) if resize == "up" else None

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.block):
            x = block(x)
            x = self.attn[number](x) if len(self.attn) else x
        for resize in (self.downsample, self.upsample):
            x = x if resize is None else resize(x)
        return x


class Half(nn.Module):
    """What encoder and decoder share: the middle at the lowest resolution, the first convolution and the last one."""

    def __init__(self, inputs: int, first: int, middle: int, last: int, outputs: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(inputs, first, 3, padding=1)
        self.mid = nn.ModuleDict(
            {
                "block_1": Residual(middle, middle),
                "attn_1": Attention(middle),
                "block_2": Residual(middle, middle),
            }
        )
        self.norm_out, self.conv_out = normalised(last), nn.Conv2d(last, outputs, 3, padding=1)

    def middle(self, x: Tensor) -> Tensor:
        for part in self.mid.values():
            x = part(x)
        return x

    def end(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


class Encoder(Half):
    """Images [B,channels,H,W] -> [B,outputs,h,w], H = 2^(levels - 1) h."""

    def __init__(
        self, channels: int, width: int, multiples: Sequence[int], blocks: int, outputs: int
    ) -> None:
        widths = [width * m for m in multiples]
        super().__init__(channels, width, widths[-1], widths[-1], outputs)
        last, before = len(widths) - 1, [width, *widths]
        self.down = nn.ModuleList(
            [
                Level(
                    [before[i], *[widths[i]] * blocks],
                    attention=i == last,
                    resize="down" if i < last else None,
                )
                for i in range(len(widths))
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.end(self.middle(x))


class Decoder(Half):
    """[B,inputs,h,w] -> images [B,channels,H,W]; a level has a block more than the encoder's."""

    def __init__(self, channels: int, width: int, multiples: Sequence[int], blocks: int, inputs: int) -> None:
        widths = [width * m for m in multiples]
        super().__init__(inputs, widths[-1], widths[-1], widths[0], channels)
        last, before = len(widths) - 1, [*widths[1:], widths[-1]]
        self.up = nn.ModuleList(
            [
                Level(
                    [before[i], *[widths[i]] * (blocks + 1)], attention=i == last, resize="up" if i else None
                )
                for i in range(len(widths))
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.conv_in(x))
        for level in reversed(list(self.up)):
            x = level(x)
        return self.end(x)


class VQGAN(TokenizerNet):
    """What both tokenizers share.

    Args:
        length: L. grid: positions a side of the map that is decoded. vocabulary: V. size: C. channels: of the images. width:
            channels at full resolution, a multiple of 32. multiples: of the width at each resolution, each half the one before.
            blocks: residual blocks a resolution. inner: channels of the encoder's output. kernel: of the convolution between
            these and code vectors.
    """

    def __init__(
        self,
        length: int,
        grid: int,
        vocabulary: int,
        size: int,
        channels: int,
        width: int,
        multiples: Sequence[int],
        blocks: int,
        inner: int,
        kernel: int,
    ) -> None:
        super().__init__()
        sizes = {
            "vocabulary": vocabulary,
            "size": size,
            "channels": channels,
            "blocks": blocks,
            "inner": inner,
        }
        if wrong := [f"{name}: found {value}" for name, value in sizes.items() if value < 1]:
            raise ValueError(f"{wrong[0]}, expected at least 1")
        if width < NORM_GROUPS or width % NORM_GROUPS or not multiples or min(multiples) < 1:
            raise ValueError(
                f"width, multiples: found {width} and {list(multiples)}, expected a multiple of {NORM_GROUPS}, and a factor of "
                "at least 1 for each resolution"
            )
        self.vocabulary, self.size, self.length, self.grid = vocabulary, size, length, grid
        self.image = (channels, grid * 2 ** (len(multiples) - 1), grid * 2 ** (len(multiples) - 1))
        self.encoder = Encoder(channels, width, multiples, blocks, inner)
        self.decoder = Decoder(channels, width, multiples, blocks, inner)
        self.quant_conv = nn.Conv2d(inner, size, kernel, padding=kernel // 2)
        self.post_quant_conv = nn.Conv2d(size, inner, kernel, padding=kernel // 2)
        self.embedding = nn.Embedding(vocabulary, size)

    def image_shape(self, sample_shape: Sequence[int]) -> tuple[int, ...]:
        if tuple(sample_shape) != (self.length, self.size):
            raise ValueError(
                f"sample_shape: found {list(sample_shape)}, but the tokenizer has {[self.length, self.size]}"
            )
        return self.image

    def features(self, images: Tensor) -> Tensor:
        """Images -> the map [B,C,h,h] whose vectors are looked up. Raises ValueError naming `images` for another shape."""
        if tuple(images.shape[1:]) != self.image:
            raise ValueError(
                f"images: found shape {list(images.shape)}, but the tokenizer takes {['B', *self.image]}"
            )
        found: Tensor = self.quant_conv(self.encoder(images))
        return found

    def pictures(self, features: Tensor) -> Tensor:
        """A map [B,C,h,h] -> images."""
        images: Tensor = self.decoder(self.post_quant_conv(features))
        return images


class VQTokenizer(VQGAN):
    """LlamaGen's tokenizer: a grid of tokens, of which codes and vectors have length 1.

    Args:
        grid: positions a side, so L = grid^2. l2_norm: see `TokenizerNet`. Others: see `VQGAN`.
    """

    def __init__(
        self,
        *,
        grid: int = 16,
        vocabulary: int = 16384,
        size: int = 8,
        channels: int = 3,
        width: int = 128,
        multiples: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int = 2,
        inner: int = 256,
        l2_norm: bool = True,
    ) -> None:
        super().__init__(grid**2, grid, vocabulary, size, channels, width, multiples, blocks, inner, 1)
        self.l2_norm = l2_norm

    def codes(self) -> Tensor:
        return F.normalize(self.embedding.weight, dim=-1) if self.l2_norm else self.embedding.weight

    def encode(self, images: Tensor) -> Tensor:
        return self.features(images).flatten(2).transpose(1, 2)

    def decode(self, codes: Tensor) -> Tensor:
        return self.pictures(codes.transpose(1, 2).unflatten(-1, (self.grid, self.grid)))


class ScaleTokenizer(VQGAN):
    """VAR's tokenizer: tokens of several scales, whose codes add up to the map that is decoded (`nets.scales.Scales`).

    Args:
        scales: positions a side of each. shared: convolutions of the map. Others: see `VQGAN`.
    """

    def __init__(
        self,
        *,
        scales: Sequence[int] = SCALES,
        vocabulary: int = 4096,
        size: int = 32,
        channels: int = 3,
        width: int = 160,
        multiples: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int = 2,
        shared: int = 4,
    ) -> None:
        length = sum(side**2 for side in scales)
        super().__init__(length, scales[-1], vocabulary, size, channels, width, multiples, blocks, size, 3)
        self.scales = Scales(scales, size, shared)

    def codes(self) -> Tensor:
        return self.embedding.weight

    def encode(self, images: Tensor) -> Tensor:
        return self.scales.vectors(self.features(images), self.codes())

    def decode(self, codes: Tensor) -> Tensor:
        return self.pictures(self.scales.total(codes))


def normalised(width: int) -> nn.GroupNorm:
    """The norm of all layers."""
    return nn.GroupNorm(NORM_GROUPS, width, eps=1e-6)
