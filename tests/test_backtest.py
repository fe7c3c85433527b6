"What prices, ruin, unknown depth and the calendar do to an account, on small made tables."
import warnings
from datetime import date

import numpy as np
import polars as pl
import pytest

from atft.backtest import (
    METRICS, Trading, TradingWarning, _luck, backtest, metric, performance, random_portfolios,
    target_weights, traded)
from atft.core import AtftError
from atft.intake import Reading, take
from atft.predictions import dense, load_predictions
from atft.prices import market_of


def made(codes=20, days=60, seed=0, horizon=1, every=None):
    "Predictions that know a little, and days of five a week or every so many days"
    rng = np.random.default_rng(seed)
    calendar = np.busday_offset('2020-01-01', np.arange(days), roll='forward')
    if every: calendar = np.datetime64('2020-01-01')+every*np.arange(days)
    day, code = np.divmod(np.arange(codes*days), codes)
    target = rng.normal(0, .02, codes*days)
    return pl.DataFrame(dict(
        date=calendar.astype('datetime64[D]')[day], code=[f'C{i:03d}' for i in code],
        horizon=np.full(codes*days, horizon, np.int32), target=target,
        prediction=10*target+rng.normal(size=codes*days)))


def priced(predictions, volume=1e6):
    "Closes and volumes of the codes of a table on its days"
    rng = np.random.default_rng(1)
    days = predictions['date'].unique().sort()
    codes = predictions['code'].unique().sort()
    rows = pl.DataFrame(dict(date=days)).join(pl.DataFrame(dict(code=codes)), how='cross')
    moves = pl.Series(rng.normal(0, .02, len(rows)))
    close = 100*(1+pl.col('move')).cum_prod().over('code', order_by='date')
    rows = rows.with_columns(move=moves).with_columns(close=close, dollar_volume=pl.lit(volume))
    return rows.drop('move')


def said(run):
    "The table of a backtest, and what it warned of"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        daily = run()
    return daily, [str(w.message) for w in seen if w.category is TradingWarning]


def test_prices_of_no_code_are_refused_with_codes_of_both_sides():
    p = made()
    other = priced(p).with_columns(pl.col('code')+'.T')
    with pytest.raises(AtftError, match='they have C000.T, .* the predictions C000, C001'):
        backtest(p, prices=other)


def test_codes_without_a_price_are_counted_and_named():
    p = made()
    half = priced(p).filter(pl.col('code') >= 'C010')
    daily, warned = said(lambda: backtest(p, prices=half))
    assert any('10 codes of the predictions have no price' in w and 'C000, C001, C002 and 7 more' in w
               for w in warned)
    assert all('\n' not in w for w in warned)
    assert '10 codes' in traded(p, prices=half).facts.notes[0]


def test_numbers_as_codes_need_a_width():
    p = made().with_columns(pl.col('code').str.slice(1))
    numbers = priced(p).with_columns(pl.col('code').cast(pl.Int64))
    with pytest.raises(AtftError, match='codes=4'):
        backtest(p, prices=numbers)
    padded = take(numbers, ('close',), Reading(codes=3), 'prices')
    assert backtest(p, prices=padded).equals(backtest(p, prices=priced(p)))


def test_prices_that_contradict_each_other_are_refused_and_identical_ones_count_once():
    p = made()
    prices = priced(p)
    daily, warned = said(lambda: backtest(p, prices=pl.concat([prices, prices[:7]])))
    assert daily.equals(backtest(p, prices=prices)) and any('7 identical' in w for w in warned)
    contrary = pl.concat([prices, prices[:30].with_columns(pl.col('close')*1.1)])
    with pytest.raises(AtftError, match='C000.*2020-01-0') as refused:
        backtest(p, prices=contrary)
    assert '\n' not in str(refused.value)


def test_prices_of_every_form_are_the_same(tmp_path):
    p = made()
    prices = priced(p)
    prices.write_parquet(tmp_path/'prices[1].parquet')
    iso = prices.with_columns(pl.col('date').dt.strftime('%Y-%m-%d'))
    expected = backtest(p, prices=prices)
    for same in (prices.to_pandas(), prices.lazy(), prices.to_arrow(), iso,
                 tmp_path/'prices[1].parquet'):
        assert backtest(p, prices=same).equals(expected), type(same)
    for missing in ('code', 'close', 'date'):
        with pytest.raises(AtftError, match=missing):
            backtest(p, prices=prices.drop(missing))


