"""Run notebooks and store what they show: no progress, no clock, no temporary paths.

`make outputs` runs all of them. Run twice, it changes nothing.
"""
import re
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbdev.clean import clean_nb
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
TEMPORARY = re.escape(tempfile.gettempdir())
PATHS = (
    (rf'{TEMPORARY}/ipykernel_\d+/\d+\.py:\d+', 'cell'),
    (rf'{TEMPORARY}/(atft-)?[a-z]*[a-z0-9_]{{8}}', 'TMP'),
    (re.escape(str(ROOT)), '.'))
PROGRESS = re.compile(r'\r|\d%\|')
SKIPPED = '#| eval: false'

def tidy(text:str)->str:
    "A stream without progress and without paths of this machine"
    lines = re.findall(r'[^\n]*\n|[^\n]+', text)
    text = ''.join(line for line in lines if not PROGRESS.search(line))
    for pattern, name in PATHS: text = re.sub(pattern, name, text)
    return text

def joined(outputs:list)->list:
    "Streams of one name that follow each other become one; empty ones go"
    kept = []
    for output in outputs:
        is_stream = output['output_type'] == 'stream'
        before = kept[-1] if kept else None
        if is_stream and before and before.get('name') == output['name']:
            before['text'] += output['text']
        else: kept.append(output)
    for output in kept:
        if output['output_type'] == 'stream': output['text'] = tidy(output['text'])
        elif 'text/plain' in output.get('data', {}):
            output['data']['text/plain'] = tidy(output['data']['text/plain'])
    return [o for o in kept if o['output_type'] != 'stream' or o['text'].strip()]

def run(path:Path)->nbformat.NotebookNode:
    "The notebook as it is after all its cells were run, but for those that are never run"
    notebook = nbformat.read(path, 4)
    asleep = [cell for cell in notebook.cells if SKIPPED in cell.source]
    sources = [cell.source for cell in asleep]
    for cell in asleep: cell.source = ''
    folder = dict(metadata=dict(path=str(path.parent)))
    NotebookClient(notebook, timeout=1200, kernel_name='python3', resources=folder).execute()
    for cell, source in zip(asleep, sources): cell.source = source
    for cell in notebook.cells:
        if cell.cell_type == 'code': cell.outputs = joined(cell.outputs)
    clean_nb(notebook, allowed_cell_metadata_keys=['tags'])
    return notebook

def shown(notebook)->dict: # id of a cell -> its outputs
    return {c.id: c.outputs for c in notebook.cells if c.cell_type == 'code'}

def differences(path:Path)->list[str]:
    "The cells whose stored outputs are not those of today's code"
    stored = shown(nbformat.read(path, 4))
    now = shown(run(path))
    return [f'{path.name}, cell {name}' for name in now if now[name] != stored.get(name)]

def store(path:Path):
    notebook = run(path)
    nbformat.write(notebook, path)

def main():
    paths = [Path(name).resolve() for name in sys.argv[1:]]
    with ThreadPoolExecutor(2) as pool:
        list(tqdm(pool.map(store, paths), total=len(paths), desc='notebooks'))

if __name__ == '__main__': main()
