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

from atft.project import reference_page

NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
PAGES = [*ROOT.glob('*.md'), *ROOT.glob('nbs/*.md'), *ROOT.glob('reports/**/*.md')]
LINK = re.compile(r'!?\[[^\]\n]*\]\(([^)\s]+)\)')
COMPLAINT = 'cells containing imports and other code'

ALL = """import sys
from pathlib import Path
from nbdev.cli import nbdev_filter
for notebook in sys.argv[2:]:
    page = nbdev_filter(Path(notebook).read_text(), printit=False)
    Path(sys.argv[1], Path(notebook).name).write_text(page)
"""


def anchor_of(heading):
    "The anchor that a heading gets, on the site as on GitHub"
    plain = re.sub(r'[^\w\s.-]', '', heading.strip().lower())
    return re.sub(r'\s+', '-', plain)


def anchors_of(page):
    "All anchors of a page in markdown"
    headings = re.findall(r'^#+ (.+)$', page.read_text(), re.M)
    return {anchor_of(heading) for heading in headings}


def leads_somewhere(page, link):
    "Whether a link is to the web, or to a file that is there, in markdown also to its heading"
    if link.startswith('http'): return True
    name, _, anchor = link.partition('#')
    there = page.parent/name if name else page
    if not there.exists(): return False
    return not anchor or there.suffix != '.md' or anchor in anchors_of(there)


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


def referred_to(notebook):
    "The names that the page of all names looks for in a notebook"
    return set(re.findall(rf'\({notebook.name}#([\w.]+)\)', reference_page()))


def check_page(notebook, page):
    shown = generated(page)
    text = written(page)+shown
    exports = '| export' in notebook.read_text()
    assert not exports or '```python\ndef ' in shown, f'{notebook.name}: no signature is shown'
    for link in LINK.findall(text):
        assert leads_somewhere(notebook, link), f'{notebook.name} links to {link}'
    shown_names = {name.lower() for name in re.findall(r'^### ([\w.]+)$', shown, re.M)}
    assert referred_to(notebook) <= shown_names, f'{notebook.name}: names without a place'
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


def site_of(): return yaml.safe_load((ROOT/'_quarto.yml').read_text())


def test_quarto_lists_pages_that_exist():
    site = site_of()
    assert site['ipynb-filters'] == ['nbdev_filter']
    assert site['execute'] == {'enabled': False}
    website = site['website']
    footer = website['page-footer']
    bars = website['sidebar'], website['navbar']['left'], footer['left'], footer['right']
    named = [page for bar in bars for page in pages_of(bar)]
    themes = site['format']['html']['theme'].values()
    files = [name for theme in themes for name in theme if '/' in name]
    files += [site['format']['html']['css'], website['favicon']]
    for page in [*site['project']['render'], *named, *files]:
        assert page.startswith('http') or glob(str(ROOT/page)), f'_quarto.yml names {page}'


def rendered():
    "The pages that the site has, by the patterns of its description"
    found = set()
    for pattern in site_of()['project']['render']:
        found |= {path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern)}
    return found


def test_every_page_is_in_the_sidebar_once():
    sidebar = pages_of(site_of()['website']['sidebar'])
    twice = {page for page in sidebar if sidebar.count(page) > 1}
    assert not twice, f'twice in the sidebar: {twice}'
    assert set(sidebar) <= rendered()
    missing = {page for page in rendered()-set(sidebar) if not page.startswith('reports/')}
    assert not missing, f'_quarto.yml: not in the sidebar: {missing}'


def kept_reports(folder):
    "The reports of a folder that git keeps; what `make run` has just written is not one of them"
    found = subprocess.run(['git', 'ls-files', f'{folder}/*.md'], cwd=ROOT, capture_output=True,
                           text=True)
    if found.returncode: pytest.skip('git knows nothing of this folder')
    names = [Path(line).name for line in found.stdout.split() if Path(line).parent == Path(folder)]
    return [name for name in names if name != 'index.md']


def kind_of(report): return re.sub(r'_\d{8}\.md$', '', report)


def test_the_newest_report_of_each_kind_is_in_the_sidebar_and_older_ones_in_the_archive():
    newest = kept_reports('reports')
    kinds = [kind_of(report) for report in newest]
    assert len(kinds) > 5
    twice = {kind for kind in kinds if kinds.count(kind) > 1}
    assert not twice, f'move the older one to reports/archive: {twice}'
    sidebar = pages_of(site_of()['website']['sidebar'])
    index = (ROOT/'reports/index.md').read_text()
    for report in newest:
        assert f'reports/{report}' in sidebar, f'_quarto.yml: {report} is not in the sidebar'
        assert f']({report})' in index, f'reports/index.md does not lead to {report}'
    for report in kept_reports('reports/archive'):
        assert kind_of(report) in kinds, f'{report} is the newest of its kind: not superseded'
    archive = yaml.safe_load((ROOT/'reports/archive/_metadata.yml').read_text())
    assert archive == {'search': False}


