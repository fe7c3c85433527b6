"A folder is one chain: what was asked goes on until it has ended, and no phase stands on weights that are gone"
import json
import os
import shutil
import signal
from dataclasses import replace
from operator import attrgetter

import polars as pl
import pytest
import torch

from atft import phases
from atft.callbacks import Callback
from atft.checkpoint import load_state, save_state
from atft.core import AtftError, write_json
from atft.data import write_panel
from atft.hpo import Search, run_study
from atft.inference import CHECKPOINT_VERSION
from atft.ledger import Ledger
from atft.market import MarketSpec, embedded_panel
from atft.phases import RunFolder, RunSpec, Stopped, plan, run_phases
from atft.trainer import Trainer

TINY = dict(
    max_epochs=2, hidden=4, heads=2, lookback=6, graph_lookback=12, min_obs=6, train_days=16,
    days_per_step=4, embargo=2, fan_windows=(3,), san_slices=2, device='cpu', predict_test=False,
    pictures=False, overrides='lr=.02,averaging=0')  # so that every epoch moves the weights


def spec(run, **options): return RunSpec(**TINY | dict(run_dir=str(run)) | options)


def train(market, run, *, phase='0', watch=None, report=None, **options):
    told = spec(run, phase=phase, **options)
    return run_phases(told, market, show=False, watch=watch, report=report)


@pytest.fixture(scope='module')
def market(tmp_path_factory):
    "A panel as small as the graph allows"
    return embedded_panel(
        MarketSpec(codes=16, days=200, clusters=2), cache=tmp_path_factory.mktemp('market'))


class Epochs:
    "Listens to the epochs of a run, and may ask it to stop after one"
    def __init__(self, stop_after=None):
        self.heard = []
        self.stop_after = stop_after

    def __call__(self, phase, history):
        self.heard.append((phase, len(history)-1))
        if self.heard[-1] == self.stop_after: os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope='module')
def first(market, tmp_path_factory):
    "Phase 0, trained"
    run = tmp_path_factory.mktemp('first')/'run'
    train(market, run)
    return run


@pytest.mark.parametrize('resume', ['path', 'none'])
def test_a_run_from_named_weights_that_was_stopped_goes_on(market, first, tmp_path, resume):
    named = str(first/'phase0_best.pt') if resume == 'path' else 'none'
    order = dict(phase='1-2', resume_checkpoint=named, overrides='1.epochs=2')
    for stop in ((1, 1), (1, 2), (2, 1)):
        said = 'the same command continues there'
        with pytest.raises(Stopped, match=said):
            train(market, tmp_path/'run', watch=Epochs(stop), **order)
    rest = Epochs()
    train(market, tmp_path/'run', watch=rest, **order)
    assert rest.heard == [(2, 2)]
    orders = RunFolder(tmp_path/'run').read_config()['orders']
    assert [(o['phases'], o['resume'], o['ended']) for o in orders] == [([1, 2], named, True)]


@pytest.mark.parametrize('resume', ['auto', 'path', 'own'])
def test_what_was_killed_while_the_report_is_written_trains_nothing_again(
        market, first, tmp_path, resume):
    run = tmp_path/'run'
    train(market, run, phase='0')
    named = {'path': str(first/'phase0_best.pt'), 'own': str(run/'phase0_best.pt')}
    order = dict(phase='0', resume_checkpoint=named.get(resume, resume))

    def killed(): raise KeyboardInterrupt

    anew = order | dict(again=True)
    with pytest.raises(KeyboardInterrupt): train(market, run, report=killed, **anew)
    again = Epochs()
    written = []
    found = train(market, run, watch=again, report=lambda: written.append(1), **anew)
    assert again.heard == [] and written == [1] and list(found) == [0]
    train(market, run, watch=again, **order)  # it has ended, and all is done
    assert again.heard == []
    train(market, run, watch=again, **anew)
    assert again.heard == [(0, 1), (0, 2)]


class Latest(Trainer):
    "Keeps the last epoch, so that every training moves the weights"
    best_epoch = property(attrgetter('trained'))


