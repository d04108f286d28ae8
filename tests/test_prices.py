"""Prices with dates, the user's before ours, and what is not known stays unknown."""

import datetime

import pytest

from maxlm.config_file import ConfigError
from maxlm.hardware import CHIPS
from maxlm.plan.prices import (
    COLUMNS,
    Price,
    co2e_kg,
    cost_usd,
    energy_kwh,
    find_price,
    read_prices,
    stale,
    users_prices,
)

HEADER = ",".join(COLUMNS)


def found(*args, **kwargs) -> Price:
    price = find_price(*args, **kwargs)
    assert price is not None
    return price


def user_file(tmp_path, *rows, header=HEADER):
    (tmp_path / "mine.csv").write_text("\n".join([header, *rows]) + "\n")
    return tmp_path / "mine.csv"


@pytest.mark.parametrize(
    ("chip", "usd"),
    [("TPU v4", 3.22), ("TPU v5e", 1.20), ("TPU v5p", 4.20), ("TPU v6e", 2.70), ("TPU7x", 12.00), ("H100", 6.16)],
)
def test_list_prices_on_demand(chip, usd):
    assert found(chip).usd_per_chip_hour == usd


def test_every_chip_has_a_price_that_says_when_and_where_from():
    for chip in CHIPS:
        price = found(chip.name)
        assert price.date.startswith("2026-") and price.source
        assert price.date in str(price) and price.source in str(price)
    assert "unverified" in str(found("TPU v4")) and "weak" in str(found("TPU7x"))


def test_kind_and_provider_choose():
    assert found("TPU v6e", "flex-start").usd_per_chip_hour == 1.35
    assert find_price("TPU v6e", "spot") is None
    assert found("h100", provider="gcp").usd_per_chip_hour == 11.06
    assert found("H100").provider == "CoreWeave"  # the cheapest, and str() names it
    assert "CoreWeave" in str(found("H100"))
    assert find_price("H100", provider="Nobody") is None


def test_the_users_price_comes_first_even_if_it_is_higher(tmp_path):
    mine = read_prices(
        user_file(tmp_path, "tpu v5e,GCP,,on-demand,2,2026-11-20,contract", "TPU v5e,,,spot,0.5,2026-11,seen", "")
    )
    assert found("TPU v5e", extra=mine).usd_per_chip_hour == 2
    assert found("TPU v5e", "spot", extra=mine).usd_per_chip_hour == 0.5
    assert found("TPU v5p", extra=mine) == found("TPU v5p")
    assert found("TPU v5e", extra=mine).chip == "TPU v5e"


def test_users_price_their_own_hosts(tmp_path, monkeypatch):
    assert users_prices() == [] and find_price("cpu") is None
    monkeypatch.setenv("MAXLM_PRICES", str(user_file(tmp_path, "CPU,me,desk,on-demand,0.25,2026-11,power and rent")))
    assert found("cpu", extra=users_prices()).usd_per_chip_hour == 0.25
    monkeypatch.setenv("MAXLM_PRICES", str(tmp_path / "none.csv"))
    with pytest.raises(ConfigError, match="none.csv does not exist"):
        users_prices()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("TPU v5,GCP,,spot,1,2026-11,x", ("line 2", "'TPU v5'", "TPU v5p")),
        ("TPU v5e,GCP,,spot,cheap,2026-11,x", ("line 2", "usd_per_chip_hour 'cheap'", "above 0")),
        ("TPU v5e,GCP,,spot,0,2026-11,x", ("usd_per_chip_hour '0'",)),
        ("TPU v5e,GCP,,spot,-1,2026-11,x", ("usd_per_chip_hour '-1'",)),
        ("TPU v5e,GCP,,spot,nan,2026-11,x", ("usd_per_chip_hour 'nan'",)),
        ("TPU v5e,GCP,,spot,1e308,2026-11,x", ("usd_per_chip_hour '1e308'", "at most 1,000,000")),
        ("TPU v5e,GCP,,spot,700.0,2026-11,x", ("SkyPilot",)),
        ("TPU v5e,GCP,,spot,1,November,x", ("date 'November'", "YYYY-MM")),
        ("TPU v5e,GCP,,spot,1,2026-13,x", ("date '2026-13'",)),
        ("TPU v5e,GCP,,cheap,1,2026-11,x", ("kind 'cheap'", "on-demand")),
        ("TPU v5e,GCP,,spot,1,2026-11", ("6 cells", "7 columns")),
    ],
)
def test_a_wrong_row_is_named(tmp_path, row, words):
    with pytest.raises(ConfigError) as error:
        read_prices(user_file(tmp_path, row))
    assert "mine.csv" in str(error.value) and all(word in str(error.value) for word in words)


def test_a_wrong_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="usd_per_hour.*are to be chip,provider"):
        read_prices(user_file(tmp_path, header=HEADER.replace("_chip", "")))
    with pytest.raises(ConfigError, match="none.csv does not exist"):
        read_prices(tmp_path / "none.csv")
    (tmp_path / "empty.csv").write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        read_prices(tmp_path / "empty.csv")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_prices(tmp_path / "bytes.csv")
    with pytest.raises(ConfigError, match="/dev/zero has more than 1,048,576 bytes"):
        read_prices("/dev/zero")


def test_old_prices_are_said_to_be_old():
    price = found("H100")  # of 2026-09-01
    assert stale(price, datetime.date(2026, 11, 30)) is None
    assert "91 days old" in str(stale(price, datetime.date(2026, 12, 1)))
    month = found("TPU v5e")  # of 2026-11, which is counted from its first day
    assert stale(month, datetime.date(2027, 1, 30)) is None
    assert "2026-11" in str(stale(month, datetime.date(2027, 1, 31)))


def test_cost_energy_and_emissions():
    assert cost_usd(64, 10, found("TPU v5p")) == pytest.approx(64 * 10 * 4.20)
    assert energy_kwh(700, 8, 10, pue=1.25) == pytest.approx(70)
    assert co2e_kg(70, 400) == pytest.approx(28)


def test_what_is_not_known_stays_unknown():
    assert cost_usd(64, 10, find_price("TPU v5p", "spot")) is None
    assert energy_kwh(None, 8, 10) is None
    assert co2e_kg(None, 400) is None and co2e_kg(70, None) is None
