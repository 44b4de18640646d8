"""What the repository says of itself in several files agrees."""

import re
import runpy
import tomllib
from pathlib import Path

import pytest
import timm
import torch
import yaml

from linvision.version import __version__

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']


def test_ci_runs_the_scripts_on_the_lowest_torch_that_is_promised():
    (job,) = yaml.safe_load((ROOT / '.github/workflows/test.yml').read_text())['jobs'].values()
    commands = [step['run'] for step in job['steps'] if 'run' in step]
    assert 'bash scripts/test.sh' in commands and any(
        c.startswith('bash scripts/demo.sh --max-minutes 1') for c in commands
    )
    lowest = dict(re.match(r'([\w-]+)>=([\d.]+)', requirement).groups() for requirement in PROJECT['dependencies'])
    (pins,) = [row['pins'] for row in job['strategy']['matrix']['include']]
    for pin in pins.split():
        name, version = pin.split('==')
        assert version.removesuffix('.*') == lowest[name]
    assert PROJECT['requires-python'] == '>=' + job['strategy']['matrix']['python'][0]


def test_pre_commit_has_the_ruff_of_the_project():
    (repo,) = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text())['repos']
    (ruff,) = [r for r in PROJECT['optional-dependencies']['dev'] if r.startswith('ruff')]
    assert ruff.startswith('ruff>=' + repo['rev'].removeprefix('v').rpartition('.')[0])


def test_the_citation_has_the_version():
    assert yaml.safe_load((ROOT / 'CITATION.cff').read_text())['version'] == __version__


@pytest.mark.parametrize('name', ['bug', 'wish', 'result', 'config'])
def test_issue_forms_are_yaml(name):
    form = yaml.safe_load((ROOT / f'.github/ISSUE_TEMPLATE/{name}.yml').read_text())
    assert name == 'config' or all(part['attributes'] for part in form['body'])


def test_torch_hub_has_every_model():
    model = torch.hub.load(str(ROOT), 'linformer_vit_pico_patch1_32', source='local', pretrained=True)
    assert model.num_classes == 10
    found = runpy.run_path(str(ROOT / 'hubconf.py'))
    assert set(timm.list_models('*linformer_vit*')) <= set(found)


def test_every_bound_has_its_reason():
    text = (ROOT / 'pyproject.toml').read_text()
    block = text[text.index('dependencies = [') : text.index('[tool.')]
    for line in block.splitlines():
        if '<' in line or '==' in line:
            assert '#' in line, line
