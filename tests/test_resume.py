"A run killed, stopped, short of disk or spread over processes ends like one nothing happened to"
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import polars as pl
import pytest
import torch
import warm
from polars.testing import assert_frame_equal

from atft.checkpoint import load_state, save_state
from atft.core import AtftError
from atft.phases import CHECKPOINT_VERSION

TINY = '--phase 0-1 --max-epochs 2 --hidden 8 --lookback 10 --embargo 5 --no-pictures --save-minutes 0.004'
SHARED = ('--accumulate', '2', '--days-per-step', '2')
HEARD = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def flags(small_market, run, *more):
    "The module and the flags of a tiny run"
    where = ['--data', str(small_market.folder), '--run-dir', str(run)]
    return ['atft.phases', *TINY.split(), *where, *more]


def command(small_market, run, *more):
    return [sys.executable, '-m', *flags(small_market, run, *more)]


def torchrun(small_market, run, *more):
    "The same by two processes"
    job = ['torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m']
    return [sys.executable, '-m', *job, *flags(small_market, run, '--device', 'cpu', *more)]


def free_port():
    "A port of this machine that nobody listens on"
    with socket.socket() as asked:
        asked.bind(('127.0.0.1', 0))
        return asked.getsockname()[1]


def pair(small_market, run, *more):
    "Two processes that find each other by what `torchrun` tells each of its own"
    job = dict(WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()))
    typed = command(small_market, run, '--device', 'cpu', *more)
    numbers = [dict(RANK=n, LOCAL_RANK=n) for n in '01']
    return [warm.Command(typed, env=os.environ | job | number) for number in numbers]


def finish(typed):
    "Run a command to its good end"
    return warm.run(typed, check=True)


def kills(request): return int(request.config.getoption('--kills'))


def wait_for(path, process):
    "Until a file is there, or the process has ended"
    while not path.exists() and process.poll() is None: time.sleep(.01)


@pytest.fixture(scope='module')
def straight(small_market, tmp_path_factory):
    "A run that nothing happened to"
    run = tmp_path_factory.mktemp('straight')/'run'
    finish(command(small_market, run))
    return run


def without(record, *names):
    return {name: value for name, value in record.items() if name not in names}


def metrics_of(run, number):
    return json.loads((run/f'phase{number}_metrics.json').read_text())


def timeless(run, number):
    "Metrics without clock and memory"
    found = metrics_of(run, number)
    epochs = [without(epoch, 'seconds', 'peak_memory') for epoch in found['epochs']]
    return without(found, 'minutes', 'epochs') | dict(epochs=epochs)


def weights_of(run, number):
    return load_state(run/f'phase{number}_best.pt', CHECKPOINT_VERSION)['model']


def predictions_of(run, number):
    return pl.read_parquet(run/f'phase{number}_predictions.parquet')


def same_bits(a, b):
    "Weights, predictions and metrics of two runs"
    for n in (0, 1):
        one = weights_of(a, n)
        two = weights_of(b, n)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[k], two[k]) for k in one)
        assert_frame_equal(predictions_of(a, n), predictions_of(b, n), check_exact=True)
        assert timeless(a, n) == timeless(b, n)


def files_of_phases(run):
    return sorted((p.name, p.stat().st_mtime_ns) for p in run.glob('phase*'))


def wait_for_news(run, process):
    "Until it trains and has written something new"
    before = files_of_phases(run)
    patience = time.monotonic()+60
    while files_of_phases(run) == before and process.poll() is None:
        if time.monotonic() > patience: break
        time.sleep(.005)


def test_kill_9_at_random_moments_then_the_same_command_gives_the_same_bits(
        small_market, straight, tmp_path, request, record_property):
    rng = random.Random(0)
    run = tmp_path/'killed'
    typed = command(small_market, run, '--again')  # whenever it gets to its end, it begins anew
    died = 0
    for _ in range(kills(request)):
        process = warm.Command(typed)
        wait_for_news(run, process)
        time.sleep(rng.uniform(0, 1.5))
        process.send_signal(signal.SIGKILL)
        died += process.wait() == -signal.SIGKILL
    record_property('killed with signal 9', died)
    assert died >= min(2, kills(request))
    done = finish(typed)
    assert 'did not end in order; continuing' in done.stderr or died < kills(request)
    same_bits(straight, run)


def test_sigterm_saves_and_says_how_to_go_on(small_market, straight, tmp_path, record_property):
    run = tmp_path/'stopped'
    process = warm.Command(command(small_market, run, '--save-minutes', '60'))
    wait_for(run/'config.json', process)
    time.sleep(1.)
    process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    text = process.communicate(timeout=60)[1]
    took = time.monotonic()-start
    record_property('seconds from SIGTERM to the end', f'{took:.1f}')
    assert process.returncode == 143 and took < 10, (process.returncode, text)
    assert 'stopped as asked' in text and 'the same command continues there' in text
    assert 'Traceback' not in text
    finish(command(small_market, run))
    same_bits(straight, run)


