"""What an install must hold: the standard library's ssl stays itself, and the wheel works away from the checkout."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROBE = "import ssl; ssl.create_default_context(); print(ssl.__file__)"


def run(*command: str, cwd: Path = ROOT, **env: str) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **env})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def assert_is_the_standard_librarys(path: str) -> None:
    assert Path(path.strip()) == Path(os.__file__).parent / "ssl.py"


def test_the_source_root_is_not_a_package():
    assert not (ROOT / "ssl" / "__init__.py").exists()


def test_import_ssl_under_pytest():
    import ssl

    assert_is_the_standard_librarys(ssl.__file__)
    ssl.create_default_context()


def test_import_ssl_from_the_root():
    assert_is_the_standard_librarys(run(sys.executable, "-c", PROBE))


def test_import_ssl_under_python_m(tmp_path):
    (tmp_path / "probe.py").write_text(PROBE)
    assert_is_the_standard_librarys(run(sys.executable, "-m", "probe", PYTHONPATH=str(tmp_path)))


@pytest.mark.parametrize(
    "launcher",
    [
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1", "--master-port=0", "--no-python"],
        [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators=1", "--no_local_rank", "--no_python"],
    ],
    ids=["torchrun", "deepspeed"],
)
def test_import_ssl_in_a_launched_process(launcher, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "probe.py").write_text(f"{PROBE}; import pathlib; pathlib.Path({str(out)!r}).write_text(ssl.__file__)")
    run(*launcher, sys.executable, str(tmp_path / "probe.py"), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    assert_is_the_standard_librarys(out.read_text())


def test_the_wheel_works_away_from_the_checkout(tmp_path):
    """The wheel holds every module and recipe; installed into another environment it answers --help and finds them."""
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT))
    (wheel,) = tmp_path.glob("selfsight-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for source, inside in (("ssl/selfsight", "selfsight"), ("eval_probes",) * 2, ("launch",) * 2):
        for module in (ROOT / source).rglob("*.py"):
            assert f"{inside}/{module.relative_to(ROOT / source).as_posix()}" in names
    for recipe in (ROOT / "configs").rglob("*.yaml"):
        assert f"selfsight/configs/{recipe.relative_to(ROOT / 'configs').as_posix()}" in names

    # The dependencies come from this environment by a path file; selfsight itself only from the wheel.
    venv.create(tmp_path / "env", with_pip=False)
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    with zipfile.ZipFile(wheel) as f:
        f.extractall(site)
    dependencies = [p for p in sys.path if p.endswith("site-packages")]
    python = str(tmp_path / "env" / "bin" / "python")
    flags = {"PYTHONPATH": os.pathsep.join(dependencies), "PYTHONNOUSERSITE": "1"}
    where = run(python, "-c", "import selfsight; print(selfsight.__file__)", cwd=tmp_path, **flags)
    assert Path(where.strip()).is_relative_to(site)
    assert "pretrain" in run(python, "-m", "launch", "--help", cwd=tmp_path, **flags)
    printed = run(python, "-m", "launch", "pretrain", "quickstart/dino", "--print", cwd=tmp_path, **flags)
    assert "objective:" in printed


def test_help_imports_nothing_heavy():
    """`selfsight --help` answers in under a second because these stay out of it."""
    code = "import sys, launch.cli as c; c.parser().format_help(); print(*sys.modules)"
    loaded = set(run(sys.executable, "-c", code).split())
    assert not loaded & {"torch", "timm", "deepspeed", "pyarrow", "faiss", "omegaconf", "PIL", "torchvision"}