def test_a_stray_day_of_prices_changes_nothing_else():
    p = made()
    prices = priced(p)
    saturday = prices[:1].with_columns(date=pl.lit(date(2020, 1, 11)))
    daily, warned = said(lambda: backtest(p, prices=pl.concat([prices, saturday])))
    assert daily.equals(backtest(p, prices=prices))
    assert any('no sessions (2020-01-11)' in w for w in warned)


@pytest.fixture
def squeezed():
    "The code that is sold short goes up tenfold on the eleventh day"
    p = made()
    days = p['date'].unique().sort()
    rises = (pl.col('code') == 'C000') & (pl.col('date') == days[10])
    return p.with_columns(prediction=pl.col('code').str.slice(1).cast(pl.Float64),
                          target=pl.when(rises).then(10.).otherwise(.001))


def test_a_lost_account_stays_at_0_and_trades_no_more(squeezed):
    daily, warned = said(lambda: backtest(squeezed, share=.05, spread_bps=0))
    value = daily['value'].to_numpy()
    lost = int((value == 0).argmax())
    assert lost == 10 and value.min() == 0 and (value[lost:] == 0).all()
    assert daily['net'][lost] == -1 and (daily['turnover'][lost+1:] == 0).all()
    assert (daily['net'][lost+1:] == 0).all() and daily['turnover'].min() >= 0
    assert f'ruined on {daily["date"][lost]}' in warned[0]
    before = np.append(1., value[:-1])
    np.testing.assert_allclose(value, 1+np.cumsum(before*daily['net'].to_numpy()), atol=1e-10)


@pytest.mark.parametrize('gain', [.001, .2])
def test_no_average_makes_a_lost_account_good(squeezed, gain):
    fell = pl.col('target') < 1
    rich = squeezed.with_columns(target=pl.when(fell & (pl.col('code') == 'C019')).then(gain)
                                 .otherwise('target'))
    found = performance(traded(rich, share=.05, spread_bps=0).daily, draws=0)
    values = {name: metric(found, name)[0] for name in METRICS}
    assert values['max_drawdown'] == 1 and values['cagr'] == -1
    for name in ('return', 'sharpe', 'sortino', 'calmar'): assert values[name] < 0, name
    assert values['omega'] == 0


def test_no_series_falls_by_more_than_everything():
    rng = np.random.default_rng(0)
    for _ in range(50):
        net = rng.normal(-.02, rng.uniform(.01, .8), 40)
        table = pl.DataFrame(dict(net=net, gross=net, turnover=1.))
        found = performance(table, draws=0, sessions_a_year=252)
        assert 0 <= metric(found, 'max_drawdown')[0] <= 1 and metric(found, 'cagr')[0] >= -1


def test_a_larger_account_never_earns_more():
    p = made(days=80)
    prices = priced(p)
    gaps = prices.with_columns(pl.when(pl.col('code') < 'C008').then(pl.col('dollar_volume')))
    still = prices.with_columns(close=pl.when(pl.col('code') < 'C008').then(100.).otherwise('close'))
    nothing = prices.with_columns(pl.when(pl.col('code') < 'C008').then(0.)
                                  .otherwise('dollar_volume').alias('dollar_volume'))
    for quotes in (prices, gaps, still, nothing):
        worth = []
        for capital in 10.**np.arange(3, 20, 2):
            daily = traded(p, prices=quotes, impact=1., capital=float(capital)).daily
            assert np.isfinite(daily['value'].to_numpy()).all()
            worth.append(daily['value'][-1])
        assert (np.diff(worth) <= 1e-12).all(), worth
        assert worth[-1] < worth[0]


def test_who_is_not_known_to_be_deep_is_not_traded():
    p = made()
    prices = priced(p).with_columns(dollar_volume=pl.lit(None, pl.Float64))
    found = traded(p, prices=prices, impact=1.)
    assert found.daily['turnover'].sum() == 0 and found.facts.shallow > 0
    warned = said(lambda: backtest(p, prices=prices, impact=1.))[1]
    assert any('volume or volatility' in w for w in warned)


def held(codes, **terms):
    "How many codes one day holds"
    p = made(codes, 2)
    daily = traded(p.with_columns(target=pl.lit(.01)), spread_bps=0, **terms)
    p = p.with_columns(target=pl.lit(0.))
    weights = target_weights(dense(load_predictions(p), 1).prediction, Trading(**terms))
    return int((weights[0] > 0).sum()), daily.facts


def test_a_side_has_as_many_names_as_were_asked_for():
    assert held(60, side='long', top=50)[0] == 50
    assert held(60, top=50)[0] == 30
    assert held(100, share=.29)[0] == 29
    assert held(100, share=.29, side='long')[0] == 29
    assert held(40, side='long', top=50)[0] == 40
    assert held(40, side='long', top=50)[1].fewer == 2


