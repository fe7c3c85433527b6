"What can be checked of the site without Quarto: notebooks through the filter, the YAML, every link"
import json
import re
import subprocess
import sys
from glob import glob
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
PAGES = [*ROOT.glob('*.md'), *ROOT.glob('nbs/*.md'), *ROOT.glob('reports/*.md')]
LINK = re.compile(r'!?\[[^\]\n]*\]\(([^)\s]+)\)')
COMPLAINT = 'cells containing imports and other code'

ALL = """import sys
from pathlib import Path
from nbdev.cli import nbdev_filter
for notebook in sys.argv[2:]:
    page = nbdev_filter(Path(notebook).read_text(), printit=False)
    Path(sys.argv[1], Path(notebook).name).write_text(page)
"""


def leads_somewhere(page, link):
    "Whether a link of a page is to the web, to itself, or to a file that is there"
    if link.startswith(('http', '#')): return True
    return (page.parent/link.split('#')[0]).exists()


def written(page):
    "What people wrote, as one text"
    sources = [''.join(c['source']) for c in page['cells'] if c['cell_type'] == 'markdown']
    return '\n'.join(sources)


def generated(page):
    "What nbdev wrote of signatures, as one text"
    found = []
    for cell in page['cells']:
        for output in cell.get('outputs', []):
            found.append(''.join(output.get('data', {}).get('text/markdown', '')))
    return '\n'.join(found)


def check_page(notebook, page):
    shown = generated(page)
    text = written(page)+shown
    exports = '| export' in notebook.read_text()
    assert not exports or '```python\ndef ' in shown, f'{notebook.name}: no signature is shown'
    for link in LINK.findall(text):
        assert leads_somewhere(notebook, link), f'{notebook.name} links to {link}'
    assert 'atft.github.io' not in text, notebook.name


def run(command, **options):
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stderr[-2000:]
    assert COMPLAINT not in result.stderr
    return result.stdout


def test_notebooks_pass_the_filter_with_signatures_and_links_that_lead_somewhere(tmp_path):
    "One process for all: anew for each notebook, as Quarto does, imports torch two dozen times"
    run([sys.executable, '-c', ALL, tmp_path, *NOTEBOOKS])
    for notebook in NOTEBOOKS:
        check_page(notebook, json.loads((tmp_path/notebook.name).read_text()))


def test_the_command_that_quarto_calls_passes_too():
    notebook = ROOT/'nbs/03e_checkpoint.ipynb'
    page = run([Path(sys.executable).parent/'nbdev_filter'], input=notebook.read_text())
    check_page(notebook, json.loads(page))


def pages_of(node):
    "The pages that a part of the site's description names"
    if isinstance(node, str): return [node]
    if isinstance(node, list): return [page for part in node for page in pages_of(part)]
    return pages_of(node.get('contents', []))+pages_of(node.get('href', []))


def test_quarto_lists_pages_that_exist():
    site = yaml.safe_load((ROOT/'_quarto.yml').read_text())
    assert site['ipynb-filters'] == ['nbdev_filter']
    assert site['execute'] == {'enabled': False}
    sidebar = pages_of(site['website']['sidebar'])
    named = [*site['project']['render'], *sidebar, *pages_of(site['website']['navbar']['left'])]
    for page in named:
        assert glob(str(ROOT/page)), f'_quarto.yml names {page}'
    assert {f'nbs/{n.name}' for n in NOTEBOOKS} <= set(sidebar)


@pytest.mark.parametrize('page', [page.relative_to(ROOT).as_posix() for page in PAGES])
def test_links_in_markdown_lead_somewhere(page):
    for link in LINK.findall((ROOT/page).read_text()):
        assert leads_somewhere(ROOT/page, link), f'{page} links to {link}'
