"What was tried on the same days is counted across folders and searches, and deflates what is reported"
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from atft.backtest import backtest
from atft.core import AtftError
from atft.folds import Walk, fold_run, train_folds
from atft.hpo import Search, finished_trials, open_study, run_study, winner
from atft.intervals import deflated_sharpe
from atft.market import MarketSpec, embedded_panel
from atft.phases import RunFolder, RunSpec, run_phases
from atft.results import deflated, load_run
from atft.summary import tries_of
from atft.tried import Tried, count_tried, project_folder, project_ledger

TINY = dict(
    phase='0', max_epochs=1, hidden=4, heads=2, lookback=6, graph_lookback=12, min_obs=6,
    days_per_step=8, embargo=2, fan_windows=(3,), san_slices=2, device='cpu', train_days=24, pictures=False,
    targets=('1d', '5d'))
FIXED = ('hidden', 'fan_windows', 'san_slices')


@pytest.fixture(scope='module')
def market(tmp_path_factory):
    "A panel as small as the graph allows"
    cache = tmp_path_factory.mktemp('market')
    return embedded_panel(MarketSpec(codes=16, days=200, clusters=2), cache=cache)


def train(market, folder, **options):
    run_phases(RunSpec(**TINY | dict(run_dir=str(folder)) | options), market, show=False)
    return folder


def tried(folder): return count_tried([RunFolder(folder)], '1d')


@pytest.fixture(scope='module')
def project(market, tmp_path_factory):
    "A search of four trials, its winner trained as it suggests, and four more seeds"
    folder = tmp_path_factory.mktemp('project')
    run = RunSpec(**TINY | dict(run_dir=str(folder/'study')))
    search = Search(run, trials=4, fixed=FIXED)
    best = winner(search, run_study(search, market, show=False)).flat()
    best |= dict(predict_test=True, data=None)
    for seed in range(5): train(market, folder/f'seed{seed}', **best | dict(
        seed=seed, run_dir=str(folder/f'seed{seed}')))
    return folder


@pytest.fixture(scope='module')
def result(project): return load_run(project/'seed0', ('random', 'reversal_1d'))


def test_nine_trainings_are_nine_tries(project, result):
    assert result.tried == Tried(1, search=4, elsewhere=4)
    assert result.trials == 9
    assert all(tried(project/f'seed{seed}') == result.tried for seed in range(5))
    lines = project_ledger(project/'seed0').entries()
    assert len(lines) == 9 and {Path(line['folder']).parts[0] for line in lines} == {
        'study', *(f'seed{seed}' for seed in range(5))}


def test_the_report_is_deflated_by_all_of_them(result):
    last = result.phases[result.last]
    net = backtest(last)['net'].to_numpy()
    assert deflated(backtest(last), result.trials) == deflated_sharpe(net, 9)
    assert deflated_sharpe(net, 9) < deflated_sharpe(net, 1)
    assert '1 of this run, 4 trials of searches, 4 trainings in other folders' in result.tried.said


def test_the_interval_of_a_winner_is_widened_by_all_of_them(project):
    run = RunSpec(**TINY | dict(run_dir=str(project/'study')))
    search = Search(run, trials=4, fixed=FIXED)
    study = open_study(search)
    assert len(finished_trials(study)) == 4
    assert tries_of(search, study) == 9


def test_what_no_ledger_knows_is_told(project):
    told = load_run(project/'seed0', ('random',), tried=12)
    assert told.trials == 9+12 and '12 that no ledger knows' in told.tried.said
    with pytest.raises(AtftError, match='tried=-1 must be a whole number'):
        load_run(project/'seed0', ('random',), tried=-1)


def test_the_same_training_counts_once_and_a_deleted_one_stays(market, tmp_path):
    one = train(market, tmp_path/'one')
    assert tried(one) == Tried(1)
    train(market, one)                # typed again
    train(market, tmp_path/'copy')    # in another folder
    train(market, tmp_path/'more', num_workers=0, save_minutes=1.)  # what decides no weight
    assert tried(one) == Tried(1)
    train(market, tmp_path/'k', k=3)
    shutil.rmtree(tmp_path/'k')
    assert tried(one) == Tried(1, elsewhere=1)
    train(market, tmp_path/'k', k=4)  # another in its place
    assert tried(one) == Tried(1, elsewhere=2)


def test_a_training_that_fails_is_a_try(market, tmp_path):
    one = train(market, tmp_path/'one')
    with pytest.raises(AtftError, match='lower the learning rate'):
        train(market, tmp_path/'wild', overrides='lr=1e30,clip=1e30')
    assert tried(one) == Tried(1, elsewhere=1)


