"""A frozen teacher from a folder is the one that was written there; a folder that is wrong says how."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from selfsight import encoders
from selfsight.encoders import DINOHead, read_frozen
from selfsight.errors import UserError
from selfsight.recipe import EncoderConfig
from selfsight.weights.export import export_encoder

CONFIG = EncoderConfig(
    "vit_tiny_patch16_224", img_size=32, args={"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
)
IMAGES = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))


def write_checkpoint(folder, heads: dict[str, DINOHead], interpolation="dino"):
    """What of a checkpoint a teacher is read from."""
    folder.mkdir()
    encoder = encoders.build(CONFIG, pos_interpolation=interpolation)
    said = {"name": CONFIG.name, "img_size": 32, "args": CONFIG.args, "pos_interpolation": interpolation}
    (folder / "state.json").write_text(json.dumps({"step": 3, "encoder": said}))
    modules = {"teacher": encoder, **heads}
    state = {f"{n}.{k}": v.clone() for n, module in modules.items() for k, v in module.state_dict().items()}
    save_file({**state, "center": torch.zeros(7)}, folder / "objective.safetensors")
    return encoder


def write_timm(folder, **model_args):
    """As a hub's folder of a timm model lies there: a classifier in it, no selfsight.json."""
    folder.mkdir()
    args = {**CONFIG.args, "img_size": 32, **model_args}
    vit = timm.create_model(CONFIG.name, num_classes=5, **args)
    save_file(vit.state_dict(), folder / "model.safetensors")
    document = {"architecture": CONFIG.name, "num_classes": 5, "model_args": args}
    cfg = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "input_size": [3, 32, 32]}
    (folder / "config.json").write_text(json.dumps({**document, "pretrained_cfg": cfg}))
    return vit.eval()


def test_an_export_of_ours(tmp_path):
    encoder = encoders.build(CONFIG, pos_interpolation="dino")
    export_encoder(encoder, CONFIG, tmp_path / "export", meta={})
    found = read_frozen(tmp_path / "export")
    assert found.head is None
    assert found.patch_head is None
    assert torch.equal(found.encoder(IMAGES).sequence, encoder.eval()(IMAGES).sequence)
    assert not any(p.requires_grad for p in found.encoder.parameters())


def test_timms_folder(tmp_path):
    vit = write_timm(tmp_path / "timm", reg_tokens=2)
    found = read_frozen(tmp_path / "timm").encoder(IMAGES[..., :32, :32])
    torch.testing.assert_close(found.sequence, vit.forward_features(IMAGES[..., :32, :32]))


@pytest.mark.parametrize("weight_norm", [True, False])
@pytest.mark.parametrize("nlayers", [1, 3])
def test_a_checkpoint_with_its_heads(tmp_path, weight_norm, nlayers):
    sizes = {"hidden_dim": 20, "nlayers": nlayers, "weight_norm": weight_norm}
    heads = {
        "teacher_head": DINOHead(32, 12, bottleneck_dim=6, **sizes),
        "teacher_patch_head": DINOHead(32, 9, bottleneck_dim=5, **sizes),
    }
    encoder = write_checkpoint(tmp_path / "step", heads)
    found = read_frozen(tmp_path / "step")
    x = torch.randn(3, 32)
    assert torch.equal(found.encoder(IMAGES).sequence, encoder.eval()(IMAGES).sequence)
    assert torch.equal(found.head(x), heads["teacher_head"](x))
    assert torch.equal(found.patch_head(x), heads["teacher_patch_head"](x))
    assert found.patch_head.out_dim == 9
    assert not any(p.requires_grad for m in (found.head, found.patch_head) for p in m.parameters())


def test_one_head_for_both(tmp_path):
    write_checkpoint(tmp_path / "step", {"teacher_head": DINOHead(32, 12)})
    found = read_frozen(tmp_path / "step")
    assert found.patch_head is found.head


def change(path, **keys):
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def test_wrong_folders(tmp_path):
    with pytest.raises(UserError, match="is no teacher"):
        read_frozen(tmp_path)
    folder = tmp_path / "timm"
    write_timm(folder)
    config = folder / "config.json"
    whole = config.read_text()
    for keys, sentence in (
        ({"pretrained_cfg": {"mean": [0.5, 0.5, 0.5]}}, "wants images of mean"),
        ({"architecture": None}, "does not say which encoder"),
        ({"model_args": {**CONFIG.args, "img_size": 32, "embed_dim": 16}}, "of another architecture"),
        ({"architecture": "vit_tinny"}, "did you mean"),
    ):
        change(config, **keys)
        with pytest.raises(UserError, match=sentence):
            read_frozen(folder)
        config.write_text(whole)
    config.write_text("[]")
    with pytest.raises(UserError, match="should hold a JSON object"):
        read_frozen(folder)
    config.write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        read_frozen(folder)
    config.write_text(whole)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        read_frozen(folder)
    weights.unlink()
    with pytest.raises(UserError, match="missing"):
        read_frozen(folder)


def test_a_checkpoint_without_what_it_should_say(tmp_path):
    write_checkpoint(tmp_path / "step", {})
    change(tmp_path / "step" / "state.json", encoder={"name": CONFIG.name, "of": 3})
    with pytest.raises(UserError, match="does not say which encoder"):
        read_frozen(tmp_path / "step")