def test_a_tenth_of_nine_names_is_none_and_said():
    assert held(9)[0] == 0 and held(9)[1].idle == 2
    warned = said(lambda: backtest(made(9, 30)))[1]
    assert any('nothing is chosen on 30 of 30 days: they have fewer than 10 names' in w
               for w in warned)
    assert held(10)[1].idle == 0


CALENDARS = [(None, 252), (1, 365), (7, 52), (30, 12)]


@pytest.mark.parametrize('every, year', CALENDARS)
def test_a_year_has_the_sessions_of_its_calendar(every, year):
    p = made(days=60, every=every)
    assert traded(p).facts.sessions_a_year == year
    daily = traded(p).daily
    net = daily['net'].to_numpy()
    found = performance(daily, draws=0)
    assert metric(found, 'return')[0] == pytest.approx(net.mean()*year)
    assert metric(found, 'sharpe')[0] == pytest.approx(net.mean()/net.std()*year**.5)
    assert metric(found, 'cagr')[0] == pytest.approx(np.prod(1+net)**(year/len(net))-1)
    told = performance(daily, draws=0, sessions_a_year=245)
    assert metric(told, 'volatility')[0] == pytest.approx(net.std()*245**.5)
    luck = random_portfolios(p, count=2)
    other = random_portfolios(p, count=2, trading=Trading(sessions_a_year=4*year))
    np.testing.assert_allclose(other, 2*luck)


def test_borrowing_costs_the_days_of_the_calendar():
    p = made(days=60, every=7)
    free = traded(p).daily
    dear = traded(p, borrow_bps=520).daily
    assert (dear['cost']-free['cost'])[0] == pytest.approx(.5*520e-4/52)


