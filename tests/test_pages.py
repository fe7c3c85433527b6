"What a page shows runs when it is copied: every name is made by a cell that is seen, folded or not."
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).parent.parent/'nbs').glob('*.ipynb'))
UNSEEN = re.compile(r'^#\| ?(hide|echo: false|eval: false)', re.M)
GIVEN = {'display', 'get_ipython'}  # by the kernel

def seen(cells:list)->str:
    "The code of the cells that a page shows, in order"
    shown = []
    for cell in cells:
        source = ''.join(cell['source'])
        if cell['cell_type'] != 'code' or UNSEEN.search(source): continue
        lines = [line for line in source.split('\n') if not line.startswith(('%', '!'))]
        shown.append('\n'.join(lines))
    return '\n'.join(shown)

def undefined(code:str)->set[str]:
    "The names that nothing makes, by ruff"
    command = [sys.executable, '-m', 'ruff', 'check', '--isolated', '--select', 'F821',
               '--output-format', 'concise', '--stdin-filename', 'page.py', '-']
    said = subprocess.run(command, input=code, capture_output=True, text=True)
    assert said.returncode in (0, 1), said.stderr
    return set(re.findall(r'Undefined name `(\w+)`', said.stdout))-GIVEN

@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_visible_cells_make_every_name_they_use(page):
    missing = undefined(seen(json.loads(page.read_text())['cells']))
    assert not missing, (f'{page.name}: {", ".join(sorted(missing))} come from cells that a reader '
                         'does not see; write #| code-fold: true there instead of #| hide')

def test_a_hidden_import_is_found():
    hidden = dict(cell_type='code', source=['#| hide\n', 'import numpy as np'])
    shown = dict(cell_type='code', source=['np.ones(3)'])
    assert undefined(seen([hidden, shown])) == {'np'}
    folded = dict(cell_type='code', source=['#| code-fold: true\n', 'import numpy as np'])
    assert undefined(seen([folded, shown])) == set()
