"Nothing may know tomorrow: change the future, and all up to today stays the same bit for bit"
from dataclasses import replace
from itertools import chain

import numpy as np
import polars as pl
import pytest
import torch

from atft.backtest import backtest
from atft.bars import assert_causal, ohlcv_features, panel_from_ohlcv
from atft.core import AtftError
from atft.correlation import rank_ic
from atft.data import ParquetStockIterableDataset
from atft.eval import effect, load_run, step_differences, verdict
from atft.intervals import mean_interval
from atft.judge import compare, decay, evaluate
from atft.market import MarketSpec, embedded_panel, synthetic_market
from atft.network import PARTS
from atft.panel import PanelSpec, write_panel
from atft.phases import RunSpec, load_checkpoint, predict, run_phases, setup
from atft.predictions import example_predictions

SMALL = RunSpec(phase='0', max_epochs=1, hidden=8, lookback=10, embargo=5, pictures=False)
BARS = ('open', 'high', 'low', 'close', 'volume')


def with_other_future(bars, day):
    "The same bars up to a day, and noise times the bars after it"
    rng = np.random.default_rng(0)
    noise = pl.Series(rng.lognormal(0, .3, len(bars)))
    later = pl.col('date') > day
    moved = [pl.when(later).then(pl.col(c)*noise).otherwise(pl.col(c)).alias(c) for c in BARS]
    return bars.with_columns(moved)


def half_open(made, weights):
    "A network of a setup with some weights, every part on and every gate open"
    net = made.network().switch(PARTS)
    net.load_state_dict(weights)
    for name, parameter in net.named_parameters():
        if name.endswith('.g'): parameter.data.fill_(.5)
    return net


def predicted_test_days(net, made):
    "Day by day"
    return chain.from_iterable(predict(net, made, made.days('test')))


def test_future_bars_move_no_feature_scaler_graph_or_prediction(tmp_path):
    bars = synthetic_market(codes=24, days=420, clusters=3).ohlcv
    spec = PanelSpec(features=tuple(ohlcv_features()))
    panel = write_panel(panel_from_ohlcv(bars), tmp_path/'whole', spec)
    run = replace(SMALL, run_dir=str(tmp_path/'run'), phase='0-1')
    run_phases(run, panel, show=False)
    whole = setup(run, panel)
    middle = len(whole.split.test)//2
    day = whole.split.test[middle]
    changed = panel_from_ohlcv(with_other_future(bars, day))
    other = setup(run, write_panel(changed, tmp_path/'changed', spec))
    assert np.array_equal(whole.scaler.center_, other.scaler.center_)
    assert np.array_equal(whole.scaler.scale_, other.scaler.scale_)
    weights = load_checkpoint(tmp_path/'run/phase1_best.pt', whole)['model']
    ours = predicted_test_days(half_open(whole, weights), whole)
    theirs = predicted_test_days(half_open(other, weights), other)
    compared = 0
    for a, b in zip(ours, theirs):
        if a.date > day.item(): break
        assert a.codes == b.codes
        assert torch.equal(a.forecast.score, b.forecast.score)
        assert torch.equal(a.forecast.quantiles, b.forecast.quantiles)
        compared += 1
    assert compared == middle+1


@pytest.mark.parametrize('seed', [0, 1])
def test_a_market_of_noise_yields_nothing(seed, tmp_path):
    """A network trained on noise: every interval contains zero, and the verdict says so. The
    intervals of four phases and four horizons are asked together, so they hold together with 95%
    (Bonferroni); one by one, one in twenty would miss zero, and one in twenty is right:
    `test_intervals_of_noise_miss_zero_as_often_as_they_say` counts."""
    spec = MarketSpec(codes=60, days=1000, clusters=6, effects=(), seed=seed)
    noise = embedded_panel(spec, cache=tmp_path)
    run = replace(SMALL, run_dir=str(tmp_path/'run'), phase='0-3', seed=seed)
    run_phases(run, noise, show=False)
    result = load_run(tmp_path/'run')
    for test in result.phases.values():
        judged = evaluate(test, draws=0, level=1-.05/16).drop_nulls('low')
        assert len(judged) >= 2
        for row in judged.iter_rows(named=True):
            assert row['low'] < 0 < row['high'] and abs(row['t']) < 3.5, row
    pairs = step_differences(result)
    tables = {**result.phases, **result.baselines}
    judged = {name: evaluate(table, draws=0) for name, table in tables.items()}
    said = verdict(result, judged, pairs, 10.)
    clear = [row for row in pairs.rows(named=True) if effect(row) and row['a'] in result.phases]
    assert not clear, pairs
    assert 'is ahead of' not in said[2] and ' adds ' not in said[1], said
    assert 'clear of zero' not in said[0] or 'below the bar' in said[0], said


