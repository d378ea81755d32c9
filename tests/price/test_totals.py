"""Totals of a plan: time with so many trials at once, device-hours, and money by GPU, CPU or node."""

from __future__ import annotations

from typing import Literal

import pytest

from clusters.profiles import Price
from harness.core.forecast import Duration, ShapeForecast
from harness.price.totals import Places, totals

HOUR_S = 3600.0


def shape(key: str, hours: float | None, disk: int = 100) -> ShapeForecast:
    trial = None if hours is None else Duration(
        low_s=hours * HOUR_S / 2, middle_s=hours * HOUR_S, high_s=hours * HOUR_S * 2, source="arithmetic"
    )  # fmt: skip
    return ShapeForecast(
        key=key, name=key, setting="", trial_ids=("a",), trial=trial, disk_bytes=disk, checkpoint_bytes=10
    )


SHAPES = [shape("one", 1.0), shape("two", 2.0)]
LEFT = {"one": 4, "two": 2}


def test_time_devices_and_disk() -> None:
    found = totals(SHAPES, LEFT, Places(at_once=4, gpus=2, cpus=8, nodes=1), None)
    assert found.trials == 6
    assert found.wall is not None
    assert found.slot is not None
    assert [found.wall.low_s, found.wall.middle_s, found.wall.high_s] == [HOUR_S, 2 * HOUR_S, 4 * HOUR_S]
    assert found.slot.middle_s == 16 * HOUR_S  # 8 hours of trials, with two GPUs each
    assert found.disk_bytes == 6 * 100 + 4 * 10
    assert (found.money, found.currency) == (None, "")


@pytest.mark.parametrize(
    ("per", "gpus", "money"),
    [("gpu", 2.0, 32.0), ("cpu", 0.0, 128.0), ("node", 0.0, 3 * 2 * 2.0), ("gpu", 0.0, None)],
)
def test_money(per: Literal["gpu", "cpu", "node"], gpus: float, money: float | None) -> None:
    price = Price(per_hour=2.0, currency="EUR", per=per)
    found = totals(SHAPES, LEFT, Places(at_once=4, gpus=gpus, cpus=8, nodes=3), price)
    assert (found.money and found.money[1]) == money
    assert found.currency == ("EUR" if money else "")


def test_a_run_is_not_shorter_than_its_longest_trial() -> None:
    found = totals(SHAPES, LEFT, Places(at_once=100, gpus=1, cpus=1, nodes=1), None)
    assert found.wall is not None
    assert found.wall.middle_s == pytest.approx(2 * HOUR_S)


def test_what_is_not_known_is_absent() -> None:
    found = totals([*SHAPES, shape("three", None)], {**LEFT, "three": 1}, Places(4, 1, 1, 1), Price(per_hour=1))
    assert (found.trials, found.wall, found.slot, found.money) == (7, None, None, None)
    unplaced = totals(SHAPES, LEFT, Places(None, 1, 1, None), Price(per_hour=1, per="node"))
    assert (unplaced.wall, unplaced.money) == (None, None)
    assert totals(SHAPES, {"one": 0, "two": 0}, Places(4, 1, 1, 1), None).trials == 0


def test_encoding_is_paid_once_and_its_work_is_shared() -> None:
    hour = Duration(low_s=HOUR_S, middle_s=HOUR_S, high_s=HOUR_S, source="probe")
    places = Places(at_once=4, gpus=2, cpus=8, nodes=1)
    without, found = totals(SHAPES, LEFT, places, None), totals(SHAPES, LEFT, places, None, hour)
    assert without.slot is not None
    assert found.slot is not None
    assert found.wall is not None
    assert found.slot.middle_s - without.slot.middle_s == pytest.approx(2 * HOUR_S)
    assert found.wall.middle_s == pytest.approx((8 + 1) / 4 * HOUR_S)
