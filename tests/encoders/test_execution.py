"""Recomputed and compiled blocks: the numbers, gradients and names of plain ones, for less memory or less time."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from selfsight import encoders
from selfsight.encoders.execution import make_step
from selfsight.errors import UserError
from selfsight.recipe import EncoderConfig

TINY = {"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
NAMES = ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"]
AUGMENTED = {"rope_shift_coords": 0.2, "rope_jitter_coords": 1.5, "rope_rescale_coords": 2.0}


def build(name: str, checkpointing: str = "none", rate: float = 0.0, **more) -> encoders.Encoder:
    torch.manual_seed(0)
    return encoders.build(EncoderConfig(name, 32, rate, checkpointing=checkpointing, args={**TINY, **more}))


def run(encoder, seed: int = 0) -> list[torch.Tensor]:
    """Tokens of two sizes, and all gradients."""
    torch.manual_seed(seed)
    images = [torch.randn(4, 3, 32, 32), torch.randn(6, 3, 16, 24)]
    encoder.zero_grad()
    tokens = encoder.forward_list(images)
    sum(t.sequence.square().sum() for t in tokens).backward()
    return [
        *(t.sequence.detach() for t in tokens),
        *(p.grad.clone() for p in encoder.parameters() if p.grad is not None),
    ]


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_recomputing_changes_no_bit(name, checkpointing):
    """With stochastic depth, dropout and RoPE's augmentation, which must be drawn once."""
    more = {"proj_drop_rate": 0.1, **(AUGMENTED if "dinov3" in name else {})}
    plain, recomputing = (build(name, how, 0.4, **more) for how in ("none", checkpointing))
    assert list(recomputing.state_dict()) == list(plain.state_dict())
    for a, b in zip(run(plain), run(recomputing), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_recomputing_in_bf16(checkpointing):
    """Autocast casts a weight once and keeps it: the second size finds what the recomputation makes again."""
    gradients = []
    for how in ("none", checkpointing):
        encoder = build(NAMES[0], how)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            loss = sum(encoder(torch.randn(4, 3, size, size)).avg.square().sum() for size in (32, 16))
        loss.backward()
        gradients.append([p.grad for p in encoder.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):  # summed over the sizes in fp32 instead of bf16
        torch.testing.assert_close(a, b, atol=0.01 * float(a.abs().max()) + 1e-3, rtol=0.01)


class Saved:
    """Bytes that autograd keeps for the backward pass, parameters left out."""

    def __init__(self, encoder) -> None:
        self.parameters = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
        self.bytes: dict[int, int] = {}
        self.tensors: list[torch.Tensor] = []  # held, so that no two have the same address

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.parameters:
            self.bytes[storage.data_ptr()] = storage.nbytes()
            self.tensors.append(tensor)
        return tensor


def test_what_is_kept_and_what_is_computed_again():
    kept, flops = {}, {}
    for how in ("none", "selective", "full"):
        encoder = build(NAMES[0], how)
        images, saved = torch.randn(4, 3, 32, 32), Saved(encoder)
        # torch lets what selective checkpointing keeps past such hooks: of it the arithmetic is counted only.
        with nullcontext() if how == "selective" else saved_tensors_hooks(saved, lambda t: t):
            loss = encoder(images).avg.square().sum()
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        kept[how], flops[how] = sum(saved.bytes.values()), counter.get_total_flops()
    assert kept["full"] < 0.3 * kept["none"]
    assert flops["selective"] == flops["none"]  # no product is made twice
    assert flops["full"] > 1.3 * flops["none"]  # a third more: forward once again


def compiled_by(encoder, compiler: str) -> list:
    """Lets the encoder's blocks be compiled by another than inductor, and returns the list of graphs it will make.

    Traced as on a GPU, but without generating code, which takes a minute here and is torch's business.
    """
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(compiler)(graph, inputs)

    torch._dynamo.reset()
    encoder.compile_blocks = True
    encoder._steps[True] = make_step(encoder.checkpointing, compiled=True, backend=backend)
    return graphs


@pytest.mark.parametrize(("name", "checkpointing"), [(NAMES[0], "none"), (NAMES[0], "full"), (NAMES[1], "selective")])
def test_compiled_blocks(name, checkpointing):
    plain, compiled = build(name, rate=0.3), build(name, checkpointing, rate=0.3)
    graphs = compiled_by(compiled, "aot_eager")
    for _ in range(2):
        for a, b in zip(run(plain), run(compiled), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    before = len(graphs)
    assert before <= 6  # two sizes, three rates of stochastic depth; not one for each block and call
    assert torch.equal(compiled.eval()(torch.ones(1, 3, 32, 32)).cls, plain.eval()(torch.ones(1, 3, 32, 32)).cls)
    assert len(graphs) == before  # evaluation runs eagerly
    assert list(copy.deepcopy(compiled).state_dict()) == list(plain.state_dict())


def test_one_graph_for_all_blocks():
    encoder = build(NAMES[0])
    graphs = compiled_by(encoder, "eager")
    with torch.no_grad():
        for _ in range(3):
            encoder(torch.ones(2, 3, 32, 32))
    assert len(graphs) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_compiled_on_a_gpu(name, checkpointing):
    plain, compiled = build(name), build(name, checkpointing)
    compiled.compile_blocks = None  # compiled, since it is a GPU
    images = [torch.randn(4, 3, 32, 32).cuda(), torch.randn(6, 3, 16, 24).cuda()]
    for encoder in (plain, compiled):
        encoder.cuda()
        with torch.autocast("cuda", torch.bfloat16):
            sum(t.sequence.square().sum() for t in encoder.forward_list(images)).backward()
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=0.02 * float(a.grad.abs().max()) + 1e-3, rtol=0.05)


def test_unknown_ways_are_refused():
    with pytest.raises(UserError, match="use one of none, selective, full"):
        build(NAMES[0], "some")
