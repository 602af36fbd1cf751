"""DINO's and MAE's training steps as people build them: timm's models, torch's AdamW, the loops of the papers' code.

One forward for each resolution, a loop over pairs of crops, over parameters for clipping and for the EMA, the loss read
back to the host every step. `fused_attention` says whether timm's blocks may use torch's fused attention, or multiply
out the attention matrix as the papers' own models do. Everything else is a recipe's: sizes, widths, depths, batch.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers.config import set_fused_attn
from torch import Tensor, nn

from benchmarks.harness import Absent

Batch = dict[str, Tensor]
Step = Callable[[Batch], float]
Mark = Callable[[str], None]


def build(recipe: Any, device: torch.device, *, bf16: bool, fused_attention: bool, mark: Mark) -> Step:
    """The step of a recipe's objective: a normalised batch on the device → its loss, once it was taken.

    `mark` is told the name of each part of the step as it ends. Raises Absent for an objective that has no peer.
    """
    if recipe.objective_name not in PEERS:
        raise Absent(f"no peer for {recipe.objective_name}")
    set_fused_attn(fused_attention)
    return PEERS[recipe.objective_name](recipe, device, torch.bfloat16 if bf16 else None, mark)


def encoder(recipe: Any, **more: Any) -> nn.Module:
    c = recipe.encoder
    return timm.create_model(
        c.name,
        img_size=c.img_size,
        num_classes=0,
        dynamic_img_size=True,
        **{"drop_path_rate": c.drop_path_rate, **c.args, **more},
    )


class Head(nn.Module):
    def __init__(self, in_dim: int, config: Any) -> None:
        super().__init__()
        widths = [in_dim] + [config.hidden_dim] * (config.head_layers - 1)
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Linear(a, b), nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(widths[-1], config.bottleneck_dim))
        last = nn.Linear(config.bottleneck_dim, config.out_dim, bias=False)
        self.last_layer = nn.utils.parametrizations.weight_norm(last)
        length = self.last_layer.parametrizations.weight.original0
        length.data.fill_(1)
        length.requires_grad = not config.norm_last_layer

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class MultiCrop(nn.Module):
    """The backbone on each resolution by itself, the head on all of them."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, crops: list[Tensor]) -> Tensor:
        sizes = torch.tensor([crop.shape[-1] for crop in crops])
        ends = torch.cumsum(torch.unique_consecutive(sizes, return_counts=True)[1], 0)
        start, out = 0, []
        for end in ends.tolist():
            out.append(self.backbone(torch.cat(crops[start:end])))
            start = end
        return self.head(torch.cat(out))


class DINOLoss(nn.Module):
    center: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("center", torch.zeros(1, config.out_dim))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        c = self.config
        predictions = (student / c.student_temp).chunk(2 + c.local_crops_number)
        targets = F.softmax((teacher - self.center) / c.teacher_temp, dim=-1).detach().chunk(2)
        total, terms = torch.zeros((), device=student.device), 0
        for i, q in enumerate(targets):
            for v, prediction in enumerate(predictions):
                if v != i:
                    total = total + torch.sum(-q * F.log_softmax(prediction, dim=-1), dim=-1).mean()
                    terms += 1
        with torch.no_grad():
            mean = teacher.sum(dim=0, keepdim=True) / len(teacher)
            self.center = self.center * c.center_momentum + mean * (1 - c.center_momentum)
        return total / terms


class SelfDistillation(nn.Module):
    def __init__(self, recipe: Any) -> None:
        super().__init__()
        config = _section(recipe)
        backbones = encoder(recipe), encoder(recipe, drop_path_rate=0.0)
        self.student, self.teacher = (MultiCrop(b, Head(int(b.num_features), config)) for b in backbones)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.loss_of = DINOLoss(config)

    def forward(self, batch: Batch) -> Tensor:
        crops = [*batch["global"].unbind(), *(batch["local"].unbind() if "local" in batch else ())]
        return self.loss_of(self.student(crops), self.teacher(crops[:2]))


def dino(recipe: Any, device: torch.device, precision: torch.dtype | None, mark: Mark) -> Step:
    model = SelfDistillation(recipe).to(device)
    student, teacher = model.student, model.teacher
    optimizer = _adamw(student, recipe)
    momentum = _section(recipe).momentum_teacher

    def step(batch: Batch) -> float:
        with torch.autocast(device.type, precision, enabled=precision is not None):
            loss = model(batch)
        value = _finite(loss)
        optimizer.zero_grad()
        mark("forward")
        loss.backward()
        mark("backward")
        if recipe.optimizer.clip:
            for parameter in student.parameters():
                if parameter.grad is not None:
                    factor = recipe.optimizer.clip / (parameter.grad.norm(2) + 1e-6)
                    if factor < 1:
                        parameter.grad.mul_(factor)
        optimizer.step()
        mark("optimiser")
        with torch.no_grad():
            for q, k in zip(student.parameters(), teacher.parameters(), strict=True):
                k.mul_(momentum).add_((1 - momentum) * q)
        mark("EMA")
        return value

    return step


