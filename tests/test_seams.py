"What a researcher might replace is replaced without touching the package, from end to end"
import json
import logging
import os
import re
import signal
import sys
from dataclasses import dataclass

import polars as pl
import pytest
import torch
import warm
from conftest import ROOT
from papermill.inspection import inspect_notebook
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from polars.testing import assert_frame_equal
from torch import nn

from atft.checkpoint import load_state
from atft.core import AtftError
from atft.eval import write_report
from atft.fan_san import split_missing
from atft.graph import GraphSpec, SectorHistory, correlation_knn
from atft.judge import compare, evaluate
from atft.losses import TERMS, mean_known, register_term, relative_to_day
from atft.market import synthetic_market
from atft.network import PARTS, register_part
from atft.panel import Panel, as_target
from atft.phases import (
    CHECKPOINT_VERSION, Callback, Phase, RunFolder, RunSpec, Stopped, check_run, load_checkpoint,
    run_phases, setup)
from atft.specs import flat_names

TINY = dict(max_epochs=1, hidden=8, lookback=10, embargo=5, pictures=False)

# --- targets by name

NAMES = ['1d', '5d_delay1', 'next_oc']


@pytest.fixture(scope='module')
def named(tmp_path_factory):
    "The folder of a run on bars whose targets were asked for by name, on the command line"
    root = tmp_path_factory.mktemp('named')
    bars = synthetic_market(codes=12, days=260, clusters=2).ohlcv
    (root/'bars').mkdir()
    bars.write_parquet(root/'bars/bars.parquet')
    options = '--phase 0 --max-epochs 1 --hidden 8 --lookback 10 --embargo 5 --run-dir run'
    typed = [*options.split(), '--data', 'bars', '--targets', *NAMES]
    warm.run([sys.executable, '-m', 'atft.phases', *typed], cwd=root, check=True)
    return RunFolder(root/'run')


def test_the_panel_made_of_bars_has_the_targets_asked_for(named):
    config = named.read_config()
    panel = Panel(config['data']['folder'])
    assert list(panel.spec.target_names) == NAMES == config['data']['targets']
    assert config['run']['targets'] == NAMES


def test_the_purge_follows_the_longest_reach(named):
    "Five sessions entered a close later reach six ahead; plus an embargo of five"
    config = named.read_config()
    dates = list(Panel(config['data']['folder']).dates.astype(str))
    split = config['split']
    for before, after in (('train', 'valid'), ('valid', 'test')):
        between = dates.index(split[after][0])-dates.index(split[before][1])-1
        assert between == 6+5


def test_predictions_and_metrics_have_the_targets_by_name(named):
    predictions = named.predictions(0)
    spans = predictions.select('target_name', 'horizon').unique().sort('target_name').rows()
    assert spans == [('1d', 1), ('5d_delay1', 5), ('next_oc', 1)]
    counts = predictions.group_by('target_name').len()['len']
    assert counts.n_unique() == 1
    found = named.read_metrics(0)['valid_rank_ic']
    assert [as_target(key).name for key in found] == NAMES
    assert all(interval['mean'] is not None for interval in found.values())
    judged = evaluate(predictions.filter(pl.col('split') == 'test'), draws=20)
    assert sorted(judged['target_name']) == NAMES


def test_what_came_is_the_return_of_the_name(named):
    "The realised target beside the prediction, counted from the bars"
    config = named.read_config()
    bars = pl.read_parquet(named.path.parent/'bars/*.parquet').sort('code', 'date')
    close = pl.col('close')
    later = close.shift(-6)/close.shift(-1)-1
    inside = close.shift(-1)/pl.col('open').shift(-1)-1
    ahead = bars.with_columns(later=later.over('code'), inside=inside.over('code'))
    for name, column in (('5d_delay1', 'later'), ('next_oc', 'inside')):
        told = named.predictions(0).filter(pl.col('target_name') == name)
        both = told.join(ahead, on=['date', 'code'], how='left').drop_nulls(['target', column])
        assert len(both) > 100, config['split']
        distance = (both['target']-both[column]).abs()
        assert distance.median() < 1e-6  # bars with gaps stand on the calendar, not in a row


def test_the_report_has_a_column_for_each_target(named, tmp_path):
    report = write_report(named.path, tmp_path, baselines=('reversal_1d', 'random'))
    text = report.read_text()
    heads = [line for line in text.splitlines() if line.startswith('|') and '5d_delay1' in line]
    assert any('h=1' in head and 'next_oc' in head for head in heads), text[:3000]


