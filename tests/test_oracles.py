"What other libraries compute too comes out the same."
from alphalens import performance as alphalens, utils as alphalens_utils
import empyrical
import numpy as np
import pandas as pd
import polars as pl
import purgedcv
import pytest
import skfolio.measures as skfolio
from scipy import stats
from skfolio.portfolio import BasePortfolio

from atft import backtest, intervals
from atft.data import split_days, walk_forward
from atft.factors import attribute
from atft.judge import decile_returns, evaluate, rank_autocorrelation
from atft.neutral import neutral_days
from atft.predictions import daily_ic, dense, load_predictions


@pytest.fixture
def profits():
    "[days, strategies] of which a few know something, with fat tails"
    rng = np.random.default_rng(0)
    return rng.standard_t(4, size=(504, 12))*.01+np.linspace(0, .001, 12)


@pytest.mark.parametrize('benchmark', [0., .05])
def test_probabilistic_sharpe_ratio(profits, benchmark):
    best = profits[:, -1]
    ours = intervals.probabilistic_sharpe(best, benchmark)
    theirs = purgedcv.probabilistic_sharpe_ratio(best, benchmark)
    assert ours == pytest.approx(theirs, abs=2e-3)  # its deviation divides by n-1
    assert ours == pytest.approx(skfolio.probabilistic_sharpe_ratio(best, benchmark), abs=2e-3)


@pytest.mark.parametrize('trials', [2, 12, 500])
def test_sharpe_ratios_deflated_for_trials(profits, trials):
    best = profits[:, -1]
    ratios = profits.mean(0)/profits.std(0)
    expected = skfolio.expected_max_sharpe_ratio(trials, ratios.std())
    assert intervals.best_of_chance(trials, ratios.var()) == pytest.approx(expected, rel=1e-12)
    ours = intervals.deflated_sharpe(best, trials, ratios.var())
    theirs = purgedcv.deflated_sharpe_ratio(best, trials, ratios.var())
    assert ours == pytest.approx(theirs, abs=2e-3)


def keeping(rng, days, share):
    "[200, days] series without a mean of which a day keeps a share of the day before"
    x = rng.normal(size=(days, 200))
    for t in range(1, days):
        x[t] = share*x[t-1]+(1-share**2)**.5*x[t]
    return x.T


@pytest.mark.parametrize('share', [0., .6, .9, .95])
def test_a_mean_of_days_that_are_alike_is_missed_as_often_as_said(share):
    series = keeping(np.random.default_rng(3), 250, share)
    found = [intervals.mean_interval(x) for x in series]
    misses = np.mean([not f['low'] <= 0 <= f['high'] for f in found])
    assert misses < .11  # 5% +- 2 x 1.5% of 200 draws, and what estimating the memory costs
    fast = [intervals.persistence(x) for x in series]
    assert np.mean(fast) == pytest.approx(share, abs=.02)


@pytest.mark.parametrize('days, horizon', [(60, 20), (199, 20), (49, 5)])
def test_there_is_no_bootstrap_where_there_is_no_headline(days, horizon):
    x = np.random.default_rng(0).normal(size=days)
    assert np.isnan(intervals.mean_interval(x, horizon)['low'])
    assert np.isnan(intervals.bootstrap_interval(x, draws=50, horizon=horizon)).all()
    slow = keeping(np.random.default_rng(1), days, .9)[:40]
    missed = [not low <= 0 <= high for low, high in
              (intervals.bootstrap_interval(x, draws=100) for x in slow)]
    assert np.mean(missed) < .2  # who does not tell the horizon gets a wide one; it was 40%


@pytest.mark.parametrize('skill', [0., .002])
def test_probability_of_overfitting(profits, skill):
    x = profits-profits.mean(0)+skill*np.arange(12)/12
    ours = intervals.overfit_probability(x, 10)
    theirs = purgedcv.probability_of_backtest_overfitting(x.T, 10)
    assert ours == pytest.approx(theirs.pbo, abs=1e-12)


