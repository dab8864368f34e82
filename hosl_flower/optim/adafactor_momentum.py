"""Adafactor with an average of its steps in 8 bits, and Adam's second moments where they pay.

    m <- b1 m + (1 - b1) u / max(1, rms(u)),  theta <- theta - eta m / (1 - b1^t),  b1 = 0.9

u is Adafactor's (adafactor.py), but for a matrix of more than 16 rows per column: embeddings of
tokens, LoRA's B. One C for rows that are seen at quite different times says little there, so

    v <- b v + (1 - b) g^2,  u = g / sqrt(v)

as Adam has it, and without rms(u). m, and sqrt(v) where there is one, are kept in 8 bits with a
scale per row, rounded at random (tensors/rounding.py): an eighth of AdamW's state in float32, a
quarter for such matrices, and eight bytes a row. What is small beside its row's largest is coarse.
"""

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from hosl_flower.optim.adafactor import Adafactor, RowIndex, Seen, Updates, state_size
from hosl_flower.tensors.rounding import OTHER_ROWS, quantize
from hosl_flower.tensors.rows import as_matrix_shape, matrix_of, row_chunks

_BETA1, _TALL, _TINY = 0.9, 16, 1e-15  # the root of Adafactor's 1e-30


class _Eight:
    """A matrix in 8 bits: codes [out, in] times a scale per row [out]. dtype: int8, or uint8 of
    what is never below zero."""

    def __init__(self, codes: Tensor, scales: Tensor):
        self.codes, self.scales = codes, scales

    @classmethod
    def zeros(cls, like: Tensor, dtype: torch.dtype) -> "_Eight":
        codes = torch.zeros_like(like, dtype=dtype)
        return cls(codes, like.new_zeros(len(codes), dtype=torch.float32))

    @classmethod
    def of(cls, flat: Tensor, like: Tensor, dtype: torch.dtype) -> "_Eight":
        """From what `flat` gave, for a parameter `like`."""
        own = flat.to(like.device, copy=True)
        most = torch.iinfo(dtype).max
        codes = own[: like.numel()].clamp(-most if dtype.is_signed else 0, most).to(dtype)
        return cls(codes.view_as(matrix_of(like)), own[like.numel() :].clone())

    @staticmethod
    def size(shape: torch.Size) -> int:
        """Numbers in `flat`."""
        return shape.numel() + as_matrix_shape(shape)[0]

    def flat(self) -> Tensor:
        """Codes, then scales, float32 on the CPU."""
        return torch.cat([t.cpu().float().flatten() for t in (self.codes, self.scales)])


class AdafactorMomentum(Adafactor):
    """State per parameter: Adafactor's, or sqrt(v) as uint8 [out, in] and a scale per row; m as
    int8 [out, in] and a scale per row."""

    def __init__(self) -> None:
        super().__init__()
        self.roots: dict[str, _Eight] = {}  # sqrt(v), of tall matrices
        self.averages: dict[str, _Eight] = {}  # m

    def learn(self, seen: Seen, shape: torch.Size, seed: int) -> Updates:
        if not _is_tall(shape):
            return super().learn(seen, shape, seed)
        if seen.name not in self.roots:
            self.roots[seen.name] = _Eight.zeros(seen.matrix, torch.uint8)
        codes, scales = (root := self.roots[seen.name]).codes, root.scales
        kept = self.kept()
        scales.mul_(kept**0.5)
        start = OTHER_ROWS  # other random numbers than the average's
        for which, g in seen.chunks():
            square = (codes[which] * scales[which].unsqueeze(1)).square_()
            new = square.addcmul_(g, g, value=1.0 - kept).sqrt_()
            codes[which], scales[which] = quantize(new, seed, start, torch.uint8)
            start += len(g)
        return partial(_over, seen, root)

    def changes(
        self, seen: Seen, updates: Updates, scale: float, seed: int
    ) -> Iterator[tuple[RowIndex, Tensor]]:
        if seen.name not in self.averages:
            self.averages[seen.name] = _Eight.zeros(seen.matrix, torch.int8)
        codes, scales = (average := self.averages[seen.name]).codes, average.scales
        scales.mul_(_BETA1)
        start = 0
        for which, u in super().changes(seen, updates, scale * (1.0 - _BETA1), seed):
            u.addcmul_(codes[which], scales[which].unsqueeze(1))
            codes[which], scales[which] = quantize(u, seed, start, torch.int8)
            start += len(u)
        corrected = scales / (1.0 - _BETA1**self.steps)
        for start, block in row_chunks(codes):
            rows = slice(start, start + len(block))
            yield rows, block * corrected[rows].unsqueeze(1)

    def scale(self, updates: Updates, shape: torch.Size) -> float:
        return 1.0 if _is_tall(shape) else super().scale(updates, shape)

    def tensors(self) -> list[Tensor]:
        held = [*self.roots.values(), *self.averages.values()]
        return [*super().tensors(), *(t for each in held for t in (each.codes, each.scales))]

    def save(self, parameters: Mapping[str, Tensor]) -> Tensor:
        if not self.averages:
            return torch.empty((0, 0))
        parts = [self._second_moments(name, p.shape) for name, p in parameters.items()]
        for name, p in parameters.items():
            own = self.averages.get(name)
            parts.append(own.flat() if own else torch.zeros(_Eight.size(p.shape)))
        return torch.cat(parts).unsqueeze(0)

    def _second_moments(self, name: str, shape: torch.Size) -> Tensor:
        if (root := self.roots.get(name)) is not None:
            return root.flat()
        own = self.moments.get(name)
        return torch.zeros(second_moments_size(shape)) if own is None else own.cpu()

    def load(self, moments: Tensor, steps: int, parameters: Mapping[str, Tensor]) -> None:
        self.steps = steps if moments.numel() else 0
        self.moments, self.roots, self.averages = {}, {}, {}
        if not moments.numel():
            return
        shapes = [p.shape for p in parameters.values()]
        sizes = [*map(second_moments_size, shapes), *map(_Eight.size, shapes)]
        parts = moments[0].split(sizes)
        for (name, p), own in zip(parameters.items(), parts[: len(shapes)], strict=True):
            if _is_tall(p.shape):
                self.roots[name] = _Eight.of(own, p, torch.uint8)
            else:
                self.moments[name] = own.to(p.device, copy=True)
        for (name, p), own in zip(parameters.items(), parts[len(shapes) :], strict=True):
            self.averages[name] = _Eight.of(own, p, torch.int8)


def _over(seen: Seen, root: _Eight) -> Iterator[tuple[RowIndex, Tensor]]:
    """Some rows' g over sqrt(v) at a time. What was rounded to zero is less than one step of its
    row's, and counts as that: a larger divisor, never a tiny one."""
    for which, g in seen.chunks():
        divisor = root.codes[which].clamp(min=1) * root.scales[which].unsqueeze(1)
        yield which, g.div_(divisor.clamp_(min=_TINY))


def _is_tall(shape: torch.Size) -> bool:
    return len(shape) > 1 and shape[0] > _TALL * as_matrix_shape(shape)[1]


def second_moments_size(shape: torch.Size) -> int:
    """Numbers of second moments of a parameter: the first part of the state."""
    return _Eight.size(shape) if _is_tall(shape) else state_size(shape)


def momentum_size(shape: torch.Size) -> int:
    """Numbers of state of a parameter."""
    return second_moments_size(shape) + _Eight.size(shape)
