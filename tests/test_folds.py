"A walk forward: killed, stopped, spread over processes and a cluster, it leaves the bits of one process"
import json
import logging
import os
import re
import shlex
import signal
import sys
import threading
import time
from concurrent.futures import BrokenExecutor, Future
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import warm
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from atft.checkpoint import Stopped
from atft.core import AtftError
from atft.ensembles import blend_weights, blended, ensemble
from atft.folds import (
    OPTIONS, PARAMETERS, Walk, engine_of, fold_run, folds_of, jobs_of, main, read_walk, train_folds, walk_line)
from atft.inference import split_of
from atft.jobs import (
    Engine, Here, Job, Outcome, chosen_epochs, dask_cluster, here, is_trained, processes, run_jobs,
    slurm_queue)
from atft.market import MarketSpec, embedded_panel
from atft.runs import RunFolder
from atft.specs import RunSpec, parameters_cell
from atft.walked import gather, spread, write_report

SIZES = dict(phase='0', max_epochs=1, hidden=8, lookback=8, embargo=5, pictures=False)
STEPS = dict(stride=20, valid_days=45, min_train=165, seeds='0,1', threads=1)  # three folds


@pytest.fixture(scope='module')
def market(tmp_path_factory):
    spec = MarketSpec(codes=24, days=300, clusters=3)
    return embedded_panel(spec, cache=tmp_path_factory.mktemp('market'))


@pytest.fixture(scope='module')
def three_years(tmp_path_factory):
    spec = MarketSpec(codes=8, days=740, clusters=2)
    return embedded_panel(spec, cache=tmp_path_factory.mktemp('years'))


def walk_to(market, folder, **more):
    run = RunSpec(data=str(market.folder), run_dir=str(folder), **SIZES)
    return Walk(run, **(STEPS | dict(workers=1) | more))


def quiet(*said): pass


@pytest.fixture(scope='module')
def walked(market, tmp_path_factory):
    "A walk of three folds by two seeds in this process, and its folds"
    walk = walk_to(market, tmp_path_factory.mktemp('walked')/'walk')
    return walk, train_folds(walk, market, tell=quiet)


def runs_of(walk, folds):
    return [fold_run(walk, fold, seed).run_dir for fold in folds for seed in walk.all_seeds]


def assert_same_bits(walk, walked):
    "Every run has the predictions and the weights of the reference, and was trained once"
    reference, folds = walked
    for one, other in zip(runs_of(walk, folds), runs_of(reference, folds), strict=True):
        assert RunFolder(one).predictions(0).equals(RunFolder(other).predictions(0)), one
        keys = [RunFolder(run).read_metrics(0)['weights'] for run in (one, other)]
        assert keys[0] == keys[1], one
        assert RunFolder(one).ledger.count('trial') == 1, one


def gap_of(walk, market): return market.spec.reach+walk.run.embargo


def assert_no_leak(split, dates, gap):
    place = {day: number for number, day in enumerate(dates)}
    assert place[split.valid[0]]-place[split.train[-1]] > gap
    assert place[split.test[0]]-place[split.valid[-1]] > gap


@settings(max_examples=25, deadline=None)
@given(stride=st.integers(5, 60), valid_days=st.integers(40, 80), embargo=st.integers(0, 10))
def test_no_fold_reaches_into_the_days_that_judge_it(market, stride, valid_days, embargo):
    walk = walk_to(market, 'unused', stride=stride, valid_days=valid_days, min_train=60)
    walk = replace(walk, run=replace(walk.run, embargo=embargo))
    folds = folds_of(walk, market)
    for fold in folds: assert_no_leak(fold.split, market.dates, gap_of(walk, market))
    tested = np.concatenate([fold.split.test for fold in folds])
    assert (tested == market.dates[-len(tested):]).all()


def test_a_year_is_tested_whole_and_chosen_by_the_year_before(three_years):
    year = three_years.dates[-1].item().year
    walk = walk_to(three_years, 'unused', stride=None,
                   test_years=str(year), min_train=20)
    split = folds_of(walk, three_years)[0].split
    assert_no_leak(split, three_years.dates, gap_of(walk, three_years))
    assert {day.item().year for day in split.test} == {year}
    assert {day.item().year for day in split.valid} == {year-1}
    of_the_year = [day for day in three_years.dates if day.item().year == year]
    assert split.test.tolist() == [day.item() for day in of_the_year]


