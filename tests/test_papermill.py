"The commands a user types, as a user types them"
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from conftest import ROOT

BIN = Path(sys.executable).parent
TINY = dict(max_epochs=1, hidden=8, lookback=10, embargo=5)


def parameters(**given):
    "-p NAME VALUE for each"
    return [word for name, value in given.items() for word in ('-p', name, str(value))]


def flags(**given):
    "--name value for each"
    pairs = [(f'--{name}'.replace('_', '-'), value) for name, value in given.items()]
    return [word for pair in pairs for word in pair]


@pytest.fixture(scope='module')
def kernels(tmp_path_factory):
    "Where kernels begin at once"
    return warm.kernels(tmp_path_factory.mktemp('jupyter'))


def papermill(kernels, *words, **options):
    "Run papermill at the project's root"
    return warm.run([BIN/'papermill', *words], cwd=ROOT, env=kernels, **options)


def train(folder, *more, **options):
    "Run the training from its command line"
    return warm.run([sys.executable, '-m', 'atft.phases', *more], cwd=folder, **options)


def read_terminal(leader):
    "All that is printed until the terminal closes, when the process ends"
    printed = []
    while True:
        try:
            chunk = os.read(leader, 4096)
        except OSError:
            chunk = b''
        if not chunk: break
        printed.append(chunk)
    text = b''.join(printed).decode(errors='replace')
    return text.replace('\r\n', '\n')


def in_terminal(command):
    "Run with standard input and output on a pseudo-terminal; exit code and what was printed"
    leader, follower = pty.openpty()
    channels = dict(stdin=follower, stdout=follower, stderr=follower)
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, close_fds=True, **channels)
    os.close(follower)
    printed = read_terminal(leader)
    os.close(leader)
    return process.wait(), printed


def test_papermill_without_an_output_path_trains_and_leaves_the_notebook_alone(
        small_market, tmp_path):
    notebook = ROOT/'nbs/03_phases.ipynb'
    outputs = ROOT/'runs/papermill'
    source = notebook.read_bytes()
    before = set(outputs.glob('*.ipynb'))
    run = tmp_path/'run'
    where = parameters(phase=2, data=small_market.folder, run_dir=run, report_dir=tmp_path)
    tiny = parameters(**TINY)
    code, printed = in_terminal([BIN/'papermill', 'nbs/03_phases.ipynb', *where, *tiny])
    assert code == 0, printed[-2000:]
    assert 'phases to train: 0, 1, 2 (asked for: 2)' in printed
    made = {path.name for path in run.iterdir()}
    for n in range(3):
        assert {f'phase{n}_best.pt', f'phase{n}_metrics.json'} <= made
        assert f'phase{n}_predictions.parquet' in made
    report = next(tmp_path.glob('phases_*.md')).read_text()
    assert '| command |' in report and '2 | fan' in report
    assert 'papermill nbs/03_phases.ipynb -p phase 2' in report
    assert notebook.read_bytes() == source
    new = set(outputs.glob('*.ipynb')) - before
    assert len(new) == 1
    new.pop().unlink()


WRONG = [
    (dict(phase=7), "phase '7' is not in 0 .. 4"),
    (dict(fase=2), "unknown parameter 'fase'; perhaps you meant 'phase'; this notebook has"),
    (dict(phase=0, data='no/such/folder'), 'does not exist'),
    (dict(phase=0, k=0), 'GraphSpec: k=0 must be at least 1'),
]
OF_PAPERMILL = ('Executing', 'Input Notebook', 'Output Notebook')


@pytest.mark.parametrize('wrong, says', WRONG)
def test_a_wrong_parameter_ends_in_one_clear_line(wrong, says, kernels, tmp_path):
    given = parameters(**wrong, run_dir=tmp_path/'run')
    result = papermill(kernels, 'nbs/03_phases.ipynb', tmp_path/'out.ipynb', *given)
    assert result.returncode == 1
    lines = [line.lstrip('\r') for line in result.stderr.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(OF_PAPERMILL)]
    assert lines[-1].startswith('AtftError: ') and says in lines[-1]
    assert 'Traceback' not in result.stderr
    assert not (tmp_path/'run').exists()


def test_the_source_notebook_survives_a_pipe_on_standard_input(tmp_path):
    copy = tmp_path/'03_phases.ipynb'
    shutil.copy(ROOT/'nbs/03_phases.ipynb', copy)
    typed = [BIN/'papermill', copy, *parameters(phase=7)]
    result = subprocess.run(typed, cwd=ROOT, capture_output=True, text=True, input='')
    assert result.returncode == 1 and "phase '7'" in result.stderr
    assert copy.read_bytes() == (ROOT/'nbs/03_phases.ipynb').read_bytes()


@pytest.mark.parametrize('name', ['01_graph', '03_phases', '04_eval', '05_hpo'])
def test_cleaning_keeps_the_parameters_tag(name):
    copy = ROOT/'runs'/f'clean_{name}.ipynb'
    copy.parent.mkdir(exist_ok=True)
    shutil.copy(ROOT/f'nbs/{name}.ipynb', copy)
    try:
        typed = [BIN/'nbdev_clean', '--fname', copy]
        subprocess.run(typed, cwd=ROOT, check=True, capture_output=True)
        cells = json.loads(copy.read_text())['cells']
    finally:
        copy.unlink()
    tagged = [cell for cell in cells if 'parameters' in cell['metadata'].get('tags', [])]
    assert len(tagged) == 1 and not tagged[0]['source'][0].startswith('#|')


def test_the_command_line_trains_and_refuses(small_market, tmp_path):
    where = flags(phase=0, data=small_market.folder, run_dir=tmp_path/'run')
    good = train(tmp_path, *where, *flags(**TINY))
    assert good.returncode == 0, good.stderr
    assert Path(good.stdout.strip().splitlines()[-1]).exists()
    refused = [
        (flags(phase=9), "phase '9' is not in 0 .. 4"),
        (flags(phase=0, data='nowhere'), 'data folder nowhere does not exist'),
        ([*where, *flags(k=7, **TINY)], 'was made with k=20 there, 7 here'),
    ]
    for given, says in refused:
        bad = train(tmp_path, *given)
        assert bad.returncode == 1 and says in bad.stderr.splitlines()[-1], bad.stderr
        assert 'Traceback' not in bad.stderr
    helped = subprocess.run([BIN/'atft_phases', '--help'], capture_output=True)
    assert helped.returncode == 0


IN_THE_REPORT = (
    '1 graph against 0 baseline', 'lightgbm', 'reversal_1d', 'oracle', 'fingerprint', 'Sharpe')


def test_the_evaluation_notebook_reports_on_a_run(small_market, kernels, tmp_path):
    run = tmp_path/'run'
    where = flags(phase='0-1', data=small_market.folder, run_dir=run)
    train(tmp_path, *where, *flags(**TINY), check=True)
    given = parameters(run_dir=run, report_dir=tmp_path)
    papermill(kernels, 'nbs/04_eval.ipynb', tmp_path/'out.ipynb', *given, check=True)
    report = next(tmp_path.glob('evaluation_*.md'))
    text = report.read_text()
    for needed in IN_THE_REPORT: assert needed in text
    for figure in ('cumulative_rank_ic', 'deciles', 'profit'):
        assert report.with_name(f'{report.stem}_{figure}.png').exists()
    verdict = (run/'verdict.txt').read_text().splitlines()
    assert verdict[0] == f'report: {report}' and len(verdict) == 4
