"A run that is killed, stopped, short of disk or spread over processes ends like one that was never disturbed"
import json, os, random, resource, signal, subprocess, sys, time
import numpy as np
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from atft.checkpoint import load_state, previous, save_state
from atft.core import AtftError
from atft.correlation import rank_ic
from atft.phases import CHECKPOINT_VERSION

def command(small_market, run, *more): return [sys.executable, '-m', 'atft.phases', '--phase', '0-1', '--data', str(small_market.folder), '--run-dir', str(run), '--max-epochs', '2', '--hidden', '8', '--lookback', '10', '--embargo', '5', '--save-minutes', '0.004', *more]
def kills(request): return int(request.config.getoption('--kills'))

@pytest.fixture(scope='module')
def straight(small_market, tmp_path_factory):
    "A run that nothing happened to"
    run = tmp_path_factory.mktemp('straight')/'run'
    subprocess.run(command(small_market, run), check=True, capture_output=True)
    return run

def same_bits(a, b):
    "Weights, predictions and metrics (without clock and memory) of two runs"
    for n in (0, 1):
        one, two = (load_state(run/f'phase{n}_best.pt', CHECKPOINT_VERSION)['model'] for run in (a, b))
        assert all(torch.equal(one[k], two[k]) for k in one)
        assert_frame_equal(*(pl.read_parquet(run/f'phase{n}_predictions.parquet') for run in (a, b)), check_exact=True)
        strip = lambda m: {k: v for k, v in m.items() if k not in ('minutes', 'epochs')} | dict(epochs=[{k: v for k, v in e.items() if k not in ('seconds', 'peak_memory')} for e in m['epochs']])
        assert strip(json.loads((a/f'phase{n}_metrics.json').read_text())) == strip(json.loads((b/f'phase{n}_metrics.json').read_text()))

