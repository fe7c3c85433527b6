"Package metadata, read from settings.ini so that it stands in one place; stubs for type checkers."
import ast
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ini = ConfigParser(delimiters=['='])
ini.read(Path(__file__).parent/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']


def patched_class(node):
    "The class that nbdev's `@patch` adds a function to; None for any other node"
    decorators = getattr(node, 'decorator_list', [])
    if not any(ast.unparse(one).startswith('patch') for one in decorators): return None
    return ast.unparse(node.args.args[0].annotation)


def as_method(node):
    "The same function as it would be written inside its class"
    node.args.args[0].annotation = None
    is_property = any('as_prop' in ast.unparse(one) for one in node.decorator_list)
    others = [one for one in node.decorator_list if not ast.unparse(one).startswith('patch')]
    node.decorator_list = [ast.Name('property'), *others] if is_property else others
    return node


def is_given(node, classes):
    "A line like `RunSpec.flat = _flat`"
    target = node.targets[0] if isinstance(node, ast.Assign) else None
    return isinstance(target, ast.Attribute) and ast.unparse(target.value) in classes


def stub_of(source):
    "A module whose patched methods stand in their classes, or None if it has none"
    tree = ast.parse(source)
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    patched = [node for node in tree.body if patched_class(node) in classes]
    given = [node for node in tree.body if is_given(node, classes)]
    for node in patched:
        classes[patched_class(node)].body.append(as_method(node))
    for node in given:
        target = node.targets[0]
        node.targets = [ast.Name(target.attr)]
        classes[ast.unparse(target.value)].body.append(node)
    moved = [*patched, *given]
    tree.body = [node for node in tree.body if node not in moved]
    return ast.unparse(ast.fix_missing_locations(tree))+'\n' if moved else None


class BuildWithStubs(build_py):
    """Writes x.pyi beside x.py where methods are added by `@patch`, which no type checker follows

    The stubs stand in what is built, never beside the sources."""
    def run(self):
        super().run()
        if self.editable_mode: return
        for module in sorted(Path(self.build_lib, 'atft').glob('*.py')):
            stub = stub_of(module.read_text(encoding='utf-8'))
            if stub: module.with_suffix('.pyi').write_text(stub, encoding='utf-8')


setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    long_description=(Path(__file__).parent/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    packages=['atft'], package_data={'atft': ['py.typed']}, python_requires=f">={cfg['min_python']}",
    install_requires=cfg['requirements'].split(),
    extras_require={
        'dev': cfg['dev_requirements'].split(), 'cluster': cfg['cluster_requirements'].split()},
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': ['atft=atft._modidx:d']},
    cmdclass=dict(build_py=BuildWithStubs),
)
