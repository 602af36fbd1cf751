"""Position tables: MAE's sines and cosines, and resampling as timm does it."""

import pytest
import torch
from timm.layers import resample_abs_pos_embed

from selfsight.encoders.positions import resampling_matrix, sincos_table


@pytest.mark.parametrize("case", ["d48_g4", "d64_g7_nocls"])
def test_sincos_table_is_the_official_one(golden, case):
    numbers = golden.load("mae_pos_embed", torch.float64)
    hyper = numbers.hyper(case)
    numbers.check(case, "pos_embed", sincos_table(hyper["embed_dim"], hyper["grid_size"], int(hyper["cls_token"])))


@pytest.mark.parametrize("new", [(6, 6), (20, 20), (7, 12), (32, 8), (7, 1), (1, 7)])
def test_timm_matrix_is_timm_resampling(new):
    table = torch.randn(1, 14 * 14, 8)
    ours = resampling_matrix((14, 14), new, "timm").float() @ table
    theirs = resample_abs_pos_embed(table, list(new), [14, 14], num_prefix_tokens=0)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("how", ["dino", "timm"])
def test_constant_tables_stay_constant(how):
    rows = resampling_matrix((14, 14), (6, 37), how).sum(dim=1)
    torch.testing.assert_close(rows, torch.ones_like(rows))


def test_dino_keeps_count_but_not_identity_for_other_shapes():
    matrix = resampling_matrix((4, 4), (2, 8), "dino")
    assert matrix.shape == (16, 16)
    assert not torch.allclose(matrix, torch.eye(16, dtype=torch.float64))


@pytest.mark.parametrize("new", range(1, 200, 7))
def test_the_tenth_keeps_every_size(new):
    assert resampling_matrix((3, 7), (new, 5), "dino").shape == (new * 5, 21)
