"""Rotary positions and timm's DINOv3 family against the official code's numbers."""

from functools import partial

import numpy as np
import pytest
import timm
import torch
from timm.layers import LayerNorm, LayerScale, RmsNorm, SwiGLU
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3

from selfsight.encoders import Encoder
from selfsight.encoders.attention import rotate
from selfsight.encoders.rope import Rotations, coordinates, make, periods, sincos

ROPE = ["base100_sep", "base10_min", "base100_max", "periods"]
DRAWN = {"draw_shift": "shift_coords", "draw_jitter_log": "jitter_coords", "draw_rescale_log": "rescale_coords"}


def given(hyper: dict, key: str):
    return None if hyper.get(key, -1) == -1 else hyper[key]


def rope_of(hyper: dict) -> RotaryEmbeddingDinoV3:
    return RotaryEmbeddingDinoV3(
        hyper["embed_dim"] // hyper["num_heads"],
        temperature=given(hyper, "base"),
        min_period=given(hyper, "min_period"),
        max_period=given(hyper, "max_period"),
        normalize_coords=hyper.get("normalize_coords", "separate"),
        **{key: given(hyper, key) for key in DRAWN.values()},
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ROPE)
def test_tables_and_rotations(golden, name, dtype):
    numbers = golden.load("dinov3_rope", dtype)
    case = f"{name}_bf16" if dtype == torch.bfloat16 else name  # the official default: table and rotation in bfloat16
    hyper, inputs = numbers.hyper(case), numbers.inputs(case)
    rope, like = rope_of(hyper).eval(), torch.empty(0, dtype=dtype)
    coords = coordinates((hyper["H"], hyper["W"]), hyper["normalize_coords"], like)
    table = sincos(coords, periods(rope, like))
    sin, cos = table.chunk(2, dim=-1)
    q_rot, k_rot = (rotate(inputs[x], table[None, None], half=True) for x in "qk")
    outputs = {"periods": periods(rope, like), "sin": sin, "cos": cos, "q_rot": q_rot, "k_rot": k_rot}
    for output, value in outputs.items():
        numbers.check(case, output, value.float() if dtype == torch.bfloat16 else value)
    if dtype == torch.bfloat16:  # the file allows 0.05 for other libraries; a float32 table would pass that
        assert numbers.worst == 0
    if dtype == torch.float32:
        assert torch.equal(make(rope, (hyper["H"], hyper["W"])), rope.get_embed((hyper["H"], hyper["W"])))


@pytest.mark.parametrize("case", ["train_all", "train_jitter"])
def test_augmentation_draws_what_the_official_code_draws(golden, case):
    numbers = golden.load("dinov3_rope")
    hyper = numbers.hyper(case)
    rope, rotations = rope_of({**hyper, "num_heads": 3}), Rotations()
    torch.manual_seed(hyper["torch_manual_seed"])
    table = rotations.table(rope, (hyper["H"], hyper["W"]))
    sin, cos = table[0, 0].chunk(2, dim=-1)
    numbers.check(case, "sin", sin)
    numbers.check(case, "cos", cos)
    assert not torch.equal(rotations.table(rope, (hyper["H"], hyper["W"])), table)  # anew each time
    rope.eval()
    assert torch.equal(
        rotations.table(rope, (4, 5)), rotations.table(rope_of({**hyper, "num_heads": 3}).eval(), (4, 5))
    )


NORMS = {
    "layernorm": partial(LayerNorm, eps=1e-6),
    "layernormbf16": partial(LayerNorm, eps=1e-5),
    "rmsnorm": partial(RmsNorm, eps=1e-5),
}


