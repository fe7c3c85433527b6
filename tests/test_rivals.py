"Baselines that learn see what the network sees, without the windows of a whole panel in memory."
import json
import sys
from functools import partial

import numpy as np
import polars as pl
import pytest
from scipy.stats import rankdata

from atft import baselines, results, views
from atft.baselines import baseline_key, cached_baselines, ridge, said_sees
from atft.data import (
    OnlineRobustScaler, ParquetStockIterableDataset, Split, make_loader, split_days)
from atft.judge import evaluate
from atft.market import MarketSpec, embedded_panel
from atft.panel import write_panel
from atft.predictions import daily_ic
from atft.results import doubts, example_run, load_run, step_differences
from atft.sentences import verdict
from atft.specs import RunSpec

LOOKBACK = 5


@pytest.fixture(scope='module')
def panel(tmp_path_factory):
    market = MarketSpec(codes=40, days=300, clusters=4)
    return embedded_panel(market, cache=tmp_path_factory.mktemp('market'))


@pytest.fixture(scope='module')
def split(panel):
    return split_days(panel.dates, str(panel.dates[200]), str(panel.dates[250]), 20, 5,
                      train_days=90)


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
    assert len(window), 'the planted effects of this market last for days'
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
    of_chosen = evaluate(chosen, draws=0)['rank_ic'].to_list()
    of_day = evaluate(day, draws=0)['rank_ic'].to_list()
    assert all(ours >= theirs-1e-12 for ours, theirs in zip(of_chosen, of_day))


def test_windows_are_made_a_part_at_a_time(panel, split, monkeypatch):
    read = []
    rows_of = views._rows
    def counting(panel, dates, columns):
        read.append(len(dates))
        return rows_of(panel, dates, columns)
    monkeypatch.setattr(views, '_rows', counting)
    monkeypatch.setattr(views, '_AT_ONCE', 500)
    monkeypatch.setattr(views, '_SESSIONS', 30)
    whole = panel.dates[40:200]
    parts = [(len(rows), x.shape) for rows, x in
             views.windows_of(panel, Same(), whole, range(LOOKBACK))]
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


@pytest.fixture
def half_known(result, monkeypatch):
    "A run whose ridge predicts half of the codes, and what Hansen's test is asked"
    asked = []
    def remember(benchmark, others, **options):
        asked.append((benchmark, others))
        return .5
    monkeypatch.setattr(results, 'superior_ability', remember)
    half = result.baselines['ridge'].with_columns(
        prediction=pl.when(pl.col('code') < 'S020').then('prediction'))
    return result._replace(baselines=result.baselines | dict(ridge=half)), asked


def test_one_baseline_is_the_best_in_every_sentence(result, half_known):
    for one in (result, half_known[0]):
        judged = {name: evaluate(table, draws=0) for name, table in one.everything.items()}
        ics = {name: daily_ic(table) for name, table in one.everything.items()}
        found = doubts(one, results._nothing('not asked'), ics)
        said = verdict(one, judged, step_differences(one), trades=results._nothing('not asked'))
        assert f'the best baseline, {found.rival}' in said[2]


def test_hansens_test_is_on_rows_that_all_are_judged_on(half_known):
    one, asked = half_known
    best, _ = results._superior(one, {n: daily_ic(t) for n, t in one.everything.items()})
    keys = ['date', 'code']
    common = None
    for name, table in one.everything.items():
        rows = table.filter(pl.col('horizon') == 1).drop_nulls(['prediction', 'target']).select(keys)
        common = rows if common is None else common.join(rows, on=keys, how='semi')
    ics = {name: daily_ic(table.filter(pl.col('horizon') == 1).join(common, on=keys, how='semi'))
           for name, table in one.everything.items()}
    np.testing.assert_allclose(asked[0][0], ics[best]['rank_ic'], atol=1e-12)
    for nth, name in enumerate(one.phases):
        np.testing.assert_allclose(asked[0][1][:, nth], ics[name]['rank_ic'], atol=1e-12)


def test_a_second_run_on_the_same_data_and_days_fits_nothing(panel, tmp_path, monkeypatch):
    monkeypatch.setattr(results, 'cached_baselines', partial(in_folder, tmp_path/'kept'))
    for name in ('first', 'second'): example_run(tmp_path/name, panel)
    kinds = ('random', 'ridge')
    first = load_run(tmp_path/'first', kinds).baselines

    def never(*given): raise AssertionError(f'{given[0]} was made again')

    monkeypatch.setattr(baselines, '_made', never)
    second = load_run(tmp_path/'second', kinds).baselines
    assert list(second) == list(kinds)
    for name in kinds: assert first[name].equals(second[name])
    with pytest.raises(AssertionError, match='reversal_1d was made again'):
        load_run(tmp_path/'second', ('reversal_1d',))


def in_folder(folder, panel, split, dates, seed, other, kinds, lookback):
    "`cached_baselines` in a folder of the test"
    return cached_baselines(panel, split, dates, seed, folder, kinds, lookback)


def test_a_changed_row_is_another_table(panel, split, tmp_path):
    rows = panel.scan().collect()
    is_one = (pl.col('date') == panel.dates[30].item()) & (pl.col('code') == panel.codes[0])
    changed = rows.with_columns(target_1d=pl.when(is_one).then(.5).otherwise('target_1d'))
    same = write_panel(rows, tmp_path/'same', panel.spec)
    other = write_panel(changed, tmp_path/'other', panel.spec)
    keys = [baseline_key('ridge', one, split, split.test, 0) for one in (panel, same, other)]
    assert keys[0] == keys[1] != keys[2]


def test_what_is_fitted_is_said(panel, split, monkeypatch, capsys):
    slow = partial(views.tqdm, file=sys.stderr)
    monkeypatch.setattr(views, 'tqdm', lambda *given, **told: slow(*given, **told | dict(delay=0)))
    baselines.baselines(panel, split, split.test[:5], kinds=('lightgbm',), lookback=LOOKBACK)
    said = capsys.readouterr().err
    wide = len(panel.spec.features)
    assert f'lightgbm on the day: {wide} columns x ' in said
    assert f'lightgbm on the window of {LOOKBACK} sessions: {LOOKBACK*wide} columns x ' in said
    assert 'tree' in said
