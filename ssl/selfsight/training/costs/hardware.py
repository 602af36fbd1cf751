"""GPUs as figures: memory, peak rates without sparsity (the vendors' data sheets), and the share of the peak that
training really gets, with the measured run that it is taken from."""

import difflib
from dataclasses import dataclass

from selfsight.errors import UserError, check_range

GIB = 1 << 30
RESERVED = 0.08  # of the memory: CUDA's context, NCCL's channels and what fragmentation leaves unusable

DINOV2 = "DINOv2 ViT-L/16 on ImageNet-1k, 32 A100, a day (its README)"
DINOV3 = "DINOv3 ViT-L/16 on ImageNet-1k, 32 H100, 14 hours (its README)"
MAE = "MAE ViT-L/16 on ImageNet-1k, 64 V100, 42 hours (its PRETRAIN.md)"
COMPILED = "compiled two-view ViT-L/16 on an H200, 481 images/s (stable-pretraining's README)"


@dataclass(frozen=True)
class Gpu:
    name: str
    memory: float  # bytes
    bf16: float  # FLOP/s of matrix products with 16-bit factors
    fp32: float  # and with 32-bit ones, TF32 left off
    utilisation: float  # share of the peak
    source: str  # of the utilisation
    half: str = "bf16"  # the 16-bit format that it computes in

    @property
    def usable(self) -> float:
        """Bytes that training may take."""
        return self.memory * (1 - RESERVED)

    def peak(self, bf16: bool) -> float:
        return self.bf16 if bf16 else self.fp32


def _gpu(name: str, gib: float, bf16: float, fp32: float, utilisation: float, source: str, half: str = "bf16") -> Gpu:
    return Gpu(name, gib * GIB, bf16 * 1e12, fp32 * 1e12, utilisation, source, half)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("h200", 141e9 / GIB, 989, 67, 0.36, COMPILED),
        _gpu("h100", 80, 989, 67, 0.18, DINOV3),
        _gpu("a100-80", 80, 312, 19.5, 0.40, DINOV2),
        _gpu("a100-40", 40, 312, 19.5, 0.40, DINOV2),
        _gpu("v100-32", 32, 125, 15.7, 0.11, MAE, half="fp16"),
        _gpu("l40s", 48, 362, 91.6, 0.30, "assumed"),
        _gpu("a10g", 24, 70, 31.2, 0.30, "assumed"),
        _gpu("rtx4090", 24, 165, 82.6, 0.30, "assumed"),
    )
}


def find_gpu(text: str) -> Gpu:
    """A name of `GPUS`, or figures, GIB:TFLOPS. Raises UserError for anything else."""
    if (known := GPUS.get(text.lower())) is not None:
        return known
    memory, sign, rate = text.partition(":")
    if not sign:
        near = difflib.get_close_matches(text.lower(), GPUS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"choose {', '.join(GPUS)}"
        raise UserError(f"no figures for a GPU called {text!r}: {hint}, or give GIB:TFLOPS, such as 48:181")
    try:
        gib, tflops = float(memory), float(rate)
    except ValueError as e:
        raise UserError(f"cannot read --gpu {text!r}: give GIB:TFLOPS, such as 48:181") from e
    check_range("the memory of --gpu", gib, 1, 1e4)
    check_range("the TFLOPS of --gpu", tflops, 0.1, 1e5)
    return _gpu(text, gib, tflops, tflops, 0.30, "assumed")
