import jax
import pytest

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
