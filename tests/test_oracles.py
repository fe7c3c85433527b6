"What other libraries compute too comes out the same."
from alphalens import performance as alphalens, utils as alphalens_utils
import numpy as np
import pandas as pd
import polars as pl
import purgedcv
import pytest
import skfolio.measures as skfolio
from scipy import stats

from atft import backtest, intervals
from atft.data import split_days, walk_forward
from atft.judge import decile_returns, rank_autocorrelation
from atft.predictions import daily_ic, dense, load_predictions

@pytest.fixture
def profits():
    "[days, strategies] of which a few know something, with fat tails"
    rng = np.random.default_rng(0)
    return rng.standard_t(4, size=(504, 12))*.01+np.linspace(0, .001, 12)

def test_sharpe_ratios_deflated_for_trials(profits):
    best = profits[:, -1]
    ratios = profits.mean(0)/profits.std(0)
    for benchmark in (0., .05):
        ours = intervals.probabilistic_sharpe(best, benchmark)
        assert ours == pytest.approx(purgedcv.probabilistic_sharpe_ratio(best, benchmark), abs=2e-3)  # its deviation divides by n-1
        assert ours == pytest.approx(skfolio.probabilistic_sharpe_ratio(best, benchmark), abs=2e-3)
    for trials in (2, 12, 500):
        expected = skfolio.expected_max_sharpe_ratio(trials, ratios.std())
        assert intervals.best_of_chance(trials, ratios.var()) == pytest.approx(expected, rel=1e-12)
        assert intervals.deflated_sharpe(best, trials, ratios.var()) == pytest.approx(purgedcv.deflated_sharpe_ratio(best, trials, ratios.var()), abs=2e-3)

@pytest.mark.parametrize('skill', [0., .002])
def test_probability_of_overfitting(profits, skill):
    x = profits-profits.mean(0)+skill*np.arange(12)/12
    ours, theirs = intervals.overfit_probability(x, 10), purgedcv.probability_of_backtest_overfitting(x.T, 10)
    assert ours == pytest.approx(theirs.pbo, abs=1e-12)

def test_performance_of_a_series(profits):
    for x in profits.T[:3]:
        found = dict(zip(backtest.METRICS, backtest._metrics(x)))
        assert found['max_drawdown'] == pytest.approx(skfolio.max_drawdown(skfolio.get_drawdowns(x, compounded=True)), rel=1e-12)
        assert found['sortino'] == pytest.approx(x.mean()/skfolio.semi_deviation(x, min_acceptable_return=0., biased=True)*252**.5, rel=1e-12)
        assert found['volatility'] == pytest.approx(skfolio.standard_deviation(x, biased=True)*252**.5, rel=1e-12)

@pytest.mark.parametrize('horizon', [1, 5, 20])
def test_purge_is_what_purging_asks(horizon):
    "A label is known when the session `horizon` days on has closed; training may use a label only if that is before the first session of validation"
    n, v, t = 600, 300, 450
    dates = np.datetime64('2020-01-01')+np.arange(n)
    split = split_days(dates, str(dates[v]), str(dates[t]), purge=horizon, embargo=0)
    opens = pd.Series(pd.Timestamp('2020-01-01')+pd.to_timedelta(np.arange(n), unit='D'))
    known = opens+pd.Timedelta(days=horizon+1)  # from a session's open to the close `horizon` sessions later
    kept = purgedcv.purge(np.arange(v), np.arange(v, len(split.valid)+v), opens, known)
    assert np.array_equal(split.train, dates[kept])
    assert np.array_equal(split.valid, dates[purgedcv.purge(np.arange(v, t), np.arange(t, n), opens, known)])

def test_walking_forward():
    n, size = 1000, 150
    dates = np.datetime64('2020-01-01')+np.arange(n)
    folds = walk_forward(dates, test_days=size, valid_days=100, min_train=200, purge=20, embargo=0)
    opens = pd.Series(pd.Timestamp('2020-01-01')+pd.to_timedelta(np.arange(n), unit='D'))
    theirs = list(purgedcv.WalkForwardSplit(len(folds), size, prediction_times=opens, evaluation_times=opens+pd.Timedelta(days=21)).split(np.zeros(n)))
    for ours, (before, test) in zip(folds, theirs, strict=True):
        assert np.array_equal(ours.test, dates[test])
        assert ours.valid[-1] == dates[before[-1]]  # what trains there is ours to train and to choose the epoch

@pytest.fixture
def predictions():
    rng, days, codes = np.random.default_rng(1), 60, 97
    date, code = np.meshgrid(np.datetime64('2024-01-01')+np.arange(days), [f'c{i:02d}' for i in range(codes)], indexing='ij')
    prediction, noise = rng.normal(size=(2, days, codes))
    prediction[1:] = .8*prediction[:-1]+.6*prediction[1:]
    target = .1*prediction+noise
    target[rng.random(target.shape) < .03] = np.nan  # where the return is unknown a name is in no decile
    return load_predictions(pl.DataFrame(dict(date=date.ravel(), code=code.ravel(), horizon=1, prediction=prediction.ravel(), target=target.ravel())))

def test_rank_ic_quantile_returns_and_turnover(predictions):
    p = predictions.with_columns(pl.col('target').fill_null(float('nan'))).to_pandas()
    p.index = pd.MultiIndex.from_arrays([pd.to_datetime(p['date']), p['code']], names=['date', 'asset'])
    clean = alphalens_utils.get_clean_factor(p['prediction'], p[['target']].rename(columns=dict(target='1D')), quantiles=10, max_loss=1)
    ic = alphalens.factor_information_coefficient(clean)['1D'].to_numpy()
    assert np.abs(daily_ic(predictions)['rank_ic'].to_numpy()-ic).max() < 1e-12
    ours = decile_returns(predictions, 1)
    assert np.abs(ours['mean'].to_numpy()-alphalens.mean_return_by_quantile(clean)[0]['1D'].to_numpy()).max() < 1e-12
    turnover = [alphalens.quantile_turnover(clean['factor_quantile'], q+1).mean() for q in range(10)]
    assert np.abs(ours['turnover'].to_numpy()-turnover).max() < 1e-12
    everywhere = predictions.with_columns(target=pl.lit(0.)).to_pandas()  # ranks among all, as ours
    everywhere.index = pd.MultiIndex.from_arrays([pd.to_datetime(everywhere['date']), everywhere['code']], names=['date', 'asset'])
    kept = alphalens.factor_rank_autocorrelation(everywhere[['prediction']].rename(columns=dict(prediction='factor'))).mean()
    assert rank_autocorrelation(dense(predictions, 1).prediction) == pytest.approx(kept, abs=1e-12)

def test_rank_ic_with_ties(predictions):
    tied = predictions.with_columns(pl.col('prediction').round(0))
    known = tied.drop_nulls('target').group_by('date', maintain_order=True).agg('prediction', 'target')
    theirs = [stats.spearmanr(a, b)[0] for a, b in known.select('prediction', 'target').iter_rows()]
    assert np.abs(daily_ic(tied)['rank_ic'].to_numpy()-theirs).max() < 1e-12
