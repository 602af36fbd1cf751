"""An export loads in selfsight and in timm with the encoder's own features, and refuses to be loaded wrong."""

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from selfsight import encoders
from selfsight.errors import UserError
from selfsight.recipe import EncoderConfig
from selfsight.weights import export_encoder, load_pretrained
from selfsight.weights.fingerprint import synthetic_image

TINY = EncoderConfig("vit_tiny_patch16_224", 32, args={"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3})
META = {"which": "teacher", "objective": "dino", "step": 7, "corpus_id": "c" * 64, "recipe_digest": "d" * 64}


def build(config: EncoderConfig = TINY, seed: int = 0) -> encoders.Encoder:
    torch.manual_seed(seed)
    return encoders.build(config, drop_path=False)


@pytest.fixture
def folder(tmp_path) -> Path:
    return export_encoder(build(), TINY, tmp_path / "export", meta=META)


def edit(path: Path, change) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        EncoderConfig("vit_tiny_patch16_224", 32, args={"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3,
                                                        "reg_tokens": 2, "init_values": 1e-5}),
        EncoderConfig("vit_tiny_patch16_224", 32, args={"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3,
                                                        "class_token": False}),
        EncoderConfig("vit_small_patch16_dinov3", 32, args={"patch_size": 8, "embed_dim": 48, "depth": 2,
                                                            "num_heads": 3, "rope_rescale_coords": 2.0}),
        EncoderConfig("eva02_tiny_patch14_224", 32, args={"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3,
                                                          "class_token": False}),
    ],
    ids=["plain", "registers-layerscale", "no-class-token", "dinov3", "eva-no-class-token"],
)  # fmt: skip
def test_selfsight_and_timm_give_the_encoders_own_features(tmp_path, config):
    encoder = build(config).eval()
    folder = export_encoder(encoder, config, tmp_path / "export", meta=META)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        own = encoder(images)
        loaded = load_pretrained(folder)(images)
        pooled = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(images)
    if own.cls is not None:
        torch.testing.assert_close(loaded.cls, own.cls, rtol=0, atol=0)
    torch.testing.assert_close(loaded.patches, own.patches, rtol=0, atol=0)
    torch.testing.assert_close(pooled, own.avg if own.cls is None else own.cls, rtol=1e-5, atol=1e-5)


def test_an_encoder_in_training_mode_is_left_alone(tmp_path):
    encoder = build().train()
    state = torch.random.get_rng_state()
    folder = export_encoder(encoder, TINY, tmp_path / "export", meta=META)
    assert encoder.training
    assert torch.equal(state, torch.random.get_rng_state()), "an export must not change what training draws next"
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.float32}


def test_preprocess_is_timms_evaluation_transform(tmp_path):
    from timm.data import create_transform, resolve_model_data_config

    config = EncoderConfig("vit_tiny_patch16_224", 224, args={"depth": 1})
    folder = export_encoder(build(config), config, tmp_path / "export", meta=META)
    theirs = create_transform(**resolve_model_data_config(timm.create_model(f"local-dir:{folder}", pretrained=True)))
    ramp = torch.arange(300 * 250 * 3).reshape(250, 300, 3) % 251
    image = Image.fromarray(ramp.to(torch.uint8).numpy())
    assert torch.equal(load_pretrained(folder).preprocess(image), theirs(image))
    assert load_pretrained(folder).preprocess(image.convert("L")).shape == (3, 224, 224)


def test_the_folder_says_where_it_comes_from(folder):
    encoder = load_pretrained(folder)
    assert encoder.info["meta"]["step"] == 7
    assert encoder.embed_dim == 48
    assert encoder.digest == encoder.info["weights"]["sha256"]
    card = (folder / "README.md").read_text()
    assert 'timm.create_model("local-dir:' in card
    assert "license:\n" in card
    assert [oct(p.stat().st_mode)[-3:] for p in (folder, folder / "model.safetensors")] == ["755", "644"]


def test_the_same_export_again_changes_nothing_and_another_is_refused(folder):
    before = (folder / "selfsight.json").read_bytes()
    assert export_encoder(build(), TINY, folder, meta=META) == folder
    assert (folder / "selfsight.json").read_bytes() == before
    with pytest.raises(UserError, match="holds something else"):
        export_encoder(build(seed=1), TINY, folder, meta=META)
    assert [p.name for p in folder.parent.iterdir()] == ["export"], "temporary folders are removed"


def test_foreign_files_are_not_overwritten(tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        export_encoder(build(), TINY, tmp_path / "export", meta=META)
    assert (tmp_path / "export" / "notes.txt").read_text() == "mine"


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "export").mkdir()
    assert load_pretrained(export_encoder(build(), TINY, tmp_path / "export", meta=META)).embed_dim == 48


def test_a_config_of_another_encoder_is_not_published(tmp_path):
    heads = EncoderConfig(TINY.name, TINY.img_size, args={**TINY.args, "num_heads": 4})  # same tensors, other function
    with pytest.raises(UserError, match="does not describe"):
        export_encoder(build(), heads, tmp_path / "export", meta=META)
    assert list(tmp_path.iterdir()) == []


