"On real prices, when a folder of them is given: repairs are counted, and a known number comes out"
import numpy as np
import polars as pl
from atft.bars import count_repairs, open_panel
from atft.baselines import reversal
from atft.judge import evaluate

def test_the_panel_of_real_bars_gives_the_known_reversal(market_data, tmp_path):
    shards = sorted(market_data.glob('*.parquet'))
    repairs = dict(count_repairs(pl.scan_parquet(shards)).select('rule', 'bars').iter_rows())
    assert repairs['zero_price'] > 0 and repairs['stale'] > 0 and repairs['swapped'] > 0 and repairs['outside'] > 0
    panel = open_panel(market_data, cache=tmp_path)
    assert len(panel.spec.features) == 25
    days = panel.dates[panel.dates >= np.datetime64('2013-01-01')]
    one = evaluate(reversal(panel, days, 1).filter(pl.col('horizon') == 1)).row(0, named=True)
    assert .022 < one['rank_ic'] < .036 and one['low'] > 0, one  # published with the data: 0.029 [0.022, 0.036]