def test_a_run_has_the_days_of_its_fold(market, walked):
    walk, folds = walked
    for job in jobs_of(replace(walk, refit=True), folds, market):
        split = split_of(job.run, market)
        assert_no_leak(split, market.dates, market.spec.reach)
        fold = next(fold for fold in folds if fold.name in job.run.run_dir)
        assert split.test.tolist() == fold.split.test.tolist()
        last = np.searchsorted(market.dates, split.train[-1])
        first = np.searchsorted(market.dates, split.test[0])
        assert first-last > gap_of(walk, market), 'a refit keeps the gap before the test days'


def test_a_whole_walk_is_left_alone(market, walked):
    walk, folds = walked
    before = [RunFolder(run).best(0).stat().st_mtime_ns for run in runs_of(walk, folds)]
    states = []
    train_folds(walk, market, tell=lambda outcome, *_: states.append(outcome.state))
    assert states == ['was whole']*6
    assert before == [RunFolder(run).best(0).stat().st_mtime_ns for run in runs_of(walk, folds)]
    with pytest.raises(AtftError, match='k=20 there, 7 here'):
        train_folds(replace(walk, run=replace(walk.run, k=7)), market, tell=quiet)


def test_seeds_are_averaged_as_ranks_by_hand(walked):
    walk, folds = walked
    tables = [RunFolder(fold_run(walk, folds[0], seed).run_dir).predictions(0) for seed in (0, 1)]
    keys = ['target_name', 'date', 'code']
    by_hand = pl.concat(
        table.select(*keys, 'target', rank=pl.col('prediction').rank().over('target_name', 'date'))
        for table in tables).group_by(keys).agg(pl.col('rank').mean(), pl.col('target').first())
    names = pl.len().over('target_name', 'date')
    by_hand = by_hand.with_columns(expected=(pl.col('rank')-.5)/names-.5)
    both = ensemble(tables).join(by_hand, on=keys)
    assert len(both) == len(tables[0])
    assert (both['prediction']-both['expected']).abs().max() < 1e-12
    assert both['target'].equals(both['target_right'], null_equal=True)


def test_the_report_judges_seeds_folds_and_ensemble(market, walked, tmp_path):
    walk, folds = walked
    kinds = ('random', 'reversal_1d', 'oracle')
    found = gather(walk, folds, market, kinds)
    test_days = np.concatenate([fold.split.test for fold in folds])
    assert found.result.phases['0 baseline']['date'].unique().sort().to_list() == test_days.tolist()
    spreads = spread(found.alone, found.result.phases['0 baseline'])
    assert (spreads['lowest'] <= spreads['mean']).all() and (spreads['deviation'] > 0).all()
    told = replace(walk, report_dir=str(tmp_path), blend='reversal_1d')
    text = write_report(told, folds, market, 'typed', kinds).read_text()
    for part in ('## Folds', '## Seeds', '| seed 1 |', '| their ensemble |', 'seed | 0, 1 |',
                 'blend with reversal_1d'):
        assert part in text, part
    assert 'One seed' not in text


def test_a_blend_is_weighed_on_validation_days_alone(market, walked, tmp_path):
    walk, folds = walked
    told = replace(walk, blend='reversal_1d')
    before = gather(told, folds, market, ('random',)).weights
    path = RunFolder(fold_run(walk, folds[0], 0).run_dir).predictions_path(0)
    whole = path.read_bytes()
    is_test = pl.col('split') == 'test'
    for column in ('prediction', 'target'):
        turned = pl.when(is_test).then(-pl.col(column)).otherwise(pl.col(column))
        pl.read_parquet(path).with_columns(turned.alias(column)).write_parquet(path)
    try: assert gather(told, folds, market, ('random',)).weights == before
    finally: path.write_bytes(whole)
    tests = RunFolder(fold_run(walk, folds[0], 0).run_dir).predictions(0)
    with pytest.raises(AtftError, match='a weight is fitted on validation days alone'):
        blend_weights(tests, tests)


def test_a_blend_of_nothing_is_the_ranks(walked):
    walk, folds = walked
    table = RunFolder(fold_run(walk, folds[0], 0).run_dir).predictions(0)
    weights = dict.fromkeys(table['target_name'].unique(), 0.)
    assert blended(table, table, weights)['prediction'].equals(ensemble([table])['prediction'])


