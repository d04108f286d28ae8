"""Files of prices may be anything: prices or one of maxlm's own errors, never a traceback."""

from importlib import resources

from fuzz_values import TEXTS, cut_or_changed, fuzz, told
from hypothesis import example, given
from hypothesis import strategies as st

from maxlm.config_file import ConfigError
from maxlm.plan.prices import COLUMNS, find_price, read_prices

GOOD = resources.files("maxlm.plan").joinpath("prices.csv").read_bytes()
HEADER = ",".join(COLUMNS) + "\n"


@fuzz(150)
@given(
    st.binary(max_size=60)
    | cut_or_changed(GOOD)
    | st.lists(TEXTS, min_size=7, max_size=7).map(
        lambda cells: (HEADER + ",".join(cells)).encode("utf-8", "surrogatepass")
    )
)
@example(b"")
@example(b'"')
@example(HEADER.encode() + b"x" * 200_000)
@example(b"a" * (1 << 21))
@example(HEADER.encode() + b"TPU v5e,,,spot,1e999,2026-11,x")
@example(HEADER.encode() + b"TPU v5e,,,spot,1,2026-11-" + b"9" * 5000 + b",x")
@example(HEADER.encode() + b"TPU v5e,,,spot,1,2026-11,\r\rx")
def test_prices(tmp_path, data):
    (tmp_path / "p.csv").write_bytes(data)
    try:
        mine = read_prices(tmp_path / "p.csv")
    except ConfigError as error:
        told(error, "p.csv")
        return
    assert all(price.usd_per_chip_hour > 0 for price in mine)
    assert find_price("TPU v5e", extra=mine) is not None