def test_an_old_table_with_an_integer_horizon_is_judged_and_compared(named):
    new = named.predictions(0).filter((pl.col('split') == 'test') & (pl.col('target_name') == '1d'))
    old = new.drop('target_name').with_columns(pl.col('horizon').cast(pl.Int64))
    assert_frame_equal(evaluate(old, draws=20), evaluate(new, draws=20))
    found = compare(old, new, names=('old', 'new')).row(0, named=True)
    assert found['target_name'] == '1d' and found['difference'] == 0
    other = old.with_columns(-pl.col('prediction'))
    row = compare(other, named.predictions(0).filter(pl.col('split') == 'test')).row(0, named=True)
    assert row['target_name'] == '1d' and abs(row['difference']) > 0


# --- parts, terms, graphs, callbacks of one's own

class Widened(nn.Module):
    "h + tanh(g) W h: one map of each code's state behind a gate"
    def __init__(self, spec):
        super().__init__()
        self.map = nn.Linear(spec.hidden, spec.hidden)
        self.g = nn.Parameter(torch.zeros(spec.hidden))

    def forward(self, h, inputs): return h + torch.tanh(self.g)*self.map(h)


class Smoothed(nn.Module):
    "x + tanh(g) (mean of the window - x): one gate a feature, on the window"
    def __init__(self, spec):
        super().__init__()
        self.g = nn.Parameter(torch.zeros(spec.channels))

    def forward(self, x): # [N, L, F], NaN where unknown -> 0 there
        values, known = split_missing(x)
        mean = values.sum(1, keepdim=True)/known.sum(1, keepdim=True).clamp(min=1)
        return values + torch.tanh(self.g)*torch.where(known, mean-values, 0)


class Loud(nn.Module):
    "Not silent at birth"
    def __init__(self, spec): super().__init__()

    def forward(self, h, inputs): return h+1


def absolute(day):
    "A term of the loss: the absolute distance of scores and targets within their day"
    score = relative_to_day(day.score, day.known)
    truth = relative_to_day(day.target, day.known)
    return mean_known((score-truth).abs(), day.known)


@dataclass(frozen=True)
class Steps:
    steps:int = 3


class Ring:
    "Every code is joined to the codes a few places before and after it"
    version = '1'
    attributes = 2

    def __init__(self): self.spec = Steps()

    def __call__(self, day):
        codes = torch.arange(len(day.codes))
        step = torch.arange(1, self.spec.steps+1)
        source = codes.repeat_interleave(len(step))
        target = (source+step.repeat(len(codes))) % len(codes)
        pairs = torch.stack([source, target])
        edges = torch.cat([pairs, pairs.flip(0)], 1)
        weight = torch.linspace(.1, .9, edges.shape[1])
        return edges, torch.stack([weight, -weight], 1)


class Witness(Callback):
    "Writes down each moment, what the gates were at birth, and may ask to stop as a user does"
    def __init__(self, stop_at=None):
        self.stop_at = stop_at  # phase and step
        self.moments = []
        self.gates = {}
        self.steps = 0

    def run_begins(self, setup): self.moments.append('run begins')

    def phase_begins(self, trainer):
        self.moments.append(f'phase {trainer.number} begins')
        named = trainer.net.named_parameters()
        own = {name: p.detach().clone() for name, p in named if name.endswith('.g')}
        self.gates[trainer.number] = own
        self.steps = 0

    def step_ends(self, trainer):
        self.steps += 1
        if (trainer.number, self.steps) == self.stop_at: os.kill(os.getpid(), signal.SIGTERM)

    def epoch_ends(self, trainer): self.moments.append(f'epoch of {trainer.number} ends')

    def phase_ends(self, trainer): self.moments.append(f'phase {trainer.number} ends')

    def phase_fails(self, trainer, error): self.moments.append(f'phase {trainer.number} fails')


@pytest.fixture(scope='module')
def mine():
    "A table of three phases, with parts and a term that are known as long as they are used"
    register_part('smoothed', 'window', Smoothed)
    register_part('widened', 'state', Widened)
    register_part('loud', 'state', Loud)
    register_term('absolute')(absolute)
    loss = dict(mse=.3, absolute=.3, ic=.4)
    weights = {'1d': 1., '5d': .5, '10d': 0., '20d': 0.}
    yield (
        Phase('plain', (), 2e-3, loss, weights, epochs=1),
        Phase('smooth', ('smoothed',), 1e-3, loss, weights, epochs=1, rates=dict(smoothed=2)),
        Phase('wide', ('smoothed', 'graph', 'widened'), 1e-3, loss, weights, epochs=1))
    for name in ('smoothed', 'widened', 'loud'): del PARTS[name]
    del TERMS['absolute']