def test_kill_9_at_random_moments_then_the_same_command_gives_the_same_bits(small_market, straight, tmp_path, request, record_property):
    rng, run, died = random.Random(0), tmp_path/'killed', 0
    for _ in range(kills(request)):
        process = subprocess.Popen(command(small_market, run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seen = lambda: sorted((p.name, p.stat().st_mtime_ns) for p in run.glob('phase*'))
        before, patience = seen(), time.monotonic()+60
        while seen() == before and process.poll() is None and time.monotonic() < patience: time.sleep(.005)  # until it trains and has written something new
        time.sleep(rng.uniform(0, 1.5))
        process.send_signal(signal.SIGKILL)
        died += process.wait() == -signal.SIGKILL
    record_property('killed with signal 9', died)
    assert died >= min(2, kills(request))
    done = subprocess.run(command(small_market, run), check=True, capture_output=True, text=True)
    assert 'did not end in order; continuing' in done.stderr or died < kills(request)
    same_bits(straight, run)

def test_sigterm_saves_and_says_how_to_go_on(small_market, straight, tmp_path, record_property):
    run = tmp_path/'stopped'
    process = subprocess.Popen(command(small_market, run, '--save-minutes', '60'), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (run/'config.json').exists(): time.sleep(.01)
    time.sleep(1.)
    process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    text, took = process.communicate(timeout=60)[1], time.monotonic()-start
    record_property('seconds from SIGTERM to the end', f'{took:.1f}')
    assert process.returncode == 143 and took < 10, (process.returncode, text)
    assert 'stopped as asked' in text and 'the same command continues there' in text and 'Traceback' not in text
    subprocess.run(command(small_market, run), check=True, capture_output=True)
    same_bits(straight, run)

def test_a_second_run_in_the_folder_is_refused(small_market, tmp_path):
    run = tmp_path/'shared'
    first = subprocess.Popen(command(small_market, run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (run/'config.json').exists(): time.sleep(.01)
    second = subprocess.run(command(small_market, run), capture_output=True, text=True)
    assert second.returncode == 1 and f'is in use by process {first.pid} on' in second.stderr and 'last sign of life' in second.stderr and 'Traceback' not in second.stderr
    first.kill(); first.wait()

SAVER = '''
import os, random, signal, sys, time, torch
from pathlib import Path
from atft.checkpoint import load_state, save_state
path, kills, rng, step, landed = Path(sys.argv[1]), int(sys.argv[2]), random.Random(1), 1, 0
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
            save_state(path, dict(version=2, step=step, w=w+step)); step += 1
            os.write(say, b'.')
    os.close(say)  # else a child that fails would be waited for
    for _ in range(rng.randrange(4)): os.read(hear, 1)  # so many whole saves, on the slowest machine too
    time.sleep(rng.uniform(0, 2*once))
    os.kill(child, signal.SIGKILL); os.waitpid(child, 0)
    os.close(hear)
    state = load_state(path, 2, fall_back=True)
    assert state["step"] >= step-1 and torch.equal(state["w"], torch.arange(20_000.)+state["step"]), (state["step"], step)
    landed += state["step"] >= step
    step = state["step"]+1
print(kills, landed)
'''
def test_a_kill_while_saving_leaves_a_checkpoint_that_loads(tmp_path, request, record_property):
    result = subprocess.run([sys.executable, '-c', SAVER, str(tmp_path/'a.pt'), str(25*kills(request))], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    done, landed = map(int, result.stdout.split())
    record_property('killed while saving, each then read whole', done)
    record_property('of these after at least one more whole save', landed)
    assert done == 25*kills(request) and landed > done/2, 'the kills came before anything was saved'

def test_a_disk_that_fills_leaves_the_old_checkpoint(tmp_path, request, record_property):
    path, rng = tmp_path/'a.pt', random.Random(2)
    save_state(path, dict(version=2, step=0, w=torch.zeros(100_000)))
    size, limits = path.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for _ in range(kills(request)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (rng.randrange(size), limits[1]))
        try:
            with pytest.raises(AtftError, match='cannot write .*a.*nothing was left behind'): save_state(path, dict(version=2, step=1, w=torch.ones(100_000)))
        finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert load_state(path, 2, fall_back=True)['step'] == 0 and not list(tmp_path.glob('.*'))
    record_property('disk budgets, each leaving the old file whole', kills(request))

def torchrun(small_market, run, *more): return [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m', *command(small_market, run, '--device', 'cpu', *more)[2:]]

def test_two_processes_give_what_one_gives(small_market, tmp_path):
    one, two, mixed = tmp_path/'one', tmp_path/'two', tmp_path/'mixed'
    refused = subprocess.run(torchrun(small_market, tmp_path/'no'), capture_output=True, text=True)
    assert refused.returncode and 'accumulate=1 passes a step cannot be shared evenly by 2 processes; use --accumulate 2' in refused.stderr
    shared = ('--accumulate', '2', '--days-per-step', '2')
    subprocess.run(command(small_market, one, *shared), check=True, capture_output=True)
    subprocess.run(torchrun(small_market, two, *shared), check=True, capture_output=True)
    process = subprocess.Popen(torchrun(small_market, mixed, *shared), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # stopped on two, finished on one
    while not (mixed/'phase0_last.pt').exists() and process.poll() is None: time.sleep(.01)
    time.sleep(.3)
    process.send_signal(signal.SIGTERM); process.wait()
    subprocess.run(command(small_market, mixed, *shared), check=True, capture_output=True)
    for run in (two, mixed):
        for n in (0, 1):
            a, b = (json.loads((r/f'phase{n}_metrics.json').read_text()) for r in (one, run))
            for x, y in zip(a['epochs'], b['epochs'], strict=True):
                if x['train']: np.testing.assert_allclose(x['train']['loss'], y['train']['loss'], atol=1e-5, rtol=1e-5)
                np.testing.assert_allclose(x['valid']['rank_ic'], y['valid']['rank_ic'], atol=1e-4)

def test_a_process_that_dies_ends_the_job_and_the_next_one_goes_on(small_market, tmp_path):
    run, shared = tmp_path/'run', ('--accumulate', '2', '--days-per-step', '2')
    process = subprocess.Popen(torchrun(small_market, run, *shared), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (run/'phase0_last.pt').exists() and process.poll() is None: time.sleep(.01)
    children = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    text = process.communicate(timeout=120)[1]
    assert process.returncode and 'Signal 9' in text, text[-2000:]
    subprocess.run(torchrun(small_market, run, *shared), check=True, capture_output=True)
    assert (run/'phase1_metrics.json').exists()
