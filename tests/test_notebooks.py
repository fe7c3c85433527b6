"What can be read of the notebooks without running them: parameters, exports, the road"
import ast
import json
import logging
import re
import shutil

import pytest
from conftest import ROOT

from atft import hpo, phases
from atft.core import AtftError
from atft.project import ROAD, assert_exported, road_svg
from atft.specs import flat_names, parameters_cell

NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))


def code_cells(notebook):
    return [c for c in json.loads(notebook.read_text())['cells'] if c['cell_type'] == 'code']


def is_parameters(cell): return 'parameters' in cell['metadata'].get('tags', [])


def asks_for_parameters(notebook):
    return any('check_parameters(before' in ''.join(c['source']) for c in code_cells(notebook))


WITH_PARAMETERS = [n.stem for n in NOTEBOOKS if asks_for_parameters(n)]


def parameters_of(name):
    cells = [c for c in code_cells(ROOT/f'nbs/{name}.ipynb') if is_parameters(c)]
    assert len(cells) == 1, f'{name}: {len(cells)} cells are tagged parameters'
    return ''.join(cells[0]['source'])


def test_the_tag_stands_where_parameters_are_checked():
    tagged = [n.stem for n in NOTEBOOKS if any(map(is_parameters, code_cells(n)))]
    assert tagged == WITH_PARAMETERS and '04_eval' in tagged


@pytest.mark.parametrize('name', WITH_PARAMETERS)
def test_a_parameter_is_none_and_says_what_it_means(name):
    source = parameters_of(name)
    lines = [line for line in source.splitlines() if line and not line.startswith('#')]
    for line, statement in zip(lines, ast.parse(source).body, strict=True):
        assert re.fullmatch(r'\w+ += None +# \S.*', line), line
        assert isinstance(statement, ast.Assign) and len(line) <= 100, line


@pytest.mark.parametrize('name', WITH_PARAMETERS)
def test_papermill_parses_every_parameter(name, caplog):
    from papermill.translators import PythonTranslator
    source = parameters_of(name)
    with caplog.at_level(logging.WARNING):
        found = PythonTranslator.inspect(dict(source=source))
    assigned = [statement.targets[0].id for statement in ast.parse(source).body]
    assert [p.name for p in found] == assigned
    assert not caplog.records, caplog.text
    assert all(p.help for p in found)


def test_the_cell_of_the_phases_is_made_of_the_records():
    assert parameters_of('03_phases') == parameters_cell(**phases.PARAMETERS)


def test_the_cell_of_the_search_is_made_of_the_records():
    of_a_run = [name for name in flat_names() if name not in hpo.DECIDED]
    cell = parameters_cell(*hpo.PARAMETERS, *of_a_run, **hpo.PARAMETERS)
    assert parameters_of('05_hpo') == cell


def test_notebooks_are_exported():
    assert_exported(ROOT)


@pytest.fixture
def project(tmp_path):
    "A copy of the notebooks and of what they export"
    for folder, kind in (('nbs', '*.ipynb'), ('atft', '*.py')):
        (tmp_path/folder).mkdir()
        for path in (ROOT/folder).glob(kind): shutil.copy(path, tmp_path/folder)
    return tmp_path


def edit(project, change, name='00c_bars'):
    path = project/f'nbs/{name}.ipynb'
    notebook = json.loads(path.read_text())
    exported = [c for c in notebook['cells'] if ''.join(c['source']).startswith('#| export')]
    change(notebook['cells'], exported[-1])
    path.write_text(json.dumps(notebook))
    return exported[-1].get('id')


def changed(cells, last): last['source'] = ''.join(last['source'])+'\n# another formula'


def removed(cells, last): cells.remove(last)


def added(cells, last):
    new = last | dict(id='new', source='#| export\nx = 1')
    cells.insert(cells.index(last), new)


@pytest.mark.parametrize('change', [changed, removed, added])
def test_a_notebook_that_differs_from_the_package_is_named_with_its_cell(project, change):
    assert_exported(project)
    cell = edit(project, change)
    cell = 'new' if change is added else cell
    says = f'nbs/00c_bars.ipynb differs from the exported package (cell {cell}): run nbdev_export'
    with pytest.raises(AtftError, match=re.escape(says)): assert_exported(project)


def test_a_demonstration_may_be_edited_without_an_export(project):
    path = project/'nbs/00c_bars.ipynb'
    notebook = json.loads(path.read_text())
    for cell in notebook['cells']:
        source = ''.join(cell['source'])
        if not source.startswith('#|'): cell['source'] = source+'\n# a note'
    path.write_text(json.dumps(notebook))
    assert_exported(project)


def test_a_module_that_is_not_there_differs(project):
    (project/'atft/bars.py').unlink()
    with pytest.raises(AtftError, match='nbs/00c_bars.ipynb differs'): assert_exported(project)


def test_beside_an_installed_package_nothing_is_compared(project):
    edit(project, added)
    shutil.rmtree(project/'atft')
    assert_exported(project)


def test_the_road_has_a_box_for_each_notebook():
    assert sorted(ROAD) == [n.stem for n in NOTEBOOKS if n.stem != 'index']


def test_the_drawing_of_the_road_is_of_the_same_table():
    assert (ROOT/'nbs/images/road.svg').read_text() == road_svg()