def test_only_the_same_data_and_days_compete(market, tmp_path):
    days = market.dates
    late = dict(valid=str(days[130]), test=str(days[160]))
    early = dict(valid=str(days[100]), test=str(days[115]), end=str(days[140]))
    one = train(market, tmp_path/'one', **late)
    train(market, tmp_path/'early', **early)
    other = embedded_panel(MarketSpec(codes=16, days=200, clusters=2, seed=7), cache=tmp_path/'cache')
    train(other, tmp_path/'other', **late)
    assert tried(one) == Tried(1)
    train(market, tmp_path/'overlaps', valid=str(days[120]), test=str(days[150]))
    assert tried(one) == Tried(1, elsewhere=1)


def test_the_folds_of_a_walk_forward_are_one_choice_after_the_trainings_before(market, tmp_path):
    days = market.dates
    runs = tmp_path/'runs'
    for k in (3, 4, 5): train(market, runs/f'k{k}', k=k, valid=str(days[110]), test=str(days[130]))
    folds = []
    for number, start in enumerate((130, 160)):
        fold = dict(valid=str(days[start-20]), test=str(days[start]), end=str(days[start+29]))
        folds.append(train(market, runs/f'walk/{number}/seed_0', **fold))
    counted = load_run(','.join(map(str, folds)), ('random',)).tried
    assert counted == Tried(1, elsewhere=3)
    assert project_folder(folds[0]) == runs and (runs/'tried.jsonl').exists()


def test_walks_that_lie_side_by_side_count_each_other_in_any_folder(market, tmp_path):
    firsts = []
    for k in (3, 4):
        run = RunSpec(**TINY | dict(data=str(market.folder), run_dir=str(tmp_path/f'k{k}'), k=k))
        walk = Walk(run, stride=30, valid_days=40, min_train=70, refit=True, workers=1, threads=1)
        folds = train_folds(walk, market, tell=lambda *_: None)
        firsts.append([RunFolder(fold_run(walk, fold, 0).run_dir) for fold in folds])
    assert {project_folder(run.path) for walk in firsts for run in walk} == {tmp_path}
    train(market, tmp_path/'alone', valid=str(market.dates[120]), test=str(market.dates[150]))
    counted = [count_tried(runs, '1d') for runs in firsts]
    assert counted == [Tried(1, elsewhere=4)]*2  # its refit, the other with its own, the one alone


def test_a_ledger_that_cannot_be_written_is_said_and_stops_nothing(market, tmp_path, capsys):
    (tmp_path/'tried.jsonl').mkdir()
    one = train(market, tmp_path/'one')
    assert 'tried.jsonl cannot be written' in capsys.readouterr().err
    assert RunFolder(one).finished()


WRITE = '''
import sys
from atft.ledger import Ledger
folder, first = sys.argv[1], int(sys.argv[2])
for number in range(first, first+25):
    Ledger(folder, 'tried.jsonl').write('trial', f'{number} x', days={}, folder='run')
'''


def test_many_processes_write_at_once(tmp_path):
    typed = [[sys.executable, '-c', WRITE, str(tmp_path), str(15*n)] for n in range(4)]
    writers = [subprocess.Popen(words) for words in typed]
    assert [writer.wait(120) for writer in writers] == [0]*4
    lines = [json.loads(line) for line in (tmp_path/'tried.jsonl').read_text().splitlines()]
    assert sorted(int(line['key'].split()[0]) for line in lines) == list(range(15*3+25))


OTHERS = [
    (dict(horizon=5), {}, 'horizon=1d there, 5d here'),
    ({}, dict(seed=5), 'seed=0 there, 5 here'),
    ({}, dict(max_epochs=2), 'max_epochs=1 there, 2 here'),
    ({}, dict(train_days=40), 'train_days=24 there, 40 here'),
    ({}, dict(lookback=5), 'lookback=6 there, 5 here'),
    ({}, dict(phase='0-1'), 'phase=0 there, 0-1 here'),
    ({}, dict(overrides='0.patience=2'), 'overrides= there, 0.patience=2 here'),
    (dict(fixed=('hidden', 'fan_windows', 'san_slices', 'k')), {}, 'fixed='),
]


@pytest.mark.parametrize('asked, options, says', OTHERS)
def test_a_study_goes_on_with_its_own_question_alone(project, market, asked, options, says):
    run = RunSpec(**TINY | dict(run_dir=str(project/'study')) | options)
    with pytest.raises(AtftError) as refused:
        run_study(Search(**dict(run=run, trials=5, fixed=FIXED) | asked), market, show=False)
    assert says in str(refused.value) and 'give another study_dir' in str(refused.value)
    assert len(list((project/'study').glob('trial-*'))) == 4


def test_a_study_on_other_test_days_names_both(project, market):
    test = str(market.dates[-20])
    run = RunSpec(**TINY | dict(run_dir=str(project/'study'), test=test))
    with pytest.raises(AtftError, match=f'test=.* there, {test} .. .* here'):
        run_study(Search(run, trials=5, fixed=FIXED), market, show=False)