def test_a_run_that_has_written_over_the_weights_it_names_goes_on(market, tmp_path, monkeypatch):
    def begin(run):
        run_phases(spec(run, phase='0'), market, show=False, kind=Latest)
        return run

    def again(run):
        named = dict(resume_checkpoint=str(run/'phase0_best.pt'), again=True)
        found = run_phases(spec(run, phase='0', **named), market, show=False, kind=Latest)[0]
        return found['start']['weights'], found['weights']

    def kill_in_between(path, content):
        "Ends the run when the best weights are there and the metrics are not"
        if path.name == 'phase0_metrics.json': raise KeyboardInterrupt
        write_json(path, content)

    def killed(run):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(phases, 'write_json', kill_in_between)
            again(run)

    straight, once, twice = (begin(tmp_path/name) for name in ('straight', 'once', 'twice'))
    killed(once)
    assert again(once) == again(straight) and Ledger(once).count('trial') == 2
    for _ in range(2): killed(twice)
    with pytest.raises(AtftError, match='has other weights than this order began with'): again(twice)


def test_a_phase_trained_again_makes_the_later_ones_undone(market, first, tmp_path):
    run = tmp_path/'run'
    moving = dict(overrides='schedule=plateau')  # keeps its best epoch, which a tiny market has
    train(market, run, phase='0-2', **moving)
    folder = RunFolder(run)
    assert list(folder.finished()) == [0, 1, 2]
    train(market, run, phase='1', again=True, **moving)  # to the same bits
    assert list(folder.finished()) == [0, 1, 2] and Ledger(run).count('trial') == 3
    train(market, run, phase='1', resume_checkpoint='none', **moving)
    assert list(folder.finished()) == [0, 1] and folder.undone() == [2]
    assert [plan(run, [n], 'auto') for n in (1, 2, 3)] == [[1], [2], [2, 3]]
    told = [entry for entry in Ledger(run).entries() if entry['event'] == 'undone']
    assert [entry['key'] for entry in told] == ['phase 2']
    assert Ledger(run).count('trial') == 4
    assert [order['resume'] for order in folder.read_config()['orders']] == ['auto', 'auto', 'none']


def test_no_phase_between_two_is_left_out(market, first, tmp_path):
    named = str(first/'phase0_best.pt')
    train(market, tmp_path/'run', phase='1,3', resume_checkpoint=named, max_epochs=1)
    metrics = RunFolder(tmp_path/'run').finished()
    assert list(metrics) == [1, 2, 3]
    assert metrics[3]['start'] == dict(resume='auto', weights=metrics[2]['weights'])
    train(market, tmp_path/'run', phase='4', max_epochs=1)  # and the chain goes on from there
    assert list(RunFolder(tmp_path/'run').finished()) == [1, 2, 3, 4]


def test_a_chain_that_keeps_no_weights_is_refused_at_the_start(market, tmp_path):
    with pytest.raises(AtftError, match='save_phase_checkpoint=False: phases 0, 1 are to be'):
        train(market, tmp_path/'run', phase='1', save_phase_checkpoint=False)
    assert not list((tmp_path/'run').glob('phase*'))


def test_another_table_is_refused_before_its_phase_is_trained(market, first):
    told = replace(spec(first, phase='1'), overrides=f'{TINY["overrides"]},4.lr=.01')
    with pytest.raises(AtftError, match='was made with overrides='):
        run_phases(told, market, show=False)
    assert json.loads((first/'config.json').read_text())['run']['overrides'] == TINY['overrides']


def test_weights_that_have_seen_the_days_which_judge_them_are_refused(market, first, tmp_path):
    days = [str(day) for day in market.dates]
    named = dict(phase='1', resume_checkpoint=str(first/'phase0_best.pt'))
    trained, *_ = load_state(first/'phase0_best.pt', CHECKPOINT_VERSION)['days']
    seen = fr'was trained on {" .. ".join(trained["trained"])} \(returns until {trained["until"]}\)'
    judged = fr'this run validates on {days[70]} .. {days[77]} and tests on {days[100]} .. {days[199]}'
    with pytest.raises(AtftError, match=f'{seen}, {judged}; give one whose days ended before'):
        train(market, tmp_path/'run', valid=days[70], test=days[100], **named)
    assert not (tmp_path/'run').exists()
    with pytest.raises(AtftError, match='was trained on'):  # on days that all come later
        train(market, tmp_path/'run', valid=days[55], test=days[80], end=days[82], **named)


