"A search that is killed, shared or interrupted ends with exactly as many trials as were asked for"
import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import BrokenExecutor, Future
from contextlib import nullcontext
from pathlib import Path

import polars as pl
import pytest
import warm
from optuna.trial import TrialState

from atft.core import AtftError
from atft.hpo import Search, finished_trials, open_study, run_study, spread_study, suggest
from atft.jobs import Engine, Here, processes
from atft.ledger import Ledger
from atft.phases import RunSpec

WORK = '''
import sys
from atft.hpo import Search, run_study
from atft.panel import Panel
from atft.phases import RunSpec
market, folder, trials, *storage = sys.argv[1:]
run = RunSpec(run_dir=folder, phase='0', max_epochs=1, hidden=8, lookback=8, embargo=5)
storage = storage[0] if storage else None
run_study(Search(run, int(trials), fixed=('hidden',), storage=storage), Panel(market), show=False)
'''


def work(market, folder, trials, *storage):
    "A process that takes part in a search"
    return warm.Command([sys.executable, '-c', WORK, market.folder, folder, trials, *storage])


def study_of(folder, storage=None):
    return open_study(Search(RunSpec(run_dir=str(folder)), storage=storage))


def states_of(study): return [trial.state for trial in study.trials]


def complete(process):
    text = process.communicate(timeout=300)[1]
    assert process.returncode == 0, text[-2000:]


def wait_for_a_trial(folder, process):
    "Until the process has begun a trial more, or ended"
    before = len(list(folder.glob('trial-*')))
    patience = time.monotonic()+60
    while len(list(folder.glob('trial-*'))) == before and process.poll() is None:
        if time.monotonic() > patience: break
        time.sleep(.01)


