"""A run's checkpoints become exports, and what a run lacks is said in one sentence."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.cli import main
from selfsight import objectives
from selfsight.errors import UserError
from selfsight.recipe import EncoderConfig, from_dict
from selfsight.weights import export_encoder, export_run, load_pretrained, newest_export
from selfsight.weights.run import STATE_SCHEMA, checkpoints, exports, recipe_digest, run_of

ENCODER = {"name": "vit_tiny_patch16_224", "img_size": 32, "args": {"patch_size": 8, "embed_dim": 48, "depth": 2,
                                                                     "num_heads": 3}}  # fmt: skip

SMALL = {
    "dino": {"out_dim": 16, "hidden_dim": 16, "bottleneck_dim": 8, "global_crops_size": 32, "local_crops_size": 16},
    "mae": {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2, "crop_size": 32},
}


def make_run(path: Path, objective: str, steps=(10, 20)) -> Path:
    """What the trainer leaves: a resolved recipe and checkpoints with the whole objective."""
    objective_class = objectives.find(objective)
    given = {
        "encoder": ENCODER,
        "objective": {"name": objective, **SMALL[objective]},
        "corpus": "somewhere",
        "output": str(path),
    }
    recipe = from_dict(given, {}, objective=lambda name: objectives.find(name).Config)
    config = {k: v for k, v in recipe.objective.items() if k != "name"}
    path.mkdir()
    (path / "recipe.yaml").write_text(recipe.to_yaml())
    for step in steps:
        torch.manual_seed(step)
        model = objective_class(objective_class.Config(**config), EncoderConfig(**ENCODER))
        folder = path / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        state = {k: v.clone() for k, v in model.state_dict().items()}
        if "teacher.vit.cls_token" in state:
            state["teacher.vit.cls_token"] += 1  # as after training, teacher and student differ
        save_file(state, folder / "objective.safetensors")
        (folder / "state.json").write_text(
            json.dumps({"schema": STATE_SCHEMA, "step": step, "total_steps": 30, "corpus_id": "c0"})
        )
        (folder / "COMPLETE").touch()
        if step == steps[0]:
            export_encoder(
                model.student, EncoderConfig(**ENCODER), path / "exports" / "step_00000000", meta={"step": 0}
            )
    return path


@pytest.fixture(scope="module")
def dino(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "dino", "dino")


def test_the_newest_teacher_is_the_default(dino, tmp_path):
    folder = export_run(dino, tmp_path / "out")
    encoder = load_pretrained(folder)
    assert encoder.info["meta"]["which"] == "teacher"
    assert encoder.info["meta"]["step"] == 20
    assert encoder.info["meta"]["corpus_id"] == "c0"
    assert encoder.encoder.pos_interpolation == "dino"
    saved = load_file(dino / "checkpoints" / "step_00000020" / "objective.safetensors")
    for name, tensor in encoder.encoder.vit.state_dict().items():
        assert torch.equal(tensor, saved[f"teacher.vit.{name}"])


def test_student_and_step_can_be_asked_for(dino, tmp_path):
    encoder = load_pretrained(export_run(dino, tmp_path / "out", which="student", step=10))
    saved = load_file(dino / "checkpoints" / "step_00000010" / "objective.safetensors")
    assert torch.equal(encoder.encoder.vit.cls_token, saved["student.vit.cls_token"])


def test_mae_has_a_student_only(tmp_path):
    run = make_run(tmp_path / "mae", "mae", steps=(5,))
    assert load_pretrained(export_run(run, tmp_path / "out")).info["meta"]["which"] == "student"
    with pytest.raises(UserError, match="no teacher: export its student"):
        export_run(run, tmp_path / "other", which="teacher")


def test_a_run_loads_its_newest_export(dino):
    assert newest_export(dino).name == "step_00000000"
    assert load_pretrained(dino).path == newest_export(dino)
    assert run_of(dino) == run_of(newest_export(dino)) == dino
    assert run_of(dino.parent) is None


def test_unfinished_checkpoints_and_exports_do_not_exist(tmp_path):
    run = make_run(tmp_path / "run", "mae", steps=(5, 6))
    (run / "checkpoints" / "step_00000006" / "COMPLETE").unlink()
    (run / "exports" / "step_00000007").mkdir()
    (run / "exports" / ".step_00000008.x").mkdir()
    assert list(checkpoints(run)) == [5]
    assert list(exports(run)) == [0]
    with pytest.raises(UserError, match="no complete checkpoint at step 6: there are 5"):
        export_run(run, tmp_path / "out", step=6)


def test_what_a_run_lacks_is_one_sentence(dino, tmp_path):
    with pytest.raises(UserError, match="not a run"):
        export_run(tmp_path, tmp_path / "out")
    (tmp_path / "recipe.yaml").write_text("encoder: {}\nobjective: {name: dino}\n")
    with pytest.raises(UserError, match="no complete checkpoint yet"):
        export_run(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="no exports yet"):
        load_pretrained(tmp_path)
    (tmp_path / "recipe.yaml").write_text("- 1")
    with pytest.raises(UserError, match="not a recipe"):
        export_run(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_of_another_encoder_are_refused(tmp_path):
    run = make_run(tmp_path / "run", "mae", steps=(5,))
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("depth: 2", "depth: 3"))
    with pytest.raises(UserError, match=r"lacks blocks\.2"):
        export_run(run, tmp_path / "out")
    (run / "recipe.yaml").write_text(recipe)
    file = run / "checkpoints" / "step_00000005" / "objective.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        export_run(run, tmp_path / "out")


def test_a_recipes_digest_does_not_depend_on_where_things_lie():
    one = {"corpus": "/a", "output": "/b", "seed": 1}
    assert recipe_digest(one) == recipe_digest({"seed": 1, "corpus": "/c", "output": None})
    assert recipe_digest(one) != recipe_digest({**one, "seed": 2})


def test_a_recipes_digest_is_of_what_is_learnt():
    recipe = {"corpus": "a", "seed": 0, "training": {"keep": 2, "zero": 1}}
    free = {"corpus": "b", "seed": 0, "training": {"keep": 9, "zero": 1}}
    assert recipe_digest(recipe) == recipe_digest(free)
    assert recipe_digest(recipe) != recipe_digest({**recipe, "seed": 1})
    assert recipe["training"] == {"keep": 2, "zero": 1}


def test_the_verb_export(dino, tmp_path, capsys):
    assert main(["export", str(dino), "--out", str(tmp_path / "out"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["which"], said["step"]) == ("teacher", 20)
    assert main(["export", str(dino), "--out", str(tmp_path / "out")]) == 0, "the same again changes nothing"
    assert "selfsight.load_pretrained(" in capsys.readouterr().out
    assert main(["export", str(dino), "--out", str(tmp_path / "out"), "--which", "student"]) == 2
    error = capsys.readouterr().err
    assert "holds something else" in error
    assert error.count("\n") == 1