@pytest.mark.parametrize('strategies', [2, 3, 4, 5])
def test_choosing_among_worthless_or_equal_ones_is_a_draw(strategies):
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(250, 200, strategies))
    found = [intervals.overfit_probability(x, 6) for x in noise]
    assert np.mean(found) == pytest.approx(.5, abs=.04)
    same = noise[0][:, [0]*strategies]
    assert intervals.overfit_probability(same) == .5
    assert intervals.overfit_probability(same*0) == .5


@pytest.mark.parametrize('strategy', [0, 1, 2])
def test_performance_of_a_series(profits, strategy):
    x = profits[:, strategy]
    found = dict(zip(backtest.METRICS, backtest._metrics(x)))
    drawdown = skfolio.max_drawdown(skfolio.get_drawdowns(x, compounded=True))
    down = skfolio.semi_deviation(x, min_acceptable_return=0., biased=True)
    deviation = skfolio.standard_deviation(x, biased=True)
    assert found['max_drawdown'] == pytest.approx(drawdown, rel=1e-12)
    assert found['sortino'] == pytest.approx(x.mean()/down*252**.5, rel=1e-12)
    assert found['volatility'] == pytest.approx(deviation*252**.5, rel=1e-12)


def figures(x):
    "What `performance` is made of, of a year of 252 sessions"
    return dict(zip(backtest.METRICS, backtest._metrics(x)))


@pytest.mark.parametrize('strategy', [0, 5, 11])
def test_a_year_of_empyrical(profits, strategy):
    """Equal where both define the same; empyrical divides by n-1 in a deviation, and its Calmar ratio
    has the compounded return where ours has the arithmetic one"""
    x = profits[:, strategy]
    found = figures(x)
    unbiased = (len(x)/(len(x)-1))**.5
    fall = empyrical.max_drawdown(x)
    assert found['max_drawdown'] == pytest.approx(-fall, rel=1e-12)
    assert found['cagr'] == pytest.approx(empyrical.annual_return(x), rel=1e-10)
    assert found['volatility']*unbiased == pytest.approx(empyrical.annual_volatility(x), rel=1e-12)
    assert found['sharpe']/unbiased == pytest.approx(empyrical.sharpe_ratio(x), rel=1e-12)
    assert found['sortino'] == pytest.approx(empyrical.sortino_ratio(x), rel=1e-12)
    assert found['omega'] == pytest.approx(empyrical.omega_ratio(x), rel=1e-10)
    assert found['cagr']/-fall == pytest.approx(empyrical.calmar_ratio(x), rel=1e-10)
    assert found['calmar'] == pytest.approx(found['return']/-fall, rel=1e-12)


@pytest.mark.parametrize('strategy', [0, 11])
def test_a_year_of_skfolio(profits, strategy):
    "Its deviations divide by n-1, and its Calmar ratio is of a day: ours is 252 times that"
    x = profits[:, strategy]
    found = figures(x)
    theirs = BasePortfolio(x, np.arange(len(x)), annualization_factor=252, compounded=True,
                           min_acceptable_return=0.)
    unbiased = (len(x)/(len(x)-1))**.5
    assert found['return'] == pytest.approx(theirs.annualized_mean, rel=1e-12)
    deviation = theirs.annualized_standard_deviation
    assert found['volatility']*unbiased == pytest.approx(deviation, rel=1e-12)
    assert found['sharpe']/unbiased == pytest.approx(theirs.annualized_sharpe_ratio, rel=1e-12)
    assert found['sortino']/unbiased == pytest.approx(theirs.annualized_sortino_ratio, rel=1e-12)
    assert found['max_drawdown'] == pytest.approx(theirs.max_drawdown, rel=1e-12)
    assert found['calmar'] == pytest.approx(252*theirs.calmar_ratio, rel=1e-12)


def of_market(profits):
    "The last strategy beside one factor, the mean of all"
    market = profits.mean(1)
    daily = pl.DataFrame(dict(date=sessions(len(market)), gross=profits[:, -1]))
    factors = pl.DataFrame(dict(date=sessions(len(market)), market=market))
    found = attribute(daily, factors, draws=0, sessions_a_year=252)
    return market, found.table['coefficient'].to_list(), found.table['contribution'].to_list()


