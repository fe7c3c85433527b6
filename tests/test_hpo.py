"A search that is killed, shared or interrupted ends with exactly as many trials as were asked for"
import fcntl, os, random, shutil, signal, subprocess, sys, time
from pathlib import Path
import polars as pl
import pytest
from optuna.trial import TrialState
from atft.hpo import Search, finished_trials, open_study
from atft.ledger import Ledger
from atft.phases import RunSpec

WORK = '''
import sys
from atft.hpo import Search, run_study
from atft.panel import Panel
from atft.phases import RunSpec
run = RunSpec(run_dir=sys.argv[2], phase='0', max_epochs=1, hidden=8, lookback=8, embargo=5)
run_study(Search(run, int(sys.argv[3]), fixed=('hidden',), storage=sys.argv[4] if len(sys.argv) > 4 else None), Panel(sys.argv[1]), show=False)
'''
def work(market, folder, trials, *storage): return subprocess.Popen([sys.executable, '-c', WORK, str(market.folder), str(folder), str(trials), *storage], stderr=subprocess.PIPE, text=True)
def study_of(folder, *storage): return open_study(Search(RunSpec(run_dir=str(folder)), storage=storage[0] if storage else None))

def complete(process):
    text = process.communicate(timeout=300)[1]
    assert process.returncode == 0, text[-2000:]

def test_kills_leave_a_study_that_ends_with_exactly_the_trials_asked_for(small_market, tmp_path, request, record_property):
    kills, rng, folder = max(1, int(request.config.getoption('--kills'))//2), random.Random(0), tmp_path/'study'
    trials = max(2*kills, 3)
    for n in range(kills):
        process = work(small_market, folder, trials)
        patience = time.monotonic()+60
        before = len(list(folder.glob('trial-*')))
        while len(list(folder.glob('trial-*'))) == before and process.poll() is None and time.monotonic() < patience: time.sleep(.01)
        time.sleep(rng.uniform(0, .8))
        process.send_signal(signal.SIGKILL); process.communicate()
        if n == 0:
            with open(folder/'journal.log', 'a') as f: f.write('{"op_code": 4, "trial_')  # the line that a kill cut off
    complete(work(small_market, folder, trials))
    study = study_of(folder)
    states = [t.state for t in study.trials]
    assert len(finished_trials(study)) == trials and TrialState.RUNNING not in states and TrialState.WAITING not in states, states
    assert Ledger(folder).count('trial') == trials
    record_property('kills', kills)
    record_property('trials asked for and finished', trials)
    for t in folder.glob('trial-*/phase0_predictions.parquet'): assert set(pl.read_parquet(t)['split']) == {'valid'}

def waits_for_a_lock(process): return any('->' in line and str(process.pid) in line.split() for line in Path('/proc/locks').read_text().splitlines())

def test_two_processes_share_a_study(small_market, tmp_path):
    folder = tmp_path/'study'
    folder.mkdir()
    with open(folder/'ask.lock', 'a') as lock:  # both have opened the study before either may start a trial
        fcntl.flock(lock, fcntl.LOCK_EX)
        both = [work(small_market, folder, 4) for _ in range(2)]
        patience = time.monotonic()+120
        while not all(map(waits_for_a_lock, both)) and time.monotonic() < patience: time.sleep(.05)
        assert all(map(waits_for_a_lock, both)), [p.poll() for p in both]
    for p in both: complete(p)
    study = study_of(folder)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE]*4
    assert len({tuple(sorted(t.params.items())) for t in study.trials}) == 4

@pytest.fixture
def postgres(tmp_path):
    "The address of a PostgreSQL server that this test starts and stops"
    programs = sorted(Path('/usr/lib/postgresql').glob('*/bin/initdb'))
    if not programs: pytest.skip('no PostgreSQL server on this machine (Debian: apt-get install postgresql)')
    pytest.importorskip('psycopg', reason='no driver for PostgreSQL: pip install psycopg[binary]')
    as_user = ['runuser', '-u', 'postgres', '--'] if os.geteuid() == 0 else []
    if as_user and subprocess.run([*as_user, 'true'], capture_output=True).returncode: pytest.skip('PostgreSQL does not run as root, and there is no user postgres')
    folder = Path('/tmp')/f'atft-postgres-{os.getpid()}'  # pytest's own folder may not be entered by another user
    folder.mkdir(); shutil.chown(folder, 'postgres') if as_user else None
    bin_, port = programs[-1].parent, 55000+os.getpid() % 5000
    run = lambda *args: subprocess.run([*as_user, *map(str, args)], check=True, capture_output=True, cwd='/')
    try:
        run(bin_/'initdb', '-D', folder/'data', '-A', 'trust', '-U', 'atft')
        run(bin_/'pg_ctl', '-D', folder/'data', '-w', '-l', folder/'log', '-o', f'-p {port} -k {folder} -c listen_addresses=127.0.0.1', 'start')
        yield f'postgresql+psycopg://atft@127.0.0.1:{port}/postgres'
        run(bin_/'pg_ctl', '-D', folder/'data', '-m', 'fast', 'stop')
    finally: shutil.rmtree(folder, ignore_errors=True)

def test_several_machines_share_a_study_by_an_address(small_market, tmp_path, postgres):
    both = [work(small_market, tmp_path/f'machine{n}', 3, postgres) for n in range(2)]
    for p in both: complete(p)
    study = study_of(tmp_path/'machine0', postgres)
    assert 3 <= len(finished_trials(study)) <= 4 and TrialState.RUNNING not in [t.state for t in study.trials]  # each may have begun the last one
