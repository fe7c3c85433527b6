"Anybody's predictions judged as a run is: in any form, beside baselines, on prices, in one line"
import re
import shlex
from datetime import date

import numpy as np
import polars as pl
import pytest

from atft.asked import PARAMETERS, command_of, read_asked, read_prices
from atft.backtest import backtest
from atft.core import AtftError
from atft.eval import write_asked
from atft.judge import evaluate
from atft.market import MarketSpec, embedded_panel
from atft.results import _example_predictions, _nothing, step_differences
from atft.sentences import _said_tables, verdict
from atft.tables import past_split, read_model, result_of_tables

QUICK = ('random', 'reversal_1d')


@pytest.fixture(scope='module')
def panel(tmp_path_factory):
    market = MarketSpec(codes=24, days=240, clusters=4)
    return embedded_panel(market, cache=tmp_path_factory.mktemp('market'))


@pytest.fixture(scope='module')
def mine(panel):
    "A model that knows a lot, of the last 60 days, for two targets"
    table = _example_predictions(panel, panel.dates[180:], knows=.5).drop('split')
    return table.filter(pl.col('horizon') < 10)


@pytest.fixture(scope='module')
def theirs(panel):
    table = _example_predictions(panel, panel.dates[180:], knows=.1, seed=1).drop('split')
    return table.filter(pl.col('horizon') < 10)


@pytest.fixture(scope='module')
def bars(panel):
    "Closes that the daily targets come from"
    rows = panel.scan().select('date', pl.col('code').cast(pl.String), 'ret_1d').collect()
    close = 100*(1+pl.col('ret_1d').fill_nan(0).fill_null(0)).cum_prod().over('code')
    return rows.sort('code', 'date').select('date', 'code', close=close.cast(pl.Float64))


@pytest.fixture
def files(mine, theirs, tmp_path):
    mine.write_parquet(tmp_path/'mine.parquet')
    theirs.drop('target').write_csv(tmp_path/'theirs.csv')
    return tmp_path


def one_day(table): return table.filter(pl.col('horizon') == 1)


def same_rows(a, b):
    keys = ['date', 'code', 'horizon']
    return a.sort(keys).select(*keys, 'prediction').equals(b.sort(keys).select(*keys, 'prediction'))


def forms(mine, folder):
    "One table as its makers would hand it over"
    mine.write_parquet(folder/'long.parquet')
    mine.write_csv(folder/'long.csv')
    pandas = mine.to_pandas()
    pandas.set_index(['date', 'code']).to_parquet(folder/'indexed.parquet')
    return [folder/'long.parquet', folder/'long.csv', folder/'indexed.parquet', mine, mine.lazy(),
            mine.to_arrow(), pandas, pandas.set_index(['date', 'code'])]


def test_a_table_is_the_same_in_every_form(mine, tmp_path):
    for source in forms(mine, tmp_path):
        assert same_rows(read_model('mine', source)[0], mine), source


def test_a_matrix_is_read_as_one_and_asks_for_its_target(mine, tmp_path):
    day = one_day(mine)
    matrix = day.pivot(on='code', index='date', values='prediction')
    matrix.write_parquet(tmp_path/'wide.parquet')
    matrix.write_csv(tmp_path/'wide.csv')
    for source in (matrix, tmp_path/'wide.parquet', tmp_path/'wide.csv'):
        table, notes = read_model('wide', source, which=1)
        assert same_rows(table, day)
        assert notes == ('read as a matrix, a column for each code', 'its target is 1d, as told')
        with pytest.raises(AtftError, match=r'predictions of wide: .*-p target 5d'):
            read_model('wide', source)


def test_only_test_days_are_judged_and_the_others_counted(mine):
    parts = pl.Series(['train', 'valid', 'test']).gather(np.arange(len(mine)) % 3)
    with_splits = mine.with_columns(split=parts)
    given = result_of_tables(dict(mine=with_splits)).tables[0]
    others = len(mine)-given.rows
    assert any(n.startswith(f'{others:,} rows of other splits left out (train ') for n in given.notes)
    untested = with_splits.with_columns(split=pl.lit('all'))
    given = result_of_tables(dict(mine=untested)).tables[0]
    assert given.rows == len(mine) and 'all rows are judged' in given.notes[0]


def test_targets_come_from_the_panel_and_are_the_same(mine, panel):
    own = result_of_tables(dict(mine=mine), panel, QUICK)
    bare = result_of_tables(dict(mine=mine.drop('target')), panel, QUICK)
    a, b = own.phases['mine']['target'], bare.phases['mine']['target']
    assert (a-b).abs().max() < 1e-6 and a.null_count() == b.null_count()
    assert bare.tables[0].notes == (f'{b.count():,} targets are those of the panel',)
    assert own.tables[0].notes == () and 'sector' in own.phases['mine'].columns


