"What is stored in a notebook is what today's code shows; a cheap part is looked at each time."
import json
import re
from pathlib import Path

import pytest

from outputs import ROOT, differences, joined, tidy

CHEAP = ('02c_losses', '03h_phase_row')

@pytest.mark.parametrize('name', CHEAP)
def test_stored_outputs_are_of_todays_code(name):
    differ = differences(ROOT/'nbs'/f'{name}.ipynb')
    assert not differ, f'run `make outputs`: {"; ".join(differ)}'

def test_a_stale_output_is_named(tmp_path):
    notebook = json.loads((ROOT/'nbs/03h_phase_row.ipynb').read_text())
    code = [c for c in notebook['cells'] if c['cell_type'] == 'code' and not c['outputs']][0]
    stale = dict(name='stdout', output_type='stream', text=['of yesterday\n'])
    code['outputs'] = [stale]
    path = ROOT/'nbs'/'_stale.ipynb'
    try:
        path.write_text(json.dumps(notebook))
        assert differences(path) == [f'_stale.ipynb, cell {code["id"]}']
    finally: path.unlink(missing_ok=True)

def test_streams_lose_progress_and_paths():
    bar = dict(output_type='stream', name='stderr', text='\rdays: 10%\n')
    said = dict(output_type='stream', name='stdout', text='in /tmp/tmpab12cd34/run\n')
    rest = dict(output_type='stream', name='stdout', text='done\n')
    assert joined([bar, said, rest]) == [
        dict(output_type='stream', name='stdout', text='in TMP/run\ndone\n')]
    assert tidy('/tmp/ipykernel_12/345.py:4: UserWarning: odd\n') == 'cell: UserWarning: odd\n'

NOISE = re.compile(r'\r|\d%\||/tmp/|\d+(\.\d+)?(it|s)/(s|it)\b|/home/|/root/')

def noisy(path:Path)->list[str]:
    "The cells of a notebook that store a clock, a bar or a path of some machine"
    found = []
    for cell in json.loads(path.read_text())['cells']:
        for output in cell.get('outputs', []):
            plain = output.get('text', output.get('data', {}).get('text/plain', ''))
            if NOISE.search(''.join(plain)): found.append(f'{path.name}, cell {cell["id"]}')
    return found

def test_nothing_noisy_is_stored():
    found = [cell for path in sorted((ROOT/'nbs').glob('*.ipynb')) for cell in noisy(path)]
    assert not found, f'run `make outputs`: {"; ".join(found)}'