def test_alpha_and_beta_of_empyrical(profits):
    "It compounds the alpha of a day to a year; ours adds it up, so that contributions add up too"
    market, (beta, a_day), (_, a_year) = of_market(profits)
    alpha, theirs = empyrical.alpha_beta(profits[:, -1], market)
    assert beta == pytest.approx(theirs, rel=1e-10)
    assert (1+a_day)**252-1 == pytest.approx(alpha, rel=1e-9)
    assert a_year == pytest.approx(252*a_day, rel=1e-12)


def sessions(count):
    "A calendar"
    return np.datetime64('2020-01-01')+np.arange(count)


def opening(dates):
    "When each of its sessions opens"
    return pd.Series(pd.to_datetime(dates))


@pytest.mark.parametrize('horizon', [1, 5, 20])
def test_purge_is_what_purging_asks(horizon):
    """A label is known when the session `horizon` days on has closed; training may use a label only
    if that is before the first session of validation"""
    n = 600
    v = 300
    t = 450
    dates = sessions(n)
    opens = opening(dates)
    split = split_days(dates, str(dates[v]), str(dates[t]), purge=horizon, embargo=0)
    known = opens+pd.Timedelta(days=horizon+1)  # from an open to the close `horizon` sessions later
    trains = purgedcv.purge(np.arange(v), np.arange(v, v+len(split.valid)), opens, known)
    chooses = purgedcv.purge(np.arange(v, t), np.arange(t, n), opens, known)
    assert np.array_equal(split.train, dates[trains])
    assert np.array_equal(split.valid, dates[chooses])


def test_walking_forward():
    size = 150
    dates = sessions(1000)
    opens = opening(dates)
    gap = dict(purge=20, embargo=0)
    folds = walk_forward(dates, test_days=size, valid_days=100, min_train=200, **gap)
    known = opens+pd.Timedelta(days=21)
    walk = purgedcv.WalkForwardSplit(
        len(folds), size, prediction_times=opens, evaluation_times=known)
    theirs = list(walk.split(np.zeros(len(dates))))
    for ours, (before, test) in zip(folds, theirs, strict=True):
        assert np.array_equal(ours.test, dates[test])
        last = dates[before[-1]]  # what trains there is ours to train and to choose the epoch
        assert ours.valid[-1] == last


@pytest.fixture
def predictions():
    "60 days of 97 codes; where the return is unknown a name is in no decile"
    days = 60
    codes = 97
    rng = np.random.default_rng(1)
    calendar = np.datetime64('2024-01-01')+np.arange(days)
    names = [f'c{i:02d}' for i in range(codes)]
    date, code = np.meshgrid(calendar, names, indexing='ij')
    prediction, noise = rng.normal(size=(2, days, codes))
    prediction[1:] = .8*prediction[:-1]+.6*prediction[1:]
    target = .1*prediction+noise
    target[rng.random(target.shape) < .03] = np.nan
    columns = dict(date=date, code=code, prediction=prediction, target=target)
    table = pl.DataFrame({name: values.ravel() for name, values in columns.items()})
    return load_predictions(table.with_columns(horizon=1))


def for_alphalens(table):
    "A pandas table indexed as alphalens wants it"
    out = table.with_columns(pl.col('target').fill_null(float('nan'))).to_pandas()
    keys = [pd.to_datetime(out['date']), out['code']]
    out.index = pd.MultiIndex.from_arrays(keys, names=['date', 'asset'])
    return out


def test_rank_ic_quantile_returns_and_turnover(predictions):
    table = for_alphalens(predictions)
    returns = table[['target']].rename(columns=dict(target='1D'))
    clean = alphalens_utils.get_clean_factor(table['prediction'], returns, quantiles=10, max_loss=1)
    ic = alphalens.factor_information_coefficient(clean)['1D'].to_numpy()
    assert np.abs(daily_ic(predictions)['rank_ic'].to_numpy()-ic).max() < 1e-12

    ours = decile_returns(predictions, 1)
    theirs = alphalens.mean_return_by_quantile(clean)[0]['1D'].to_numpy()
    assert np.abs(ours['mean'].to_numpy()-theirs).max() < 1e-12
    deciles = clean['factor_quantile']
    turnover = [alphalens.quantile_turnover(deciles, q).mean() for q in range(1, 11)]
    assert np.abs(ours['turnover'].to_numpy()-turnover).max() < 1e-12


