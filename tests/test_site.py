"What can be checked of the site without Quarto: notebooks through nbdev's filter, the YAML, every link"
import json, re, subprocess, sys
from glob import glob
from pathlib import Path
import pytest
import yaml
from conftest import ROOT

NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
LINK = re.compile(r'!?\[[^\]\n]*\]\(([^)\s]+)\)')

ALL = """import sys
from pathlib import Path
from nbdev.cli import nbdev_filter
for notebook in sys.argv[2:]: Path(sys.argv[1], Path(notebook).name).write_text(nbdev_filter(Path(notebook).read_text(), printit=False))
"""

def check_page(notebook, page):
    text = '\n'.join(''.join(c['source']) for c in page['cells'] if c['cell_type'] == 'markdown')
    shown = '\n'.join(''.join(o['data']['text/markdown']) for c in page['cells'] for o in c.get('outputs', []) if 'text/markdown' in o.get('data', {}))
    exports = '| export' in notebook.read_text()
    assert not exports or '```python\ndef ' in shown, f'{notebook.name}: no signature is shown'
    for link in LINK.findall(text+shown):
        if link.startswith(('http', '#')): continue
        target = (notebook.parent/link.split('#')[0])
        assert target.exists(), f'{notebook.name} links to {link}'
    assert 'atft.github.io' not in text+shown, notebook.name

def test_notebooks_pass_the_filter_with_signatures_and_links_that_lead_somewhere(tmp_path):
    "One process for all: started anew for each notebook, as Quarto does, it would import torch two dozen times"
    result = subprocess.run([sys.executable, '-c', ALL, tmp_path, *NOTEBOOKS], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert 'cells containing imports and other code' not in result.stderr
    for notebook in NOTEBOOKS: check_page(notebook, json.loads((tmp_path/notebook.name).read_text()))

def test_the_command_that_quarto_calls_passes_too():
    notebook = ROOT/'nbs/03e_checkpoint.ipynb'
    result = subprocess.run([Path(sys.executable).parent/'nbdev_filter'], input=notebook.read_text(), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert 'cells containing imports and other code' not in result.stderr
    check_page(notebook, json.loads(result.stdout))

def test_quarto_lists_pages_that_exist():
    site = yaml.safe_load((ROOT/'_quarto.yml').read_text())
    assert site['ipynb-filters'] == ['nbdev_filter'] and site['execute'] == {'enabled': False}
    def pages(node):
        if isinstance(node, str): yield node
        elif isinstance(node, list):
            for n in node: yield from pages(n)
        else:
            for k in ('contents', 'href'): yield from pages(node.get(k, []))
    for page in [*site['project']['render'], *pages(site['website']['sidebar']), *pages(site['website']['navbar']['left'])]:
        assert glob(str(ROOT/page)), f'_quarto.yml names {page}'
    assert {f'nbs/{n.name}' for n in NOTEBOOKS} <= set(pages(site['website']['sidebar']))

@pytest.mark.parametrize('page', [p.relative_to(ROOT).as_posix() for p in [*ROOT.glob('*.md'), *ROOT.glob('nbs/*.md'), *ROOT.glob('reports/*.md')]])
def test_links_in_markdown_lead_somewhere(page):
    for link in LINK.findall((ROOT/page).read_text()):
        if not link.startswith(('http', '#')): assert ((ROOT/page).parent/link.split('#')[0]).exists(), f'{page} links to {link}'