HORIZONS = (1, 5, 10, 20)


def worthless(rng, persistence):
    "A signal [400, 30] that knows nothing, and returns [420, 30]"
    returns = rng.normal(0, .02, (420, 30))
    signal = rng.normal(size=(400, 30))
    fresh = (1-persistence**2)**.5
    for day in range(1, 400):
        signal[day] = persistence*signal[day-1]+fresh*signal[day]
    return signal, returns


def overlapping(total, horizon):
    "Returns over a horizon from each of 400 days, entered a day later where there is one more"
    first = 1 if horizon < 20 else 0
    return torch.from_numpy(total[first+horizon:400+first+horizon]-total[first:400+first])


def test_intervals_of_noise_miss_zero_as_often_as_they_say():
    """Worthless forecasters, fresh and persistent, on real overlapping targets: 5% of the 95%
    intervals miss zero, and no more than 7%"""
    rng = np.random.default_rng(0)
    missed = {h: [] for h in HORIZONS}
    for persistence in [0., .95]*150:
        signal, returns = worthless(rng, persistence)
        total = np.vstack([np.zeros(30), returns.cumsum(0)])
        for h in HORIZONS:
            ic = rank_ic(torch.from_numpy(signal), overlapping(total, h)).numpy()
            interval = mean_interval(ic, h)
            missed[h].append(not interval['low'] <= 0 <= interval['high'])
    rates = {h: np.mean(m) for h, m in missed.items()}
    assert all(.02 < rate <= .07 for rate in rates.values()), rates


def test_labels_shuffled_within_days_are_worth_nothing(small_market, tmp_path):
    "Train on labels that belong to other codes: what is learnt does not rank the true ones"
    rng = np.random.default_rng(0)
    table = small_market.scan().collect().sort('date', 'code')
    keyed = table.with_columns(key=pl.Series(rng.random(len(table))))
    targets = [pl.col(t).sort_by('key').over('date') for t in small_market.spec.targets]
    shuffled = keyed.with_columns(targets).drop('key')
    panel = write_panel(shuffled, tmp_path/'panel', small_market.spec)
    run_phases(replace(SMALL, run_dir=str(tmp_path/'run'), phase='0-1'), panel, show=False)
    for number in (0, 1):
        predictions = pl.read_parquet(tmp_path/f'run/phase{number}_predictions.parquet')
        test = predictions.filter(pl.col('split') == 'test')
        for row in evaluate(test, draws=0).drop_nulls('low').iter_rows(named=True):
            assert row['low'] < 0 < row['high'], row


def with_tomorrow(table):
    "A panel with a feature that is the next day's return"
    return panel_from_ohlcv(table).with_columns(tomorrow=pl.col('target_1d'))


def shifted_back(table):
    "A panel in which a feature is a day early"
    early = pl.col('vol_20d').shift(-1).over('code', order_by='date')
    return panel_from_ohlcv(table).with_columns(early)


@pytest.mark.parametrize('leaky, column', [(with_tomorrow, 'tomorrow'), (shifted_back, 'vol_20d')])
def test_a_feature_that_is_tomorrows_return_is_caught(leaky, column):
    "The leak is found by `assert_causal` and named"
    bars = synthetic_market(codes=12, days=320, clusters=3).ohlcv
    with pytest.raises(AssertionError, match=f'look-ahead: column {column!r}'):
        assert_causal(leaky, bars)