def timms(official: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The official names as they are in timm. A bias mask of zeros is what leaves the keys without a bias."""
    renames = {
        "storage_tokens": "reg_token",
        ".ls1.gamma": ".gamma_1",
        ".ls2.gamma": ".gamma_2",
        ".mlp.w1.": ".mlp.fc1_g.",
        ".mlp.w2.": ".mlp.fc1_x.",
        ".mlp.w3.": ".mlp.fc2.",
    }
    left = ("mask_token", "rope_embed.periods", "cls_norm.")
    renamed = {}
    for name, w in official.items():
        if name.startswith(left) or name.endswith("bias_mask"):
            continue
        if f"{name}_mask" in official:
            w = w * torch.nan_to_num(official[f"{name}_mask"])
        for old, new in renames.items():
            name = name.replace(old, new)
        renamed[name] = w
    return renamed


def encoder_of(hyper: dict, **args) -> Encoder:
    vit = timm.create_model(
        "vit_small_patch16_dinov3",
        num_classes=0,
        global_pool="token",
        img_size=hyper.get("img_size", 224),
        patch_size=hyper["patch_size"],
        embed_dim=hyper["embed_dim"],
        depth=hyper["depth"],
        num_heads=hyper["num_heads"],
        num_reg_tokens=hyper["n_storage_tokens"],
        norm_layer=NORMS[hyper.get("norm_layer", "layernorm")],
        attn_type="rope",  # timm's attention whose keys may have a bias, as they have in these files
        qkv_bias=True,
        **args,
    )
    return Encoder(vit).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", ["plain", "untied_kmask", "swiglu_rms"])
@torch.no_grad()
def test_tokens(golden, case, dtype):
    numbers = golden.load("dinov3_vit", dtype)
    hyper, weights, inputs = numbers.hyper(case), numbers.weights(case), numbers.inputs(case)
    encoder = encoder_of(
        hyper, **({"swiglu_mlp": True, "swiglu_align_to": 64, "mlp_ratio": 8 / 3} if "swiglu" in case else {})
    )
    encoder.to(dtype).vit.load_state_dict(timms(weights), strict=True)
    prefix_norm = None
    if hyper.get("untie_cls_and_patch_norms"):
        prefix_norm = NORMS[hyper["norm_layer"]](hyper["embed_dim"]).to(dtype)
        prefix_norm.load_state_dict({n.removeprefix("cls_norm."): w for n, w in weights.items() if "cls_norm." in n})
    images, mask = inputs["images"], inputs["masks"]
    for start, masks in (("", None), ("masked_", mask)):
        tokens = encoder(images, mask=masks, mask_token=weights["mask_token"], prefix_norm=prefix_norm)
        numbers.check(case, f"{start}x_norm_clstoken", tokens.cls)
        numbers.check(case, f"{start}x_storage_tokens", tokens.registers)
        numbers.check(case, f"{start}x_norm_patchtokens", tokens.patches)
    numbers.check(case, "x_prenorm", encoder.intermediate(images, norm=False)[0].sequence)
    if prefix_norm is None:
        for i, layer in enumerate(encoder.intermediate(images, n=2)):
            numbers.check(case, f"intermediate{i}_cls", layer.cls)
            numbers.check(case, f"intermediate{i}_extra", layer.registers)


def hash_uniform(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """The counter hash of the files' README: 24 bits of splitmix64, in [-1, 1)."""
    n = int(np.prod(shape))
    with np.errstate(over="ignore"):
        z = np.uint64(seed) * np.uint64(2**32) + np.arange(n, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    u = 2 * (z >> np.uint64(40)).astype(np.float64) / 2**24 - 1
    return u.astype(np.float32).reshape(shape)


@pytest.mark.parametrize("case", ["rope_fp32", "rope_bf16"])
@torch.no_grad()
def test_vit_small(golden, case):
    numbers = golden.load("dinov3_vit_small")
    hyper = numbers.hyper(case)
    weights = {}
    for i, (name, shape) in enumerate(zip(hyper["w_names"], hyper["w_shapes"], strict=True)):
        sides = tuple(int(side) for side in str(shape).strip("()").replace("x", ",").split(",") if side.strip())
        u = hash_uniform(hyper["seed0"] + i, sides)
        weights[str(name)] = torch.from_numpy(hyper["w_offset"][i] + hyper["w_scale"][i] * u)
        if i == 0:
            np.testing.assert_allclose(weights[str(name)].flatten()[:8], hyper["first_values_check"], rtol=1e-6)
    encoder = encoder_of(hyper)
    encoder.vit.load_state_dict(timms(weights), strict=True)
    tokens = encoder(numbers.inputs(case)["images"])  # rotated in float32 either way; the bound of rope_bf16 allows it
    numbers.check(case, "x_norm_clstoken", tokens.cls)
    numbers.check(case, "x_storage_tokens", tokens.registers)
    numbers.check(case, "x_norm_patchtokens", tokens.patches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_parts_of_its_blocks(golden, dtype):
    """timm's layers, of which encoders are built, against the official ones."""
    numbers = golden.load("dinov3_misc", dtype)
    scale = LayerScale(6, numbers.hyper("layer_scale")["init_values"]).to(dtype)
    norm = RmsNorm(6, eps=numbers.hyper("rms_norm")["eps"]).to(dtype)
    norm.load_state_dict(numbers.weights("rms_norm"))
    hyper = numbers.hyper("swiglu")
    swiglu = SwiGLU(6, int(hyper["hidden_features"] * 2 / 3), align_to=hyper["align_to"]).to(dtype)
    ours = {"w1": "fc1_g", "w2": "fc1_x", "w3": "fc2"}
    swiglu.load_state_dict({f"{ours[n[:2]]}{n[2:]}": w for n, w in numbers.weights("swiglu").items()})
    numbers.check("layer_scale", "gamma", scale.gamma)
    for case, layer in {"layer_scale": scale, "rms_norm": norm, "swiglu": swiglu}.items():
        numbers.check(case, "y", layer(numbers.inputs(case)["x"]))
