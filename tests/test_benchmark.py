"What an account earned beyond a benchmark, and what is left of it in a larger one; against other packages."
import warnings
from datetime import date
from types import SimpleNamespace

import empyrical
import numpy as np
import polars as pl
import pytest
import statsmodels.api as sm
from test_backtest import made, priced

from atft.backtest import Trading, TradingWarning, traded
from atft.benchmark import _given, benchmark_returns, benchmark_section, beyond, broad_returns, read_benchmark
from atft.capacity import capacity, capacity_of, capacity_section, limits, sized
from atft.core import AtftError


def values(found): return dict(found.select('metric', 'value').iter_rows())


@pytest.mark.parametrize('seed', range(3))
def test_beta_and_alpha_are_those_of_empyrical_and_of_least_squares(seed):
    rng = np.random.default_rng(seed)
    its = rng.standard_t(4, 500)*.008
    ours = .0004+.7*its+rng.normal(0, .01, 500)
    daily = pl.DataFrame(dict(net=ours, gross=ours, turnover=0.))
    found = values(beyond(daily, its, draws=0, sessions_a_year=252))
    assert found['beta'] == pytest.approx(empyrical.beta(ours, its))
    compounded = (1+found['alpha']/252)**252-1  # empyrical compounds the daily mean, this room multiplies it
    assert compounded == pytest.approx(empyrical.alpha(ours, its))
    fitted = sm.OLS(ours, sm.add_constant(its)).fit().params
    assert [found['alpha']/252, found['beta']] == pytest.approx(list(fitted))
    excess = empyrical.excess_sharpe(ours, its)*(500/499)**.5*252**.5  # which divides by n-1, by the day
    assert found['information_ratio'] == pytest.approx(excess)
    assert found['tracking_error'] == pytest.approx(empyrical.annual_volatility(ours-its)*(499/500)**.5)
    assert found['active_return'] == pytest.approx((ours-its).mean()*252)


def test_an_interval_covers_what_was_put_in():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(6):
        its = rng.normal(0, .01, 250)
        daily = pl.DataFrame(dict(net=.5*its+rng.normal(.001, .01, 250), gross=0., turnover=0.))
        rows = beyond(daily, its, draws=100, sessions_a_year=252).filter(pl.col('metric').is_in(['beta', 'alpha']))
        covered += sum(low < true < high for low, high, true in zip(rows['low'], rows['high'], (.5, .252)))
    assert covered >= 9  # of 12


@pytest.fixture
def closes():
    calendar = np.busday_offset('2020-01-01', np.arange(70), roll='forward').astype('datetime64[D]')
    move = np.random.default_rng(3).normal(0, .01, 70)
    return pl.DataFrame(dict(date=calendar, close=1000*np.exp(move.cumsum())))


def test_a_benchmark_of_every_form_is_the_same(closes, tmp_path):
    closes.write_csv(tmp_path/'topix.csv')
    closes.with_columns(code=pl.lit('TOPIX')).write_parquet(tmp_path/'long.parquet')
    wide = closes.rename(dict(close='TOPIX')).with_columns(OTHER=pl.lit(5.))
    wide.write_csv(tmp_path/'wide.csv')
    returns = closes.select('date', pl.col('close').pct_change().fill_null(0.).alias('return'))
    expected = benchmark_returns(closes.rename(dict(close='level')), closes['date'])
    forms = dict(topix=tmp_path/'topix.csv', TOPIX=tmp_path/'long.parquet', benchmark=returns)
    for name, source in forms.items():
        read = read_benchmark(source)
        assert list(read.levels) == [name] and not read.notes
        np.testing.assert_allclose(benchmark_returns(read.levels[name], closes['date']), expected)
    for source in (wide, tmp_path/'wide.csv', wide.to_pandas(), wide.to_pandas().set_index('date')):
        assert list(read_benchmark(source).levels) == ['TOPIX', 'OTHER'], type(source)
    assert read_benchmark(closes.to_pandas().set_index('date')).levels['benchmark'].equals(
        closes.rename(dict(close='level')))