class MaskedAutoencoder(nn.Module):
    def __init__(self, recipe: Any) -> None:
        super().__init__()
        self.config = c = _section(recipe)
        self.vit: Any = encoder(recipe, global_pool="token", fc_norm=False)
        self.patch = self.vit.patch_embed.patch_size[0]
        dim, n = c.decoder_embed_dim, self.vit.patch_embed.num_patches
        self.decoder_embed = nn.Linear(self.vit.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.decoder_pos_embed = nn.Parameter(torch.randn(1, n + 1, dim) * 0.02, requires_grad=False)
        block = timm.models.vision_transformer.Block
        self.decoder_blocks = nn.ModuleList(
            block(dim, c.decoder_num_heads, mlp_ratio=4.0, qkv_bias=True) for _ in range(c.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_pred = nn.Linear(dim, self.patch**2 * 3)
        self.vit.pos_embed.requires_grad_(False)

    def forward(self, batch: Batch) -> Tensor:
        images, noise = batch["crop"][0], batch["noise"]
        x = self.vit.patch_embed(images).flatten(1, 2) + self.vit.pos_embed[:, 1:]  # a grid, for any image size
        n, length, dim = x.shape
        keep = int(length * (1 - self.config.mask_ratio))
        shuffle = torch.argsort(noise, dim=1)
        restore = torch.argsort(shuffle, dim=1)
        x = torch.gather(x, 1, shuffle[:, :keep].unsqueeze(-1).repeat(1, 1, dim))
        mask = torch.ones(n, length, device=x.device)
        mask[:, :keep] = 0
        mask = torch.gather(mask, 1, restore)
        cls = self.vit.cls_token + self.vit.pos_embed[:, :1]
        x = self.vit.norm(self.vit.blocks(torch.cat([cls.expand(n, -1, -1), x], dim=1)))

        x = self.decoder_embed(x)
        filled = torch.cat([x[:, 1:], self.mask_token.to(x.dtype).repeat(n, length - keep, 1)], dim=1)
        filled = torch.gather(filled, 1, restore.unsqueeze(-1).repeat(1, 1, x.shape[-1]))
        x = torch.cat([x[:, :1], filled], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        pred = self.decoder_pred(self.decoder_norm(x))[:, 1:]

        p, side = self.patch, images.shape[-1] // self.patch
        target = torch.einsum("nchpwq->nhwpqc", images.reshape(n, 3, side, p, side, p)).reshape(n, length, -1)
        if self.config.norm_pix_loss:
            mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
            target = (target - mean) / (var + 1e-6) ** 0.5
        loss = ((pred - target) ** 2).mean(dim=-1)
        return (loss * mask).sum() / mask.sum()


def mae(recipe: Any, device: torch.device, precision: torch.dtype | None, mark: Mark) -> Step:
    model = MaskedAutoencoder(recipe).to(device)
    optimizer = _adamw(model, recipe)

    def step(batch: Batch) -> float:
        with torch.autocast(device.type, precision, enabled=precision is not None):
            loss = model(batch)
        value = _finite(loss)
        mark("forward")
        loss.backward()
        mark("backward")
        torch.stack([p.grad.norm(2) for p in model.parameters() if p.grad is not None]).norm(2)  # it is logged
        optimizer.step()
        optimizer.zero_grad()
        mark("optimiser")
        return value

    return step


PEERS = {"dino": dino, "mae": mae}


def _section(recipe: Any) -> Any:
    from selfsight import objectives

    return objectives.find(recipe.objective_name).Config(**{k: v for k, v in recipe.objective.items() if k != "name"})


def _adamw(module: nn.Module, recipe: Any) -> torch.optim.Optimizer:
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1]},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    c = recipe.optimizer
    return torch.optim.AdamW(groups, lr=1e-4, betas=(c.betas[0], c.betas[1]), weight_decay=c.weight_decay)


def _finite(loss: Tensor) -> float:
    value = loss.item()
    if not math.isfinite(value):
        raise Absent(f"the loss is {value}")
    return value