def test_a_table_that_was_judged_on_something_else_says_so(mine, panel):
    odd = mine.with_columns(target=pl.col('target')*2)
    result = result_of_tables(dict(mine=odd), panel, QUICK)
    assert 'differ from those of the panel, its own are judged' in result.tables[0].notes[0]
    judged = result.baselines['reversal_1d'].join(odd, on=['date', 'code', 'horizon'])
    assert judged['target'].equals(judged['target_right'])  # everybody on the same


def test_targets_made_of_closes_look_from_the_close_of_the_day(mine, bars):
    bare = one_day(mine).drop('target', 'horizon')
    result = result_of_tables(dict(mine=bare), prices=bars)
    found = result.phases['mine']
    after = bars.sort('code', 'date').with_columns(
        known=pl.col('close').shift(-1).over('code')/pl.col('close')-1)
    both = found.join(after, on=['date', 'code']).drop_nulls(['known', 'target'])
    assert len(both) > 1000 and (both['known']-both['target']).abs().max() < 1e-12
    assert found.filter(pl.col('date') == found['date'].max())['target'].is_null().all()
    assert 'targets are made of closes' in ' '.join(result.tables[0].notes)
    assert 'its target is 1d, since it tells none and prices make it' in result.tables[0].notes


def test_prices_after_a_day_change_no_target_before_it(mine, bars):
    bare = one_day(mine).drop('target')
    last = bare['date'].unique().sort()[40]
    fallen = pl.when(pl.col('date') > last).then(.5).otherwise(1.)
    changed = bars.with_columns(close=pl.col('close')*fallen)
    a = result_of_tables(bare, prices=bars).phases['model'].filter(pl.col('date') < last)
    b = result_of_tables(bare, prices=changed).phases['model'].filter(pl.col('date') < last)
    assert a.equals(b)


NOBODY_KNOWS = r'nobody knows what 1d, 5d came to be; .* \(-p data FOLDER\), or prices'


def test_who_knows_nothing_of_targets_is_told_what_to_give(mine, bars, panel):
    with pytest.raises(AtftError, match=NOBODY_KNOWS): result_of_tables(mine.drop('target'))
    others = mine.drop('target').with_columns(code=pl.lit('X-')+pl.col('code'))
    with pytest.raises(AtftError, match='has no row of a day and code of the predictions'):
        result_of_tables(others, panel)
    with pytest.raises(AtftError, match='spell them alike'):
        result_of_tables(others, prices=bars)
    named = one_day(mine).drop('target', 'horizon').with_columns(target_name=pl.lit('next_oc'))
    with pytest.raises(AtftError, match='next_oc cannot be made of closes'):
        result_of_tables(named, prices=bars)


def test_baselines_learn_from_days_before_the_first_prediction_alone(panel, mine):
    split = past_split(panel, mine['date'].unique().sort().to_list())
    at = {part: np.searchsorted(panel.dates, getattr(split, part)) for part in ('train', 'valid')}
    reach = panel.spec.reach
    assert at['train'][-1]+reach < at['valid'][0] and at['valid'][-1]+reach < 180
    said = ' '.join(result_of_tables(mine, panel, ('ridge',)).told)
    assert f'{len(split.train)} days' in said and f'the {reach} sessions before each' in said


def test_too_few_days_before_leave_learners_out_by_name(panel):
    early = _example_predictions(panel, panel.dates[50:120], knows=.3)
    result = result_of_tables(early, panel, ('random', 'ridge', 'reversal_5d'))
    assert list(result.baselines) == ['random', 'reversal_5d']
    assert 'ridge cannot be fitted' in result.told[1]


def test_the_first_table_is_spoken_of_and_compared_with_the_others(mine, theirs):
    result = result_of_tables(dict(mine=mine, theirs=theirs, again=mine))
    pairs = step_differences(result)
    judged = {name: evaluate(table, draws=0) for name, table in result.everything.items()}
    said = verdict(result, judged, pairs, trades=_nothing('nobody trades here'))
    assert said[0].startswith('Model mine ranks the next day with a rank IC of +')
    assert said[1].startswith('Beside the other models, one day ahead: ')
    assert 'it is ahead of model theirs (+' in said[1]
    assert 'it predicts the same as model again' in said[1]
    assert not re.search('[Pp]hase', ' '.join(said))
    assert set(pairs.select('a', 'b').unique().rows()) == {
        ('theirs', 'mine'), ('again', 'mine')}


def test_a_model_called_as_a_baseline_stands_beside_it(mine, panel, tmp_path):
    mine.write_parquet(tmp_path/'reversal_1d.parquet')
    result = result_of_tables(tmp_path/'reversal_1d.parquet', panel, QUICK)
    assert list(result.everything) == ['reversal_1d (table)', *QUICK]


def test_who_is_alone_has_chance_beside_it(mine):
    result = result_of_tables(mine)
    assert list(result.baselines) == ['random'] and result.rivals == []
    assert same_rows(result.baselines['random'], result_of_tables(mine).baselines['random'])
    assert not same_rows(result.baselines['random'], result_of_tables(mine, seed=1).baselines['random'])