def clean_factor(predictions, **options):
    "What alphalens works on"
    table = for_alphalens(predictions)
    returns = table[['target']].rename(columns=dict(target='1D'))
    return alphalens_utils.get_clean_factor(table['prediction'], returns, max_loss=1, **options)


def test_mean_rank_ic(predictions):
    theirs = alphalens.mean_information_coefficient(clean_factor(predictions, quantiles=10))
    ours = evaluate(predictions, draws=0)['rank_ic'][0]
    assert ours == pytest.approx(theirs['1D'], abs=1e-12)


def test_rank_ic_within_groups(predictions):
    "Theirs has a number for each group and day; ours is their mean with the weights it says"
    group = pl.col('code').str.slice(1).cast(pl.Int64) % 4
    grouped = predictions.with_columns(sector=pl.format('s{}', group))
    groups = grouped.select('code', 'sector').unique().rows()
    clean = clean_factor(predictions, quantiles=2, groupby=dict(groups))
    theirs = alphalens.factor_information_coefficient(clean, by_group=True)['1D']
    size = clean.groupby([clean.index.get_level_values('date'), 'group'], observed=True).size()
    weight = size*(size-1)/(size+1)
    by_day = (theirs*weight).groupby(level='date').sum()/weight.groupby(level='date').sum()
    ours = neutral_days(grouped, 'sector')['neutral_ic'].to_numpy()
    assert np.abs(ours-by_day.to_numpy()).max() < 1e-12


def test_alpha_and_beta_of_a_factor_s_portfolio(predictions):
    "Weights by the demeaned factor; the market is the mean of the day; alpha is compounded there"
    clean = clean_factor(predictions, quantiles=2)
    theirs = alphalens.factor_alpha_beta(clean)['1D']
    gross = alphalens.factor_returns(clean)['1D']
    market = clean.groupby(level='date', observed=True)['1D'].mean()
    days = gross.index.to_numpy().astype('datetime64[D]')
    daily = pl.DataFrame(dict(date=days, gross=gross.to_numpy()))
    factors = pl.DataFrame(dict(date=days, market=market.to_numpy()))
    beta, alpha = attribute(daily, factors, draws=0).table['coefficient']
    assert beta == pytest.approx(theirs['beta'], abs=1e-10)
    assert (1+alpha)**252-1 == pytest.approx(theirs['Ann. alpha'], rel=1e-8)


@pytest.mark.parametrize('value', [.1, .3, 1/3, 1e-3, .25, 2., 1e6/3])
def test_a_constant_is_seen_whatever_number_it_is(predictions, value):
    constant = load_predictions(predictions).with_columns(prediction=pl.lit(value))
    for kind in (pl.Float64, pl.Float32):
        found = evaluate(constant.with_columns(pl.col('prediction').cast(kind)), draws=0)
        assert found['days_constant'].to_list() == found['days'].to_list()
        assert set(found['note']) == {'predictions are constant across codes'}
        assert found['rank_ic'].to_list() == found['ic'].to_list() == [0.]*len(found)


def test_rank_autocorrelation(predictions):
    "Ranks among all, whether their return is known or not"
    everywhere = for_alphalens(predictions.with_columns(target=pl.lit(0.)))
    factor = everywhere[['prediction']].rename(columns=dict(prediction='factor'))
    kept = alphalens.factor_rank_autocorrelation(factor).mean()
    ours = rank_autocorrelation(dense(predictions, 1).prediction)
    assert ours == pytest.approx(kept, abs=1e-12)


def test_rank_ic_with_ties(predictions):
    tied = predictions.with_columns(pl.col('prediction').round(0))
    known = tied.drop_nulls('target').group_by('date', maintain_order=True)
    days = known.agg('prediction', 'target').select('prediction', 'target')
    theirs = [stats.spearmanr(a, b)[0] for a, b in days.iter_rows()]
    assert np.abs(daily_ic(tied)['rank_ic'].to_numpy()-theirs).max() < 1e-12
