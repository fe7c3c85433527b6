"Baselines that learn see what the network sees, without the windows of a whole panel in memory."
import json

import numpy as np
import polars as pl
import pytest
from scipy.stats import rankdata

from atft import baselines, results
from atft.baselines import baseline_key, ridge, said_sees
from atft.data import (
    OnlineRobustScaler, ParquetStockIterableDataset, Split, make_loader, split_days)
from atft.judge import common_ics, evaluate
from atft.market import MarketSpec, embedded_panel
from atft.results import example_run, load_run, make_frames
from atft.sentences import tried, verdict
from atft.specs import RunSpec

LOOKBACK = 5


@pytest.fixture(scope='module')
def panel(tmp_path_factory):
    market = MarketSpec(codes=40, days=300, clusters=4)
    return embedded_panel(market, cache=tmp_path_factory.mktemp('market'))


@pytest.fixture(scope='module')
def split(panel):
    return split_days(panel.dates, str(panel.dates[200]), str(panel.dates[250]), 20, 5)


def centred_ranks(y):
    known = np.isfinite(y)
    out = np.full(len(y), np.nan)
    out[known] = (rankdata(y[known])-.5)/known.sum()-.5
    return out


def of_the_network(panel, split, days, target):
    "Windows as the network's loader gives them, ranks of a target, and whose they are"
    scaler = OnlineRobustScaler().fit(panel, split.train)
    stream = ParquetStockIterableDataset(panel, days, LOOKBACK, 1, scaler)
    found = list(make_loader(stream))
    x = np.concatenate([np.nan_to_num(day.x.reshape(len(day), -1).numpy()) for day in found])
    y = np.concatenate([centred_ranks(day.y[:, target].numpy()) for day in found])
    return x.astype(float), y, [(day.date, code) for day in found for code in day.codes]


def test_ridge_is_fitted_on_the_windows_that_the_network_reads(panel, split):
    table = ridge(panel, split, split.test, lookback=LOOKBACK)
    window = table.filter(pl.col('sees') == f'the window of {LOOKBACK} sessions')
    assert '1d' in window['target_name'], 'the planted effects of this market last for days'
    for target, name in enumerate(label.name for label in panel.spec.labels):
        ours = window.filter(pl.col('target_name') == name)
        if not len(ours): continue
        x, y, _ = of_the_network(panel, split, split.train, target)
        known = np.isfinite(y)
        squares = x[known].T @ x[known]+1e-3*known.sum()*np.eye(x.shape[1])
        new, _, keys = of_the_network(panel, split, split.test, target)
        by_hand = new @ np.linalg.solve(squares, x[known].T @ y[known])
        days, codes = zip(*keys)
        theirs = pl.DataFrame(dict(date=days, code=codes, by_hand=by_hand))
        both = ours.join(theirs.cast(dict(date=pl.Date)), on=['date', 'code'])
        assert len(both) == len(theirs)
        np.testing.assert_allclose(both['prediction'], both['by_hand'], atol=1e-5)


def test_the_better_view_on_validation_days_is_the_baseline(panel, split):
    chosen = ridge(panel, split, split.valid, lookback=LOOKBACK)
    day = ridge(panel, split, split.valid, lookback=1)
    of_chosen = evaluate(chosen, draws=0)
    of_day = evaluate(day, draws=0)
    for name, sees, ours, theirs in zip(
            of_day['target_name'], chosen['sees'].unique(maintain_order=True).to_list()*4,
            of_chosen['rank_ic'], of_day['rank_ic']):
        assert ours >= theirs-1e-12, (name, sees)


def test_windows_are_made_a_part_at_a_time(panel, split, monkeypatch):
    read = []
    rows_of = baselines._rows
    def counting(panel, dates, columns):
        read.append(len(dates))
        return rows_of(panel, dates, columns)
    monkeypatch.setattr(baselines, '_rows', counting)
    monkeypatch.setattr(baselines, '_AT_ONCE', 500)
    monkeypatch.setattr(baselines, '_SESSIONS', 30)
    whole = panel.dates[40:200]
    parts = [(len(rows), x.shape) for rows, x in
             baselines._windows(panel, Same(), whole, range(LOOKBACK))]
    assert max(read) <= 30+LOOKBACK and len(read) >= 5
    assert max(n for n, _ in parts) <= 500
    assert all(shape == (n, LOOKBACK*len(panel.spec.features)) for n, shape in parts)
    assert sum(n for n, _ in parts) == len(rows_of(panel, whole, []))


class Same:
    "No scaler"
    def transform(self, x): return x


def test_too_many_windows_are_thinned_by_days_and_said(panel, split, monkeypatch):
    monkeypatch.setattr(baselines, '_PRODUCTS', 2e6)
    table = ridge(panel, split, split.test, lookback=LOOKBACK)
    assert any('one training day of' in said for said in said_sees(dict(ridge=table)))


def test_the_window_is_that_of_the_run(panel, tmp_path):
    assert baselines.LOOKBACK == RunSpec().lookback
    example_run(tmp_path/'run', panel)
    config = json.loads((tmp_path/'run'/'config.json').read_text())
    config['run']['lookback'] = 3
    (tmp_path/'run'/'config.json').write_text(json.dumps(config))
    result = load_run(tmp_path/'run', ('ridge', 'reversal_1d'))
    seen = result.baselines['ridge']['sees'].unique().to_list()
    assert set(seen) <= {'the day', 'the window of 3 sessions'}
    split = Split(*(np.array([np.datetime64('2020-01-01')])+n for n in range(3)))
    keys = [baseline_key(name, panel, split, split.test, 0, lookback)
            for name in ('ridge', 'reversal_1d') for lookback in (3, 20)]
    assert keys[0] != keys[1] and keys[2] == keys[3]


@pytest.fixture(scope='module')
def result(panel, tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    example_run(folder, panel)
    return load_run(folder, ('reversal_1d', 'ridge'))


def test_one_baseline_is_the_best_in_every_sentence(result):
    cut = result.baselines['ridge'].with_columns(
        prediction=pl.when(pl.col('code') < 'S020').then('prediction'))
    for ridges in (result.baselines['ridge'], cut):
        one = result._replace(baselines=result.baselines | dict(ridge=ridges))
        frames = make_frames(one)
        said = verdict(one, frames.evaluations, frames.pairs, trades=frames.trades)
        assert f'the best baseline, {frames.doubts.rival}' in said[2]
        hansen = next(s for s in tried(one, frames) if s.startswith('Hansen'))
        assert f'better than {frames.doubts.rival} ' in hansen and 'all are judged on' in hansen


def test_hansens_test_is_on_rows_that_all_are_judged_on(result, monkeypatch):
    half = result.baselines['ridge'].with_columns(
        prediction=pl.when(pl.col('code') < 'S020').then('prediction'))
    one = result._replace(baselines=result.baselines | dict(ridge=half))
    tested = []
    def remember(benchmark, others, **options):
        tested.append(others)
        return .5
    monkeypatch.setattr(results, 'superior_ability', remember)
    ics = {name: baselines.daily_ic(table) for name, table in one.everything.items()}
    results._superior(one, ics)
    few = {name: table.filter(pl.col('code') < 'S020') for name, table in one.phases.items()}
    expected = common_ics(few, '1d').drop_nulls().select(list(few)).to_numpy()
    np.testing.assert_allclose(tested[0], expected[:len(tested[0])], atol=1e-12)