def test_a_second_run_in_the_folder_is_refused(small_market, tmp_path):
    run = tmp_path/'shared'
    first = warm.Command(command(small_market, run))
    wait_for(run/'config.json', first)
    second = warm.run(command(small_market, run))
    assert second.returncode == 1 and 'Traceback' not in second.stderr
    assert f'is in use by process {first.pid} on' in second.stderr
    assert 'last sign of life' in second.stderr
    first.kill()
    first.wait()


SAVER = '''
import os, random, signal, sys, time, torch
from pathlib import Path
from atft.checkpoint import load_state, save_state

path = Path(sys.argv[1])
kills = int(sys.argv[2])
rng = random.Random(1)
step = 1
landed = 0
torch.set_num_threads(1)
start = time.perf_counter()
for _ in range(5): save_state(path, dict(version=2, step=0, w=torch.arange(20_000.)))
once = (time.perf_counter()-start)/5  # how long a save takes here and now
for _ in range(kills):
    hear, say = os.pipe()
    child = os.fork()
    if not child:  # saves for ever, and says so each time
        w = torch.arange(20_000.)
        while True:
            save_state(path, dict(version=2, step=step, w=w+step))
            step += 1
            os.write(say, b'.')
    os.close(say)  # else a child that fails would be waited for
    for _ in range(rng.randrange(4)): os.read(hear, 1)  # whole saves, on the slowest machine too
    time.sleep(rng.uniform(0, 2*once))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(hear)
    state = load_state(path, 2, fall_back=True)
    assert state['step'] >= step-1, (state['step'], step)
    assert torch.equal(state['w'], torch.arange(20_000.)+state['step']), (state['step'], step)
    landed += state['step'] >= step
    step = state['step']+1
print(kills, landed)
'''


def test_a_kill_while_saving_leaves_a_checkpoint_that_loads(tmp_path, request, record_property):
    wanted = 25*kills(request)
    typed = [sys.executable, '-c', SAVER, str(tmp_path/'a.pt'), str(wanted)]
    result = subprocess.run(typed, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    done, landed = map(int, result.stdout.split())
    record_property('killed while saving, each then read whole', done)
    record_property('of these after at least one more whole save', landed)
    assert done == wanted and landed > done/2, 'the kills came before anything was saved'


def test_a_disk_that_fills_leaves_the_old_checkpoint(tmp_path, request, record_property):
    path = tmp_path/'a.pt'
    rng = random.Random(2)
    save_state(path, dict(version=2, step=0, w=torch.zeros(100_000)))
    size = path.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    new = dict(version=2, step=1, w=torch.ones(100_000))
    for _ in range(kills(request)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (rng.randrange(size), limits[1]))
        try:
            with pytest.raises(AtftError, match='cannot write .*a.*nothing was left behind'):
                save_state(path, new)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert load_state(path, 2, fall_back=True)['step'] == 0 and not list(tmp_path.glob('.*'))
    record_property('disk budgets, each leaving the old file whole', kills(request))


@pytest.fixture(scope='module')
def alone(small_market, tmp_path_factory):
    "What one process makes of the flags that two can share"
    run = tmp_path_factory.mktemp('alone')/'run'
    finish(command(small_market, run, *SHARED))
    return run


def same_curves(one, other):
    "Loss and rank IC of every epoch of both phases, within what sums in another order do"
    for n in (0, 1):
        pairs = zip(metrics_of(one, n)['epochs'], metrics_of(other, n)['epochs'], strict=True)
        for a, b in pairs:
            if a['train']:
                losses = a['train']['loss'], b['train']['loss']
                np.testing.assert_allclose(*losses, atol=1e-5, rtol=1e-5)
            np.testing.assert_allclose(a['valid']['rank_ic'], b['valid']['rank_ic'], atol=1e-4)


def test_two_processes_give_what_one_gives(small_market, alone, tmp_path):
    says = 'accumulate=1 passes a step cannot be shared evenly by 2 processes; use --accumulate 2'
    for refused in pair(small_market, tmp_path/'no'):
        assert says in refused.communicate(timeout=120)[1] and refused.returncode
    typed = torchrun(small_market, tmp_path/'two', *SHARED)
    subprocess.run(typed, check=True, capture_output=True)
    same_curves(alone, tmp_path/'two')


def test_what_two_processes_began_one_finishes(small_market, alone, tmp_path):
    mixed = tmp_path/'mixed'
    both = pair(small_market, mixed, *SHARED)
    wait_for(mixed/'phase0_last.pt', both[0])
    time.sleep(.3)
    for process in both: process.send_signal(signal.SIGTERM)
    for process in both: process.wait()
    finish(command(small_market, mixed, *SHARED))
    same_curves(alone, mixed)


def test_a_process_that_dies_ends_the_job_and_the_next_one_goes_on(small_market, tmp_path):
    run = tmp_path/'run'
    process = subprocess.Popen(torchrun(small_market, run, *SHARED), **HEARD)
    wait_for(run/'phase0_last.pt', process)
    asked = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True)
    os.kill(int(asked.stdout.split()[-1]), signal.SIGKILL)
    text = process.communicate(timeout=120)[1]
    assert process.returncode and 'Signal 9' in text, text[-2000:]
    for process in pair(small_market, run, *SHARED):
        text = process.communicate(timeout=240)[1]
        assert process.returncode == 0, text[-2000:]
    assert (run/'phase1_metrics.json').exists()
