"What the report says: every branch of its sentences with made numbers, and what it is made of"
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from datetime import date

import numpy as np
import polars as pl
import pytest

from atft import eval as report
from atft import sentences
from atft.backtest import Trading, performance
from atft.baselines import past_return
from atft.core import AtftError
from atft.data import write_panel
from atft.eval import alone, effect, said_rival, said_step, verdict, write_report
from atft.judge import compare, evaluate, evaluate_by
from atft.market import MarketSpec, embedded_panel, synthetic_market
from atft.predictions import example_predictions
from atft.results import (
    example_run, load_run, make_frames, named, spoken_target, step_differences, trade)

UP = dict(difference=.0089, low=.0031, high=.0148)
DOWN = dict(difference=-.0042, low=-.0070, high=-.0014)
LEVEL = dict(difference=.0004, low=-.0010, high=.0018)
SAME = dict(difference=0, low=0, high=0, holm=None)
SHORT = dict(difference=.01, low=None, high=None, holm=None)


def row(shows, holm=.11, **more):
    "A difference of the last phase against LightGBM, as `step_differences` has it"
    return dict(a='lightgbm', b='2 fan', holm=holm, horizon=1, target_name='1d') | shows | more


STEPS = [
    (row(UP, .01), 'adds +0.0089 [+0.0031, +0.0148]'),
    (row(UP), 'asked alone would add +0.0089 [+0.0031, +0.0148], '
              'but not among 36 comparisons (Holm p = .11)'),
    (row(UP, .052), 'asked alone would add +0.0089 [+0.0031, +0.0148], '
                    'but not among 36 comparisons (Holm p = .052)'),
    (row(UP, None), 'asked alone would add +0.0089 [+0.0031, +0.0148], '
                    'but not corrected for other comparisons'),
    (row(DOWN, .01), 'takes away 0.0042 [0.0014, 0.0070]'),
    (row(DOWN), 'asked alone would take away 0.0042 [0.0014, 0.0070], '
                'but not among 36 comparisons (Holm p = .11)'),
    (row(LEVEL, 1.), 'makes no measurable difference: +0.0004 [-0.0010, +0.0018]'),
    (row(SAME), 'kept the weights it was given'),
    (row(SHORT), 'cannot be compared: too few days')]

RIVALS = [
    (row(UP, .01), 'It is ahead of the best baseline, lightgbm (+0.0089 [+0.0031, +0.0148])'),
    (row(UP), 'Asked alone, it would be ahead of the best baseline, lightgbm '
              '(+0.0089 [+0.0031, +0.0148]), but not among 36 comparisons (Holm p = .11)'),
    (row(DOWN, .01), 'It is behind the best baseline, lightgbm (-0.0042 [-0.0070, -0.0014])'),
    (row(DOWN, .12), 'Asked alone, it is behind the best baseline, lightgbm '
                     '(-0.0042 [-0.0070, -0.0014]), but not among 36 comparisons (Holm p = .12)'),
    (row(LEVEL, 1.), 'It is level with the best baseline, lightgbm (+0.0004 [-0.0010, +0.0018])'),
    (row(SAME), 'It predicts the same as the best baseline, lightgbm'),
    (row(SHORT), 'It cannot be compared with the best baseline, lightgbm: too few days')]


@pytest.mark.parametrize('difference, says', STEPS)
def test_a_step_is_said_as_its_interval_and_all_comparisons_allow(difference, says):
    assert said_step(difference, 36) == says


@pytest.mark.parametrize('difference, says', RIVALS)
def test_a_baseline_is_said_as_its_interval_and_all_comparisons_allow(difference, says):
    assert said_rival(difference, 36) == says


def test_no_sentence_contradicts_the_interval_beside_it():
    for holm in (None, .001, .049, .05, .2, 1.):
        for shows in (UP, DOWN, LEVEL):
            one = row(shows, holm)
            said = [said_step(one, 36), said_rival(one, 36)]
            unclear = [s for s in said if re.search('no measurable|not distinguishable|level', s)]
            assert len(unclear) == (0 if alone(one) else 2)
            claims = [s for s in said if re.search('^adds|^takes away|is ahead of', s)]
            assert bool(claims) == (alone(one) != 0 and effect(one) is not None)


def test_one_comparison_is_not_said_to_be_among_others():
    for said in (said_step(row(UP), 1), said_rival(row(UP), 1)):
        assert 'comparisons' not in said and said.endswith('but with a p value of .11')


