"Who is held: buffers, days between two choices, and what holding costs, on small made tables."
import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_backtest import made, priced, weekly

from atft.backtest import Trading, _luck, backtest, traded
from atft.choices import choose, schedule, target_weights, weights_after
from atft.core import AtftError
from atft.predictions import dense, load_predictions
from atft.prices import HELD, market_of


def persistent(memory=.9, codes=40, days=120, seed=0, vanish=0.):
    "Scores [D, N] that change slowly; some are not there on some days"
    rng = np.random.default_rng(seed)
    score = rng.normal(size=(days, codes))
    for t in range(1, days):
        score[t] = memory*score[t-1]+(1-memory**2)**.5*score[t]
    score[rng.random(score.shape) < vanish] = np.nan
    return score


def as_table(score, horizon=1, seed=1):
    "A table of predictions of such scores, with returns that they know a little of"
    days, codes = score.shape
    rng = np.random.default_rng(seed)
    calendar = np.busday_offset('2020-01-01', np.arange(days), roll='forward')
    target = .001*np.nan_to_num(score)+rng.normal(0, .01, score.shape)
    table = pl.DataFrame(dict(
        date=calendar.astype('datetime64[D]').repeat(codes), code=[f'C{i:03d}' for i in range(codes)]*days,
        horizon=np.full(score.size, horizon, np.int32), prediction=score.ravel(), target=target.ravel()))
    return table.filter(pl.col('prediction').is_not_nan())


def turnover(score, **terms):
    return traded(as_table(score), **terms).daily['turnover'].mean()


SIDES = st.sampled_from(['long', 'long_short'])


@given(seed=st.integers(0, 10**6), memory=st.floats(.5, .99), side=SIDES)
@settings(max_examples=15, deadline=None)
def test_on_persistent_scores_a_wider_buffer_never_trades_more(seed, memory, side):
    score = persistent(memory, seed=seed)
    widths = [None, 6, 9, 14, 20]
    found = [turnover(score, side=side, top=6, keep=keep) for keep in widths]
    assert found[0] == found[1]
    assert all(after <= before for before, after in zip(found[1:], found[2:])), found


