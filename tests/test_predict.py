"A run ranks the codes of a day that came later, and refuses data that is not its own with more days"
import json
import shlex
import shutil
from datetime import date, timedelta

import numpy as np
import polars as pl
import pytest
from conftest import ROOT

from atft.backtest import Trading, target_weights
from atft.bars import bars_panel
from atft.core import AtftError
from atft.ensembles import ensemble
from atft.grown import check_grown
from atft.longer import append_bars
from atft.market import synthetic_market
from atft.panel import Panel, write_panel
from atft.phases import RunFolder, RunSpec, run_phases
from atft.predict import _read_line, main, rank_today, said_today, write_today
from atft.predictions import dense, load_predictions

KEYS = ['date', 'code', 'horizon', 'target_name']
SCORES = ['prediction', 'q10', 'q50', 'q90']
TINY = dict(
    phase='0-1', max_epochs=1, hidden=4, heads=2, lookback=6, graph_lookback=12, min_obs=6, train_days=12,
    days_per_step=4, embargo=0, fan_windows=(3,), san_slices=2, device='cpu', pictures=False,
    overrides='lr=.02,averaging=0')


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('predict')


@pytest.fixture(scope='module')
def bars(): return synthetic_market(codes=20, days=330, clusters=2).ohlcv


@pytest.fixture(scope='module')
def days(bars): return bars['date'].unique().sort()


def until(bars, day): return bars.filter(pl.col('date') <= day)


def made(bars, out): return bars_panel(bars, out=out, cache=out.parent/'cache', show=False)


@pytest.fixture(scope='module')
def runs(folder, bars, days):
    "Two seeds that were trained while the market had 324 days"
    made(until(bars, days[323]), folder/'panel')
    (folder/'bars').mkdir()
    until(bars, days[323]).write_parquet(folder/'bars/until.parquet')
    sources = folder/'panel', folder/'bars'  # the same panel, read and made
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        for seed in (0, 1):
            told = dict(valid=str(days[280]), test=str(days[310]), seed=seed, data=str(sources[seed]))
            spec = RunSpec(**TINY | told, run_dir=str(folder/f'runs/seed_{seed}'))
            run_phases(spec, show=False)
    return folder/'runs'


@pytest.fixture(scope='module')
def grown(runs, folder, bars, days):
    "The panel of the runs in another folder, and six days longer"
    shutil.copytree(folder/'panel', folder/'grown')
    append_bars(Panel(folder/'grown'), bars.filter(pl.col('date').is_between(days[324], days[326])))
    return append_bars(Panel(folder/'grown'), bars.filter(pl.col('date') > days[326]))


def rows_of(table, day): return table.filter(pl.col('date') == day).select(*KEYS, *SCORES).sort(KEYS)


@pytest.mark.parametrize('place', [280, 310, 317, 323])
def test_a_day_of_the_evaluation_gets_its_scores_bit_for_bit(runs, grown, days, place):
    for number, data in ((0, grown.folder), (1, None), (1, grown.folder)):
        kept = RunFolder(runs/'seed_0').predictions(number)
        found = rank_today(runs/'seed_0', phase=number, date=days[place], data=data)
        assert found.date == days[place]
        assert rows_of(found.table, days[place]).equals(rows_of(kept, days[place]))


def test_ranks_and_weights_are_those_of_the_scores_and_of_the_report(runs, days):
    kept = RunFolder(runs/'seed_0').predictions(1)
    test = load_predictions(kept.filter(pl.col('split') == 'test'))
    for target in ('1d', '5d'):
        found = rank_today(runs/'seed_0', date=days[318], target=target, trading=Trading(top=3)).table
        mine = found.filter(pl.col('target_name') == target)
        by_score = mine.drop_nulls('rank').sort('prediction', descending=True)['rank']
        assert by_score.is_sorted() and by_score[0] == 1
        one = dense(test, target)
        wanted = target_weights(one.prediction, Trading(top=3), one.horizon)[one.dates.index(days[318])]
        weights = dict(zip(mine['code'], mine['weight']))
        assert {c: w for c, w in zip(one.codes, wanted.tolist()) if w} == {c: w for c, w in weights.items() if w}
        assert found.filter(pl.col('target_name') != target)['weight'].null_count() == len(found)-len(mine)