def test_a_t_below_the_bar_is_not_rounded_to_it():
    shown = dict(rank_ic=.04, low=.01, high=.07, days=250)
    assert '(t = 2.9, below the bar of 3' in sentences._clear(shown | dict(t=2.97))
    assert sentences._clear(shown | dict(t=3.01)) == 'clear of zero (t = 3.0)'


def test_a_table_is_bold_by_the_rule_of_the_sentences():
    assert report._difference_cell(row(UP, .01)) == '**+0.0089 [+0.0031, +0.0148]**'
    assert report._difference_cell(row(UP)) == '+0.0089 [+0.0031, +0.0148]'
    assert report._difference_cell(row(SAME)) == 'the same'
    assert report._difference_cell(row(SHORT)) == 'too few days'
    pairs = pl.DataFrame([row(UP, .01), row(LEVEL, 1., horizon=5, target_name='5d_delay1')])
    head = report.difference_table(pairs).splitlines()[0]
    assert head == '|  | h=1 | 5d_delay1 |'


@pytest.fixture(scope='module')
def panel(tmp_path_factory):
    market = MarketSpec(codes=40, days=300, clusters=4)
    return embedded_panel(market, cache=tmp_path_factory.mktemp('market'))


@pytest.fixture(scope='module')
def run(panel, tmp_path_factory):
    "A run folder made by hand: three phases, the second the same as the first"
    folder = tmp_path_factory.mktemp('run')
    example_run(folder, panel)
    return folder


@pytest.fixture(scope='module')
def result(run):
    return load_run(run, ('reversal_1d', 'ridge'))


def on_weeks(result):
    "The same without the target of one day"
    later = {}
    for kind in ('phases', 'baselines'):
        tables = getattr(result, kind)
        later[kind] = {n: t.filter(pl.col('horizon') > 1) for n, t in tables.items()}
    return result._replace(**later)


def test_the_verdict_of_a_run_counts_its_comparisons(result):
    pairs = step_differences(result)
    judged = {name: evaluate(table, draws=0) for name, table in result.everything.items()}
    said = verdict(result, judged, pairs, 10.)
    assert said[0].startswith('Phase 2 knows 0.3 ranks the next day with a rank IC of ')
    assert 'phase 1 knows 0.2 kept the weights it was given' in said[1]
    asked = pairs['p'].count()
    weak = pairs.with_columns(holm=pl.when(pl.col('p').is_not_null()).then(pl.lit(.5)))
    again = verdict(result, judged, weak, 10.)
    assert f'not among {asked} comparisons (Holm p = .50)' in again[1]
    alone_in_the_run = result._replace(phases={'2 x': result.phases[result.last]}, baselines={})
    said = verdict(alone_in_the_run, {'2 x': judged[result.last]},
                   step_differences(alone_in_the_run))
    assert said[1] == 'Only one phase was trained.'
    assert said[2].startswith('It was not set beside a baseline; after 10 bp')


def test_a_run_without_a_daily_target_is_reported_and_not_traded(result):
    later = on_weeks(result)
    frames = make_frames(later)
    assert frames.spoken == '5d' and frames.trades.net == {}
    said = verdict(later, frames.evaluations, frames.pairs, trades=frames.trades)
    assert 'ranks the next 5 days' in said[0] and '5 days ahead' in said[1]
    assert 'nothing is said about profit: there is no target 1d' in said[2]
    assert 'Nothing is traded' in report.tried(later, frames)[0]
    assert 'profit' not in report.plot_evaluation(later, frames)


def test_targets_go_by_name_where_they_have_one():
    plain = pl.DataFrame(dict(horizon=[1, 5]))
    assert named(plain)['target_name'].to_list() == ['1d', '5d']
    other = pl.DataFrame(dict(horizon=[1, 5, 6], target_name=['next_oc', '5d', '5d_delay1']))
    assert spoken_target(other) == '5d'
    assert spoken_target(other.filter(pl.col('target_name') != '5d')) == 'next_oc'
    heads = [report.label(name) for name in other['target_name']]
    assert heads == ['next_oc', 'h=5', '5d_delay1']


