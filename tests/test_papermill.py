"The commands a user types, as a user types them"
import json, os, pty, shutil, subprocess, sys
from pathlib import Path
import pytest
from conftest import ROOT

BIN = Path(sys.executable).parent
TINY = ['-p', 'max_epochs', '1', '-p', 'hidden', '8', '-p', 'lookback', '10', '-p', 'embargo', '5']

def in_terminal(command):
    "Run with standard input and output on a pseudo-terminal; return exit code and what was printed"
    leader, follower = pty.openpty()
    process = subprocess.Popen([str(c) for c in command], cwd=ROOT, stdin=follower, stdout=follower, stderr=follower, close_fds=True)
    os.close(follower)
    printed = b''
    try:
        while chunk := os.read(leader, 4096): printed += chunk
    except OSError: pass  # the terminal closes when the process ends
    os.close(leader)
    return process.wait(), printed.decode(errors='replace').replace('\r\n', '\n')

def test_papermill_without_an_output_path_trains_and_leaves_the_notebook_alone(small_market, tmp_path):
    notebook, outputs = ROOT/'nbs/03_phases.ipynb', ROOT/'runs/papermill'
    source, before = notebook.read_bytes(), set(outputs.glob('*.ipynb'))
    code, printed = in_terminal([BIN/'papermill', 'nbs/03_phases.ipynb', '-p', 'phase', '2', '-p', 'data', small_market.folder, '-p', 'run_dir', tmp_path/'run', '-p', 'report_dir', tmp_path, *TINY])
    assert code == 0, printed[-2000:]
    assert 'phases to train: 0, 1, 2 (asked for: 2)' in printed
    assert {f'phase{n}_{what}' for n in range(3) for what in ('best.pt', 'metrics.json', 'predictions.parquet')} <= {p.name for p in (tmp_path/'run').iterdir()}
    report = next(tmp_path.glob('phases_*.md')).read_text()
    assert '| command |' in report and '2 | fan' in report and 'papermill nbs/03_phases.ipynb -p phase 2' in report
    assert notebook.read_bytes() == source
    new = set(outputs.glob('*.ipynb')) - before
    assert len(new) == 1
    new.pop().unlink()

@pytest.mark.parametrize('wrong, says', [(['-p', 'phase', '7'], "phase 7 is not in 0 .. 4"), (['-p', 'fase', '2'], "unknown parameter 'fase'"),
    (['-p', 'phase', '0', '-p', 'data', 'no/such/folder'], 'does not exist'), (['-p', 'phase', '0', '-p', 'k', '0'], 'k=0 must be at least 1')])
def test_a_wrong_parameter_ends_in_one_clear_line(wrong, says, tmp_path):
    result = subprocess.run([BIN/'papermill', 'nbs/03_phases.ipynb', tmp_path/'out.ipynb', *wrong, '-p', 'run_dir', tmp_path/'run'], cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.returncode == 1
    lines = [l for l in result.stderr.splitlines() if l.strip() and not l.lstrip('\r').startswith(('Executing', 'Input Notebook', 'Output Notebook'))]
    assert lines[-1].startswith('AtftError: ') and says in lines[-1]
    assert 'Traceback' not in result.stderr
    assert not (tmp_path/'run').exists()

def test_the_source_notebook_survives_a_pipe_on_standard_input(tmp_path):
    copy = tmp_path/'03_phases.ipynb'
    shutil.copy(ROOT/'nbs/03_phases.ipynb', copy)
    result = subprocess.run([BIN/'papermill', str(copy), '-p', 'phase', '7'], cwd=ROOT, capture_output=True, text=True, input='')
    assert result.returncode == 1 and 'phase 7' in result.stderr
    assert copy.read_bytes() == (ROOT/'nbs/03_phases.ipynb').read_bytes()

@pytest.mark.parametrize('name', ['01_graph', '03_phases', '04_eval'])
def test_cleaning_keeps_the_parameters_tag(name, tmp_path):
    copy = ROOT/'runs'/f'clean_{name}.ipynb'
    copy.parent.mkdir(exist_ok=True)
    shutil.copy(ROOT/f'nbs/{name}.ipynb', copy)
    try:
        subprocess.run([BIN/'nbdev_clean', '--fname', copy], cwd=ROOT, check=True, capture_output=True)
        tagged = [c for c in json.loads(copy.read_text())['cells'] if 'parameters' in c['metadata'].get('tags', [])]
    finally: copy.unlink()
    assert len(tagged) == 1 and not tagged[0]['source'][0].startswith('#|')

def test_the_command_line_trains_and_refuses(small_market, tmp_path):
    tiny = ['--max-epochs', '1', '--hidden', '8', '--lookback', '10', '--embargo', '5']
    run = lambda *args: subprocess.run([sys.executable, '-m', 'atft.phases', *map(str, args)], cwd=tmp_path, capture_output=True, text=True)
    good = run('--phase', '0', '--data', small_market.folder, '--run-dir', tmp_path/'run', *tiny)
    assert good.returncode == 0 and Path(good.stdout.strip().splitlines()[-1]).exists(), good.stderr
    for args, says in [(['--phase', '9'], "phase '9' is not in 0 .. 4"), (['--phase', '0', '--data', 'nowhere'], 'data folder nowhere does not exist'),
                       (['--phase', '0', '--data', small_market.folder, '--run-dir', tmp_path/'run', '--k', '7', *tiny], 'was made with k=20 there, 7 here')]:
        bad = run(*args)
        assert bad.returncode == 1 and says in bad.stderr.splitlines()[-1] and 'Traceback' not in bad.stderr
    assert subprocess.run([BIN/'atft_phases', '--help'], capture_output=True).returncode == 0

def test_the_evaluation_notebook_reports_on_a_run(small_market, tmp_path):
    run = tmp_path/'run'
    subprocess.run([sys.executable, '-m', 'atft.phases', '--phase', '0-1', '--data', small_market.folder, '--run-dir', run, '--max-epochs', '1', '--hidden', '8', '--lookback', '10', '--embargo', '5'], check=True, capture_output=True)
    subprocess.run([BIN/'papermill', 'nbs/04_eval.ipynb', tmp_path/'out.ipynb', '-p', 'run_dir', run, '-p', 'report_dir', tmp_path], cwd=ROOT, check=True, capture_output=True)
    report = next(tmp_path.glob('evaluation_*.md'))
    text = report.read_text()
    for needed in ('1 gat against 0 baseline', 'lightgbm', 'reversal_1d', 'oracle', 'fingerprint', 'Sharpe'): assert needed in text
    for figure in ('cumulative_rank_ic', 'deciles', 'profit'): assert report.with_name(f'{report.stem}_{figure}.png').exists()
    verdict = (run/'verdict.txt').read_text().splitlines()
    assert verdict[0] == f'report: {report}' and len(verdict) == 4