def test_what_was_tried_is_told(mine):
    assert result_of_tables(mine).trials == 1
    assert result_of_tables(mine, tried=12).trials == 13
    for wrong in (-1, 'many', 1.5, True):
        with pytest.raises(AtftError, match='must be a whole number'):
            result_of_tables(mine, tried=wrong)


def asked_of(files, **more):
    both = f'{files/"mine.parquet"},{files/"theirs.csv"}'
    return dict.fromkeys(PARAMETERS) | dict(predictions=both) | more


def test_the_whole_report_lies_beside_the_table(files, panel, bars):
    bars.write_parquet(files/'bars.parquet')
    given = asked_of(files, data=str(panel.folder), prices=str(files/'bars.parquet'), top=3,
                     tried=12, html='true', baselines='reversal_1d')
    report = write_asked(read_asked(given))
    assert report == files/f'evaluation_mine_{date.today():%Y%m%d}.md'
    text = report.read_text()
    for section in ('Rank IC on the test days', 'Beside the others', 'Deciles and costs',
                    'With everything in mind that was tried', 'What to keep in mind'):
        assert f'\n## {section}\n' in text, section
    for said in ('12 things were tried besides', 'targets are those of the panel', 'SHA-256',
                 '| prices | ', 'Traded as Trading(', 'rows on 60 days'):
        assert said in text, said
    assert not re.search(r'\b[Pp]hase', text)
    page = report.with_suffix('.html').read_text()
    assert page.count('data:image/png;base64,') == text.count('![')
    assert not re.search(r'(?:src|href)="http', page)
    line = re.search(r'\| command \| `(.*?)` \|', text)[1]
    words = shlex.split(line)
    again = dict(zip(words[3::3], words[4::3]))
    assert again == {name: str(value) for name, value in given.items() if value is not None}


def test_without_a_panel_it_is_said_what_is_missing(mine):
    result = result_of_tables(dict(alone=one_day(mine)))
    judged = {name: evaluate(table, draws=0) for name, table in result.everything.items()}
    trades = _nothing('nobody trades here')
    said = verdict(result, judged, step_differences(result), trades=trades)
    assert said[1] == 'No other model was given.'
    assert said[2].startswith('It was not set beside a baseline')
    assert result.told[0].startswith('No panel was given: only chance stands beside the models')
    assert 'nobody told how many things were tried besides (-p tried N)' in _said_tables(result)


REFUSED = [
    (dict(run_dir='runs/x'), 'are both given'),
    (dict(prices='no/bars'), 'prices .*no/bars does not exist'),
    (dict(data='no/panel'), 'data .*no/panel does not exist'),
    (dict(benchmark='no/index.csv'), 'benchmark .*no/index.csv does not exist'),
    (dict(cost_bps='dear'), "cost_bps='dear' must be a number"),
    (dict(cost_bps=5, spread_bps=4), 'both say what trading costs'),
    (dict(share=.9), 'share=0.9 must lie in'),
    (dict(side='short'), "side 'short' is not known"),
    (dict(html='perhaps'), 'neither true nor false'),
    (dict(name='a/b'), 'cannot be the name of a report'),
    (dict(colour=1), "'colour' is none of run_dir, predictions"),
]


@pytest.mark.parametrize('wrong, says', REFUSED)
def test_what_cannot_be_meant_is_refused_before_anything_is_fitted(files, wrong, says):
    with pytest.raises(AtftError, match=says) as refused: read_asked(asked_of(files, **wrong))
    assert '\n' not in str(refused.value)


def test_what_belongs_to_tables_is_refused_of_a_run_and_of_nothing():
    for name in ('data', 'target', 'columns'):
        with pytest.raises(AtftError, match='the run knows its own'):
            read_asked({'run_dir': 'runs/x', name: '5d'})
    with pytest.raises(AtftError, match='nothing is there to judge'): read_asked(dict(html='true'))
    assert read_asked(dict.fromkeys(PARAMETERS)) is None


@pytest.mark.parametrize('value, typed', [
    (5, '5'), (5., '5'), (.25, '0.25'), (12345678., '12345678'), ('a b.csv', "'a b.csv'"),
    ('true', 'true')])
def test_the_line_repeats_what_was_typed(value, typed):
    assert command_of(dict(prices=value)) == f'papermill nbs/04_eval.ipynb -p prices {typed}'


def test_prices_in_memory_trade_as_those_on_disk(mine, bars, tmp_path):
    bars.write_parquet(tmp_path/'bars.parquet')
    held = read_prices(tmp_path/'bars.parquet', mine['date'].min())
    from_disk = backtest(mine, prices=tmp_path/'bars.parquet')
    assert from_disk.equals(backtest(mine, prices=held))