def nonzero(codes, weights): return {c: pytest.approx(w) for c, w in zip(codes, weights) if w}


def test_a_buffer_and_seldom_choices_carry_on_what_the_report_holds(runs, days):
    kept = RunFolder(runs/'seed_0').predictions(1)
    test = load_predictions(kept.filter(pl.col('split') == 'test'))
    one = dense(test, '1d')
    first = days.to_list().index(one.dates[0])
    for terms in (dict(keep=6), dict(rebalance=3), dict(keep=6, rebalance=3)):
        trading = Trading(top=3, **terms)
        expected = target_weights(one.prediction, trading)
        held = None
        for nth in range(5):
            found = rank_today(runs/'seed_0', date=days[first+nth], holdings=held, target='1d', trading=trading)
            mine = found.table.filter(pl.col('target_name') == '1d')
            if nth % trading.rebalance == 0: mine = mine.drop_nulls('rank')  # who pauses is sold at once
            wanted = nonzero(one.codes, expected[nth].tolist())
            assert {c: w for c, w in zip(mine['code'], mine['weight']) if w} == wanted
            if nth % trading.rebalance and held is not None:
                assert mine['trade'].abs().sum() == 0
                assert 'nothing is traded today' in said_today(found)[-1]
            fresh = [line for line in said_today(found) if 'fresh start' in line]
            assert len(fresh) == ('keep' in terms and held is None)
            held = mine.select('code', 'weight')
        between = rank_today(runs/'seed_0', date=days[first+4], target='1d', trading=Trading(top=3, rebalance=3))
        assert between.facts['choice']['on'] == str(days[first+3])


def test_a_panel_that_was_carried_on_ranks_as_one_that_was_made_of_all_bars(runs, grown, folder, bars, days):
    whole = made(bars, folder/'whole')
    for day in (days[324], days[329]):
        found = [rank_today(runs/'seed_0', date=day, data=p.folder) for p in (grown, whole)]
        assert found[0].table.equals(found[1].table)
        assert [f.facts['data']['new_days'] for f in found] == [6, 6]
    assert rank_today(runs/'seed_0', data=grown.folder).date == days[329]
    before = made(until(bars, days[325]), folder/'before')  # what came later moves nothing
    early = rank_today(runs/'seed_0', date=days[325], data=before.folder)
    assert early.table.equals(rank_today(runs/'seed_0', date=days[325], data=grown.folder).table)


def test_a_folder_of_bars_gets_one_file_more(runs, grown, folder, bars, days, monkeypatch):
    monkeypatch.chdir(folder)
    bars.filter(pl.col('date') > days[323]).write_parquet(folder/'bars/later.parquet')
    found = rank_today(runs/'seed_1')
    assert found.date == days[329] and found.facts['data']['new_days'] == 6
    assert found.table.equals(rank_today(runs/'seed_1', data=grown.folder).table)


def other_price(bars, days):
    place = (pl.col('code') == 'S003') & (pl.col('date') == days[40])
    return bars.with_columns(close=pl.when(place).then(pl.col('close')*.99).otherwise('close'))


def a_row_gone(bars, days):
    return bars.filter((pl.col('code') != 'S003') | (pl.col('date') != days[300]))


def a_day_between(bars, days):
    gaps = [day for day in days if day.weekday() == 4 and day < days[200]]
    saturday = bars.filter(pl.col('date') == gaps[-1]).with_columns(
        date=pl.lit(gaps[-1]+timedelta(1)), volume=pl.col('volume')*2)
    return pl.concat([bars, saturday])


@pytest.mark.parametrize('change', [other_price, a_row_gone, a_day_between])
def test_data_in_which_an_old_row_is_other_is_refused_by_name(runs, folder, bars, days, change):
    other = made(change(bars, days), folder/change.__name__)
    with pytest.raises(AtftError, match=r'rows of .* days that it was trained on .* \(in year=201'):
        rank_today(runs, data=other.folder)


