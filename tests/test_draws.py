"Intervals drawn for all rows together are those of one draw after the other; arch is not imported for none"
import subprocess
import sys
import warnings

import numpy as np
import polars as pl
import pytest

from atft import backtest, intervals

GENERATOR = np.random.default_rng(7)
PLACES = np.arange(120)
RISKY = GENERATOR.normal(.001, .02, 120)
SLOW = np.convolve(GENERATOR.normal(0, .01, 140), np.ones(21)/5, 'valid')
SERIES = dict(
    risky=RISKY, slow=SLOW, zeros=np.zeros(120), constant=np.full(120, .003), gains=np.abs(RISKY),
    one_loss=np.where(PLACES == 7, -.002, np.abs(RISKY)+1e-4), losses=-np.abs(RISKY),
    ruined=np.where(PLACES == 60, -1., RISKY), below_all=np.where(PLACES == 60, -1.7, RISKY),
    nearly=np.where(PLACES == 60, -.9999, RISKY), short=RISKY[:15], least=RISKY[:20],
    tiny=RISKY*1e-12, large=RISKY*100, fat=GENERATOR.standard_t(2, 120)*.01,
    sparse=np.where(PLACES % 17 == 0, RISKY, 0.), rich=np.abs(RISKY)+5,
    coin=np.where(RISKY > 0, .01, 0.), long=GENERATOR.normal(0, .01, 2600), weekly=RISKY[:52])

@pytest.mark.parametrize('name', SERIES)
def test_a_row_each_or_one_after_the_other_are_the_same_bits(name, monkeypatch):
    x = SERIES[name]
    turnover = np.abs(SLOW)[:len(x)] if len(x) <= 120 else np.abs(x)
    daily = pl.DataFrame(dict(gross=x+.0005*turnover, net=x, turnover=turnover))

    def one_by_one(x, statistic, draws, rows):
        assert rows
        def of_one(sample): return statistic(sample[None])[0]
        return intervals.bootstrap_interval(x, of_one, draws)

    with warnings.catch_warnings():
        warnings.simplefilter('ignore', RuntimeWarning)
        together = backtest.performance(daily, draws=60, sessions_a_year=252)
        backtest._interval_of.cache_clear()
        monkeypatch.setattr(backtest, 'bootstrap_interval', one_by_one)
        alone = backtest.performance(daily, draws=60, sessions_a_year=252)
        backtest._interval_of.cache_clear()
    assert together.rows() == alone.rows()

def test_arch_is_not_imported_where_no_interval_is_asked():
    told = ('import sys, numpy as np, polars as pl; import atft.eval as e; '
            'x = np.random.default_rng(0).normal(size=60)*.01; '
            'd = pl.DataFrame(dict(gross=x, net=x, turnover=0*x)); '
            'e.performance(d, draws=0, sessions_a_year=252); print("arch" in sys.modules); '
            'e.performance(d, draws=9, sessions_a_year=252); print("arch" in sys.modules)')
    out = subprocess.run([sys.executable, '-c', told], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ['False', 'True']
