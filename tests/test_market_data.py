"On real prices, when a folder of them is given: repairs are counted, and a known number comes out"
import numpy as np
import polars as pl

from atft.bars import open_panel
from atft.baselines import reversal
from atft.judge import evaluate


def test_the_panel_of_real_bars_gives_the_known_reversal(market_data, tmp_path):
    panel = open_panel(market_data, cache=tmp_path)
    for rule in ('zero_price', 'stale', 'swapped', 'outside'):
        assert panel.findings['repairs'][rule]['bars'] > 0, rule
    assert len(panel.spec.features) == 25+panel.spec.steps == 30
    days = panel.dates[panel.dates >= np.datetime64('2013-01-01')]
    next_day = reversal(panel, days, 1).filter(pl.col('horizon') == 1)
    one = evaluate(next_day).row(0, named=True)
    # published with the data: 0.029 [0.022, 0.036]
    assert .022 < one['rank_ic'] < .036 and one['low'] > 0, one