def test_the_line_of_a_report_is_the_same_walk(market, walked):
    walk, folds = walked
    typed = read_walk(shlex.split(walk_line(walk))[3:])
    assert jobs_of(typed, folds_of(typed, market), market) == jobs_of(walk, folds, market)


def test_who_names_no_workers_has_as_many_as_there_is_room_for(market, walked):
    walk, folds = walked
    engine, threads = engine_of(replace(walk, workers=None, threads=None), folds, market)
    assert engine.says == 'here' or engine.says.endswith(' processes')
    assert threads >= 1


def test_a_warm_start_and_a_refit_take_what_validation_chose(market, tmp_path):
    walk = walk_to(market, tmp_path/'warm', seeds='3', stride=30, warm_start=True, refit=True)
    folds = train_folds(walk, market, tell=quiet)
    first, second, *refits = [RunFolder(job.run.run_dir) for job in jobs_of(walk, folds, market)]
    assert second.read_metrics(0)['start']['weights'] == first.read_metrics(0)['weights']
    for chooser, refit in zip((first, second), refits, strict=True):
        found = refit.read_metrics(0)
        assert len(found['epochs'])-1 == found['best_epoch'] == chosen_epochs(chooser.path)[0]
    warm = jobs_of(walk, folds, market)[1]
    assert is_trained(warm)
    first.metrics_path(0).write_text(json.dumps(first.read_metrics(0) | dict(weights='others')))
    assert not is_trained(warm), 'the fold before has other weights now'


WALK = '''
import sys
from atft.folds import read_walk, opened, train_folds
from atft.checkpoint import Stopped
walk = read_walk(sys.argv[1:])
try: train_folds(walk, opened(walk))
except Stopped as stopped:
    print(stopped, file=sys.stderr)
    sys.exit(128+stopped.number)
'''


def start(walk, workers):
    "The walk in a process of its own"
    words = shlex.split(walk_line(walk))[3:]
    return warm.Command([sys.executable, '-c', WALK, *words, '--workers', workers])


def owners(folder):
    "The living processes that train in run folders below"
    told = [re.match(r'process (\d+) on', lock.read_text())
            for lock in Path(folder).glob('*/seed_*/run.lock')]
    return [int(one[1]) for one in told if one and Path(f'/proc/{one[1]}').exists()]


def waited(ask, patience=300):
    "The first answer that is something"
    until = time.monotonic()+patience
    while time.monotonic() < until:
        answer = ask()
        if answer: return answer
        time.sleep(.02)
    raise AssertionError(f'{ask} came to nothing')


def test_a_walk_is_killed_stopped_and_goes_on(market, walked, tmp_path):
    walk = walk_to(market, tmp_path/'walk')
    killed = start(walk, 2)
    waited(partial(owners, walk.folder))
    killed.kill()
    killed.communicate()
    waited(lambda: not owners(walk.folder))  # no worker outlives the one that it works for
    stopped = start(walk, 2)
    waited(partial(owners, walk.folder))
    stopped.send_signal(signal.SIGTERM)
    text = stopped.communicate(timeout=120)[1]
    assert stopped.returncode == 128+signal.SIGTERM, text
    assert 'the same command continues there' in text
    last = start(walk, 2)
    text = last.communicate(timeout=300)[1]
    assert last.returncode == 0, text
    assert_same_bits(walk, walked)


def die_once(job):
    mark = Path(job.run.run_dir)
    if mark.exists(): return Outcome(job.name, 'trained')
    mark.mkdir()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_replaced(tmp_path):
    jobs = [Job('one', RunSpec(run_dir=str(tmp_path/'one')))]
    found = run_jobs(jobs, processes(2), tell=quiet, function=die_once)
    assert found['one'].state == 'trained'


class Deadly(Here):
    "Every worker of it dies"
    def submit(self, function, /, *args, **options):
        future = Future()
        future.set_exception(BrokenExecutor('killed'))
        return future


def test_a_job_whose_workers_die_is_given_up(tmp_path):
    jobs = [Job('one', RunSpec()), Job('two', RunSpec(), after='one')]
    found = run_jobs(jobs, Engine(lambda: nullcontext(Deadly()), 1), tell=quiet)
    assert 'its worker was killed 3 times' in found['one'].reason
    assert found['two'].reason == 'one came to nothing'


def fail(job): raise ValueError('of its own')


def stop(job): return Outcome(job.name, 'stopped', signal=signal.SIGINT)