def test_a_panel_with_other_features_or_fewer_days_is_refused(runs, folder, bars, days):
    short = made(until(bars, days[320]), folder/'short')
    with pytest.raises(AtftError, match='is not the data of the run with more days'):
        rank_today(runs/'seed_0', data=short.folder)
    scaled = bars_panel(bars, out=folder/'scaled', cache=folder/'cache', scale='robust', show=False)
    with pytest.raises(AtftError, match='are other, gone or new'): rank_today(runs/'seed_0', data=scaled.folder)
    few = bars_panel(bars, out=folder/'few', cache=folder/'cache', horizons=(1, 5), show=False)
    with pytest.raises(AtftError, match=r'lacks 10d, 20d \(targets\)'): rank_today(runs/'seed_0', data=few.folder)


def test_only_the_days_of_a_window_are_decoded(runs, folder, monkeypatch):
    "The same rows in small row groups, at another place"
    panel = Panel(folder/'panel')
    small = write_panel(panel.scan().collect(), folder/'small', panel.spec, row_group=64)
    decoded = []
    decode = Panel.decode

    def watched(self, group, *more):
        decoded.append(group.last)
        return decode(self, group, *more)

    monkeypatch.setattr(Panel, 'decode', watched)
    found = rank_today(runs/'seed_0', data=small.folder)
    assert found.facts['data']['new_days'] == 0
    assert min(decoded) >= 323-3-12 and len(set(decoded)) < len(small.groups)/5


def test_a_run_that_did_not_write_its_shards_down_is_known_while_its_panel_is_there(runs, folder, grown):
    config = RunFolder(runs/'seed_0').read_config()['data']
    bare = {name: value for name, value in config.items() if name not in ('shards', 'root')}
    assert check_grown(bare, grown) == 6
    with pytest.raises(AtftError, match='does not tell the shards'):
        check_grown(bare | dict(folder=str(folder/'nowhere')), grown)


def test_an_ensemble_is_the_mean_of_the_ranks_of_its_runs(runs, days):
    single = [rank_today(runs/f'seed_{seed}', date=days[323]).table for seed in (0, 1)]
    both = rank_today(runs, date=days[323])
    assert both.facts['runs'] == [str(runs/'seed_0'), str(runs/'seed_1')]
    for name in ('1d', '20d'):
        ranks = [t.filter(pl.col('target_name') == name).sort('code') for t in single]
        mine = both.table.filter(pl.col('target_name') == name).sort('code')
        up = np.mean([len(r)+1-r['rank'].to_numpy() for r in ranks], 0)
        np.testing.assert_allclose(mine['prediction'], (up-(len(up)+1)/2)/len(up), atol=1e-12)
        np.testing.assert_allclose(mine['q50'], np.mean([r['q50'] for r in ranks], 0), rtol=1e-6)


def test_ranks_with_the_same_mean_are_tied():
    tables = []
    for order in ('ABC', 'BAC', 'BCA', 'CAB', 'CBA', 'ACB'):
        table = pl.DataFrame(dict(date=date(2024, 1, 2), code=list('ABC'), horizon=1,
                                  target_name='1d', target=None))
        tables.append(table.with_columns(prediction=pl.col('code').replace_strict(
            {code: float(place) for place, code in enumerate(order)})))
    assert ensemble(tables)['prediction'].to_list() == [0, 0, 0]


def test_runs_of_other_data_are_no_ensemble(runs, folder):
    mixed = folder/'mixed'
    shutil.copytree(runs, mixed)
    path = mixed/'seed_1/config.json'
    config = json.loads(path.read_text())
    config['data']['fingerprint'] = 'another'
    path.write_text(json.dumps(config))
    with pytest.raises(AtftError, match='seed_1 has fingerprint another, .*seed_0 has '):
        rank_today(mixed)
    with pytest.raises(AtftError, match='its folders hold some: .*runs'): rank_today(folder)