def test_kills_leave_a_study_that_ends_with_exactly_the_trials_asked_for(
        small_market, tmp_path, request, record_property):
    kills = max(1, int(request.config.getoption('--kills'))//2)
    rng = random.Random(0)
    folder = tmp_path/'study'
    trials = max(2*kills, 3)
    for n in range(kills):
        process = work(small_market, folder, trials)
        wait_for_a_trial(folder, process)
        time.sleep(rng.uniform(0, .8))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if n == 0:
            with open(folder/'journal.log', 'a') as journal:
                journal.write('{"op_code": 4, "trial_')  # the line that a kill cut off
    complete(work(small_market, folder, trials))
    study = study_of(folder)
    states = states_of(study)
    assert len(finished_trials(study)) == trials, states
    assert TrialState.RUNNING not in states and TrialState.WAITING not in states, states
    assert Ledger(folder).count('trial') == trials
    record_property('kills', kills)
    record_property('trials asked for and finished', trials)
    for table in folder.glob('trial-*/phase0_predictions.parquet'):
        assert set(pl.read_parquet(table)['split']) == {'valid'}


def waits_for_a_lock(process):
    "Whether the kernel has it in the queue of a lock"
    locks = Path('/proc/locks').read_text().splitlines()
    waiting = [line.split() for line in locks if '->' in line]
    return any(str(process.pid) in words for words in waiting)


def test_two_processes_share_a_study(small_market, tmp_path):
    folder = tmp_path/'study'
    folder.mkdir()
    with open(folder/'ask.lock', 'a') as lock:  # both have opened the study before either may start
        fcntl.flock(lock, fcntl.LOCK_EX)
        both = [work(small_market, folder, 4) for _ in range(2)]
        patience = time.monotonic()+120
        while not all(map(waits_for_a_lock, both)) and time.monotonic() < patience: time.sleep(.05)
        assert all(map(waits_for_a_lock, both)), [p.poll() for p in both]
    for process in both: complete(process)
    study = study_of(folder)
    assert states_of(study) == [TrialState.COMPLETE]*4
    assert len({tuple(sorted(trial.params.items())) for trial in study.trials}) == 4


def search_in(market, folder, trials):
    run = RunSpec(run_dir=str(folder), data=str(market.folder), phase='0', max_epochs=1, hidden=8,
                  lookback=8, embargo=5)
    return Search(run, trials, fixed=('hidden',))


def quiet(*said): pass


def test_trials_on_two_processes_are_those_of_one(small_market, tmp_path):
    search = search_in(small_market, tmp_path/'study', 3)
    said = []
    study = spread_study(search, processes(2), tell=lambda outcome, *_: said.append(outcome))
    assert states_of(study) == [TrialState.COMPLETE]*3
    assert [one.state for one in said] == ['trained']*3 and Ledger(search.folder).count('trial') == 3
    alone = run_study(search_in(small_market, tmp_path/'alone', 3), small_market, show=False)
    drawn = [[sorted(trial.params.items()) for trial in one.trials] for one in (study, alone)]
    assert drawn[0] == drawn[1]  # the first trials depend on their number alone
    again = []
    spread_study(search, processes(2), tell=lambda *said: again.append(said))
    assert again == [] and len(study_of(search.folder).trials) == 3


class Dying(Here):
    "Its first worker is killed in a trial, which stays at work with nobody"
    def __init__(self, study):
        self.study = study
        self.killed = None

    def submit(self, function, /, *args, **options):
        if self.killed: return super().submit(function, *args, **options)
        trial = self.study.ask()
        trial.set_user_attr('folder', trial.number)
        self.killed = suggest(trial, ('hidden',))
        future = Future()
        future.set_exception(BrokenExecutor('killed'))
        return future


def test_a_trial_whose_worker_is_killed_is_asked_again(small_market, tmp_path):
    search = search_in(small_market, tmp_path/'study', 2)
    executor = Dying(open_study(search))
    study = spread_study(search, Engine(lambda: nullcontext(executor), 1), tell=quiet)
    assert states_of(study) == [TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE]
    assert study.trials[1].params == executor.killed
    assert study.trials[1].user_attrs['folder'] == 0
    assert Ledger(search.folder).count('trial') == 2


def test_a_search_whose_workers_all_die_is_given_up(small_market, tmp_path):
    class Deadly(Here):
        def submit(self, function, /, *args, **options):
            future = Future()
            future.set_exception(BrokenExecutor('killed'))
            return future

    search = search_in(small_market, tmp_path/'study', 1)
    with pytest.raises(AtftError, match='1 of 1 trials came to nothing, .* killed 3 times'):
        spread_study(search, Engine(lambda: nullcontext(Deadly()), 1), tell=quiet)


def postgres_programs():
    "The folder of a server's programs; the test says so when it skips"
    programs = sorted(Path('/usr/lib/postgresql').glob('*/bin/initdb'))
    if not programs:
        pytest.skip('no PostgreSQL server on this machine (Debian: apt-get install postgresql)')
    pytest.importorskip('psycopg', reason='no driver for PostgreSQL: pip install psycopg[binary]')
    return programs[-1].parent


def its_user():
    "How to run a program as a user that PostgreSQL accepts: it does not run as root"
    if os.geteuid(): return []
    as_user = ['runuser', '-u', 'postgres', '--']
    if subprocess.run([*as_user, 'true'], capture_output=True).returncode:
        pytest.skip('PostgreSQL does not run as root, and there is no user postgres')
    return as_user


@pytest.fixture
def postgres():
    "The address of a PostgreSQL server that this test starts and stops"
    programs = postgres_programs()
    as_user = its_user()
    folder = Path('/tmp')/f'atft-postgres-{os.getpid()}'  # pytest's own is closed to other users
    folder.mkdir()
    if as_user: shutil.chown(folder, 'postgres')
    port = 55000+os.getpid() % 5000

    def run(program, *args):
        typed = [*as_user, str(programs/program), *map(str, args)]
        subprocess.run(typed, check=True, capture_output=True, cwd='/')

    data = folder/'data'
    listen = f'-p {port} -k {folder} -c listen_addresses=127.0.0.1'
    try:
        run('initdb', '-D', data, '-A', 'trust', '-U', 'atft')
        run('pg_ctl', '-D', data, '-w', '-l', folder/'log', '-o', listen, 'start')
        yield f'postgresql+psycopg://atft@127.0.0.1:{port}/postgres'
        run('pg_ctl', '-D', data, '-m', 'fast', 'stop')
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_several_machines_share_a_study_by_an_address(small_market, tmp_path, postgres):
    both = [work(small_market, tmp_path/f'machine{n}', 3, postgres) for n in range(2)]
    for process in both: complete(process)
    study = study_of(tmp_path/'machine0', postgres)
    assert 3 <= len(finished_trials(study)) <= 4  # each may have begun the last one
    assert TrialState.RUNNING not in states_of(study)