def my_run(folder): return RunSpec(run_dir=str(folder), phase='0-2', **TINY)


@pytest.fixture(scope='module')
def chain(mine, small_market, tmp_path_factory):
    "The run that nothing happened to: its folder, its metrics, and who watched"
    folder = tmp_path_factory.mktemp('chain')/'run'
    witness = Witness()
    options = dict(phases=mine, graph=Ring(), callbacks=[witness])
    found = run_phases(my_run(folder), small_market, show=False, **options)
    return folder, found, witness


def test_a_table_of_ones_own_trains_with_parts_term_graph_and_callback(chain):
    folder, found, witness = chain
    assert [m['name'] for m in found.values()] == ['plain', 'smooth', 'wide']
    assert found[2]['parts'] == ['graph', 'smoothed', 'widened']
    assert found[0]['epochs'][1]['train']['absolute'][0] > 0
    config = json.loads((folder/'config.json').read_text())
    assert config['keys']['graph']['name'] == 'Ring'
    assert config['keys']['graph']['spec'] == dict(steps=3)
    assert [phase['terms'] for phase in config['phases']] == [dict(mse=.3, absolute=.3, ic=.4)]*3
    wanted = ['run begins']
    for n in range(3):
        wanted += [f'phase {n} begins', f'epoch of {n} ends', f'phase {n} ends']
    assert witness.moments == wanted


MINE = ('smoothed.g', 'widened.g', 'graph.g')


def test_gates_are_zero_at_birth_and_move_in_their_phase(chain):
    folder, found, witness = chain
    assert set(witness.gates[0]) >= {*MINE, 'fan.gate.g', 'san.gate.g'}
    assert not any(gate.any() for gate in witness.gates[0].values())
    before_last = witness.gates[2]
    assert before_last['smoothed.g'].any() and not before_last['widened.g'].any()
    assert not before_last['graph.g'].any()
    last = load_state(folder/'phase2_best.pt', CHECKPOINT_VERSION)['model']
    for name in MINE: assert last[name].any(), name
    for name in ('fan.gate.g', 'san.gate.g'): assert not last[name].any(), name


def test_a_phase_starts_bit_for_bit_where_the_one_before_ended(chain, mine, small_market):
    folder, found, _ = chain
    for n in (0, 1):
        ended = found[n]['epochs'][found[n]['best_epoch']]['valid']
        began = found[n+1]['epochs'][0]['valid']
        assert began['rank_ic'] == ended['rank_ic']
    parts = ('fan', 'san', 'levels', 'graph', 'smoothed', 'widened')
    made = setup(check_run(my_run(folder), mine), small_market, parts, Ring())
    day = next(iter(made.dataset(made.split.test[:1])))
    for n in (0, 1):
        net = made.network()
        net.load_state_dict(load_checkpoint(folder/f'phase{n}_best.pt', made)['model'])
        net.eval()
        inputs = day.x, *made.graphs(day)
        with torch.no_grad():
            before = net.switch(mine[n].parts)(*inputs)
            after = net.switch(mine[n+1].parts)(*inputs)
        assert torch.equal(before.score, after.score)
        assert torch.equal(before.quantiles, after.quantiles)


@pytest.mark.parametrize('stop_at', [(1, 3), (2, 5)])
def test_a_stop_in_the_middle_of_a_phase_leaves_no_trace(
        chain, mine, small_market, tmp_path, stop_at):
    straight, found, _ = chain
    folder = tmp_path/'run'
    witness = Witness(stop_at)
    options = dict(show=False, phases=mine, graph=Ring())
    with pytest.raises(Stopped, match=f'phase {stop_at[0]}: stopped as asked'):
        run_phases(my_run(folder), small_market, callbacks=[witness], **options)
    assert witness.moments[-1] == f'phase {stop_at[0]} fails'
    assert not RunFolder(folder).is_done(stop_at[0])
    run_phases(my_run(folder), small_market, **options)
    for n in range(3):
        one = load_state(straight/f'phase{n}_best.pt', CHECKPOINT_VERSION)['model']
        two = load_state(folder/f'phase{n}_best.pt', CHECKPOINT_VERSION)['model']
        assert one.keys() == two.keys()
        assert all(torch.equal(one[k], two[k]) for k in one)
        ours = RunFolder(straight).predictions(n)
        assert_frame_equal(ours, RunFolder(folder).predictions(n), check_exact=True)


