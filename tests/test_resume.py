"A killed run, started again, ends like one that was never killed"
import json, signal, subprocess, sys, time
import polars as pl
import torch
from polars.testing import assert_frame_equal

def test_kill_9_then_the_same_command_gives_the_same_bits(small_market, tmp_path):
    def command(run): return [sys.executable, '-m', 'atft.phases', '--phase', '0-1', '--data', str(small_market.folder), '--run-dir', str(tmp_path/run), '--max-epochs', '3', '--hidden', '8', '--lookback', '10', '--embargo', '5']
    subprocess.run(command('straight'), check=True, capture_output=True)
    for wait_for in ('phase0_last.pt', 'phase1_last.pt'):  # killed somewhere in a later epoch of each phase
        process = subprocess.Popen(command('killed'), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (tmp_path/'killed'/wait_for).exists() and process.poll() is None: time.sleep(.02)
        time.sleep(.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command('killed'), check=True, capture_output=True)
    for n in (0, 1):
        a, b = (torch.load(tmp_path/run/f'phase{n}_best.pt', weights_only=True)['model'] for run in ('straight', 'killed'))
        assert all(torch.equal(a[k], b[k]) for k in a)
        assert_frame_equal(*(pl.read_parquet(tmp_path/run/f'phase{n}_predictions.parquet') for run in ('straight', 'killed')), check_exact=True)
        histories = [json.loads((tmp_path/run/f'phase{n}_metrics.json').read_text()) for run in ('straight', 'killed')]
        strip = lambda m: [{k: v for k, v in e.items() if k != 'seconds'} for e in m['epochs']]
        assert strip(histories[0]) == strip(histories[1])