@given(seed=st.integers(0, 10**6), size=st.integers(1, 15), levels=st.integers(2, 50), side=SIDES,
       horizon=st.integers(1, 6), every=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_a_buffer_no_wider_than_the_choice_is_none(seed, size, levels, side, horizon, every):
    "Ties, gaps and all"
    score = np.round(persistent(days=30, seed=seed, vanish=.2)*levels/3)
    plain = Trading(top=size, side=side, rebalance=every)
    x = torch.from_numpy(score)
    same = Trading(top=size, side=side, rebalance=every, keep=size)
    assert target_weights(x, plain, horizon).equal(target_weights(x, same, horizon))
    by_share = dict(share=size/40, side=side, rebalance=every)
    same = Trading(**by_share, keep=size/40)
    assert target_weights(x, Trading(**by_share), horizon).equal(target_weights(x, same, horizon))


@given(seed=st.integers(0, 10**6), cut=st.integers(1, 39), keep=st.sampled_from([None, 8, 12, 20]),
       every=st.integers(1, 9), horizon=st.integers(1, 12), side=SIDES)
@settings(max_examples=60, deadline=None)
def test_no_day_depends_on_a_later_one(seed, cut, keep, every, horizon, side):
    score = persistent(days=40, seed=seed, vanish=.1)
    future = score.copy()
    future[cut:] = persistent(days=40, seed=seed+1, vanish=.3)[cut:]
    trading = Trading(top=5, keep=keep, rebalance=every, side=side)
    one, other = [target_weights(torch.from_numpy(x), trading, horizon) for x in (score, future)]
    assert one[:cut].equal(other[:cut])


@given(seed=st.integers(0, 10**6), keep=st.integers(5, 20), side=SIDES)
@settings(max_examples=40, deadline=None)
def test_who_is_held_follows_the_rule_name_by_name(seed, keep, side):
    "Against a loop over names that reads as the sentence does; no ties here"
    score = persistent(days=25, seed=seed, vanish=.15)
    held = set()
    chosen = choose(score, Trading(top=5, keep=keep, side=side))
    for day, weights in zip(score, chosen):
        order = [n for n in np.argsort(-day) if np.isfinite(day[n])]
        most = len(order) if side == 'long' else len(order)//2
        held = set(order[:min(5, most)]) | held & set(order[:min(keep, most)])
        assert set(np.flatnonzero(weights > 0)) == held
        assert weights[weights > 0].sum() == pytest.approx(1 if side == 'long' else .5)


def test_who_vanishes_leaves_and_comes_back_only_among_the_best():
    score = np.tile(np.arange(20.), (4, 1))
    score[1, 19] = np.nan
    score[2:, 19] = 15.5
    held = choose(score, Trading(top=2, keep=8, side='long'))
    assert (held[:, 19] > 0).tolist() == [True, False, False, False]
    assert (held[:, 18] > 0).all()


def test_names_that_tie_across_the_wider_border_are_kept_or_let_go_together():
    score = np.arange(20.)[None].repeat(2, 0)
    score[1, 15:] = [1., 30, 31, 9.5, 9.5]  # 18 and 19 fall to where 9 would be, and tie
    twice = choose(score, Trading(top=2, keep=9, side='long'))[1]
    assert twice[18] == twice[19]
    edge = score.copy()
    edge[1, [18, 19]] = 12.
    edge[1, 12] = 12.
    held = choose(edge, Trading(top=2, keep=5, side='long'))[1] > 0
    assert held[18] == held[19]


@pytest.mark.parametrize('with_prices', [False, True])
def test_between_two_choices_nothing_is_traded_and_holdings_drift(with_prices):
    p = made(20, 30)
    prices = priced(p) if with_prices else None
    daily = traded(p, prices=prices, rebalance=5, spread_bps=0.).daily
    sessions = np.arange(len(daily)) % 5
    trades = daily['turnover'].to_numpy()
    assert (trades[sessions > 0] == 0).all() and (trades[sessions == 0] > 0).all()
    plain = dense(load_predictions(p), 1)
    market = market_of(plain, load_predictions(p), Trading(), prices)
    value = 1.
    for first in range(0, len(daily), 5):  # bought and held by hand
        held = target_weights(plain.prediction, Trading())[first].numpy()*value
        cash = value-held.sum()
        for t in range(first, min(first+5, len(daily))):
            held = held*(1+market.returns[t])
            assert daily['value'][t] == pytest.approx(cash+held.sum(), abs=1e-12)
        value = cash+held.sum()


def test_a_choice_of_h_sessions_every_n_is_held_in_h_over_n_parts():
    score = persistent(days=40)
    x = torch.from_numpy(score)
    every = schedule(np.arange(40), 5)
    chosen = choose(score[::5], Trading())
    ten, _ = weights_after(score, Trading(rebalance=5), 10, every)
    np.testing.assert_allclose(ten[10:15], np.tile((chosen[1]+chosen[2])/2, (5, 1)))
    assert target_weights(x, Trading(rebalance=5), 10).equal(torch.from_numpy(ten))
    short, _ = weights_after(score, Trading(rebalance=5), 1, every)
    np.testing.assert_allclose(short[::5], chosen)


def test_weekly_predictions_choose_when_they_come_and_seldom_if_told():
    prices, predictions, *_ = weekly(every=5)
    plain = traded(predictions, 5, prices=prices)
    assert traded(predictions, 5, prices=prices, rebalance=5).daily.equals(plain.daily)
    seldom = traded(predictions, 5, prices=prices, rebalance=7)
    trades = seldom.daily['turnover'].to_numpy()
    at = np.arange(len(trades)) % 10 == 0
    assert (trades[~at] == 0).all() and (trades[at] > 0).mean() > .9
    assert 'rebalance=7' in seldom.facts.notes[0] and '10 sessions' in seldom.facts.notes[0]
    assert seldom.facts.days == (plain.facts.days+1)//2


def test_a_new_fold_chooses_at_once_and_keeps_nobody():
    p = made(days=60)
    prices = priced(p)
    days = p['date'].unique().sort()
    folds = p.filter(~pl.col('date').is_in(days[20:40].to_list()))
    alone = p.filter(pl.col('date') >= days[40])
    terms = dict(prices=prices, rebalance=7, keep=.3, spread_bps=0.)
    both = traded(folds, **terms).daily.filter(pl.col('date') >= days[40])
    second = traded(alone, **terms).daily
    np.testing.assert_allclose(both['net'], second['net'], atol=1e-12)


@pytest.mark.parametrize('terms', [dict(keep=.3), dict(rebalance=5), dict(top=4, keep=10, rebalance=3)])
@pytest.mark.parametrize('horizon', [1, 5])
def test_shuffled_portfolios_trade_as_much(terms, horizon):
    p = as_table(persistent(), 1)
    if horizon > 1: p = pl.concat([p, p.with_columns(horizon=pl.lit(horizon, pl.Int32))])
    p = load_predictions(p)
    trading = Trading(**terms)
    chosen = dense(p, horizon)
    market = market_of(chosen, p, trading, None)
    weights, _ = weights_after(chosen.prediction.numpy(), trading, horizon, market.plan)
    ours = traded(p, horizon, trading).daily['turnover']
    for seed in range(4):
        luck = _luck(weights, market, trading, np.random.default_rng(seed))['turnover']
        assert luck.mean() == pytest.approx(ours.mean(), rel=.04)
        assert ((luck == 0) == (ours == 0)).all()
    if 'rebalance' in terms: assert (market.decided == HELD).any()


def two_codes(days=8):
    "Two codes whose price stands still, and predictions that always prefer B"
    calendar = np.busday_offset('2024-01-01', np.arange(days), roll='forward').astype('datetime64[D]')
    table = pl.DataFrame(dict(date=calendar.repeat(2), code=['A', 'B']*days, horizon=1,
                              prediction=[0., 1.]*days, target=0.))
    return table


def test_what_holding_costs_is_right_to_the_cent():
    "An account of 1,000,000 and a year of 252 sessions: half of it is sold short, half bought"
    terms = dict(top=1, spread_bps=0., sessions_a_year=252)
    for name, bps in (('borrow_bps', 252.), ('carry_bps', 504.)):
        daily = backtest(two_codes(), **terms, **{name: bps})
        first = daily['cost'][0]*1e6
        assert first == pytest.approx(500_000*bps/1e4/252, abs=.005)  # 50.00 and 100.00
    both = backtest(two_codes(), **terms, borrow_bps=252., carry_bps=504.)
    assert both['cost'][0]*1e6 == pytest.approx(150, abs=.005)
    value = 1e6
    for cost, after in zip(both['cost'], both['value']):  # half of what is left, day by day
        assert cost*value == pytest.approx(value*.5*(252+504)/1e4/252, abs=.005)
        value -= value*.5*(252+504)/1e4/252
        assert after*1e6 == pytest.approx(value, abs=.005)
    long = backtest(two_codes(), **terms, side='long', carry_bps=252.)
    assert long['cost'][0]*1e6 == pytest.approx(100, abs=.005)
    assert backtest(two_codes(), **terms, side='long', borrow_bps=252.)['cost'].sum() == 0


@pytest.mark.parametrize('terms, found', [
    (dict(rebalance=0), 'rebalance=0 must be at least 1'),
    (dict(rebalance=2.5), 'rebalance=2.5 must be a whole number'),
    (dict(rebalance=True), 'rebalance=True must be a whole number'),
    (dict(rebalance=None), 'rebalance=None must be a whole number'),
    (dict(keep=.05), 'keep=0.05 must lie between share=0.1 and 0.5'),
    (dict(keep=.7), 'keep=0.7 must lie between'),
    (dict(keep=40), 'give top where names are counted'),
    (dict(top=20, keep=.2), 'keep=0.2 must be a whole number'),
    (dict(top=20, keep=10), 'keep=10 must be at least top=20'),
    (dict(keep=float('inf')), 'keep=inf must be finite'),
    (dict(keep='0.2'), "keep='0.2' must be a number"),
    (dict(carry_bps=-1), 'carry_bps=-1 must be at least 0')])
def test_what_cannot_be_meant_is_refused_in_a_line(terms, found):
    with pytest.raises(AtftError, match='backtest: ') as refused: Trading(**terms)
    assert found in str(refused.value) and '\n' not in str(refused.value)


def test_a_day_without_an_order_is_chosen_by_nobody():
    score = np.vstack([np.arange(20.), np.zeros(20), np.arange(20.)])
    for side in ('long', 'long_short'):
        found = choose(score, Trading(top=3, keep=8, side=side))
        assert not found[1].any() and found[2].any()