def test_weights_chosen_on_test_days_are_refused_and_earlier_ones_are_not(market, first, tmp_path):
    days = [str(day) for day in market.dates]
    named = dict(phase='1', resume_checkpoint=str(first/'phase0_best.pt'), max_epochs=1)
    with pytest.raises(AtftError, match=f'was chosen on {days[120]} .. .* and tests on {days[130]}'):
        train(market, tmp_path/'run', valid=days[119], test=days[130], purge=5, **named)
    kept, *_ = load_state(first/'phase0_best.pt', CHECKPOINT_VERSION)['days']
    last = days.index(kept['chosen'][1])
    with pytest.raises(AtftError, match=fr'\(returns until {days[last+20]}\), .* tests on {days[last+1]}'):
        train(market, tmp_path/'run', valid=days[119], test=days[last+1], purge=5, **named)
    train(market, tmp_path/'run', valid=days[140], test=days[170], **named)
    kept = load_state(tmp_path/'run/phase1_best.pt', CHECKPOINT_VERSION)['days']
    assert [one['chosen'][0] for one in kept] == [days[120], days[140]]  # and are not forgotten


def test_a_checkpoint_of_another_format_says_who_wrote_it(market, first, tmp_path):
    state = load_state(first/'phase0_best.pt', CHECKPOINT_VERSION)
    old = {name: value for name, value in state.items() if name not in ('days', 'by')}
    save_state(tmp_path/'old.pt', old | dict(version=5))
    save_state(tmp_path/'new.pt', state | dict(version=8, by='atft 0.9'))
    for name, number, by in (('old', 5, 'the earlier atft'), ('new', 8, 'atft 0.9')):
        said = (f'was written in format {number} of checkpoints, this package reads '
                f'{CHECKPOINT_VERSION}; train its phase again, or read it with {by} that wrote it')
        with pytest.raises(AtftError, match=said):
            train(market, tmp_path/'run', phase='1', resume_checkpoint=str(tmp_path/f'{name}.pt'))


def test_checkpoints_that_differ_in_names_alone_say_so(market, first, tmp_path):
    frame = market.scan().collect()
    *others, one = market.spec.features
    renamed = replace(market.spec, features=(*others, 'renamed'))
    other = write_panel(frame.rename({one: 'renamed'}), tmp_path/'panel', renamed)
    named = dict(phase='1', resume_checkpoint=str(first/'phase0_best.pt'))
    with pytest.raises(AtftError, match=f'does not fit: features: {one} only there, renamed only here'):
        train(other, tmp_path/'run', **named)


def test_weights_of_another_shape_under_the_same_names_say_so(market, first, tmp_path):
    state = load_state(first/'phase0_best.pt', CHECKPOINT_VERSION)
    weights = state['model'] | {'heads.linear.weight': torch.zeros(2, 3)}
    save_state(tmp_path/'grown.pt', state | dict(model=weights))
    there = r'does not fit: heads.linear.weight: 2×3 there, \d+×\d+ here'
    with pytest.raises(AtftError, match=there):
        train(market, tmp_path/'run', phase='1', resume_checkpoint=str(tmp_path/'grown.pt'))


def without_labels(market, folder, first, last):
    "The panel, with no 5-day return known between two days"
    is_between = pl.col('date').is_between(first, last)
    unknown = pl.when(~is_between).then(pl.col('target_5d')).alias('target_5d')
    return write_panel(market.scan().with_columns(unknown).collect(), folder, market.spec)


@pytest.mark.parametrize('part', ['training', 'validation'])
def test_a_target_without_labels_is_refused_unless_it_has_no_weight(market, tmp_path, part):
    edges = dict(training=(0, 119), validation=(119, 155))[part]
    first, last = (market.dates[at].item() for at in edges)
    panel = without_labels(market, tmp_path/'panel', first, last)
    said = f"weighs target '5d' 0.8, but it has no returns on the {part} days"
    with pytest.raises(AtftError, match=said): train(panel, tmp_path/'run')
    assert not (tmp_path/'run').exists()
    unweighed = f'{TINY["overrides"]},horizon_weights=1 0 1 1'
    found = train(panel, tmp_path/'other', overrides=unweighed)
    assert max(epoch['score'] for epoch in found[0]['epochs']) == found[0]['score']
    assert list(RunFolder(tmp_path/'other').finished()) == [0]


def test_a_target_that_no_validation_day_knows_is_not_searched_for(market, tmp_path):
    edges = (market.dates[at].item() for at in (119, 155))
    panel = without_labels(market, tmp_path/'panel', *edges)
    unweighed = f'{TINY["overrides"]},horizon_weights=1 0 1 1'
    run = spec(tmp_path/'study', phase='0', overrides=unweighed)
    with pytest.raises(AtftError, match='search: no validation day, .* knows the target 5d of 5 codes'):
        run_study(Search(run, trials=2, horizon=5), panel, show=False)
    assert not (tmp_path/'study').exists()


