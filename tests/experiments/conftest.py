import inspect

import pytest

from experiments import clips


@pytest.fixture(params=clips.FACTORIES)
def clip(request):
    """Every clip; 0.5 or 1.5 is the threshold of those that need one."""
    name = request.param
    first = next(iter(inspect.signature(clips.FACTORIES[name]).parameters.values()))
    if first.default is not inspect.Parameter.empty:
        return clips.parse(name)
    return clips.parse(f"{name}:{1.5 if name == 'ema_clip' else 0.5}")
