"""Tiny models of tokens: a tokenizer of 8x8 images, an autoregressive teacher of its tokens, a Distilled Decoding student."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.data.batch import Batch
from distill.data.cond import Cond
from distill.data.digits import Digits
from distill.data.rng import sample_noise
from distill.models.code_flow import CodeFlow
from distill.models.conditions import Labels, Nothing
from distill.models.decoder import VQ, Codes, Pixels, codes_of, indices
from distill.models.denoiser import Denoiser
from distill.models.model import Model
from distill.models.tokens import Tokenizer, TokenTeacher
from distill.nets.token_transformer import TokenTransformer
from distill.nets.tokenizer import ConvTokenizer
from distill.process.prefix import Prefix
from distill.stages.adapt import as_code_flow

V, C, L = 8, 4, 4
SMALL = {"vocabulary": V, "size": C, "length": L, "width": 16, "depth": 1, "heads": 2, "dropout": 0.0}


def conv() -> ConvTokenizer:
    """8x8 images as 2x2 tokens of 8."""
    torch.manual_seed(1)
    return ConvTokenizer(patch=4, grid=2, vocabulary=V, size=C, width=8)


def decoder() -> VQ:
    return VQ(conv())


def codes(seed: int = 2) -> Codes:
    """A codebook alone: samples are points."""
    return Codes.of(torch.randn(V, C, generator=torch.Generator().manual_seed(seed)))


def tokenizer() -> Tokenizer:
    return Tokenizer(conv(), (1, 8, 8), decoder=Pixels())


def teacher(classes: int = 10, guidable: bool = True, **options) -> TokenTeacher:
    torch.manual_seed(3)
    net = TokenTransformer(num_classes=classes, **SMALL)
    with torch.no_grad():
        net.head.weight.mul_(5)  # so that tokens depend on what is before them
    return TokenTeacher(net, (L, C), decoder=decoder(), guidable=guidable and classes > 0, **options).eval()


def student(classes: int = 10, split: int | None = None) -> Denoiser:
    torch.manual_seed(4)
    net = TokenTransformer(num_classes=classes, student=True, split=split, **SMALL)
    conditions, own = Labels(classes) if classes else Nothing(), decoder()
    net.codebook.copy_(own.codebook.detach())
    return Denoiser(net, Prefix([1] * L), "x0", (L, C), conditions=conditions, decoder=own)


def flow(seed: int = 5) -> CodeFlow:
    """A flow of code vectors with the body of `teacher`, and a head that makes something."""
    torch.manual_seed(seed)
    made = as_code_flow(teacher(), {"width": 16, "layers": 2})
    for parameter in made.net.head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def scores() -> dict[str, Model]:
    """What the first stage of Distilled Decoding 2 is given."""
    return {"student": flow(), "teacher": teacher()}


def generator() -> dict[str, Model]:
    """What its second stage is given."""
    return {"student": flow(), "teacher": teacher(), "guidance": flow(6)}


class TokenDigits:
    """Digits as tokens, with a noise each."""

    num_classes, sample_shape = 10, (L, C)

    def __init__(self) -> None:
        self.decoder, self.images = decoder(), Digits()

    def __len__(self) -> int:
        return 200

    def fetch(self, rows: Tensor, index: Tensor) -> Batch:
        images = self.images.fetch(rows, index)
        with torch.no_grad():
            tokens = indices(self.decoder, self.decoder.encode(images.x0))
            x0 = codes_of(self.decoder, tokens)
        z = sample_noise(0, "pairs", rows, (L, C))
        return Batch(rows, index, images.cond, x0=x0, z=z, tokens=tokens)


def classes_of(count: int) -> Cond:
    return Cond.of_labels(torch.arange(count) % 10)