def test_a_trading_of_ones_own_is_what_the_report_counts(run, tmp_path):
    only = dict(baselines=('ridge',))
    cheap = write_report(run, tmp_path, 'cheap', trading=Trading(spread_bps=0), **only).read_text()
    dear = write_report(run, tmp_path, 'dear', cost_bps=50., **only).read_text()
    assert 'after 0 bp its daily long-short' in cheap and 'Traded as Trading(' in cheap
    assert 'after 50 bp its daily long-short' in dear and '-p cost_bps 50' in dear
    assert '| lightgbm |' not in cheap
    assert 'are fitted on the day and on the window that the network reads' in cheap


def test_a_cost_of_ones_own_is_not_drawn_at_other_spreads(result):
    @dataclass(frozen=True)
    class Flat(Trading):
        "Prices its own way"
    trades = trade(result, Flat(spread_bps=8), names=(result.last,), luck=False)
    assert trades.cost == 'its own costs' and list(trades.by_cost) == [4.]


def test_a_report_says_its_data_its_year_and_compounded_returns(run, tmp_path):
    text = write_report(run, tmp_path, baselines=('reversal_1d',)).read_text()
    data = text[text.index('## The data'):text.index('## Rank IC')]
    assert 'Panel(' in data and 'a year has 261 sessions' in data
    head, _, *rows = text[text.index('|  | Sharpe gross'):].split('\n\n')[0].splitlines()
    column = head.split('|').index(' net return a year, compounded ')
    for line in rows[:-1]:
        shown = re.findall(r'[+-][\d.]+(?=%)', line.split('|')[column])
        assert shown and all(float(number) >= -100 for number in shown), line
    assert 'have no known return and earn nothing' in text
    assert ' Calmar of the arithmetic mean ' in head and ' Sharpe net of 10 bp ' in head


def test_a_report_says_what_the_baselines_are_fitted_on(result):
    said = report._fitted_on(result)
    assert re.search('ridge is fitted on the (day|window of 20 sessions) for ', said[0])
    assert report._fitted_on(result._replace(baselines={})) == []


def test_a_ratio_without_a_losing_day_is_unbounded_in_the_table():
    rises = np.random.default_rng(0).uniform(.001, .01, 60)
    net = performance(pl.DataFrame(dict(gross=rises, net=rises, turnover=.1)), sessions_a_year=252)
    cells = report._backtest_row('x', net, net)
    assert cells.count('unbounded [unbounded, unbounded]') == 3  # Sortino, Calmar, Omega
    assert not any('inf' in str(cell) for cell in cells)


def test_findings_of_a_panel_are_printed_with_the_data(result):
    many = {f'rule {i}': i for i in range(12)}
    found = dict(rows_dropped=3, repairs=many, days=[['2024-01-06', 'A']])
    said = report.data_of(result._replace(findings=({}, found, found)))
    assert said[1].count('rows_dropped: 3') == 1 and 'and 2 more' in said[1]
    assert '  - 2024-01-06 A' in said[1] and len(said) == 2


def test_a_prediction_is_relative_to_the_mean_of_its_day():
    "A score is read from the network, which the rest of this file does without"
    import torch
    from atft.inference import Predicted, _rows
    from atft.network import Forecast
    from atft.targets import Target
    codes = [f'C{i}' for i in range(50)]
    score = .01*torch.randn(50, 1, generator=torch.Generator().manual_seed(0))+.06
    day = Predicted(date(2024, 1, 4), codes, Forecast(score, torch.zeros(50, 1, 3)), score)
    prediction = _rows(day, [Target(1)])['prediction']
    assert abs(prediction.mean()) < 1e-6*prediction.std()
    assert prediction.arg_sort().to_list() == score[:, 0].argsort().tolist()


def test_a_run_of_other_horizons_gets_a_whole_report(run, tmp_path):
    later = tmp_path/'run'
    shutil.copytree(run, later)
    for path in later.glob('phase*_predictions.parquet'):
        pl.read_parquet(path).filter(pl.col('horizon').is_in([5, 10])).write_parquet(path)
    text = write_report(later, tmp_path, baselines=('reversal_1d',)).read_text()
    sections = re.findall('^## (.*)$', text, re.M)
    for wanted in ('The data', 'Rank IC on the test days', 'Deciles and costs', 'Where it lives'):
        assert wanted in sections
    assert 'Nothing is traded: there is no target 1d' in text and 'give prices' in text
    assert not re.search(r'\bNone\b|\bnan\b|  \.', text[text.index('## Rank IC'):])


