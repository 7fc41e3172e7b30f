"""Decoders turn a model's samples into data: images, points, or images from latents. Everything that depends on the kind of
samples uses the decoder; nothing depends on the rank of a tensor."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from distill.nets.autoencoder import AutoencoderNet
from distill.nets.tokenizer import TokenizerNet, nearest_codes
from distill.typed import Configured

Moved = TypeVar("Moved", bound=nn.Module)


class Decoder(Configured, ABC):
    """Between a model's samples [B,*S] and data [B,*D]. Never changed once it is made, so copies of a model share it.

    Attributes:
        images: whether the data are images [C,H,W].
        range: (lowest, highest) value of data, which `clamp` enforces; None: no range.
    """

    images: ClassVar[bool] = True
    range: ClassVar[tuple[float, float] | None] = (-1.0, 1.0)

    def shape(self, sample_shape: Sequence[int]) -> tuple[int, ...]:
        """D, the shape of one decoded sample. Raises ValueError for samples that it does not decode."""
        return tuple(sample_shape)

    def decode(self, samples: Tensor) -> Tensor:
        """[B,*S] -> [B,*D], differentiable, not clamped."""
        return samples

    def encode(self, data: Tensor) -> Tensor:
        """[B,*D] -> [B,*S]."""
        return data

    def encode_sample(self, data: Tensor, noise: Tensor) -> Tensor:
        """[B,*D] -> [B,*S]: a sample of the posterior, by standard normal noise [B,*S]; `encode` gives its mean.

        Raises ValueError naming `posterior` for encoders without one."""
        raise ValueError(
            f"posterior: found 'sample', but {type(self).__name__} has no posterior; expected mean"
        )

    @property
    def codebook(self) -> Tensor | None:
        """The vectors [V,C] that samples [L,C] are sequences of; None for samples that are no tokens."""
        return None

    def clamp(self, data: Tensor) -> Tensor:
        """Data within `range`."""
        return data if self.range is None else data.clamp(*self.range)

    def weights(self) -> dict[str, Tensor]:
        """Its tensors by name; empty for decoders without a net."""
        return {}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Inverse of `weights`."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


class Pixels(Decoder):
    """Samples are pixels in [-1, 1]: images [C,H,W]."""


class Points(Decoder):
    """Samples are points or other vectors without a range, used as they are."""

    images, range = False, None


class Autoencoder(Decoder):
    """Samples are latents of an autoencoder: x = (net.encode(images) - shift) scale, images = net.decode(x / scale + shift).

    Args:
        net: the autoencoder; its weights are frozen.
        scale, shift: numbers for all channels (`scaling_factor` and `shift_factor` of diffusers), or
        mean, std: one of each for every channel (`latents_mean` and `latents_std`): shift = mean, scale = 1 / std.

    Raises:
        ValueError: names the argument: both forms given, a scale or std that is not positive, other lengths.
    """

    def __init__(
        self,
        net: AutoencoderNet,
        scale: float = 1.0,
        shift: float = 0.0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        if (mean is None) != (std is None) or (mean is not None and (scale, shift) != (1.0, 0.0)):
            raise ValueError("scale, shift, mean, std: expected scale and shift, or mean and std")
        if mean is not None and std is not None and (len(mean) != len(std) or not std or min(std) <= 0):
            raise ValueError(
                f"mean, std: found {list(mean)}, {list(std)}, expected one of each a channel, std > 0"
            )
        if not scale > 0:
            raise ValueError(f"scale: found {scale}, expected a positive number")
        self.net = net.requires_grad_(False).eval()
        shifts, scales = ([shift], [scale]) if mean is None or std is None else (mean, [1 / s for s in std])
        self._shift, self._scale = (
            torch.tensor(list(numbers), dtype=torch.float64, device="cpu") for numbers in (shifts, scales)
        )

    def shape(self, sample_shape: Sequence[int]) -> tuple[int, ...]:
        found = self.net.image_shape(sample_shape)
        if len(self._shift) not in (1, sample_shape[0]):
            raise ValueError(
                f"mean: found {len(self._shift)} numbers, expected {sample_shape[0]}, one a channel"
            )
        return found

    def decode(self, samples: Tensor) -> Tensor:
        scale, shift = self._numbers(samples)
        net = self._net(samples)
        return net.decode((samples / scale + shift).to(_type(net))).to(samples.dtype)

    def encode(self, data: Tensor) -> Tensor:
        net = self._net(data)
        return self._scaled(net.encode(data.to(_type(net))).to(data.dtype))

    def encode_sample(self, data: Tensor, noise: Tensor) -> Tensor:
        net = self._net(data)
        given = data.to(_type(net))
        return self._scaled(net.encode_sample(given, noise.to(given)).to(data.dtype))

    def _scaled(self, latents: Tensor) -> Tensor:
        scale, shift = self._numbers(latents)
        return (latents - shift) * scale

    def weights(self) -> dict[str, Tensor]:
        return self.net.state_dict()

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        self.net.load_state_dict(weights)

    def _net(self, x: Tensor) -> AutoencoderNet:
        return _on_device(self.net, x)

    def _numbers(self, x: Tensor) -> list[Tensor]:
        """(scale, shift), each [1 or C, 1, ...] as x [B,C,...]."""
        return [
            n.to(x.device, x.dtype).reshape(-1, *(1,) * (x.dim() - 2)) for n in (self._scale, self._shift)
        ]


class Codes(Decoder):
    """Samples are sequences [L,C] of vectors of a codebook, used as they are.

    Args:
        vocabulary: V. size: C. The codebook itself is the decoder's weights; `Codes.of` has it from a tensor.
    """

    images, range = False, None

    def __init__(self, vocabulary: int, size: int) -> None:
        if vocabulary < 1 or size < 1:
            raise ValueError(f"vocabulary, size: found {vocabulary}, {size}, expected at least 1")
        self._book = torch.zeros(vocabulary, size)

    @classmethod
    def of(cls, codebook: Tensor) -> Codes:
        """With the vectors [V,C]."""
        made = cls(*codebook.shape)
        made.load_weights({"codebook": codebook})
        return made

    @property
    def codebook(self) -> Tensor:
        return self._book

    def shape(self, sample_shape: Sequence[int]) -> tuple[int, ...]:
        if len(sample_shape) != 2 or sample_shape[1] != self._book.shape[1]:
            raise ValueError(
                f"sample_shape: found {list(sample_shape)}, expected [L, {self._book.shape[1]}]: a code of the "
                f"codebook a position"
            )
        return tuple(sample_shape)

    def encode(self, data: Tensor) -> Tensor:
        book = self._book.to(data.device)
        return book[nearest_codes(data, book)]

    def weights(self) -> dict[str, Tensor]:
        return {"codebook": self._book}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        self._book = weights["codebook"].detach().clone().float()


class VQ(Decoder):
    """Samples are code vectors [L,C] of a tokenizer; images = net.decode(samples), which are not quantised again.

    Args:
        net: the tokenizer; its weights are frozen.
    """

    def __init__(self, net: TokenizerNet) -> None:
        self.net = net.requires_grad_(False).eval()

    @property
    def codebook(self) -> Tensor:
        return self.net.codes()

    def shape(self, sample_shape: Sequence[int]) -> tuple[int, ...]:
        return self.net.image_shape(sample_shape)

    def decode(self, samples: Tensor) -> Tensor:
        net = _on_device(self.net, samples)
        return net.decode(samples.to(_type(net))).to(samples.dtype)

    def encode(self, data: Tensor) -> Tensor:
        net = _on_device(self.net, data)
        vectors = net.encode(data.to(_type(net)))
        book = net.codes()
        if net.l2_norm:
            vectors = torch.nn.functional.normalize(vectors, dim=-1)
        return book[nearest_codes(vectors, book)].to(data.dtype)

    def weights(self) -> dict[str, Tensor]:
        return self.net.state_dict()

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        self.net.load_state_dict(weights)


def indices(decoder: Decoder, samples: Tensor) -> Tensor:
    """The tokens [B,L] int64 of samples [B,L,C]: the nearest codes. Raises ValueError for a decoder without a codebook."""
    return nearest_codes(samples, codebook_of(decoder).to(samples.device))


def codebook_of(decoder: Decoder) -> Tensor:
    """The codebook [V,C] of a decoder. Raises ValueError naming `decoder` for one without."""
    if (book := decoder.codebook) is None:
        raise ValueError(
            f"decoder: found {type(decoder).__name__}, whose samples are no tokens; expected a decoder with a codebook, VQ or "
            "Codes"
        )
    return book


def codes_of(decoder: Decoder, tokens: Tensor) -> Tensor:
    """The code vectors [...,C] of tokens [...], on their device. Raises IndexError for tokens on the CPU outside 0 .. V - 1."""
    book = codebook_of(decoder)
    if tokens.device.type == "cpu" and tokens.numel():
        wrong = tokens[(tokens < 0) | (tokens >= len(book))]
        if len(wrong):
            raise IndexError(f"tokens: found {int(wrong[0])}, expected indices 0 .. {len(book) - 1}")
    return book.to(tokens.device)[tokens]


def _on_device(net: Moved, x: Tensor) -> Moved:
    """The net on the device of x: the models that share it may lie on several."""
    if x.is_meta:  # moving the net there would lose its weights
        raise ValueError("samples: found a tensor on the meta device, expected values to decode or encode")
    return net.to(x.device)


def _type(net: nn.Module) -> torch.dtype:
    """The type of a net's weights; float32 for a net without any."""
    return next((p.dtype for p in net.parameters()), torch.float32)


def of_source(source: Any) -> Decoder:
    """What the samples of a source are: its `decoder`, or pixels or points by its `value_range`.

    Raises:
        ValueError: the source has neither.
    """
    if (given := getattr(source, "decoder", None)) is not None:
        return given
    if not hasattr(source, "value_range"):
        raise ValueError(
            f"data: {type(source).__name__} has neither `value_range` nor `decoder`; expected `value_range`, "
            "(-1, 1) for images and None for other samples, or a `decoder`"
        )
    return Points() if source.value_range is None else Pixels()