def test_titles_in_the_sidebar_are_told_apart():
    def titles(node):
        if isinstance(node, str): return []
        if isinstance(node, list): return [title for part in node for title in titles(part)]
        return [node.get('text') or node['section'], *titles(node.get('contents', []))]

    found = titles(site_of()['website']['sidebar']['contents'])
    assert len(found) > 90 and len(set(found)) == len(found)
    assert max(map(len, found)) <= 45


def test_the_groups_of_the_sidebar_are_open_and_the_rooms_of_a_pillar_folded():
    sidebar = site_of()['website']['sidebar']
    groups = [part['section'] for part in sidebar['contents']]
    assert groups == ['Start', 'How to', 'The five pillars', 'Reference', 'Reports']
    assert sidebar['collapse-level'] == 2
    pillars = sidebar['contents'][2]['contents']
    assert [p['section'] for p in pillars] == ['Data', 'Graph', 'Network', 'Training', 'Judging']
    assert all(pillar['href'] and pillar['contents'] for pillar in pillars)


def test_the_source_of_the_site_is_that_of_the_package():
    settings = (ROOT/'settings.ini').read_text()
    assert f"git_url = {site_of()['website']['repo-url']}\n" in settings


def test_the_page_of_all_names_is_what_the_package_gives():
    page = (ROOT/'nbs/reference.md').read_text()
    assert page == reference_page(), 'nbs/reference.md is not of this package: run make export'


def table_rows(page):
    lines = (ROOT/page).read_text().split('| package | for |')[1].splitlines()[1:]
    return [line for line in lines if line.startswith('|')]


def test_the_site_names_the_dependencies_that_the_readme_names():
    rows = table_rows('README.md')
    assert len(rows) > 20 and rows == table_rows('nbs/dependencies.md')


FIRST_PAGES = ['README.md', 'nbs/training.md', 'nbs/index.ipynb', 'nbs/00_data.ipynb',
               'nbs/01_graph.ipynb', 'nbs/02_fan_san.ipynb', 'nbs/02b_network.ipynb',
               'nbs/03_phases.ipynb', 'nbs/04_eval.ipynb', 'nbs/05_hpo.ipynb']


def text_of(page):
    "What people wrote on a page"
    if page.suffix == '.md': return page.read_text()
    return written(json.loads(page.read_text()))


@pytest.mark.parametrize('page', FIRST_PAGES)
def test_first_uses_of_a_word_lead_to_the_glossary(page):
    linked = re.findall(r'\((?:nbs/)?glossary\.md#([\w-]+)\)', text_of(ROOT/page))
    assert linked, f'{page} leads to no word of the glossary'
    assert len(set(linked)) == len(linked), f'{page} explains a word twice'
    assert set(linked) <= anchors_of(ROOT/'nbs/glossary.md')


def test_every_cell_of_the_comparison_has_its_source_or_says_that_there_is_none():
    text = (ROOT/'nbs/compare.md').read_text()
    sources = dict(re.findall(r'^\[([\w-]+)\]: (https://\S+)$', text, re.M))
    cited = re.findall(r'\]\[([\w-]+)\]', text)
    assert set(cited) == set(sources), set(cited) ^ set(sources)
    rows = [line for line in text.split('## Row by row')[1].splitlines() if line.startswith('| ')]
    assert len(rows) > 10
    for row in rows[1:]:
        cells = [cell.strip() for cell in row.strip('|').split('|')]
        assert len(cells) == 7, row
        for cell in cells[1:]:
            assert '](' in cell or '][' in cell or cell == 'not found in its documentation', row


def test_every_word_of_the_glossary_is_short_and_leads_to_its_room():
    words = (ROOT/'nbs/glossary.md').read_text().split('\n## ')[1:]
    titles = [word.splitlines()[0] for word in words]
    assert titles == sorted(titles, key=str.lower) and len(titles) > 30
    for word in words:
        assert re.search(r'\]\(\w+\.ipynb\)', word), f'{word[:20]} leads to no room'
        assert len(word.split()) < 70, f'{word[:20]} is long'


@pytest.mark.parametrize('page', [page.relative_to(ROOT).as_posix() for page in PAGES])
def test_links_in_markdown_lead_somewhere(page):
    for link in LINK.findall((ROOT/page).read_text()):
        assert leads_somewhere(ROOT/page, link), f'{page} links to {link}'
