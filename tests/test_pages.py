"What a page shows runs when it is copied: every name is made by a cell that is seen, folded or not."
import json
import re
import subprocess
import sys
from itertools import takewhile
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

def has_picture(cell:dict)->bool:
    return any('image/png' in output.get('data', {}) for output in cell.get('outputs', []))

def is_option(line:str)->bool: return line.startswith('#|')

def undescribed(cells:list)->list[str]:
    "A line for each option that a cell with a stored picture lacks"
    lacking = []
    for number, cell in enumerate(cells):
        if not has_picture(cell): continue
        source = ''.join(cell['source'])
        leading = takewhile(is_option, source.split('\n'))  # below code Quarto reads none
        options = '\n'.join(leading)
        wanted = ['fig-alt'] if 'plot_road(' in source else ['fig-cap', 'fig-alt']
        for option in wanted:
            if not re.search(rf'^#\| {option}: "[^"\\]+"$', options, re.M):
                lacking.append(f'cell {number} lacks #| {option}: "..."')
    return lacking

@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_every_stored_fig_has_a_caption_and_an_alternative_text(page):
    lacking = undescribed(json.loads(page.read_text())['cells'])
    assert not lacking, f'{page.name}: {"; ".join(lacking)}'

def test_a_fig_without_its_words_is_found():
    picture = [dict(output_type='display_data', data={'image/png': ''})]
    alt = '#| fig-alt: "a line"\n'
    cap = '#| fig-cap: "It rises"\n'
    def cell(source): return dict(cell_type='code', source=[source], outputs=picture)

    bare = undescribed([cell('plot()')])
    assert len(bare) == 2 and 'fig-cap' in bare[0] and 'fig-alt' in bare[1]
    assert len(undescribed([cell(alt+'plot()')])) == 1
    assert len(undescribed([cell(cap+'plot()\n'+alt)])) == 1
    assert len(undescribed([cell(cap.replace('rises', '"rises"')+alt+'plot()')])) == 1
    assert undescribed([cell(cap+alt+'plot()')]) == []
    assert undescribed([cell(alt+"plot_road('00_data')")]) == []
    assert len(undescribed([cell("plot_road('00_data')")])) == 1
    assert undescribed([dict(cell_type='code', source=['1+1'], outputs=[])]) == []