@pytest.mark.parametrize('table, found', [
    (dict(date=[date(2024, 1, 1)], code=['A']), 'neither a column close nor a column return'),
    (dict(date=[date(2024, 1, 1)], close=[0.]), 'must be above 0'),
    (dict(date=[date(2024, 1, 1)], mine=[-.01]), 'returns belong in a column return'),
    (dict(date=[date(2024, 1, 1)]*2, close=[1., 2.]), '2024-01-01')])
def test_a_benchmark_that_cannot_be_read_is_refused_in_a_line(table, found):
    with pytest.raises(AtftError, match='benchmark') as refused: read_benchmark(pl.DataFrame(table))
    assert found in str(refused.value) and '\n' not in str(refused.value)


@pytest.mark.parametrize('entry', ['close', 'next_close'])
@pytest.mark.parametrize('terms', [{}, dict(rebalance=5), dict(keep=2)])
def test_who_holds_the_benchmark_has_beta_1_and_nothing_beyond(entry, terms):
    p = made(20, 60).with_columns(prediction=pl.col('code').str.slice(1).cast(pl.Float64))
    prices = priced(p)
    held = prices.filter(pl.col('code') == 'C019').select('date', 'close')
    daily = traded(p, prices=prices, side='long', top=1, spread_bps=0., entry=entry, **terms).daily
    found = values(beyond(daily, held, draws=0, entry=entry))
    assert [found[m] for m in ('beta', 'alpha', 'tracking_error')] == pytest.approx([1, 0, 0], abs=1e-9)
    assert found['lacking'] == 0


def test_days_that_lack_are_counted_and_said(closes):
    p = made(20, 60)
    daily = traded(p, prices=priced(p)).daily
    holes = closes.with_columns(close=pl.when(pl.col('date') == closes['date'][7]).then(None).otherwise('close'))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        found = values(beyond(daily, holes, draws=0))
    assert found['lacking'] == 2 and found['days'] == 57
    assert ['1 days without a number left out' in str(w.message) for w in seen
            if w.category is TradingWarning] == [True]
    whole = values(beyond(daily, closes, draws=0))
    assert whole['lacking'] == 0
    with pytest.raises(AtftError, match='0 of 59 days'):
        beyond(daily, closes.with_columns(pl.col('date').dt.offset_by('20y')), draws=0)
    with pytest.raises(AtftError, match='there are several'):
        beyond(daily, closes.with_columns(OTHER=pl.col('close')).rename(dict(close='TOPIX')), draws=0)


def test_weights_by_value_traded_are_those_of_the_days_before():
    p = made(6, 30)
    prices = priced(p)
    volume = 1e6*(1+pl.col('code').str.slice(1).cast(pl.Float64))*(1+pl.col('date').dt.day())
    prices = prices.with_columns(dollar_volume=volume)
    both, why = broad_returns(p, Trading(), prices)
    assert why == ''
    close, traded_value = [prices.pivot('code', index='date', values=c).sort('date').drop('date').to_numpy()
                           for c in ('close', 'dollar_volume')]
    for t in (6, 12, 25):
        weights = traded_value[max(0, t-19):t+1].mean(0)
        moves = close[t+1]/close[t]-1
        assert both['by value traded']['return'][t] == pytest.approx((weights*moves).sum()/weights.sum())
        assert both['equal weights']['return'][t] == pytest.approx(moves.mean())
    none, why = broad_returns(p, Trading(), prices.drop('dollar_volume'))
    assert list(none) == ['equal weights'] and 'dollar_volume' in why


def a_result(p, daily):
    frames = SimpleNamespace(trades=SimpleNamespace(daily=dict(mine=daily), why=''))
    return SimpleNamespace(everything=dict(mine=p), last='mine', sessions_a_year=252), frames


