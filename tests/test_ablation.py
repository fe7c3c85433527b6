"What the ablation computes of results: gains, shares and the ceiling of a window"
import logging
import re

import numpy as np
import polars as pl
import pytest
from papermill.inspection import _infer_parameters
from papermill.iorw import load_notebook_node

from atft.ablation import AblationSpec, branch_folder, run_options
from atft.core import AtftError
from atft.gains import (
    branch_table, ceiling, chain_frame, chain_table, daily, daily_gain, gains, limit_table,
    made_of, over_seeds, share_of_oracle)
from atft.intervals import mean_interval
from conftest import ROOT

CODES = list('ABCDE')
FIRST = np.datetime64('2020-01-01')

def ranked(signs, horizon=1):
    "Five codes a day with targets 0 to 4: a day's rank IC is its sign, or unknown for 0"
    target = np.arange(5.)
    frames = []
    for day, sign in enumerate(signs):
        frame = pl.DataFrame(dict(code=CODES, prediction=sign*target, target=target))
        date = pl.lit(FIRST+day)
        frames.append(frame.with_columns(date=date, horizon=pl.lit(horizon, pl.Int32)))
    return pl.concat(frames)

ALWAYS = [1]*30
HALF = [1, -1]*15

def test_a_gain_is_the_mean_difference_of_the_same_days_with_the_interval_of_all_seeds_in_a_row():
    seeds = [dict(control=ranked(HALF), part=ranked(ALWAYS)),
             dict(control=ranked(ALWAYS), part=ranked(ALWAYS))]
    frame = gains(seeds)
    assert frame['branch'].to_list() == ['control', 'part']
    assert frame['rank_ic'].to_list() == [.5, 1]
    assert frame['gain'].to_list() == [0, .5]
    assert frame['days'].to_list() == [60, 60]
    expected = mean_interval(np.array([0, 2]*15+[0]*30, float), 1)
    assert (frame['low'][1], frame['high'][1]) == (expected['low'], expected['high'])
    assert frame['low'][0] == frame['high'][0] == 0

def test_days_that_only_one_side_has_are_no_gain():
    ours = daily(ranked(ALWAYS), 1)
    base = daily(ranked(HALF[:10]), 1)
    found = daily_gain(ours, base)
    assert found['value'].to_list() == [0, 2]*5
    assert found['date'].to_list() == base['date'].to_list()

def test_only_the_horizon_that_is_asked_for_is_judged():
    both = pl.concat([ranked(ALWAYS, 1), ranked(HALF, 5)])
    assert daily(both, 1)['value'].to_list() == ALWAYS
    assert daily(both, 5)['value'].to_list() == HALF

def test_seeds_that_saw_the_same_days_are_averaged_day_by_day():
    series = [daily(ranked(ALWAYS), 1), daily(ranked(HALF), 1)]
    assert over_seeds(series).tolist() == [1, 0]*15

def test_too_few_days_have_a_mean_and_no_interval():
    seeds = [dict(control=ranked(HALF[:4]), oracle=ranked(ALWAYS[:4]), part=ranked(ALWAYS[:4]))]
    frame = gains(seeds)
    assert frame['gain'].to_list() == [0, 1, 1]
    assert frame['low'].is_nan().all()
    assert '| made | 1.0000 | +0.0000 | too few days |' in branch_table({'made': frame}, ('part',))

def test_a_phase_is_compared_with_the_one_before_and_the_oracle_with_nothing():
    chain = {'0 baseline': ranked(HALF), '1 graph': ranked(ALWAYS), 'oracle': ranked(ALWAYS)}
    frame = chain_frame([chain, chain], 1, over_seeds)
    assert frame['rank_ic'].to_list() == [0, 1, 1]
    assert frame['gain'].to_list() == [None, 1, None]
    expected = mean_interval(np.array([0, 2]*15, float), 1)
    assert frame['gain_low'][1] == expected['low']
    lines = chain_table(frame, 1).splitlines()
    assert lines[2].startswith('| 0 baseline | +0.0000 [') and lines[2].count('|') == 5
    assert '| +1.0000 [' in lines[3]

def test_sharpe_ratios_are_of_one_day_only():
    chain = {'0 baseline': ranked(HALF, 5)}
    frame = chain_frame([chain], 5)
    assert frame['sharpe'].is_null().all()
    assert 'Sharpe' not in chain_table(frame, 5)