def test_missing_extra_and_misshapen_tensors_are_named(folder):
    file = folder / "model.safetensors"
    whole = load_file(file)

    def save(state) -> None:
        file.unlink()  # the tensors above are mapped from the old file
        save_file(state, file)

    whole = {k: v.clone() for k, v in whole.items()}
    save({k: v for k, v in whole.items() if k != "blocks.1.attn.proj.weight"})
    with pytest.raises(UserError, match=r"lacks blocks\.1\.attn\.proj\.weight"):
        load_pretrained(folder)
    save({**whole, "head.weight": torch.zeros(2)})
    with pytest.raises(UserError, match=r"does not: head\.weight"):
        load_pretrained(folder)
    save({**whole, "cls_token": torch.zeros(1, 1, 47)})
    with pytest.raises(UserError, match=r"cls_token has shape \(1, 1, 47\)"):
        load_pretrained(folder)
    save({**whole, "cls_token": whole["cls_token"].half()})
    with pytest.raises(UserError, match=r"cls_token is torch\.float16"):
        load_pretrained(folder)
    save({**whole, "cls_token": whole["cls_token"] + 1e-3})
    with pytest.raises(UserError, match="not the file that was exported"):
        load_pretrained(folder)


def test_a_file_cut_short_is_refused(folder):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    for cut in (0, 7, 100, len(data) - 1):
        file.write_bytes(data[:cut])
        with pytest.raises(UserError, match="not a whole safetensors file"):
            load_pretrained(folder)


def test_a_pickle_under_the_name_of_safetensors_is_not_opened(folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    torch.save(Bomb(), folder / "model.safetensors")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_pretrained(folder)
    assert not (tmp_path / "exploded").exists()


def test_a_fingerprint_that_is_not_reproduced_is_refused(folder):
    # The tensors fit an encoder with other heads just as well: only the fingerprint tells.
    edit(folder / "config.json", lambda c: c["model_args"].update(num_heads=4))
    with pytest.raises(UserError, match="does not reproduce its fingerprint"):
        load_pretrained(folder)


def test_another_architecture_is_refused(folder):
    edit(folder / "config.json", lambda c: c["model_args"].update(depth=4))
    with pytest.raises(UserError, match=r"lacks blocks\.3"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", "{", "is not JSON"),
        ("config.json", "[]", "JSON object"),
        ("config.json", "{}", "lacks architecture"),
        ("selfsight.json", '{"schema": 99}', "schema 99"),
        ("selfsight.json", '{"schema": 1}', "lacks pos_interpolation"),
    ],
)
def test_damaged_descriptions_are_one_sentence(folder, file, text, message):
    (folder / file).write_text(text)
    with pytest.raises(UserError, match=message):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("file", "path", "value"),
    [
        ("config.json", ("num_features",), None),
        ("config.json", ("model_args",), None),
        ("config.json", ("model_args", "patch_size"), 0),
        ("selfsight.json", ("weights",), []),
        ("selfsight.json", ("weights", "parameters"), "many"),
        ("selfsight.json", ("meta",), None),
        ("selfsight.json", ("preprocess",), {}),
        ("selfsight.json", ("preprocess", "crop_pct"), 0),
        ("selfsight.json", ("preprocess", "mean"), "grey"),
        ("selfsight.json", ("preprocess", "input_size"), [3]),
    ],
)
def test_a_malformed_description_is_one_sentence(folder, file, path, value):
    document = json.loads((folder / file).read_text())
    node = document
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    (folder / file).write_text(json.dumps(document))
    with pytest.raises(UserError):
        load_pretrained(folder)


def test_a_malformed_fingerprint_is_one_sentence(folder):
    edit(folder / "selfsight.json", lambda s: s["fingerprint"].update(values=["x"]))
    with pytest.raises(UserError, match="malformed"):
        load_pretrained(folder)


def test_what_is_no_export_is_one_sentence(tmp_path, folder):
    with pytest.raises(UserError, match="no weights folder"):
        load_pretrained(tmp_path / "nowhere")
    (folder / "selfsight.json").unlink()
    with pytest.raises(UserError, match=r"not an export: selfsight\.json"):
        load_pretrained(folder)


def test_the_synthetic_image_is_the_same_everywhere():
    image = synthetic_image(32)
    assert image.shape == (1, 3, 32, 32)
    pixels = ((image[0] * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
               + torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) * 255).round().long()  # fmt: skip
    assert pixels[0, 0, :5].tolist() == [0, 7, 14, 21, 28]
    assert pixels[2, 3, :4].tolist() == [((7 * x + 39 + 62) ^ (x + 34)) & 255 for x in range(4)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_an_encoder_on_the_gpu_exports_and_loads_there(tmp_path):
    folder = export_encoder(build().cuda(), TINY, tmp_path / "export", meta=META)
    encoder = load_pretrained(folder, device="cuda")
    assert encoder(synthetic_image(32).cuda()).cls.is_cuda