def test_names_with_signs_of_other_languages_are_read_as_they_are(result, tmp_path):
    signs = ' $a_b$ {x} 5%|_$\n^'
    odd = result._replace(phases={n+signs: t for n, t in result.phases.items()})
    frames = make_frames(odd)
    for name, fig in report.plot_evaluation(odd, frames).items():
        fig.savefig(tmp_path/f'{name}.png')
    lines = report.rank_ic_table(frames.evaluations).splitlines()
    assert len(lines) == 2+len(odd.everything)
    assert len({len(re.findall(r'(?<!\\)\|', line)) for line in lines}) == 1


def test_sectors_that_are_numbers_are_groups(result):
    sector = pl.col('code').str.slice(-1).cast(pl.Float64)
    table = result.phases[result.last].with_columns(
        sector=pl.when(sector > 1).then(float('nan')).otherwise(sector+33))
    assert evaluate_by(table, 'sector')['group'].unique().sort().to_list() == ['33', '34']
    whole = table.with_columns(pl.col('sector').fill_nan(None).cast(pl.Int16))
    assert evaluate_by(whole, 'sector').equals(evaluate_by(table, 'sector'))


def test_tables_without_enough_names_are_refused(result):
    one = result.phases[result.last].filter(pl.col('horizon') == 1)
    with pytest.raises(AtftError, match='10 tables without names'):
        compare(*[one]*10)
    with pytest.raises(AtftError, match='3 tables with 2 names'):
        compare(one, one, one, names=('x', 'y'))
    assert len(compare(*[one]*10, names=tuple('0123456789'))) == 9


def test_no_interval_stands_beside_too_few_days():
    judged = evaluate(example_predictions(.5, codes=20, days=120), draws=50)
    short = judged.filter(pl.col('low').is_null())
    assert short['horizon'].to_list() == [20] and short['note'][0].startswith('too few days')
    assert judged['boot_low'].is_null().to_list() == judged['low'].is_null().to_list()


@pytest.mark.parametrize('turned', [False, True])
@pytest.mark.parametrize('column', ['target', 'prediction'])
def test_tables_are_compared_on_rows_that_both_are_judged_on(column, turned):
    a = example_predictions(.5, codes=40, days=120)
    noise = pl.Series(np.random.default_rng(0).normal(size=len(a)))
    b = a.with_columns(prediction=pl.col('prediction')+.01*noise)
    of_day = pl.col('target').abs().rank().over('date', 'horizon')
    less = b.with_columns(pl.when(of_day <= 20).then(column).alias(column))
    rows = less.drop_nulls(['prediction', 'target']).select('date', 'code', 'horizon')
    common = [t.join(rows, on=rows.columns, how='semi') for t in (a, b)]
    order = -1 if turned else 1
    assert compare(*[a, less][::order]).equals(compare(*common[::order]))


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(AtftError, match='holds no config.json; train with 03_phases first'):
        load_run(tmp_path)


def test_the_report_is_imported_without_the_network_or_compiled_loops():
    heavy = ['numba', 'atft.kernels', 'atft.network', 'atft.graph', 'atft.phases']
    check = f'import sys, atft.eval; print([m for m in {heavy} if m in sys.modules])'
    found = subprocess.run([sys.executable, '-c', check], capture_output=True, text=True)
    assert found.stdout.strip() == '[]', found.stdout + found.stderr


@pytest.mark.parametrize('days, skip', [(20, 5), (100, 20), (5, 0)])
def test_who_paused_on_one_day_has_a_past_return(tmp_path, days, skip):
    made = synthetic_market(codes=20, days=200, clusters=4)
    rng = np.random.default_rng(0)
    thin = made.panel.filter(pl.Series(rng.random(len(made.panel)) < .85))
    panel = write_panel(thin, tmp_path/'panel', made.panel_spec)
    got = past_return(panel, panel.dates[140:160], days, skip).filter(pl.col('horizon') == 1)
    wide = panel.scan().select('date', 'code', 'ret_1d').collect().pivot(
        on='code', index='date', values='ret_1d').sort('date')
    place = {day: i for i, day in enumerate(wide['date'])}
    for day, code, value in got.select('date', 'code', 'prediction').iter_rows():
        end = place[day]-skip+1
        past = wide[code][end-days:end].drop_nulls()
        if len(past) < days/2: assert value is None
        else: assert value == pytest.approx(past.sum(), abs=1e-6)
