"""iBOT: image BERT pre-training with an online tokenizer (Zhou et al., ICLR 2022, arXiv:2111.07832).

DINO on the class tokens, and beside it self-distillation of masked patches: the student sees the global crops with
blocks of patches hidden behind a mask token, and says at each of those places what the teacher, who sees all, says
there. Equal to bytedance/ibot, main_ibot.py iBOTLoss and loader.py.
"""

import math
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor, nn

from selfsight.collective import Collective
from selfsight.encoders import Tokens
from selfsight.errors import UserError, check_range
from selfsight.losses import Center, ibot_loss
from selfsight.losses.ibot import masked_rows
from selfsight.masks import NUMBERS, block_masks
from selfsight.objectives.base import Outcome, ParameterRule, Progress
from selfsight.objectives.dino import DINO, DINOConfig
from selfsight.recipe import EncoderConfig
from selfsight.viewspec import NoiseSpec, ViewSpec


@dataclass
class IBOTConfig(DINOConfig):
    out_dim: int = 8192
    shared_head: bool = True  # one projection head for class and patch tokens
    patch_out_dim: int | None = None  # prototypes of the patches' own head; null = out_dim
    mask_probability: float = 0.5  # of each global crop, to be masked at all
    mask_ratio: list[float] = field(default_factory=lambda: [0.1, 0.5])  # of its patches, uniform: 0.3 ± 0.2
    dino_weight: float = 1.0  # λ1, of L_[CLS]
    ibot_weight: float = 1.0  # λ2, of L_MIM


