"On real prices, when a folder of them is given: repairs are counted, and a known number comes out"
import numpy as np
import polars as pl

from atft.bars import count_repairs, open_panel
from atft.baselines import reversal
from atft.judge import evaluate


def test_the_panel_of_real_bars_gives_the_known_reversal(market_data, tmp_path):
    shards = sorted(market_data.glob('*.parquet'))
    counts = count_repairs(pl.scan_parquet(shards))
    repairs = dict(counts.select('rule', 'bars').iter_rows())
    for rule in ('zero_price', 'stale', 'swapped', 'outside'):
        assert repairs[rule] > 0, rule
    panel = open_panel(market_data, cache=tmp_path)
    assert len(panel.spec.features) == 25
    days = panel.dates[panel.dates >= np.datetime64('2013-01-01')]
    next_day = reversal(panel, days, 1).filter(pl.col('horizon') == 1)
    one = evaluate(next_day).row(0, named=True)
    # published with the data: 0.029 [0.022, 0.036]
    assert .022 < one['rank_ic'] < .036 and one['low'] > 0, one