def test_rows_dropped_by_their_label_move_no_window(small_market, tmp_path):
    """An extreme-return filter takes labels away; windows, days and everybody else's labels stay
    as they are"""
    target = small_market.spec.targets[0]
    table = small_market.scan().collect()
    size = pl.col(target).abs()
    kept = pl.when(size < size.quantile(.9)).then(pl.col(target)).alias(target)
    other = write_panel(table.with_columns(kept), tmp_path/'panel', small_market.spec)
    days = small_market.dates[100:140]
    ours = ParquetStockIterableDataset(small_market, days, lookback=10)
    theirs = ParquetStockIterableDataset(other, days, lookback=10)
    lost = 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.date == b.date and a.codes == b.codes
        assert torch.equal(a.x.nan_to_num(9), b.x.nan_to_num(9))
        same = b.y.isfinite()
        assert torch.equal(a.y[same], b.y[same])
        assert not (b.y == 0).any()  # a missing label is never a zero
        lost += int((a.y.isfinite() & ~same).sum())
    assert lost > 0


def test_a_day_that_is_missing_is_nan_in_the_window_and_shifts_nothing(small_market, tmp_path):
    code = small_market.codes[3]
    day = small_market.dates[120]
    gone = (pl.col('code') == code) & (pl.col('date') == day.item())
    table = small_market.scan().collect().filter(~gone)
    other = write_panel(table, tmp_path/'panel', small_market.spec)
    later = small_market.dates[[125]]
    a = next(iter(ParquetStockIterableDataset(small_market, later, lookback=10)))
    b = next(iter(ParquetStockIterableDataset(other, later, lookback=10)))
    assert a.codes == b.codes
    n = a.codes.index(code)
    assert b.x[n, 4].isnan().all()
    rest = [*range(4), *range(5, 10)]
    assert torch.equal(a.x[n, rest].nan_to_num(9), b.x[n, rest].nan_to_num(9))


def test_the_purge_and_the_embargo_stand_between_training_and_judging(small_market):
    split = setup(replace(SMALL, run_dir='unused', embargo=7), small_market).split
    longest = max(small_market.spec.horizons)
    for before, after in ((split.train, split.valid), (split.valid, split.test)):
        last = int(np.searchsorted(small_market.dates, before[-1]))
        first = int(np.searchsorted(small_market.dates, after[0]))
        assert first-last-1 == longest+7
        assert last+longest < first


def constant(table): return table.with_columns(prediction=pl.lit(1.))


def full_of_gaps(table): return table.with_columns(prediction=pl.lit(None, pl.Float64))


def two_codes(table): return table.filter(pl.col('code').is_in(['S000', 'S001']))


def single_day(table): return table.filter(pl.col('date') == table['date'].max())


def no_labels(table): return table.with_columns(target=pl.lit(float('nan')))


def infinite(table): return table.with_columns(prediction=pl.lit(float('inf')))


DEGENERATE = (constant, full_of_gaps, two_codes, single_day, no_labels, infinite)


@pytest.mark.parametrize('make', DEGENERATE)
def test_a_degenerate_table_gets_a_statement_and_no_bare_number(make):
    table = make(example_predictions(codes=30, days=120))
    for row in evaluate(table, draws=100).iter_rows(named=True):
        assert row['note'] and (row['low'] is None) == (row['high'] is None)
        is_zero = row['low'] == row['rank_ic'] == row['high'] == 0
        assert row['low'] is None or make is constant and is_zero, row
    for row in decay(table).iter_rows(named=True):
        assert row['low'] is None or row['low'] <= row['rank_ic'] <= row['high']
    if make in (full_of_gaps, infinite, single_day, no_labels):  # nothing that both can be judged on
        with pytest.raises(AtftError, match='no row is predicted by both a and b'):
            compare(table, table)
    else:
        for row in compare(table, table).iter_rows(named=True):
            assert row['low'] is None or row['low'] == row['difference'] == row['high'] == 0
    if make in (constant, two_codes):
        traded = backtest(table)
        assert (traded['value'] > 0).all()
        assert make is not constant or traded['turnover'].sum() == 0