def test_the_last_phase_reaches_its_share_of_the_oracle():
    chain = {'4 finetune': ranked([1, 1, 1, -1]*5), 'oracle': ranked([1]*20)}
    assert share_of_oracle([chain]) == pytest.approx(.5)
    assert share_of_oracle([{'4 finetune': ranked(ALWAYS)}]) is None

def keys(days):
    return dict(date=np.repeat(FIRST+np.arange(days), 5), code=CODES*days)

def test_the_variance_of_ranks_goes_with_what_they_are_made_of():
    days = 400
    own = np.tile([-2., -1, 0, 1, 2], days)
    shift = np.tile([2., -1, -2, -1, 2], days)  # uncorrelated with the other
    truth = pl.DataFrame(keys(days) | dict(own=own, shift=shift)).with_columns(horizon=1)
    def shares(prediction):
        columns = dict(prediction=prediction, target=np.zeros(5*days))
        return made_of(pl.DataFrame(keys(days) | columns).with_columns(horizon=1), truth)
    alone = shares(own)
    assert alone['own'] == pytest.approx(1)
    assert alone['none of them'] == pytest.approx(0, abs=1e-12)
    noise = shares(np.random.default_rng(0).normal(size=5*days))
    assert noise['none of them'] > .99
    mixed = shares(3*own+shift)
    assert mixed['own'] > mixed['shift'] > 0
    assert sum(mixed.values()) == pytest.approx(1)

def test_the_ceiling_adds_up_in_variance_and_what_is_known_counts_whole():
    limits = dict(peers=dict(share=.36, correlations=None),
                  own=dict(share=.64, correlations=[.1, .5, .2, .3]))
    assert ceiling(limits) == pytest.approx((.36+.64*.25)**.5)
    text = limit_table(limits)
    assert '| peers | 36% | known | known | known | known |' in text
    assert '| own | 64% | 0.10 | 0.50 | 0.20 | 0.30 |' in text
    assert 'correlation of 0.72 with the oracle' in text

@pytest.mark.parametrize('wrong, says', [
    (dict(markets='pears'), "markets: 'pears' is not one of own, peers, periodic, shift, all"),
    (dict(branches='graph,fann'), "branches: 'fann' is not one of graph, fan, "),
    (dict(chain_epochs=0), 'chain_epochs=0 must be at least 1')])
def test_what_cannot_be_meant_is_one_line(wrong, says):
    with pytest.raises(AtftError, match=re.escape(says)) as found:
        AblationSpec(**wrong)
    assert '\n' not in str(found.value)

def test_options_take_the_type_of_what_they_set():
    found = run_options('valid=2015-01-01,train_days=500,dropout=.2')
    assert found == dict(valid='2015-01-01', train_days=500, dropout=.2)
    with pytest.raises(AtftError, match="options: 'valdi=3' names no option of a run"):
        run_options('valdi=3')

def test_another_option_has_another_folder(tmp_path):
    ask = AblationSpec(codes=30, days=260)
    wider = AblationSpec(codes=30, days=260, hidden=32)
    assert branch_folder(ask, 'own', 0, tmp_path) == branch_folder(ask, 'own', 0, tmp_path)
    assert branch_folder(ask, 'own', 0, tmp_path) != branch_folder(wider, 'own', 0, tmp_path)
    assert branch_folder(ask, 'own', 0, tmp_path).name.startswith('own-30x260-4+3-0-')

@pytest.mark.parametrize('name', ['06_bench', '07_ablation'])
def test_papermill_reads_every_parameter_that_the_makefile_sets_and_warns_of_none(name, caplog):
    notebook = load_notebook_node(str(ROOT/f'nbs/{name}.ipynb'))
    with caplog.at_level(logging.WARNING):
        known = _infer_parameters(notebook)
    assert not caplog.records
    assert {p.default for p in known} == {'None'}
    lines = (ROOT/'Makefile').read_text().splitlines()
    meant = [line for line in lines if f'nbs/{name}.ipynb' in line]
    if name == '07_ablation':
        meant += [line for line in lines if re.match('(ABLATION|LARGE|REAL) :=', line)]
    given = {word for line in meant for word in re.findall(r'-p (\w+)', line)}
    assert given and given <= {p.name for p in known}