class IBOT(DINO):
    Config = IBOTConfig
    encoder_inputs = ("mask_token",)
    config: IBOTConfig

    def __init__(self, config: IBOTConfig, encoder: EncoderConfig, collective: Collective | None = None) -> None:
        super().__init__(_checked(config), encoder, collective)
        self.mask_token = nn.Parameter(torch.zeros(1, self.student.embed_dim))
        patch_dim = config.patch_out_dim or config.out_dim
        if not config.shared_head:
            self.student_patch_head, self.teacher_patch_head = self._head(patch_dim), self._head(patch_dim)
            self.teacher_patch_head.load_state_dict(self.student_patch_head.state_dict())
            self.teacher_patch_head.requires_grad_(False)
        self.patch_center = Center(patch_dim, config.center_momentum)

    def views(self) -> ViewSpec:
        return ViewSpec(super().views().crops, (NoiseSpec("mask", 2 * (2 + NUMBERS)),))

    def masks(self, noise: Tensor) -> Tensor:
        """noise (B, …) of the images → bool (2·B, N), true = hidden, for all first global crops, then all second."""
        c, grid = self.config, self.student.grid(self.config.global_crops_size)
        noise = rearrange(noise, "b (v n) -> (v b) n", v=2)
        low, high = c.mask_ratio
        ratio = torch.where(noise[:, 0] < c.mask_probability, low + (high - low) * noise[:, 1], 0.0)
        return block_masks(noise[:, 2:], ratio * grid**2, (grid, grid), min_area=(grid // 3) ** 2)

    def forward(self, batch: dict[str, Tensor], progress: Progress) -> Outcome:
        """batch: "global" (2, B, 3, S, S), "mask" (B, …) and, if there are local crops, "local" (n, B, 3, s, s)."""
        return self.distil(batch, self.masks(batch["mask"]), progress)

    def distil(self, batch: dict[str, Tensor], mask: Tensor, progress: Progress) -> Outcome:
        """`forward` once the masks (2·B, N) of the global crops are drawn. Equations 1 to 3 of the paper."""
        at, weight = masked_rows(mask)
        t, s, cls_s = self.see(batch, mask)
        student_head, teacher_head = self.patch_heads()
        with torch.no_grad():
            logits_t = self.per_crop(self.teacher_head(_cls(t)), batch)
            patches_t = teacher_head(t.patches.flatten(0, 1))  # (2·B·N, K): the centre is of all patches
            q = self.center_softmax(patches_t[at], self.patch_center, self.teacher_temperature(progress))
            if self.training:
                self.patch_center.add(patches_t)
        l_cls, metrics = self.compare(self.per_crop(self.student_head(cls_s), batch), logits_t, progress)
        patches_s = student_head(s.patches.flatten(0, 1)[at])  # (M, K)
        l_mim = ibot_loss(patches_s, q, weight, len(mask), self.config.student_temp)
        loss = self.config.dino_weight * l_cls + self.config.ibot_weight * l_mim
        return Outcome(loss, _cls(t)[: len(mask) // 2], {**metrics, "dino": l_cls.detach(), "ibot": l_mim.detach()})

    def see(self, batch: dict[str, Tensor], mask: Tensor) -> tuple[Tokens, Tokens, Tensor]:
        """Tokens of the global crops, whole to the teacher and masked to the student, and the student's class tokens
        (V·B, D) of all crops: the masked global ones, then the local ones.
        """
        images = rearrange(batch["global"], "v b c h w -> (v b) c h w")
        with torch.no_grad():
            t = self.teacher(images)
        return t, *self.see_as_student(batch, mask)

    def see_as_student(self, batch: dict[str, Tensor], mask: Tensor | None) -> tuple[Tokens, Tensor]:
        """The student's part of `see`; without a mask it sees the global crops whole. Of the local crops only the class
        tokens are compared with anything."""
        crops = [batch[name] for name in ("global", "local") if name in batch]
        s, *local = self.student.forward_list(
            [rearrange(crop, "v b c h w -> (v b) c h w") for crop in crops],
            masks=[mask, None][: len(crops)],
            mask_token=self.mask_token,
            prefix_norms=[None, self.local_prefix_norm()][: len(crops)],
            prefix_only=[False, True][: len(crops)],
        )
        return s, torch.cat([_cls(s), *map(_cls, local)])

    def local_prefix_norm(self) -> nn.Module | None:
        """The student's last norm of the local crops' class tokens, where it is one of their own."""
        return None

    def per_crop(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """(V·B, K) → (V, B, K) in fp32 or wider: softmax and loss leave autocast here."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return rearrange(logits, "(v b) k -> v b k", b=batch["global"].shape[1])

    def center_softmax(self, logits: Tensor, center: Center, temp: float) -> Tensor:
        """Probabilities of centred and sharpened logits (M, K), in fp32 or wider."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return ((logits - center.value) / temp).softmax(dim=-1)

    def cls_heads(self) -> tuple[nn.Module, nn.Module]:
        """The student's and the teacher's head for class tokens."""
        return self.student_head, self.teacher_head

    def patch_heads(self) -> tuple[nn.Module, nn.Module]:
        """The student's and the teacher's head for patch tokens."""
        if self.config.shared_head:
            return self.student_head, self.teacher_head
        return self.student_patch_head, self.teacher_patch_head

    def teacher_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        pairs = super().teacher_pairs()
        return pairs if self.config.shared_head else [*pairs, self.patch_heads()]

    def parameter_rules(self) -> list[ParameterRule]:
        rules = super().parameter_rules()
        return [*rules, *(ParameterRule("student_patch_head.last_layer.", rule.lr_scale) for rule in rules)]

    def after_step(self) -> None:
        self.patch_center.commit(self.collective)
        super().after_step()

    def discard_step(self) -> None:
        self.patch_center.discard()
        super().discard_step()

    def collapse_values(self) -> dict[str, float]:
        """Not the loss: a batch in which m of the 2·B crops happen to be masked gives (λ1 + λ2·m / 2·B) ln K."""
        ln_k = math.log(self.config.out_dim)
        return {"dino": ln_k, "teacher_entropy": ln_k}


def _cls(tokens: Tokens) -> Tensor:
    assert tokens.cls is not None  # DINO refuses encoders without
    return tokens.cls


def _checked(c: IBOTConfig) -> IBOTConfig:
    check_range("objective.mask_probability", c.mask_probability, 0, 1)
    if len(c.mask_ratio) != 2 or not 0 <= c.mask_ratio[0] <= c.mask_ratio[1] <= 1:
        raise UserError(f"objective.mask_ratio is {c.mask_ratio}: give two numbers, 0 ≤ from ≤ to ≤ 1")
    if c.patch_out_dim is not None:
        check_range("objective.patch_out_dim", c.patch_out_dim, 1)
        if c.shared_head and c.patch_out_dim != c.out_dim:
            raise UserError("objective.patch_out_dim is for a head of its own: set objective.shared_head=false")
    for name in ("dino_weight", "ibot_weight"):
        check_range(f"objective.{name}", getattr(c, name), 0)
    return c
