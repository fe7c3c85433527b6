"A folder is one chain: what was asked goes on until it has ended, and no phase stands on weights that are gone"
import json
import os
import signal
from dataclasses import replace

import pytest

from atft import phases
from atft.core import AtftError
from atft.ledger import Ledger
from atft.market import MarketSpec, embedded_panel
from atft.phases import RunFolder, RunSpec, Stopped, plan, run_phases

TINY = dict(
    max_epochs=2, hidden=4, heads=2, lookback=6, graph_lookback=12, min_obs=6, train_days=16,
    days_per_step=4, embargo=2, fan_windows=(3,), san_slices=2, device='cpu', predict_test=False,
    overrides='lr=.02,averaging=0')  # so that every epoch moves the weights


def spec(run, **options): return RunSpec(**TINY | dict(run_dir=str(run)) | options)


def train(market, run, *, phase='0', watch=None, report=None, **options):
    told = spec(run, phase=phase, **options)
    return run_phases(told, market, show=False, watch=watch, report=report)


@pytest.fixture(scope='module', autouse=True)
def no_pictures():
    "They take three quarters of so small a phase"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(phases, 'attribution', lambda *_: None)
        patched.setattr(phases, 'save_figure', lambda *_: None)
        yield


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
    order = dict(phase='1-2', resume_checkpoint=named)
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

    with pytest.raises(KeyboardInterrupt): train(market, run, report=killed, **order)
    again = Epochs()
    written = []
    found = train(market, run, watch=again, report=lambda: written.append(1), **order)
    assert again.heard == [] and written == [1] and list(found) == [0]
    train(market, run, watch=again, **order)  # it has ended: asked again, it begins anew
    assert again.heard == [(0, 1), (0, 2)]


def test_a_phase_trained_again_makes_the_later_ones_undone(market, first, tmp_path):
    run = tmp_path/'run'
    train(market, run, phase='0-2')
    folder = RunFolder(run)
    assert list(folder.finished()) == [0, 1, 2]
    train(market, run, phase='1')  # to the same bits
    assert list(folder.finished()) == [0, 1, 2] and Ledger(run).count('trial') == 3
    train(market, run, phase='1', resume_checkpoint='none')
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