def weekly(days=200, codes=30, every=5, seed=0):
    "Closes whose drift lasts `every` sessions, predictions of it when it begins, and the drift"
    rng = np.random.default_rng(seed)
    drift = np.repeat(rng.normal(0, .004, (days//every, codes)), every, 0)
    moves = drift+rng.normal(0, .01, (days, codes))
    close = 100*np.exp(np.vstack([np.zeros(codes), moves[:-1].cumsum(0)]))
    calendar = np.busday_offset('2020-01-01', np.arange(days), roll='forward')
    names = [f'C{i:02d}' for i in range(codes)]
    prices = pl.DataFrame(dict(date=calendar.repeat(codes), code=names*days, close=close.ravel()))
    at = np.arange(0, days-every-1, every)
    predictions = pl.DataFrame(dict(
        date=calendar[at].repeat(codes), code=names*len(at), horizon=every,
        prediction=drift[at].ravel(), target=(close[at+every]/close[at]-1).ravel()))
    return prices, predictions, close, drift, at


@pytest.mark.parametrize('every', [5, 20])
@pytest.mark.parametrize('entry', ['close', 'next_close'])
def test_predictions_that_are_not_made_daily_are_held(every, entry):
    prices, predictions, close, drift, at = weekly(every=every)
    late = int(entry == 'next_close')
    at = at[at+late+every < len(close)]
    order = drift[at].argsort(1)
    earned = close[at+late+every]/close[at+late]-1
    held = [e[o[-3:]].mean()/2-e[o[:3]].mean()/2 for e, o in zip(earned, order)]
    found = traded(predictions, every, prices=prices, spread_bps=0., entry=entry)
    daily = found.daily
    assert (daily['gross'] != 0).mean() > .99
    by_decision = (1+daily['gross'].to_numpy()[:len(at)*every].reshape(-1, every)).prod(1)-1
    np.testing.assert_allclose(by_decision, held, atol=1e-9)
    sessions = np.arange(len(daily)) % every
    assert (daily['turnover'].to_numpy()[sessions > 0] == 0).all()  # no trade until the next
    assert found.facts.sessions_a_year == 252
    assert 'positions are held until the next ones' in found.facts.notes[-1]


def test_a_daily_table_is_traded_daily_and_nothing_is_held_over_a_long_gap():
    p = made(days=60, horizon=1)
    prices = priced(p)
    assert traded(p, prices=prices).facts.notes == ()
    days = p['date'].unique().sort()
    folds = p.filter(~pl.col('date').is_in(days[20:40].to_list()))
    found = traded(folds, prices=prices)
    gap = found.daily.filter(pl.col('date').is_in(days[22:40].to_list()))
    assert (gap['positions'].abs() < 1e-12).all() and (gap['gross'] == 0).all()
    assert '1 of 59 sessions have no predictions' in found.facts.notes[0]


def test_rare_days_without_prices_are_said():
    assert 'taken for a session' in traded(made(days=60, every=7)).facts.notes[0]
    assert traded(made(days=60)).facts.notes == ()


def test_business_days_have_their_year_also_where_predictions_are_weekly():
    prices, predictions, close, drift, at = weekly(days=400)
    daily = traded(predictions, 5, prices=prices, spread_bps=0.).daily
    order = drift[at].argsort(1)
    earned = close[at+5]/close[at]-1
    held = np.mean([e[o[-3:]].mean()/2-e[o[:3]].mean()/2 for e, o in zip(earned, order)])
    shown = metric(performance(daily, draws=0), 'return')[0]
    assert shown == pytest.approx(held*252/5, rel=.06)  # and 261 without holidays


RISING = np.array([.01, 0, .02, .005]*15)


@pytest.mark.parametrize('losses, bound', [(0, np.inf), (1, np.inf), (30, None)])
def test_without_a_losing_day_ratios_to_losses_have_no_bound(losses, bound):
    net = RISING.copy()
    net[:losses] = -.004
    table = pl.DataFrame(dict(gross=net, net=net, turnover=.1))
    found = performance(table, sessions_a_year=252)
    for name in ('sortino', 'calmar', 'omega'):
        value, low, high = metric(found, name)
        assert np.isinf(value) == (losses == 0) and low <= value <= high
        assert (high == np.inf) == (bound is not None), name
    assert all(np.isfinite(metric(found, 'sharpe')))
    assert metric(performance(table.with_columns(net=pl.lit(0.)), sessions_a_year=252), 'omega')[0] == 0


def turning_over(share=.5, days=120, codes=40):
    "Predictions of a universe whose first half makes way for the second, and prices of it"
    p = made(codes, days)
    middle = p['date'].unique().sort()[int(share*days)]
    is_old = pl.col('code') < f'C{codes//2:03d}'
    return p.filter(is_old == (pl.col('date') < middle))


@pytest.mark.parametrize('with_prices', [False, True])
@pytest.mark.parametrize('horizon', [1, 5])
def test_shuffled_portfolios_trade_as_much_where_the_universe_turns_over(horizon, with_prices):
    p = turning_over()
    later = p.with_columns(horizon=pl.lit(horizon, pl.Int32))
    if horizon > 1: p = pl.concat([p, later])
    quotes = priced(later) if with_prices else None
    if with_prices: quotes = quotes.join(later.select('date', 'code'), on=['date', 'code'])
    p = load_predictions(p)
    chosen = dense(p, horizon)
    market = market_of(chosen, p, Trading(), quotes)
    ours = traded(p, horizon, prices=quotes).daily['turnover'].mean()
    weights = target_weights(chosen.prediction, Trading(), horizon).numpy()
    for seed in range(5):
        luck = _luck(weights, market, Trading(), np.random.default_rng(seed))
        assert luck['turnover'].mean() == pytest.approx(ours, rel=.02)
    assert len(set(random_portfolios(p, horizon, count=4, prices=quotes))) == 4


def test_shuffled_portfolios_know_nothing_of_delistings():
    "Who never holds what is delisted does not lend that knowledge to luck"
    p = made(40, 80)
    is_gone = pl.col('code') < 'C010'
    end = p['date'].unique().sort()[60]
    p = p.filter(~is_gone | (pl.col('date') < end)).with_columns(
        prediction=pl.when(is_gone).then(-99.).otherwise('prediction'))
    prices = priced(p).join(p.select('date', 'code'), on=['date', 'code'])
    terms = dict(side='long', spread_bps=0.)
    costly = dict(delisting=-.9, **terms)
    assert traded(p, prices=prices, **terms).daily.equals(traded(p, prices=prices, **costly).daily)
    free, dear = [random_portfolios(p, count=8, prices=prices, trading=Trading(**each))
                  for each in (terms, costly)]
    assert (dear < free).any()


def test_a_delisting_return_needs_prices_as_impact_does():
    p = made()
    for terms in (dict(delisting=-.3), dict(impact=1.)):
        with pytest.raises(AtftError, match='price') as refused:
            backtest(p, **terms)
        assert '\n' not in str(refused.value)
        with pytest.raises(AtftError, match='price'):
            random_portfolios(p, count=2, trading=Trading(**terms))
    assert len(backtest(p, prices=priced(p), delisting=-.3)) == 59