def test_holdings_become_trades(runs, folder, days, grown):
    codes = grown.codes
    held = pl.DataFrame(dict(code=[codes[0], codes[1]], weight=[.5, -.25]))
    found = rank_today(runs/'seed_0', holdings=held, data=grown.folder).table.filter(pl.col('target_name') == '1d')
    known = dict(zip(found['code'], found['held']))
    assert known[codes[0]] == .5 and known[codes[1]] == -.25 and sum(map(abs, known.values())) == .75
    assert (found['trade']-(found['weight']-found['held'])).abs().max() == 0
    write_today(rank_today(runs/'seed_0', date=days[328], data=grown.folder), folder/'yesterday.csv')
    again = rank_today(runs/'seed_0', holdings=folder/'yesterday.csv', data=grown.folder).table
    yesterday = pl.read_csv(folder/'yesterday.csv').filter(pl.col('weight') != 0)
    mine = again.filter(pl.col('held') != 0)
    assert dict(zip(mine['code'], mine['held'])) == dict(zip(yesterday['code'], yesterday['weight']))
    with pytest.raises(AtftError, match=r'holdings: 1 codes that the panel does not have \(NOBODY\)'):
        rank_today(runs/'seed_0', holdings=pl.DataFrame(dict(code=['NOBODY'], weight=[.1])), data=grown.folder)


def test_a_csv_holds_what_parquet_holds(runs, folder, days):
    found = rank_today(runs/'seed_0')
    write_today(found, folder/'a.csv')
    where = write_today(found, folder/'archive/{date}.parquet')
    assert where.name == f'{days[323]}.parquet' and where.with_suffix('.json').exists()
    table = pl.read_parquet(where)
    text = pl.read_csv(folder/'a.csv', try_parse_dates=True, schema_overrides=table.schema)
    assert text.equals(table)
    facts = json.loads((folder/'a.json').read_text())
    assert facts['date'] == str(days[323]) and facts['data']['new_days'] == 0


@pytest.mark.parametrize('more, says', [
    (['--run-dir', 'nowhere'], 'atft_predict: predict: no run nowhere'),
    (['--phase', '3'], r'no trained phase 3 \(it has 0, 1\)'),
    (['--date', '1999-01-01'], '1999-01-01 is no day of '),
    (['--date', '2015-01-05'], 'days of history with itself'),
    (['--out', 'today.xlsx'], 'ends in .xlsx'),
    (['--data', 'nowhere'], 'nowhere does not exist'),
    (['--target', '7d'], "no target '7d'"),
    (['--share', '.7'], r'share=0.7 must lie in \(0, 0.5\]')])
def test_what_cannot_be_meant_is_one_line(runs, folder, more, says, monkeypatch):
    monkeypatch.chdir(folder)
    line = ['--run-dir', 'runs/seed_0', '--out', 'never.csv', *more]
    with pytest.raises(SystemExit, match=says) as stopped: main(line)
    assert '\n' not in str(stopped.value) and not (folder/'never.csv').exists()


def test_the_line_of_the_morning_works_as_it_stands(runs, grown, folder, days, monkeypatch, capsys):
    page = (ROOT/'nbs/morning.md').read_text()
    lines = [shlex.split(line)[3:] for line in page.splitlines() if line.startswith('python -m atft.predict')]
    assert [_read_line(line)['run_dir'] for line in lines] == ['runs/market']
    monkeypatch.chdir(folder)
    shutil.copytree('runs/seed_0', 'market/runs/market')
    monkeypatch.chdir(folder/'market')
    pl.DataFrame(dict(code=grown.codes[:1], weight=[.1])).write_csv('held.csv')
    main([*lines[0], '--data', str(grown.folder)])
    said = capsys.readouterr().out.splitlines()
    assert f'codes on {days[329]}, by phase 1 of runs/market' in said[0] and '6 days of the data came' in said[1]
    assert said[-1].startswith(f'archive/{days[329]}.parquet, and what')
    assert {'held', 'trade'} <= set(pl.read_parquet(f'archive/{days[329]}.parquet').columns)
