"What stands in two places says the same: versions, hooks, the citation, the changelog"
import ast
import json
import re
from configparser import ConfigParser

import pytest
import yaml
from conftest import ROOT


@pytest.fixture(scope='module')
def settings():
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    return ini['DEFAULT']


@pytest.fixture(scope='module')
def pinned():
    "Package -> version, of constraints.txt"
    lines = (ROOT/'constraints.txt').read_text().splitlines()
    return dict(line.split('==') for line in lines if not line.startswith('#'))


@pytest.fixture(scope='module')
def hooks():
    "Name of a repository -> what .pre-commit-config.yaml says of it"
    config = yaml.safe_load((ROOT/'.pre-commit-config.yaml').read_text())
    return {one['repo'].rsplit('/', 1)[1]: one for one in config['repos']}


def test_hooks_have_the_versions_that_are_installed(hooks, pinned):
    assert hooks['ruff-pre-commit']['rev'] == f'v{pinned["ruff"]}'
    assert hooks['nbdev']['rev'] == pinned['nbdev']
    ids = [hook['id'] for hook in hooks['nbdev']['hooks']]
    assert ids == ['nbdev_clean', 'nbdev_export']
    for hook in hooks['nbdev']['hooks']:
        for needed in hook['additional_dependencies']:
            name, version = needed.split('==')
            assert pinned[name] == version


def test_what_is_asked_for_is_pinned(settings, pinned):
    asked = (settings['requirements']+' '+settings['dev_requirements']).split()
    names = [re.match(r'[\w-]+', word)[0] for word in asked]
    known = {name.lower().replace('_', '-') for name in pinned}
    assert not [name for name in names if name.lower() not in known]


def test_notebooks_keep_their_tags(settings):
    "nbdev_clean, in hooks too, would strip the tag `parameters`"
    assert settings['allowed_cell_metadata_keys'] == 'tags'


def test_a_conflict_in_a_notebook_goes_to_nbdev():
    assert '*.ipynb merge=nbdev-merge' in (ROOT/'.gitattributes').read_text().splitlines()
    assert 'driver = nbdev_merge' in (ROOT/'.gitconfig').read_text()


def test_the_citation_is_of_this_version(settings):
    citation = yaml.safe_load((ROOT/'CITATION.cff').read_text())
    assert citation['cff-version'] == '1.2.0'
    assert citation['version'] == settings['version']
    assert citation['url'] == citation['repository-code'] == settings['git_url']
    assert citation['abstract'] == settings['description']+'.'
    assert [one['name'] for one in citation['authors']] == [settings['author']]


def test_papers_that_a_notebook_names_are_cited():
    citation = yaml.safe_load((ROOT/'CITATION.cff').read_text())
    cells = json.loads((ROOT/'nbs/02g_published.ipynb').read_text())['cells']
    text = ''.join(''.join(cell['source']) for cell in cells)
    named = re.findall(r'^\*([^*]+)\*, (\w+ \d{4})', text, re.M)
    cited = {one['conference']['name']: one['title'] for one in citation['references']}
    assert len(named) == 3 == len(cited)
    for title, conference in named:
        assert cited[conference].startswith(title)


def test_the_changelog_begins_with_this_version(settings):
    heads = re.findall(r'^## (\S+)', (ROOT/'CHANGELOG.md').read_text(), re.M)
    numbers = [tuple(map(int, head.split('.'))) for head in heads]
    assert heads[0] == settings['version']
    assert len(heads) > 1 and numbers == sorted(set(numbers), reverse=True)


def test_the_package_says_this_version(settings):
    text = (ROOT/'atft/__init__.py').read_text()
    assert ast.literal_eval(text.split('=')[1].strip()) == settings['version']
