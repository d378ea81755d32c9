"""Series: what is read and what is refused; features against their definition in plain Python."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.core.errors import UserError
from tasks.modalities.encoders.series_patches import SeriesPatches
from tasks.modalities.series import Series


def csv(folder: Path, text: str | bytes) -> Path:
    path = folder / "series.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def npy(folder: Path, array: np.ndarray) -> Path:
    path = folder / "series.npy"
    np.save(path, array)
    return path


@pytest.mark.parametrize("text", ["1\n2.5\n-3e2\n", "1,2.5,-3e2", "\ufeff1\r\n2.5\r\n\r\n-300\r\n", " 1, 2.5 ,-300\n"])
def test_a_csv_of_one_column_or_one_line_is_read(text: str, tmp_path: Path) -> None:
    series = Series().load(csv(tmp_path, text))
    assert series.dtype == np.float64
    assert series.tolist() == [1.0, 2.5, -300.0]


@pytest.mark.parametrize("kind", [np.int16, np.uint8, np.float32, np.float64])
def test_an_npy_of_one_dimension_is_read(kind: type, tmp_path: Path) -> None:
    series = Series().load(npy(tmp_path, np.array([1, 2, 3], dtype=kind)))
    assert series.dtype == np.float64
    assert series.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"no numbers"),
        ("\n\n", r"no numbers"),
        ("time\n1\n", r"line 1: found 'time'; allowed: numbers, no header"),
        ("1\n2,3\n", r"line 2 has 2 columns; allowed: one column, or one line"),
        ("1\nnan\n", r"line 2: found 'nan'; allowed: finite numbers"),
        ("1\n1e999\n", r"line 2: found '1e999'; allowed: finite"),
        ("1,,2", r"line 1: found ''; allowed: numbers"),
        (b"\xff\xfe\x00\x01", r"cannot be read as a series"),
    ],
)
def test_a_csv_that_is_no_series_is_refused(text: str | bytes, words: str, tmp_path: Path) -> None:
    path = csv(tmp_path, text)
    with pytest.raises(UserError, match=rf"series\.csv: {words}"):
        Series().load(path)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((2, 3)), r"an array of shape \(2, 3\) and type float64; allowed: one dimension, real"),
        (np.zeros(3, dtype=complex), r".* shape \(3,\) and type complex128"),
        (np.array(["1", "2"]), r".* type <U1"),
        (np.zeros(0), r"no numbers"),
        (np.array([1.0, np.inf]), r"value 2 is inf; allowed: finite numbers"),
        (np.array([{}], dtype=object), r"cannot be read as a series: Object arrays cannot be loaded"),
    ],
)
def test_an_npy_that_is_no_series_is_refused(array: np.ndarray, words: str, tmp_path: Path) -> None:
    path = npy(tmp_path, array)
    with pytest.raises(UserError, match=rf"series\.npy: {words}"):
        Series().load(path)


def test_an_archive_called_npy_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "two.npz", a=np.zeros(2), b=np.zeros(2))
    path = (tmp_path / "two.npz").rename(tmp_path / "series.npy")
    with pytest.raises(UserError, match=r"series\.npy: holds several arrays"):
        Series().load(path)


def expected(values: list[float]) -> list[list[float]]:
    """The features by their definition."""
    mean, deviation = statistics.fmean(values), statistics.pstdev(values)
    rows = []
    for start in range(0, len(values), 8):
        patch = [(value - mean) / deviation if deviation else 0.0 for value in values[start : start + 8]]
        scale = [math.asinh(mean), math.asinh(deviation), start / len(values), len(patch) / 8]
        rows.append([*patch, *[0.0] * (8 - len(patch)), *scale])
    return rows


@pytest.mark.parametrize("length", [1, 7, 8, 9, 100])
def test_features_are_as_defined(length: int) -> None:
    series = np.random.default_rng(length).normal(3.0, 20.0, length)
    (features_ND,) = SeriesPatches().encode([series])
    torch.testing.assert_close(features_ND, torch.tensor(expected(series.tolist())), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "mean", "deviation"),
    [
        ([0.1] * 11, math.asinh(0.1), 0.0),  # the mean of these is not 0.1 to the last bit
        ([0.0] * 3, 0.0, 0.0),
        ([1e308, -1e308], 0.0, math.asinh(1e308)),
        ([5e-324, 5e-324], 0.0, 0.0),
    ],
)
def test_constant_and_extreme_series_have_finite_features(values: list[float], mean: float, deviation: float) -> None:
    (features_ND,) = SeriesPatches().encode([np.array(values)])
    assert features_ND.isfinite().all()
    assert features_ND[0, 8].item() == pytest.approx(mean)
    assert features_ND[0, 9].item() == pytest.approx(deviation)
    assert features_ND[:, :8].abs().max().item() == pytest.approx(1.0 if deviation else 0.0)


def test_another_encoder_is_refused_and_the_built_in_one_has_no_weights() -> None:
    for method in (Series().encoder, Series().empty_encoder):
        with pytest.raises(UserError, match=r"'builtin/serie' is not an encoder of .*did you mean 'builtin/series'"):
            method("builtin/serie")
        assert sum(weight.numel() for weight in method("builtin/series").parameters()) == 0
    assert Series().encoder("builtin/series").device == torch.device("cpu")