def test_sections_say_what_they_cannot_say(closes, tmp_path):
    p = made(20, 60)
    prices = priced(p)
    result, frames = a_result(p, traded(p, prices=prices).daily)
    drawn = []
    def show(name, figure):
        drawn.append(name)
        return f'![]({name}.png)'
    whole = benchmark_section(result, frames, closes, prices, show=show)
    assert whole[0] == '## Beyond a benchmark' and '| benchmark |' in whole[2] and '| by value traded |' in whole[2]
    assert 'No benchmark was given' in benchmark_section(result, frames, None, None)[-1]
    assert 'cannot be read: benchmark: ' in _given(tmp_path/'no.csv', [], 'close')[1][0]
    nothing = SimpleNamespace(trades=SimpleNamespace(daily={}, why='there are no prices'))
    assert benchmark_section(result, nothing, closes, prices)[1:] == ['Nothing is traded: there are no prices.']
    whole = capacity_section(result, frames, Trading(), prices, show=show)
    assert whole[0] == '## Capacity' and 'impact=0' in whole[-2]
    assert 'volatility of the last 20 sessions is not known' in whole[-1]
    assert drawn == ['benchmark', 'capacity']
    for without in (None, prices.drop('dollar_volume')):
        title, why = capacity_section(result, frames, None, without)
        assert why.startswith('No capacity is known: ') and 'dollar_volume' in why


def knowing(codes=40, days=80):
    "Prices of a market, and predictions that know much of what each next day brings"
    p = made(codes, days)
    prices = priced(p)
    move = (pl.col('close').shift(-1)/pl.col('close')-1).over('code', order_by='date')
    coming = prices.select('date', 'code', move=move.fill_null(0.))
    noise = pl.Series(np.random.default_rng(5).normal(0, .02, len(p)))
    told = p.join(coming, on=['date', 'code'], maintain_order='left').with_columns(prediction=pl.col('move')+noise)
    return told.drop('move'), prices


@pytest.mark.parametrize('terms', [{}, dict(keep=.3), dict(rebalance=5), dict(side='long'),
                                   dict(borrow_bps=50., carry_bps=50.)])
def test_a_larger_capital_leaves_less(terms):
    p, prices = knowing()
    found = capacity(p, Trading(impact=1., **terms), prices, 10.**np.arange(1, 8), draws=20)
    assert (found['sharpe'].diff().drop_nulls() < 0).all()
    assert (found['cost'].diff().drop_nulls() > 0).all()
    assert found['low'].null_count() == 0
    np.testing.assert_allclose(found['participation'].to_numpy(), found['participation'][0]*10.**np.arange(7))
    account = sized(p, Trading(impact=1., **terms), prices)
    ends = limits(account)
    half, zero = capacity_of(account, [ends['half'], ends['zero']], draws=0)['sharpe']
    assert half == pytest.approx(ends['gross']/2) and zero == pytest.approx(0, abs=1e-9)
    assert ends['half'] < ends['zero']


@pytest.mark.parametrize('capital', [1e3, 1e6])
def test_the_first_trades_cost_what_the_account_of_that_capital_pays(capital):
    p = made(40, 40)
    trading = Trading(impact=.7, capital=capital, borrow_bps=40.)
    account = sized(p, trading, priced(p))
    daily = traded(p, trading=trading, prices=priced(p)).daily
    paid = account.fixed+capital**.5*account.moved
    first = int(np.flatnonzero(account.moved)[0])
    assert paid[first] == pytest.approx(daily['cost'][first], rel=1e-9)
    assert account.moved[first] > 0


def test_without_impact_the_usual_one_is_used_and_said():
    p = made(40, 40)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        found = capacity(p, Trading(), priced(p), [1e5], draws=0)
    assert any('impact=0' in str(w.message) for w in seen if w.category is TradingWarning)
    assert found.equals(capacity(p, Trading(impact=1.), priced(p), [1e5], draws=0))