def test_what_became_of_jobs_is_told(tmp_path):
    jobs = [Job('one', RunSpec()), Job('two', RunSpec(), after='one'), Job('three', RunSpec())]
    found = run_jobs(jobs, here(), tell=quiet, function=fail)
    assert [one.reason for one in found.values()] == [
        'ValueError: of its own', 'one came to nothing', 'ValueError: of its own']
    with pytest.raises(Stopped, match='0 of 3 are done') as told:
        run_jobs(jobs, here(), tell=quiet, function=stop)
    assert told.value.number == signal.SIGINT


@pytest.fixture
def two_workers():
    "A dask cluster of two processes on this machine"
    distributed = pytest.importorskip(
        'distributed', reason='no dask cluster to try: pip install distributed')
    logging.getLogger('distributed').setLevel(logging.CRITICAL)
    with distributed.LocalCluster(2, threads_per_worker=1, dashboard_address=None) as cluster:
        yield cluster


def test_a_cluster_loses_a_worker_and_nothing_else(market, walked, tmp_path, two_workers):
    walk = walk_to(market, tmp_path/'walk')
    folds = walked[1]
    killed = []

    def kill_a_worker():
        killed.extend(waited(partial(owners, walk.folder)))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_a_worker)
    killer.start()
    jobs = jobs_of(walk, folds, market)
    outcomes = run_jobs(jobs, dask_cluster(two_workers.scheduler_address), tell=quiet)
    killer.join()
    assert killed[0] != os.getpid()
    assert [one.state for one in outcomes.values()] == ['trained']*6, outcomes
    assert_same_bits(walk, walked)


def test_slurm_is_tried_on_this_machine(market, walked, tmp_path):
    pytest.importorskip('submitit', reason='no submitit to try: pip install submitit')
    walk = walk_to(market, tmp_path/'walk')
    reference, folds = walked
    job = jobs_of(walk, folds, market)[0]
    outcomes = run_jobs([job], slurm_queue(tmp_path/'slurm', where='local'), tell=quiet)
    assert outcomes[job.name].state == 'trained', outcomes
    other = fold_run(reference, folds[0], 0).run_dir
    assert RunFolder(job.run.run_dir).predictions(0).equals(RunFolder(other).predictions(0))


REFUSED = [
    ('--test-years 1950', 'test year 1950 has no session in the data'),
    ('--test-years soon', "test_years='soon' is no list of numbers"),
    ('--seeds 0,1,1', "seeds='0,1,1' names 1 twice"),
    ('--stride 20 --min-train 5000', '300 days are too few for one fold'),
    ('--stride 20 --min-train 60 --valid-days 45 --scheduler tcp://127.0.0.1:9',
     'no scheduler answers at tcp://127.0.0.1:9'),
    ('--blend luck', "blend='luck' is no baseline"),
    ('--workers 2 --slurm', 'exclude each other'),
    ('--stride 20 --min-train 60 --valid-days 45 --slurm', 'finds no sbatch on this machine')]


@pytest.mark.parametrize('flags, says', REFUSED)
def test_what_cannot_be_meant_is_one_line(market, tmp_path, flags, says):
    if '--scheduler' in flags:
        pytest.importorskip('distributed', reason='no dask to refuse: pip install distributed')
        logging.getLogger('distributed').setLevel(logging.CRITICAL)
    if '--slurm' in flags:
        pytest.importorskip('submitit', reason='no submitit to refuse: pip install submitit')
    own = f'--data {market.folder} --run-dir {tmp_path/"walk"} --embargo 5 --phase 0'
    with pytest.raises(SystemExit) as refused: main(shlex.split(f'{own} {flags}'))
    text = str(refused.value)
    assert says in text and '\n' not in text and text.startswith('atft_folds: '), text


def test_the_cell_of_the_walk_is_made_of_the_records():
    notebook = json.loads((ROOT/'nbs/05c_folds.ipynb').read_text())
    cells = [c for c in notebook['cells'] if 'parameters' in c['metadata'].get('tags', [])]
    made = parameters_cell(*PARAMETERS, *OPTIONS, **PARAMETERS)
    assert ''.join(cells[0]['source']) == made


def test_a_year_with_too_little_before_it_is_one_line(three_years):
    year = three_years.dates[-1].item().year
    walk = walk_to(three_years, 'unused', stride=None,
                   test_years=str(year), min_train=600)
    with pytest.raises(AtftError, match='fewer than min_train=600; begin later'):
        folds_of(walk, three_years)