def test_a_part_that_is_not_silent_at_birth_is_refused_in_one_line(mine, small_market, tmp_path):
    loud = Phase('loud', ('loud',), 1e-3, dict(mse=1.), mine[0].horizon_weights, epochs=1)
    run = RunSpec(run_dir=str(tmp_path/'run'), phase='0-1', **TINY)
    with pytest.raises(AtftError) as refused:
        run_phases(run, small_market, show=False, phases=(mine[0], loud))
    says = 'part loud: it changes the output at birth; let its gate be zero at birth'
    assert str(refused.value) == says
    assert not list((tmp_path/'run').glob('phase*'))


# --- options of the graph by their flat names

GRAPHS = [dict(demean=True), dict(halflife=20.), dict(shrinkage=.3), dict(sector_edges=True),
          dict(graph_lookback=45), dict(demean=True, halflife=30., shrinkage=.2, sector_edges=True)]


class Opened(Exception):
    "The run is open and its config written: nothing needs to be trained"


class Stop(Callback):
    def run_begins(self, setup):
        self.setup = setup
        raise Opened


def begin(panel, folder, **options):
    "The setup of a run and its folder, nothing trained"
    run = RunSpec(run_dir=str(folder), phase='1', **TINY, **options)
    stop = Stop()
    with pytest.raises(Opened): run_phases(run, panel, show=False, callbacks=[stop])
    return stop.setup, RunFolder(folder)


@pytest.mark.parametrize('options', GRAPHS, ids=' '.join)
def test_options_of_the_graph_reach_its_edges_and_the_config(
        options, small_market, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made, folder = begin(small_market, tmp_path/'run', **options)
    own = {flat_names()[name].field: value for name, value in options.items()}
    spec = GraphSpec(**own)
    config = folder.read_config()
    assert {name: config['run'][name] for name in options} == options
    told = config['keys']['graph']['spec']
    assert {name: told[name] for name in own} == own
    assert made.graphs.spec == spec
    day = next(iter(made.dataset(made.split.valid[:1])))
    history = SectorHistory(small_market) if spec.sectors else None
    sectors = history.on(day.date, day.codes) if spec.sectors else None
    wanted = correlation_knn(day.returns, spec, sectors=sectors)
    found = made.graphs(day)
    assert all(map(torch.equal, wanted, found))
    assert found[1].shape[1] == made.network_spec.attributes == 1+spec.sectors
    usual, _ = begin(small_market, tmp_path/'usual')
    ours = usual.graphs(next(iter(usual.dataset(usual.split.valid[:1]))))
    assert not all(map(same, ours, found))


def same(a, b): return a.shape == b.shape and torch.equal(a, b)


# --- papermill has nothing to complain of

def typed_lines():
    "Every papermill command that README.md shows and that the Makefile runs, on one line each"
    readme = (ROOT/'README.md').read_text()
    shown = re.findall(r'(?:^|`)(papermill nbs/[^`\n]*)', readme, re.M)
    makefile = (ROOT/'Makefile').read_text()
    variables = dict(re.findall(r'^([A-Z]+) := (-p .*)$', makefile, re.M))
    run = re.findall(r'/papermill (nbs/.*)$', makefile, re.M)
    for name, text in variables.items():
        run = [line.replace(f'$({name})', text) for line in run]
    return [line.split(' #')[0].strip() for line in [*shown, *run]]


def parameters_in(line):
    "The names after -p"
    return re.findall(r'-p (\w+)', line)


@pytest.mark.parametrize('line', typed_lines())
def test_papermill_knows_every_parameter_that_is_typed_in_the_readme(line, caplog):
    name = re.search(r'nbs/\w+\.ipynb', line)[0]
    with caplog.at_level(logging.WARNING):
        known = inspect_notebook(ROOT/name)
        notebook = load_notebook_node(str(ROOT/name))
        given = {parameter: 0 for parameter in parameters_in(line)}
        parameterize_notebook(notebook, given)
    assert set(given) <= set(known), sorted(set(given)-set(known))
    assert not caplog.records, caplog.text