def test_weights_that_weigh_nothing_of_the_panel_are_refused(market, tmp_path):
    nothing = dict(targets=('1d',), overrides='horizon_weights=1d:0 5d:1')
    with pytest.raises(AtftError, match=r'no target of the panel \(1d\) has a weight'):
        train(market, tmp_path/'run', **nothing)


class Spoil(Callback):
    "Makes the scores of a network undefined"
    def phase_begins(self, trainer):
        with torch.no_grad(): trainer.net.heads.linear.weight.fill_(float('nan'))


def test_scores_that_are_no_numbers_are_refused(market, tmp_path):
    with pytest.raises(AtftError, match='have a forecast that is not finite'):
        run_phases(spec(tmp_path/'run', phase='0'), market, show=False, callbacks=[Spoil()])


def test_a_gap_that_returns_reach_over_stands_where_one_reads(
        market, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(phases, 'save_figure', lambda *_: '')
    open_borders = spec(tmp_path/'run', phase='0', purge=0, embargo=0, max_epochs=1)
    run_phases(open_borders, market)
    said = 'The gap before a border has 0 sessions, the returns reach 20'
    assert said in capsys.readouterr().err
    report = phases.write_report(phases.check_run(open_borders), tmp_path, 'test').read_text()
    assert said in report and 'a gap of 0 sessions before each border' in report
    assert RunFolder(tmp_path/'run').read_config()['gap'] == dict(sessions=0, reach=20)


def test_one_thread_and_two_give_the_same_score(market, first, tmp_path):
    before = torch.get_num_threads()
    scores = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            scores.append(train(market, tmp_path/str(threads))[0]['score'])
    finally: torch.set_num_threads(before)
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)


def test_a_finished_phase_typed_again_says_that_it_is_done(market, tmp_path, capsys):
    run = spec(tmp_path/'run', phase='0-1', max_epochs=1)
    first = run_phases(run, market, show=False)
    stamps = [path.stat().st_mtime_ns for path in sorted((tmp_path/'run').glob('phase*'))]
    again = run_phases(run, market)
    assert [found['score'] for found in again.values()] == [first[n]['score'] for n in (0, 1)]
    assert 'phases to train: none, all is done; --again trains once more' in capsys.readouterr().err
    run_phases(replace(run, phase='1'), market)
    assert 'none, all is done' in capsys.readouterr().err
    assert stamps == [path.stat().st_mtime_ns for path in sorted((tmp_path/'run').glob('phase*'))]
    heard = Epochs()
    run_phases(replace(run, phase='1', again=True), market, show=False, watch=heard)
    assert heard.heard == [(1, 1)]
    assert RunFolder(tmp_path/'run').run().again is False  # of a command, not of the folder


def test_only_a_run_that_died_is_said_not_to_have_ended_in_order(market, tmp_path, capsys):
    said = 'did not end in order'
    with pytest.raises(Stopped): train(market, tmp_path/'run', watch=Epochs((0, 1)))
    with pytest.raises(AtftError, match='was made with hidden=4 there, 6 here'):
        train(market, tmp_path/'run', hidden=6)
    assert said not in capsys.readouterr().err

    def dies(phase, history): raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt): train(market, tmp_path/'run', watch=dies)
    assert said not in capsys.readouterr().err
    train(market, tmp_path/'run')
    assert said in capsys.readouterr().err


def test_the_same_data_by_another_path_are_the_same(market, tmp_path, monkeypatch):
    shutil.copytree(market.folder, tmp_path/'copy')
    monkeypatch.chdir(tmp_path)
    for nth, where in enumerate((market.folder, os.path.relpath(market.folder), 'copy')):
        run_phases(spec(tmp_path/'run', phase=str(nth), max_epochs=1, data=str(where)), show=False)
    assert list(RunFolder(tmp_path/'run').finished()) == [0, 1, 2]
    frame = market.scan().with_columns(pl.col('target_1d')*2).collect()
    other = write_panel(frame, tmp_path/'other', market.spec)
    with pytest.raises(AtftError, match='was made with other data'):
        run_phases(spec(tmp_path/'run', phase='1', max_epochs=1, data=str(other.folder)), show=False)
