"""timm's own model tests, called for our models, where the environment variable TIMM_TESTS says where they are.

timm's wheel does not hold them: clone its repository at the installed version and set TIMM_TESTS to its `tests/`.
"""

import importlib.util
import os
import warnings
from pathlib import Path
from types import ModuleType

import pytest

from linvision.models.linformer_vit import LinformerVisionTransformer

MODELS = [
    'test_linformer_vit',
    'linformer_vit_pico_patch1_32',
    'linformer_vit_tiny_patch1_32',
    'linformer_vit_tiny_patch8_224',
    'linformer_vit_tiny_patch16_224',
]
TESTS = [
    'test_model_forward',
    'test_model_backward',
    'test_model_default_cfgs_non_std',
    'test_model_forward_torchscript',
    'test_model_forward_features',
    'test_model_forward_intermediates_features',
    'test_model_forward_intermediates',
    'test_model_forward_fx',
    'test_model_backward_fx',
    'test_model_forward_fx_torchscript',
]


@pytest.fixture(scope='module')
def timm_tests(request: pytest.FixtureRequest) -> ModuleType:
    folder = os.environ.get('TIMM_TESTS')
    if not folder:
        pytest.skip(reason="TIMM_TESTS is not set: clone timm's repository and give the path of its tests/")
    spec = importlib.util.spec_from_file_location('timm_test_models', Path(folder) / 'test_models.py')
    module = importlib.util.module_from_spec(spec)
    for mark in ('base', 'cfg', 'torchscript', 'features', 'fxforward', 'fxbackward', 'timeout'):  # timm's settings
        request.config.addinivalue_line('markers', f'{mark}: of timm')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings('ignore')  # timm's tests have their own opinion on warnings
@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('test', TESTS)
def test_model_passes_what_timm_asks_of_its_own(timm_tests, test, name, monkeypatch):
    """The assertions are timm's; here it is asserted that they were about a model of ours."""
    made, create = [], timm_tests.create_model
    monkeypatch.setattr(
        timm_tests, 'create_model', lambda *args, **named: made.append(create(*args, **named)) or made[-1]
    )
    function = getattr(timm_tests, test)
    sizes = [mark.args[1] for mark in function.pytestmark if mark.name == 'parametrize' and 'batch_size' in mark.args]
    function(name, sizes[0][0])
    assert made  # else the test returned before it looked at anything
    assert all(any(isinstance(m, LinformerVisionTransformer) for m in model.modules()) for model in made)
