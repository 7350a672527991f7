import jax
import pytest

if not hasattr(jax, "enable_x64"):  # before JAX 0.8
    from jax.experimental import enable_x64

    jax.enable_x64 = enable_x64

# Eight virtual devices: the laws about sharding need more than one.
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def strict():
    """No silent rank or dtype promotion in the code under test."""
    with (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
    ):
        yield
