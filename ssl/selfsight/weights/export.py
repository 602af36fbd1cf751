"""An encoder → a folder that selfsight, timm and transformers load. Nothing is published before timm has loaded it.

The folder is written under a temporary name, read back by both loaders, their answers compared with the encoder's own,
and only then renamed. A second export of the same weights to the same place changes nothing.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from selfsight import __version__, encoders
from selfsight.encoders import Encoder
from selfsight.errors import UserError
from selfsight.files import sha256_of, sync_files
from selfsight.recipe import EncoderConfig
from selfsight.weights import fingerprint
from selfsight.weights.card import model_card
from selfsight.weights.folder import CARD, CONFIG, ORIGIN, SCHEMA, WEIGHTS, Export, plain, share
from selfsight.weights.preprocess import settings
from selfsight.weights.pretrained import read_encoder


def export_encoder(encoder: Encoder, config: EncoderConfig, out: Path, *, meta: dict[str, Any]) -> Path:
    """Writes `encoder` (on any device, in any mode; not changed) as float32 to the folder `out` and returns it.

    `meta` is JSON-able and says where the weights come from: which, objective, step, corpus_id, recipe_digest, …
    Raises UserError when `out` holds anything but this same export, or `config` does not describe `encoder`.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        export = _write(encoder, config, temporary, {**meta, "selfsight": __version__})
        _check(encoder, export)
        for path in (temporary, temporary / WEIGHTS):
            share(path, like=temporary / CONFIG)
        sync_files(temporary)
        _publish(export, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _write(encoder: Encoder, config: EncoderConfig, folder: Path, meta: dict[str, Any]) -> Export:
    vit = encoder.vit
    preprocess = settings(config.img_size)
    document = {
        "architecture": config.name.split(".")[0],  # timm's name without the tag of someone else's weights
        "num_classes": 0,
        "num_features": encoder.embed_dim,
        "global_pool": "token" if encoder.has_class_token else "avg",
        "model_args": {
            **encoders.model_args(config),
            **({} if encoder.has_class_token else {"global_pool": "avg"}),
        },
        "pretrained_cfg": {
            **preprocess,
            "fixed_input_size": True,
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "",
        },
    }
    state = plain(vit.state_dict())
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    origin = {
        "schema": SCHEMA,
        "pos_interpolation": encoder.pos_interpolation,
        "preprocess": preprocess,
        "weights": {
            "sha256": sha256_of(folder / WEIGHTS),
            "tensors": len(state),
            "parameters": sum(p.numel() for p in vit.parameters()),
        },
        "meta": meta,
    }
    (folder / CONFIG).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    (folder / CARD).write_text(model_card(document, origin), encoding="utf-8")
    # The fingerprint is that of the file read back on a CPU, which is what a loader will see.
    taken = fingerprint.take(read_encoder(Export(folder, document, origin)), config.img_size)
    origin["fingerprint"] = taken.to_json()
    (folder / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
    return Export(folder, document, origin)


def _check(encoder: Encoder, export: Export) -> None:
    """Raises unless the encoder in memory, the one read back and the one timm loads say the same of one image."""
    recorded = fingerprint.Fingerprint.from_json(export.origin["fingerprint"])
    live = fingerprint.take(encoder, recorded.size)
    on_cpu = next(encoder.parameters()).device.type == "cpu"
    if apart := fingerprint.difference(recorded, live, slack=1.0 if on_cpu else 10.0):  # a GPU may compute in TF32
        raise UserError(f"the encoder config does not describe this encoder ({apart}): export with the config it has")
    import timm

    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        model = timm.create_model(f"local-dir:{export.path}", pretrained=True).eval()
        pooled = model(fingerprint.synthetic_image(recorded.size))[0]
    # The class token, or the mean patch token of an encoder without one.
    expected = fingerprint.Fingerprint(recorded.size, recorded.values[: encoder.embed_dim])
    actual = fingerprint.Fingerprint(recorded.size, tuple(pooled.tolist()))
    if apart := fingerprint.difference(expected, actual):
        raise UserError(f"timm reads other features from these weights ({apart}): this encoder cannot be exported")


def _publish(export: Export, out: Path) -> None:
    try:
        os.rename(export.path, out)  # onto nothing or an empty folder; the system refuses anything else
    except OSError:
        if not out.is_dir() or not any(out.iterdir()):
            raise
        if not _same(export, out):
            raise UserError(f"{out} exists and holds something else: remove it or choose another folder") from None
        return
    handle = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _same(export: Export, out: Path) -> bool:
    try:
        there = Export.open(out)
        whole = sha256_of(out / WEIGHTS) == there.digest
    except UserError:
        return False
    keys = ("pos_interpolation", "preprocess", "weights", "meta")  # a fingerprint's last digits depend on the machine
    return whole and there.config == export.config and all(there.origin[k] == export.origin[k] for k in keys)
